"""The ctypes classes, callback types and prototypes of a layout, built from the declarations."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from types import MappingProxyType
from typing import Any, NamedTuple

from rkruntime.abi.declarations import CALLBACKS, ENUMS, FUNCTIONS, STRUCTS, UNIONS, Field, Function
from rkruntime.abi.releases import LAYOUTS, RELEASES, within

_SCALARS: dict[str, Any] = {
    "void": None,
    "bool": ctypes.c_bool,
    "int": ctypes.c_int,
    "float": ctypes.c_float,
    "size_t": ctypes.c_size_t,
    "int8_t": ctypes.c_int8,
    "uint8_t": ctypes.c_uint8,
    "int32_t": ctypes.c_int32,
    "uint32_t": ctypes.c_uint32,
    "uint64_t": ctypes.c_uint64,
    "char *": ctypes.c_char_p,
    "void *": ctypes.c_void_p,
    "LLMHandle": ctypes.c_void_p,
}


class Prototype(NamedTuple):
    """Result and argument types of a function, as ctypes types."""

    restype: Any
    argtypes: tuple[Any, ...]


def fields_of(name: str, version: str) -> tuple[Field, ...]:
    """Return the members of a struct or union in a release, in memory order; empty if the release has no such type."""
    declared = STRUCTS.get(name) or UNIONS[name]
    return tuple(item for item in declared if within(version, item.since, item.until))


def _function_in(table: tuple[Function, ...], version: str) -> dict[str, Function]:
    return {item.name: item for item in table if within(version, item.since, item.until)}


def functions_of(version: str) -> dict[str, Function]:
    """Return the functions that a release declares."""
    return _function_in(FUNCTIONS, version)


def callbacks_of(version: str) -> dict[str, Function]:
    """Return the callback types that a release declares."""
    return _function_in(CALLBACKS, version)


def enum_values(name: str, version: str) -> dict[str, int]:
    """Return names and values of an enum in a release."""
    return {item.name: item.value for item in ENUMS[name] if within(version, item.since, item.until)}


def since(name: str) -> str:
    """Return the first release that has a function, or a field given as `Struct.field`."""
    struct, _, field = name.partition(".")
    if field:
        return next(item.since for item in STRUCTS[struct] if item.name == field)
    return next(item.since for item in FUNCTIONS if item.name == name)


@dataclass(frozen=True)
class Abi:
    """The C interface of one layout. `version` is any release with that layout."""

    layout: str
    version: str

    @cached_property
    def structs(self) -> Mapping[str, Any]:
        """ctypes.Structure classes by their names in the newest header."""
        made = {name: self._aggregate(name) for name in STRUCTS if fields_of(name, self.version)}
        return MappingProxyType(made)

    @cached_property
    def callbacks(self) -> Mapping[str, Any]:
        """ctypes function types of the callbacks."""
        return MappingProxyType({name: self._resolve(name) for name in callbacks_of(self.version)})

    @cached_property
    def functions(self) -> Mapping[str, Prototype]:
        """Prototypes of the library's functions."""
        return MappingProxyType(
            {
                name: Prototype(self._resolve(item.returns), tuple(self._resolve(param.type) for param in item.params))
                for name, item in functions_of(self.version).items()
            }
        )

    @cached_property
    def enums(self) -> Mapping[str, Mapping[str, int]]:
        """Values of the enums."""
        return MappingProxyType({name: enum_values(name, self.version) for name in ENUMS})

    @cached_property
    def _resolved(self) -> dict[str, Any]:
        return dict(_SCALARS)

    def _resolve(self, declared: str) -> Any:
        """Return the ctypes type of a C type as written in the header."""
        text = declared.removeprefix("const ")
        if text not in self._resolved:
            self._resolved[text] = self._make(text)
        return self._resolved[text]

    def _make(self, text: str) -> Any:
        if text.endswith(" *"):
            return ctypes.POINTER(self._resolve(text.removesuffix(" *")))
        if text.endswith("]"):
            item, _, count = text[:-1].partition("[")
            return self._resolve(item) * int(count)
        if text in ENUMS:
            return ctypes.c_uint32
        if text in STRUCTS or text in UNIONS:
            return self._aggregate(text)
        callback = callbacks_of(self.version)[text]
        return ctypes.CFUNCTYPE(
            self._resolve(callback.returns), *(self._resolve(param.type) for param in callback.params)
        )

    def _aggregate(self, name: str) -> Any:
        if name in self._resolved:
            return self._resolved[name]
        members = fields_of(name, self.version)
        body = {
            "_anonymous_": ("_unnamed",) if any(not item.name for item in members) else (),
            "_fields_": [(item.name or "_unnamed", self._resolve(item.type)) for item in members],
        }
        made = type(name, (ctypes.Union if name in UNIONS else ctypes.Structure,), body)
        self._resolved[name] = made
        return made


@cache
def _abi(layout: str) -> Abi:
    return Abi(layout, LAYOUTS[layout][0])


def abi_of(version: str) -> Abi:
    """Return the interface of a release. Releases with the same layout share one."""
    return _abi(RELEASES[version].layout)
