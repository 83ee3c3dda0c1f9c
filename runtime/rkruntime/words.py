"""Wording that messages share: numbers with their nouns, and what a name may be."""

from __future__ import annotations

import re
from typing import Final

# What users and conversations may be called; the names are also those of files.
NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
NAME_RULE: Final = "letters, digits, dot, dash and underscore, at most 64, of which the first is a letter or a digit"


def counted(count: float, noun: str) -> str:
    """`1 turn`, `2 turns`, `1,024 bytes`, `0.5 seconds`."""
    number = f"{count:,}" if isinstance(count, int) else f"{count:g}"
    return f"{number} {noun}" if count == 1 else f"{number} {noun}s"


def dropped_turns(count: int) -> str:
    """A note on the turns that the context had no room for."""
    return "the oldest turn was dropped" if count == 1 else f"the {count} oldest turns were dropped"
