"""The declarations against what was measured on the vendor's headers: as ctypes, and as C++ for three compilers."""

from __future__ import annotations

import ctypes
import json
import shutil
import subprocess
from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from rkboard.emulator.abi_header import declarations, header
from rkruntime.abi import CALLABLE, LAYOUTS, RELEASES, abi_of, release_named, since
from rkruntime.abi.declarations import CALLBACKS, ENUMS, FORMER_NAMES, FUNCTIONS, STRUCTS, UNIONS, UNNAMED
from rkruntime.abi.types import callbacks_of, enum_values, fields_of, functions_of
from rkruntime.errors import LibraryError
from rkruntime.versions import version as order

FACTS = {path.stem: json.loads(path.read_text()) for path in Path("tests/data/rkllm-abi").glob("*.json")}
BY_VERSION = {version: facts for facts in FACTS.values() for version in facts["versions"]}


def header_name(name: str, version: str) -> str:
    """A type's name in the header of a release."""
    former, last = FORMER_NAMES.get(name, ("", ""))
    return former if former and order(version) <= order(last) else name


def as_in_header(declared: str, version: str) -> str:
    for name in FORMER_NAMES:
        declared = declared.replace(name, header_name(name, version))
    return declared


def measured_members(fields: list[dict[str, Any]], prefix: str = "") -> Iterator[tuple[str, str, int, int]]:
    """Name, type, offset and size of each member; members of unnamed types count as the struct's own."""
    for field in fields:
        if "members" in field:
            yield from measured_members(field["members"], f"{prefix}{field['name']}." if field["name"] else prefix)
        else:
            yield prefix + field["name"], field["type"], field["offset"], field["size"]


def our_members(name: str, version: str, prefix: str = "", base: int = 0) -> Iterator[tuple[str, str, int, int]]:
    abi = abi_of(version)
    made = abi._aggregate(name)
    for field in fields_of(name, version):
        member = getattr(made, field.name or "_unnamed")
        if field.type in UNNAMED:
            inner = f"{prefix}{field.name}." if field.name else prefix
            yield from our_members(field.type, version, inner, base + member.offset)
        else:
            yield prefix + field.name, as_in_header(field.type, version), base + member.offset, member.size


def signature(function: Mapping[str, Any]) -> tuple[str, list[tuple[str, str]]]:
    return function["returns"], [(param["type"], param["name"]) for param in function["params"]]


def our_signature(function: Any, version: str) -> tuple[str, list[tuple[str, str]]]:
    return function.returns, [(as_in_header(param.type, version), param.name) for param in function.params]


def test_every_release_with_facts_is_declared_and_the_other_way_round() -> None:
    computed = {version for version, release in RELEASES.items() if release.evidence == "computed"}
    assert set(BY_VERSION) == set(RELEASES) - computed
    assert computed == {"1.3.1"}
    for version, facts in BY_VERSION.items():
        assert RELEASES[version].layout == facts["layout_id"]


@pytest.mark.parametrize("version", sorted(BY_VERSION, key=order))
def test_structs(version: str) -> None:
    facts = BY_VERSION[version]
    ours = {header_name(name, version): name for name in STRUCTS if fields_of(name, version) and name not in UNNAMED}
    assert set(ours) == set(facts["structs"])
    for name, measured in facts["structs"].items():
        made = abi_of(version).structs[ours[name]]
        assert (ctypes.sizeof(made), ctypes.alignment(made)) == (measured["size"], measured["align"]), name
        assert list(our_members(ours[name], version)) == list(measured_members(measured["fields"])), name


@pytest.mark.parametrize("version", sorted(BY_VERSION, key=order))
def test_enums_callbacks_and_functions(version: str) -> None:
    facts = BY_VERSION[version]
    ours = {name: values for name in ENUMS if (values := enum_values(name, version))}
    assert ours == {name: measured["values"] for name, measured in facts["enums"].items()}
    assert {measured["size"] for measured in facts["enums"].values()} == {ctypes.sizeof(ctypes.c_uint32)}
    for declared, measured in ((callbacks_of, "callbacks"), (functions_of, "functions")):
        assert {name: our_signature(item, version) for name, item in declared(version).items()} == {
            name: signature(item) for name, item in facts[measured].items()
        }


@pytest.mark.parametrize("version", sorted(BY_VERSION, key=order))
def test_prototypes_in_ctypes(version: str) -> None:
    """Each ctypes argument has the size and kind that C gives it."""
    abi = abi_of(version)
    for name, function in functions_of(version).items():
        prototype = abi.functions[name]
        assert len(prototype.argtypes) == len(function.params)
        for given, param in zip([prototype.restype, *prototype.argtypes], [None, *function.params], strict=True):
            declared = function.returns if param is None else param.type
            pointer = declared.endswith("*") or declared == "LLMHandle" or declared in callbacks_of(version)
            expected = 8 if pointer else abi.structs and ctypes.sizeof(abi._resolve(declared))
            assert ctypes.sizeof(given) == expected, (name, declared)
    for name, callback in callbacks_of(version).items():
        assert abi.callbacks[name]._restype_ is (None if callback.returns == "void" else ctypes.c_int)


def test_layouts_are_what_differs() -> None:
    """Releases of one layout are equal in everything but names; two layouts are not."""

    def shape(version: str) -> Any:
        functions = {name: our_signature(item, "1.3.0") for name, item in functions_of(version).items()}
        callbacks = {name: our_signature(item, "1.3.0") for name, item in callbacks_of(version).items()}
        structs = {name: fields_of(name, version) for name in (*STRUCTS, *UNIONS)}
        return functions, callbacks, structs, {name: enum_values(name, version) for name in ENUMS}

    for versions in LAYOUTS.values():
        assert all(shape(version) == shape(versions[0]) for version in versions)
    firsts = [versions[0] for versions in LAYOUTS.values()]
    assert all(shape(a) != shape(b) for a in firsts for b in firsts if a != b)


def test_the_computed_layout() -> None:
    """1.3.1: one more member of 48 bytes in the multimodal input, nothing else."""
    sizes = {version: {name: ctypes.sizeof(s) for name, s in abi_of(version).structs.items()} for version in CALLABLE}
    grown = {name: sizes["1.3.1"][name] - size for name, size in sizes["1.3.0"].items()}
    assert {name: by for name, by in grown.items() if by} == {"RKLLMMultiModalInput": 48, "RKLLMInput": 48}
    assert sizes["1.3.1"].keys() == sizes["1.3.0"].keys()
    assert sizes["1.3.1"]["RKLLMInput"] == 208
    assert RELEASES["1.3.1"].evidence == "computed"


def test_since_names_the_first_release() -> None:
    assert since("rkllm_get_kv_cache_size") == "1.2.1"
    assert since("RKLLMInferParam.max_new_tokens") == "1.3.0"
    assert since("rkllm_clear_kv_cache") == "1.2.0"


def test_releases_that_are_not_called() -> None:
    for version in ("1.0.0", "1.0.1", "1.0.2b"):
        with pytest.raises(LibraryError, match="by value"):
            release_named(version)
    with pytest.raises(LibraryError, match=r"no layout for librkllmrt.so 1\.9\.0"):
        release_named("1.9.0")
    assert set(CALLABLE) == set(RELEASES) - {"1.0.0", "1.0.1", "1.0.2b"}


def test_versions_are_in_order() -> None:
    keys = [order(version) for version in RELEASES]
    assert keys == sorted(keys)
    assert order("1.2.0") < order("1.2.1b1") < order("1.2.1") < order("1.10.0")


# --- as C++ ------------------------------------------------------------------------------------------------------


def assertions(facts: Mapping[str, Any]) -> Iterator[str]:
    """What was measured, as static assertions."""
    for name, struct in facts["structs"].items():
        yield f"sizeof({name}) == {struct['size']}"
        yield f"alignof({name}) == {struct['align']}"
        for member, declared, offset, size in measured_members(struct["fields"]):
            yield f"offsetof({name}, {member}) == {offset}"
            yield f"sizeof((({name} *)nullptr)->{member}) == {size}"
            array = declared.split("[")
            kind = f"{array[0]}[{array[1]}" if len(array) > 1 else declared
            yield (
                f"std::is_same<decltype((({name} *)nullptr)->{member}), {kind}>::value" if "." not in member else "true"
            )
    for enum in facts["enums"].values():
        for value, number in enum["values"].items():
            yield f"{value} == {number}"
    for name, item in facts["callbacks"].items():
        types = ", ".join(param["type"] for param in item["params"])
        yield f"std::is_same<{name}, {item['returns']} (*)({types})>::value"
    for name, item in facts["functions"].items():
        types = ", ".join(param["type"] for param in item["params"])
        yield f"std::is_same<decltype(&{name}), {item['returns']} (*)({types})>::value"


def program(facts: Mapping[str, Mapping[str, Any]]) -> str:
    includes = ["#include <cstddef>", "#include <cstdint>", "#include <type_traits>"]
    parts = [*includes, "#define RKLLM_BOOL bool", "#define RKLLM_API"]
    for number, (version, measured) in enumerate(facts.items()):
        checks = "\n".join(f'static_assert({check}, "{version}");' for check in assertions(measured))
        ours = "\n".join(declarations(version))
        parts.append(f"namespace release{number} {{\n{ours}\n{checks}\n}}")
    return "\n".join(parts)


def compiles(compiler: str, source: str, folder: Path) -> subprocess.CompletedProcess[str]:
    file = folder / "abi.cc"
    file.write_text(source)
    command = [compiler, "-std=c++17", "-fsyntax-only", "-Wno-invalid-offsetof", str(file)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("compiler", ["g++", "clang++", "aarch64-linux-gnu-g++"])
def test_a_compiler_agrees(compiler: str, tmp_path: Path) -> None:
    if shutil.which(compiler) is None:
        pytest.skip(f"no {compiler} here")
    facts = {item["versions"][-1]: item for item in FACTS.values()}
    result = compiles(compiler, program(facts), tmp_path)
    assert result.returncode == 0, result.stderr[:4000]


@pytest.mark.parametrize("version", CALLABLE)
def test_the_emulators_header(version: str, tmp_path: Path) -> None:
    """What a client includes, with the number of its layout, holds the same measured facts."""
    facts = BY_VERSION.get(version, {"structs": {}, "enums": {}, "callbacks": {}, "functions": {}})
    number = RELEASES[version].layout.removeprefix("L")
    checks = [*assertions(facts), f"RKEMU_LAYOUT == {number}", "sizeof(RKLLMInitCallback) == sizeof(void *)"]
    static = "\n".join(f'static_assert({check}, "");' for check in checks)
    source = f"{header(version)}\n#include <cstddef>\n#include <type_traits>\n{static}"
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler here")
    done = compiles(compiler, source, tmp_path)
    assert done.returncode == 0, done.stderr[:4000]


def test_the_compiler_would_notice(tmp_path: Path) -> None:
    """The facts of one release do not fit the declarations of the next."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler here")
    releases = [
        facts["versions"][-1] for facts in sorted(FACTS.values(), key=lambda facts: order(facts["versions"][0]))
    ]
    for version, following in pairwise(releases):
        assert compiles(compiler, program({version: BY_VERSION[following]}), tmp_path).returncode != 0, version


def test_every_declaration_belongs_to_some_release() -> None:
    for table in (*STRUCTS.values(), *UNIONS.values(), *ENUMS.values(), CALLBACKS, FUNCTIONS):
        for item in table:
            assert item.since in RELEASES
            assert not item.until or order(item.since) <= order(item.until)
