"""Wording that messages share: numbers with their nouns, and the rule for names."""

from __future__ import annotations

import re
from typing import Final

# Valid names of users and conversations, which are also file names.
NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
NAME_RULE: Final = "letters, digits, dot, dash and underscore, at most 64, of which the first is a letter or a digit"


def counted(count: float, noun: str) -> str:
    """Return a number with its noun: `1 turn`, `2 turns`, `1,024 bytes`, `0.5 seconds`."""
    number = f"{count:,}" if isinstance(count, int) else f"{count:g}"
    return f"{number} {noun}" if count == 1 else f"{number} {noun}s"


def dropped_turns(count: int) -> str:
    """Return a note on the turns that were dropped for lack of room in the context."""
    return "the oldest turn was dropped" if count == 1 else f"the {count} oldest turns were dropped"
