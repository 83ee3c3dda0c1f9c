"""YAML or JSON to frozen dataclasses: contents are checked against the fields, and errors name the key."""

from __future__ import annotations

import difflib
import types
from collections.abc import Callable, Iterable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")
_WORDS: Final[dict[Any, str]] = {
    str: "text (in quotes, if it looks like something else)",
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    tuple: "a list",
    dict: "a mapping",
    Path: "a path",
}


class Between(NamedTuple):
    """The range of a number, as in `Annotated[int, Between(1, 16)]`."""

    least: int | float
    most: int | float


class Length(NamedTuple):
    """The maximum length of a string in characters, as in `Annotated[str, Length(256)]`."""

    most: int


def build(kind: type[T], data: Mapping[str, Any], fail: Callable[[str], Exception]) -> T:
    """Build an object of the dataclass `kind` from plain data.

    Fields may be JSON types, Any, Path (from text), Literal, `X | None`, `tuple[X, ...]`, `dict[str, X]`, numbers with
    a Between, strings with a Length, and further dataclasses. The only conversion is int to float.

    Raises:
        `fail`'s result for "KEY is missing", "unknown key KEY (did you mean NAME?)", "KEY is TYPE; it must be TYPE",
        "KEY is NUMBER; it must be from NUMBER to NUMBER" or "KEY has NUMBER characters; it may have NUMBER".
    """
    value: T = _Builder(fail).dataclass(kind, data, "")
    return value


class _Builder:
    def __init__(self, fail: Callable[[str], Exception]) -> None:
        self._fail = fail

    def dataclass(self, kind: Any, data: Mapping[str, Any], where: str) -> Any:
        hints = get_type_hints(kind, include_extras=True)
        known = {item.name: item for item in fields(kind)}
        for key in data:
            if key not in known:
                raise self._fail(f"unknown key {_key(where, key)}{_nearest(key, known)}")
        for name, item in known.items():
            if name not in data and item.default is MISSING and item.default_factory is MISSING:
                raise self._fail(f"{_key(where, name)} is missing")
        return kind(**{key: self._value(hints[key], value, _key(where, key)) for key, value in data.items()})

    def _value(self, kind: Any, data: Any, where: str) -> Any:
        origin, arguments = get_origin(kind), get_args(kind)
        if kind is Any or (origin is Literal and data in arguments):
            return data
        if origin is Annotated:
            return self._within(arguments[1], self._value(arguments[0], data, where), where)
        if origin in (Union, types.UnionType):
            return None if data is None else self._value(arguments[0], data, where)
        if origin is tuple and isinstance(data, list):
            return tuple(self._value(arguments[0], item, f"{where}[{at}]") for at, item in enumerate(data))
        if origin is dict and isinstance(data, dict):
            return {str(key): self._value(arguments[1], item, _key(where, key)) for key, item in data.items()}
        if hasattr(kind, "__dataclass_fields__") and isinstance(data, dict):
            return self.dataclass(kind, data, where)
        return self._plain(kind, data, where)

    def _within(self, bounds: Between | Length, value: Any, where: str) -> Any:
        if isinstance(bounds, Length):
            return self._short(bounds, value, where)
        if not bounds.least <= value <= bounds.most:
            raise self._fail(f"{where} is {value:,}; it must be from {bounds.least:,} to {bounds.most:,}")
        return value

    def _short(self, bounds: Length, text: str, where: str) -> str:
        if len(text) > bounds.most:
            raise self._fail(f"{where} has {len(text):,} characters; it may have {bounds.most:,}")
        return text

    def _plain(self, kind: Any, data: Any, where: str) -> Any:
        if get_origin(kind) is None and type(data) is kind:
            return data
        if kind is float and type(data) is int:
            return float(data)
        if kind is Path and isinstance(data, str):
            return Path(data)
        if get_origin(kind) is Literal:
            raise self._fail(f"{where} is {str(data)[:80]!r}; it must be one of {', '.join(map(str, get_args(kind)))}")
        wanted = _WORDS.get(get_origin(kind) or kind, _WORDS[dict])
        raise self._fail(f"{where} is {type(data).__name__}; it must be {wanted}")


def _key(where: str, name: object) -> str:
    # A name that is not a field can have any length.
    shown = str(name)[:80]
    return f"{where}.{shown}" if where else shown


def _nearest(key: object, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(key)[:80], known, n=1)
    return f" (did you mean {near[0]}?)" if near else ""
