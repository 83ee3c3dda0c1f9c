"""Plain data to dataclasses: right values arrive, wrong ones are named by their key."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest

from rkruntime.errors import UsageError
from rkruntime.schema import build


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
        ({"name": "x", "mode": "c"}, "mode is 'c'; it must be one of a, b"),
        ({"name": None}, "name is NoneType"),
    ],
)
def test_errors_name_the_key(data: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        build(Outer, data, UsageError)
