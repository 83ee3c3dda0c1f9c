"""Numbers with their nouns, in messages for people."""

from __future__ import annotations


def counted(count: float, noun: str) -> str:
    """`1 turn`, `2 turns`, `1,024 bytes`, `0.5 seconds`."""
    number = f"{count:,}" if isinstance(count, int) else f"{count:g}"
    return f"{number} {noun}" if count == 1 else f"{number} {noun}s"


def dropped_turns(count: int) -> str:
    """A note on the turns that the context had no room for."""
    return "the oldest turn was dropped" if count == 1 else f"the {count} oldest turns were dropped"
