"""Plain data to dataclasses: right values arrive, wrong ones are named by their key."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest

from rkruntime.errors import UsageError
from rkruntime.schema import Between, Length, build


@dataclass(frozen=True)
class Inner:
    count: int
    rate: float = 1.0


@dataclass(frozen=True)
class Outer:
    name: str
    inner: Inner = field(default_factory=lambda: Inner(1))
    many: tuple[Inner, ...] = ()
    table: dict[str, int] = field(default_factory=dict)
    where: Path | None = None
    mode: Literal["a", "b"] = "a"
    free: Any = None


def test_all_kinds_of_fields() -> None:
    data = {
        "name": "x",
        "inner": {"count": 2, "rate": 3},
        "many": [{"count": 4}],
        "table": {"k": 5},
        "where": "/tmp/y",
        "mode": "b",
        "free": [{}],
    }
    expected = Outer("x", Inner(2, 3.0), (Inner(4),), {"k": 5}, Path("/tmp/y"), "b", [{}])
    assert build(Outer, data, UsageError) == expected
    assert build(Outer, {"name": "x", "where": None}, UsageError) == Outer("x")


@dataclass(frozen=True)
class Bounded:
    count: Annotated[int, Between(1, 16)]
    rates: tuple[Annotated[float, Between(0, 1.5)], ...] = ()
    other: Annotated[int, Between(0, 9)] | None = None
    text: Annotated[str, Length(3)] = ""
    word: Annotated[str, Length(3, least=1)] | None = None


def test_bounds() -> None:
    good = {"count": 16, "rates": [0, 1.5], "other": None, "text": "abc"}
    assert build(Bounded, good, UsageError) == Bounded(16, (0.0, 1.5), text="abc")
    for change, message in (
        ({"count": 0}, "count is 0; it must be from 1 to 16"),
        ({"count": 10**12}, "count is 1,000,000,000,000; it must be from 1 to 16"),
        ({"rates": [0.5, 1.6]}, r"rates\[1\] is 1.6; it must be from 0 to 1.5"),
        ({"rates": [float("nan")]}, "rates.* is nan"),
        ({"rates": [10**400]}, r"rates\[0\] is too large a number"),
        ({"other": 10}, "other is 10"),
        ({"count": "x"}, "count is str"),
        ({"text": "abcd"}, "text has 4 characters; it may have 3"),
        ({"text": 4}, "text is int"),
        ({"word": ""}, "word is empty"),
    ):
        with pytest.raises(UsageError, match=message):
            build(Bounded, good | change, UsageError)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "name is missing"),
        ({"name": 1}, r"name is int; it must be text \(in quotes"),
        ({"name": "x", "nam": 1}, r"unknown key nam \(did you mean name\?\)"),
        ({"name": "x", "inner": {"count": "1"}}, r"inner\.count is str; it must be a whole number"),
        ({"name": "x", "inner": {"count": True}}, r"inner\.count is bool"),
        ({"name": "x", "inner": []}, "inner is list; it must be a mapping"),
        ({"name": "x", "many": [{"count": 1}, {}]}, r"many\[1\]\.count is missing"),
        ({"name": "x", "many": {}}, "many is dict; it must be a list"),
        ({"name": "x", "table": {"k": None}}, r"table\.k is NoneType"),
        ({"name": "x", "where": 3}, "where is int; it must be a path"),
        ({"name": "x", "where": ""}, "where is empty; the current folder is a dot"),
        ({"name": "x", "mode": "c"}, "mode is 'c'; it must be one of a, b"),
        ({"name": None}, "name is NoneType"),
    ],
)
def test_errors_name_the_key(data: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build(Outer, data, UsageError)
