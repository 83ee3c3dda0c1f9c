"""Regular expressions of an untrusted adapter: matched only if no name of a module makes that take long.

Python's `re` tries every way to match before it gives up. How many there are at most follows from the pattern alone.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from importlib import import_module
from math import comb, inf
from typing import Any, Final, NamedTuple

_parser: Any = import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")
# Longer than any name of a module, as in model.layers.45.self_attn.q_proj.
_LONGEST_NAME: Final = 48
_MOST_WAYS: Final = 1_000_000
_MOST_LENGTH: Final = 1000
_ASCII: Final = 128
_SINGLE: Final = ("LITERAL", "NOT_LITERAL", "ANY", "IN", "AT", "RANGE", "CATEGORY")


def are_safe(patterns: Iterable[str]) -> bool:
    """Whether all patterns together can be matched with any name of a module within some milliseconds.

    Raises:
        re.error: A pattern is not a regular expression.
    """
    ways = 0.0
    for pattern in patterns:
        ways += _most_ways(pattern)
        if ways > _MOST_WAYS:
            return False
    return True


def _most_ways(pattern: str) -> float:
    """Return an upper bound on what is tried to match a name."""
    if len(pattern) > _MOST_LENGTH:
        return inf
    try:
        found = _of(_parser.parse(pattern))
        re.compile(pattern)
    except (OverflowError, RecursionError):
        return inf
    return found.tried + found.ways


class _Bound(NamedTuple):
    """Bounds on a part of a pattern that begins at one place of a name.

    Attributes:
        choices: Product of all choices between alternatives.
        repeats: Number of repeats, each of any length: they divide the name's characters among themselves.
        tried: How often a choice or an assertion in it is begun.
    """

    choices: float = 1
    repeats: int = 0
    tried: float = 0

    @property
    def ways(self) -> float:
        """How many ways there are to match it."""
        return self.choices * comb(_LONGEST_NAME + self.repeats, self.repeats) if self.choices < inf else inf


def _of(items: Sequence[Any]) -> _Bound:
    """Return the bounds of a sequence."""
    whole = _Bound()
    for kind, value in items:
        one = _of_item(str(kind), value)
        # Each way to match what stands in front begins it once more.
        tried = whole.tried + (whole.ways * one.tried if one.tried else 0)
        whole = _Bound(whole.choices * one.choices, whole.repeats + one.repeats, tried)
    return whole


def _of_item(kind: str, value: Any) -> _Bound:
    if kind in (*_SINGLE, "GROUPREF"):
        return _Bound()
    if kind == "BRANCH":
        found = [_of(items) for items in value[1]]
        tried = len(found) + sum(one.tried for one in found)
        return _Bound(_choices(value[1], found), max(one.repeats for one in found), tried)
    if kind == "SUBPATTERN":
        return _of(value[-1])
    if kind in ("ASSERT", "ASSERT_NOT", "ATOMIC_GROUP"):
        # What follows never makes it try another way.
        inner = _of(value if kind == "ATOMIC_GROUP" else value[-1])
        return _Bound(tried=inner.tried + inner.ways)
    if kind in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
        return _of_repeat(*value)
    return _Bound(inf)


def _of_repeat(least: Any, most: Any, items: Sequence[Any]) -> _Bound:
    one = _of(items)
    if int(most) <= 1:
        return _Bound(one.choices + (least != most), one.repeats, one.tried)
    # A repeat of something that has choices itself multiplies them each time.
    return _Bound(max(1, int(least)) if _is_fixed(items) else inf, int(least != most))


def _choices(branches: Sequence[Sequence[Any]], found: Sequence[_Bound]) -> float:
    """Return how many choices alternatives are at one place of a name, where most do not begin as they should."""
    together = (
        sum(own.choices for other, own in zip(branches, found, strict=True) if not _differ(branch, other))
        for branch in branches
    )
    return max(together)


def _differ(one: Sequence[Any], other: Sequence[Any]) -> bool:
    """Whether two alternatives cannot both match at one place, because of a letter at their beginning."""
    for (kind, letter), (other_kind, other_letter) in zip(one, other, strict=False):
        if not str(kind) == str(other_kind) == "LITERAL":
            return False
        # Others may be forms of an ASCII letter where case is ignored.
        if max(letter, other_letter) < _ASCII and chr(letter).lower() != chr(other_letter).lower():
            return True
    return False


def _is_fixed(items: Sequence[Any]) -> bool:
    """Whether a sequence matches in one way only, or not at all."""
    return all(str(kind) in _SINGLE or (str(kind) == "SUBPATTERN" and _is_fixed(value[-1])) for kind, value in items)
