"""Numbers with their nouns."""

from __future__ import annotations

import pytest

from rkruntime.words import counted, dropped_turns


@pytest.mark.parametrize(
    ("count", "words"),
    [(0, "0 turns"), (1, "1 turn"), (2, "2 turns"), (1024, "1,024 turns"), (1.0, "1 turn"), (0.5, "0.5 turns")],
)
def test_one_and_many(count: float, words: str) -> None:
    assert counted(count, "turn") == words


def test_dropped_turns() -> None:
    assert dropped_turns(1) == "the oldest turn was dropped"
    assert dropped_turns(3) == "the 3 oldest turns were dropped"
