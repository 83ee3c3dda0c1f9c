"""Check the declared types of dataclasses: contents of files (`build`) and arguments of callers (`check_fields`).

Errors name the key or the field. msgspec (0.22) ignores unknown keys of a dataclass silently, so that a mistyped
setting would have no effect; cattrs leaves ranges and wording to its caller, which is most of this module.
"""

from __future__ import annotations

import difflib
import os
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING, fields
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple, TypeVar, Union, get_args, get_origin, get_type_hints

from rkruntime.errors import UsageError

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

    def __str__(self) -> str:
        return f"from {self.least:,} to {self.most:,}"

    def holds(self, value: float) -> bool:
        """Whether `value` is in the range; NaN never is."""
        return self.least <= value <= self.most


class Length(NamedTuple):
    """The length of a string in characters, as in `Annotated[str, Length(256)]`; with `least=1` it is not empty."""

    most: int
    least: int = 0


def build(kind: type[T], data: Mapping[str, Any], fail: Callable[[str], Exception]) -> T:
    """Build an object of the dataclass `kind` from plain data.

    Fields may be JSON types, Any, Path (from text), Literal, `X | None`, `tuple[X, ...]`, `dict[str, X]`, numbers with
    a Between, strings with a Length, and further dataclasses. The only conversion is int to float.

    Raises:
        `fail`'s result for "KEY is missing", "unknown key KEY (did you mean NAME?)", "KEY is TYPE; it must be TYPE",
        "KEY is NUMBER; it must be from NUMBER to NUMBER", "KEY is too large a number", "KEY has NUMBER characters; it
        may have NUMBER" or "KEY is empty": an empty path would be the current folder.
    """
    value: T = _Builder(fail).dataclass(kind, data, "")
    return value


class _Builder:
    def __init__(self, fail: Callable[[str], Exception]) -> None:
        self._fail = fail

    def dataclass(self, kind: Any, data: Mapping[str, Any], where: str) -> Any:
        hints = types_of(kind)
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
        if not bounds.holds(value):
            raise self._fail(f"{where} is {value:,}; it must be from {bounds.least:,} to {bounds.most:,}")
        return value

    def _short(self, bounds: Length, text: str, where: str) -> str:
        if len(text) < bounds.least:
            raise self._fail(f"{where} is empty")
        if len(text) > bounds.most:
            raise self._fail(f"{where} has {len(text):,} characters; it may have {bounds.most:,}")
        return text

    def _plain(self, kind: Any, data: Any, where: str) -> Any:
        if get_origin(kind) is None and type(data) is kind:
            return data
        if kind is float and type(data) is int:
            try:
                return float(data)
            except OverflowError:
                raise self._fail(f"{where} is too large a number") from None
        if kind is Path and isinstance(data, str):
            if not data:
                raise self._fail(f"{where} is empty; the current folder is a dot")
            return Path(data)
        if get_origin(kind) is Literal:
            raise self._fail(f"{where} is {str(data)[:80]!r}; it must be one of {', '.join(map(str, get_args(kind)))}")
        wanted = _WORDS.get(get_origin(kind) or kind, _WORDS[dict])
        raise self._fail(f"{where} is {type(data).__name__}; it must be {wanted}")


def _key(where: str, name: object) -> str:
    # The name of an unknown field may have any length.
    shown = str(name)[:80]
    return f"{where}.{shown}" if where else shown


def _nearest(key: object, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(str(key)[:80], known, n=1)
    return f" (did you mean {near[0]}?)" if near else ""


@cache
def types_of(kind: type[Any]) -> Mapping[str, Any]:
    """Return the declared types of a dataclass's fields, by name."""
    hints = get_type_hints(kind, include_extras=True)
    return {item.name: hints[item.name] for item in fields(kind)}


def check_fields(record: Any, *leaving: str) -> None:
    """Check the fields of a dataclass that a caller made, except those `leaving` names. Raises as `check_value`."""
    for name, kind in types_of(record.__class__).items():
        if name not in leaving:
            check_value(name, kind, getattr(record, name))


def check_value(name: str, kind: Any, value: Any) -> None:
    """Check a value that a caller gave. Raises UsageError, "NAME is VALUE; it must be KIND", for another type."""
    if type(value) is not kind and not _test(kind)(value):
        raise UsageError(f"{name} is {shown(value)}; it must be {_described(kind)}.")


def shown(value: object) -> str:
    """Return a caller's value as short text for a message."""
    try:
        text = repr(value)
    except Exception:  # such as for an int with more than 4,300 digits
        text = type(value).__name__
    return text if len(text) <= 40 else f"{text[:40]}..."


@cache
def _test(kind: Any) -> Callable[[Any], bool]:
    """Return the function that tells whether a value has a type; made once, as requests are checked before they run."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        inner, bounds = _test(arguments[0]), arguments[1]
        return lambda value: inner(value) and bool(bounds.holds(value))
    if origin in (Union, types.UnionType):
        tests = tuple(map(_test, arguments))
        return lambda value: any(test(value) for test in tests)
    if origin is Callable:
        return callable
    if kind in (int, float):
        return lambda value: isinstance(value, (int, kind)) and not isinstance(value, bool)
    items = _test_of_items(origin, arguments)

    def test(value: Any) -> bool:
        if isinstance(value, (str, bytes, bytearray)):  # a string is not a sequence of its letters
            return origin is None and isinstance(value, kind)
        return isinstance(value, origin or kind) and items(value)

    return test


def _test_of_items(origin: Any, arguments: tuple[Any, ...]) -> Callable[[Any], bool]:
    """Return the function that tells whether the items of a collection have the right types."""
    if origin is None or issubclass(origin, os.PathLike):
        return lambda _: True
    if origin is tuple and ... not in arguments:
        tests = tuple(map(_test, arguments))
        return lambda value: (
            len(value) == len(tests) and all(test(item) for test, item in zip(tests, value, strict=False))
        )
    if issubclass(origin, Mapping):
        of_key, of_item = map(_test, arguments)
        return lambda value: all(of_key(key) and of_item(item) for key, item in value.items())
    kind, of_one = arguments[0], _test(arguments[0])
    return lambda value: {type(item) for item in value} == {kind} or all(map(of_one, value))


def _described(kind: Any) -> str:
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return f"{_described(arguments[0])} {arguments[1]}"
    if origin in (Union, types.UnionType):
        return " or ".join(map(_described, arguments))
    if kind in _WORDS:
        return _WORDS[kind].partition(" (")[0]
    if origin is not None and arguments and issubclass(origin, (tuple, frozenset, Sequence)):
        return f"a {'list' if origin is Sequence else origin.__name__} of {arguments[0].__name__}"
    return "None" if kind is type(None) else (origin or kind).__name__
