"""Conditions on facts such as versions, as written in the tables in data/: `<0.9.7`, `>=1.1.0 <1.3.0`, `unknown`."""

from __future__ import annotations

import operator
import re
from collections.abc import Callable, Mapping
from typing import Any, Final

from rkruntime.versions import version

_TESTS: Final[dict[str, Callable[[Any, Any], bool]]] = {
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "": operator.eq,
}
_PART = re.compile(r"([<>]=?|)(.+)")


def meets(facts: Mapping[str, str], wanted: Mapping[str, str]) -> bool:
    """Whether every wanted fact is known and meets its conditions.

    Args:
        facts: Facts by name; a missing one is unknown.
        wanted: Conditions by name, separated by spaces; all must hold. `{name}` in a condition refers to another fact.
    """
    return all(_meets(facts, name, condition) for name, condition in wanted.items())


def _meets(facts: Mapping[str, str], name: str, condition: str) -> bool:
    if condition == "unknown":
        return name not in facts
    try:
        parts = condition.format_map(facts).split()
    except KeyError:
        return False
    return name in facts and all(_holds(facts[name], part) for part in parts)


def _holds(value: str, part: str) -> bool:
    match = _PART.fullmatch(part)
    assert match is not None
    test, bound = match.groups()
    try:
        return _TESTS[test](version(value), version(bound))
    except ValueError:
        return not test and value.lower() == bound.lower()
