"""The rkllm.h of a release in C++, made from the runtime's declarations: the emulator and its clients include it.

tests/runtime/abi compares it with what was measured on the vendor's headers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from rkruntime.abi import LAYOUTS, RELEASES
from rkruntime.abi.declarations import ENUMS, FORMER_NAMES, STRUCTS, UNIONS, UNNAMED, Function, Param
from rkruntime.abi.types import callbacks_of, enum_values, fields_of, functions_of
from rkruntime.versions import version

HEADER: Final = "abi.h"
_CALLBACK_OF_INIT: Final = 2


def header(release: str) -> str:
    """Return the text of `abi.h`. RKEMU_LAYOUT is the number of its layout, RKEMU_1_2_0 that of the layout of 1.2.0."""
    layouts = [f"#define RKEMU_{_macro(versions[0])} {_number(layout)}" for layout, versions in LAYOUTS.items()]
    major, minor, patch = version(release).release
    lines = [
        f"// The C interface of librkllmrt.so {release}, made from rkruntime.abi.",
        "#pragma once",
        "#include <stddef.h>",
        "#include <stdint.h>",
        f'#define RKEMU_RELEASE "{release}"',
        f"#define RKEMU_RELEASE_NUMBER {major * 10000 + minor * 100 + patch}",
        f"#define RKEMU_LAYOUT {_number(RELEASES[release].layout)}",
        *layouts,
        '#define RKLLM_API __attribute__((visibility("default")))',
        "// The emulator takes a byte: a caller may pass any, and in a bool that would be undefined behaviour.",
        "#ifndef RKLLM_BOOL",
        "#define RKLLM_BOOL bool",
        "#endif",
        'extern "C" {',
        *declarations(release),
        f"typedef {functions_of(release)['rkllm_init'].params[_CALLBACK_OF_INIT].type} RKLLMInitCallback;",
        "}",
    ]
    return "\n".join(lines) + "\n"


def declarations(release: str) -> Iterator[str]:
    """Yield the enums, callbacks, structures and functions of a release, by the names in its own header.

    They use the macros RKLLM_BOOL and RKLLM_API. Enums have a fixed type, so that any value of a caller is defined.
    """
    yield "typedef void *LLMHandle;"
    for name in ENUMS:
        if values := enum_values(name, release):
            yield f"enum {name} : uint32_t {{ {', '.join(f'{key} = {value}' for key, value in values.items())} }};"
    structs = [name for name in STRUCTS if fields_of(name, release) and name not in UNNAMED]
    yield from (f"struct {_named(name, release)};" for name in structs)
    for name, callback in callbacks_of(release).items():
        yield f"typedef {callback.returns} (*{name})({_parameters(callback.params, release)});"
    for name in structs:
        yield f"struct {_named(name, release)} {{ {_members(name, release)} }};"
    for function in functions_of(release).values():
        yield _prototype(function, release)


def _members(name: str, release: str) -> str:
    members = []
    for field in fields_of(name, release):
        if field.type in UNNAMED:
            kind = "union" if field.type in UNIONS else "struct"
            members.append(f"{kind} {{ {_members(field.type, release)} }} {field.name};")
        else:
            kind, bracket, count = _type(field.type, release).partition("[")
            members.append(f"{kind} {field.name}{bracket}{count};")
    return " ".join(members)


def _prototype(function: Function, release: str) -> str:
    return f"RKLLM_API {function.returns} {function.name}({_parameters(function.params, release)});"


def _parameters(params: Iterable[Param], release: str) -> str:
    return ", ".join(f"{_type(param.type, release)} {param.name}" for param in params)


def _type(declared: str, release: str) -> str:
    if declared == "bool":
        return "RKLLM_BOOL"
    name = declared.removesuffix(" *")
    return declared.replace(name, _named(name, release))


def _named(name: str, release: str) -> str:
    former, last = FORMER_NAMES.get(name, ("", ""))
    return former if former and version(release) <= version(last) else name


def _macro(release: str) -> str:
    return release.replace(".", "_").upper()


def _number(layout: str) -> str:
    return layout.removeprefix("L")
