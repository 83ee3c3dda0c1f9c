"""Regular expressions of an untrusted adapter: matched only if no name of a module makes that take long.

Python's `re` tries every way to match before it gives up. How many there are at most follows from the pattern alone.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Sequence
from importlib import import_module
from math import comb, inf, prod
from typing import Any, Final

_parser: Any = import_module("re._parser" if sys.version_info >= (3, 11) else "sre_parse")
# Longer than any name of a module, as in model.layers.45.self_attn.q_proj.
_LONGEST_NAME: Final = 48
_MOST_WAYS: Final = 1_000_000
_MOST_LENGTH: Final = 1000
_SINGLE: Final = ("LITERAL", "NOT_LITERAL", "ANY", "IN", "AT", "RANGE", "CATEGORY")


def are_safe(patterns: Iterable[str]) -> bool:
    """Whether all patterns together can be matched with any name of a module within some milliseconds.

    Raises:
        re.error: A pattern is not a regular expression.
    """
    ways = 0.0
    for pattern in patterns:
        ways += _ways(pattern)
        if ways > _MOST_WAYS:
            return False
    return True


def _ways(pattern: str) -> float:
    """Return an upper bound on the number of ways to match a name."""
    if len(pattern) > _MOST_LENGTH:
        return inf
    try:
        choices, repeats = _count(_parser.parse(pattern))
        re.compile(pattern)
    except (OverflowError, RecursionError):
        return inf
    # The repeats divide the name's characters among themselves.
    return choices * comb(_LONGEST_NAME + repeats, repeats) if choices < inf else inf


def _count(items: Sequence[Any]) -> tuple[float, int]:
    """Return the product of all choices between alternatives, and the number of repeats, each of any length."""
    found = [_count_item(str(kind), value) for kind, value in items]
    return prod(choices for choices, _ in found), sum(repeats for _, repeats in found)


def _count_item(kind: str, value: Any) -> tuple[float, int]:
    if kind in (*_SINGLE, "GROUPREF"):
        return 1, 0
    if kind == "BRANCH":
        found = [_count(items) for items in value[1]]
        return sum(choices for choices, _ in found), max(repeats for _, repeats in found)
    if kind in ("SUBPATTERN", "ATOMIC_GROUP", "ASSERT", "ASSERT_NOT"):
        return _count(value if kind == "ATOMIC_GROUP" else value[-1])
    if kind in ("MAX_REPEAT", "MIN_REPEAT", "POSSESSIVE_REPEAT"):
        return _count_repeat(*value)
    return inf, 0


def _count_repeat(least: Any, most: Any, items: Sequence[Any]) -> tuple[float, int]:
    choices, repeats = _count(items)
    if int(most) <= 1:
        return choices + (least != most), repeats
    # A repeat of something that has choices itself multiplies them each time.
    return (max(1, int(least)) if _is_fixed(items) else inf), int(least != most)


def _is_fixed(items: Sequence[Any]) -> bool:
    """Whether a sequence matches in one way only, or not at all."""
    return all(str(kind) in _SINGLE or (str(kind) == "SUBPATTERN" and _is_fixed(value[-1])) for kind, value in items)
