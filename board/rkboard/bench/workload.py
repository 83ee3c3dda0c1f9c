"""The tests to run: those known from llama-bench, as far as the context has room for them.

`pp128 @ d1024` reads 128 tokens after 1,024, `tg64 @ d1024` generates 64 after them. One more test repeats the vendor's
benchmark: 128 tokens in, 64 out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Final, Literal, TypeAlias

from rkruntime.engine.generation import RESERVED

Kind: TypeAlias = Literal["pp", "tg", "vendor"]
# Tokens in and out in the vendor's benchmark.md.
VENDOR_PROMPT: Final = 128
VENDOR_NEW: Final = 64
# Tokens reserved for the question in a test without a depth; about the length of that question.
START: Final = 32


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        tokens: Tokens in for `pp`, otherwise tokens out.
        depth: Tokens in the context before that; with 0, decoding still has the question before it.
    """

    kind: Kind
    tokens: int
    depth: int = 0

    @property
    def name(self) -> str:
        """The test's name in llama-bench's table."""
        kind = "tg" if self.kind == "vendor" else self.kind
        return f"{kind}{self.tokens}" + (f" @ d{self.depth}" if self.depth else "")


@dataclass(frozen=True)
class Workload:
    """The tests in the order of their runs, and notes on those that were left out or changed."""

    tests: Sequence[Row]
    notes: Sequence[str] = field(default_factory=tuple)


def workload(prompts: Sequence[int], news: Sequence[int], depths: Sequence[int], context: int) -> Workload:
    """Return the tests for these numbers of tokens in and out, at these depths, that fit into a context."""
    found, notes = [], []
    if context - RESERVED >= VENDOR_PROMPT + VENDOR_NEW + 1:
        found.append(Row("vendor", VENDOR_NEW, VENDOR_PROMPT))
    for test in _asked(prompts, news, depths):
        room = context - RESERVED - _needs(test)
        if room < 0:
            notes.append(f"{test.name} does not fit into a context of {context:,} tokens.")
            continue
        depth = min(test.depth, room)
        less = Row(test.kind, test.tokens, depth)
        if depth == test.depth:
            found.append(less)
        elif any((one.kind, one.tokens, one.depth) == (less.kind, less.tokens, depth) for one in found):
            notes.append(f"{test.name} does not fit into a context of {context:,} tokens.")
        else:
            notes.append(f"{less.name} stands for {test.name}: the context has {context:,} tokens.")
            found.append(less)
    return Workload(found, notes)


def _asked(prompts: Sequence[int], news: Sequence[int], depths: Sequence[int]) -> Iterator[Row]:
    for depth in dict.fromkeys(sorted(depths)):
        yield from (Row("pp", tokens, depth) for tokens in dict.fromkeys(prompts))
        yield from (Row("tg", tokens, depth) for tokens in dict.fromkeys(news))


def _needs(test: Row) -> int:
    """Return the tokens that a test needs besides its depth: each run makes one more than it counts."""
    return test.tokens + 1 + (START if test.kind == "tg" and not test.depth else 0)
