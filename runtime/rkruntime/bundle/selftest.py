"""What a bundle's self-test expects: `report/selftest.json`, which the converter writes and a board reads.

The file is untrusted like the rest of a bundle: each number has a range, and each list a maximum length.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Final

from rkruntime.bundle.record import Record
from rkruntime.schema import Between, Length

SCHEMA: Final = "rkedge-selftest/1"
SELFTEST: Final = "report/selftest.json"
# In bytes. The converter writes about ten thousand.
MAX_SELFTEST: Final = 1 << 20
_MOST_PROMPTS: Final = 8
_MOST_TOKENS: Final = 1024
_MOST_ANSWER: Final = 64
_MOST_CANDIDATES: Final = 16

# A difference counts if it exceeds twice the largest change that rounding caused during the conversion: how a board
# rounds is not known, but it may err as much in the opposite direction. It must also exceed _LEAST logits: half floats
# near Gemma 2's largest logits (30) are 1/64 apart, and many sums precede them. Both constants are assumptions.
_TIMES: Final = 2.0
_LEAST: Final = 0.125

_Id = Annotated[int, Between(0, (1 << 24) - 1)]
# Distance between two logits; the limit is far beyond what any model computes.
_Gap = Annotated[float, Between(0, 1e6)]


@dataclass(frozen=True)
class Expected:
    """The tokens that may come at one position of an answer, given the float model's answer up to there.

    Attributes:
        ids: The float model's likeliest tokens, the likeliest first.
        behind: By how much each one's logit is behind the first one's.
        rounded_id: The likeliest token after the weights and activations are rounded.
        rounded_margin: By how much the second likeliest is behind `rounded_id` then.
    """

    ids: tuple[_Id, ...]
    behind: tuple[_Gap, ...]
    rounded_id: _Id
    rounded_margin: _Gap

    @property
    def margin(self) -> float:
        """By how much the float model's second choice is behind its first."""
        return self.behind[1]

    def gap(self, *found: int) -> float:
        """Return by how much the likeliest of these tokens is behind; a lower bound if none of them is listed."""
        listed = [behind for token, behind in zip(self.ids, self.behind, strict=True) if token in found]
        return min(listed, default=self.behind[-1])


@dataclass(frozen=True)
class Question:
    """A question with the float model's own answer.

    Attributes:
        tokens: The question in the chat template, `<bos>` once.
        answer: One item for each token of the answer, as far as it is known.
        ends: Whether the last token of `answer` ends it.
    """

    question: Annotated[str, Length(1024)]
    tokens: tuple[_Id, ...]
    answer: tuple[Expected, ...]
    ends: bool

    @property
    def ids(self) -> list[int]:
        """The answer's tokens."""
        return [item.ids[0] for item in self.answer]


@dataclass(frozen=True)
class SelfTest(Record):
    """The contents of the file.

    Attributes:
        vocabulary: Number of tokens that the model knows.
        arithmetic: What the weights and activations were rounded to, such as `w8a8`.
        rounding: Largest change that this rounding caused in the gap between two of the likeliest tokens, in logits.
    """

    vocabulary: Annotated[int, Between(1, 1 << 24)]
    arithmetic: Annotated[str, Length(64)]
    rounding: _Gap
    prompts: tuple[Question, ...]
    schema: Annotated[str, Length(64)] = field(default=SCHEMA, kw_only=True)

    @property
    def tolerance(self) -> float:
        """The largest gap between two logits that rounding explains."""
        return max(_LEAST, _TIMES * self.rounding)

    @property
    def longest(self) -> int:
        """Most tokens of a question with its answer."""
        return max(len(item.tokens) + len(item.answer) for item in self.prompts)

    @property
    def highest(self) -> int:
        """The highest token id in any prompt or answer."""
        return max(token for item in self.prompts for token in (*item.tokens, *item.ids))

    def knows(self, token: int | None) -> bool:
        """Whether the model's vocabulary has this token; None stands for the end of an answer."""
        return token is None or 0 <= token < self.vocabulary

    def problem(self) -> str:
        """See `Record`."""
        return _problem(self)


def _problem(made: SelfTest) -> str:
    """Say what is wrong with the lists; empty if nothing is."""
    if not 1 <= len(made.prompts) <= _MOST_PROMPTS:
        return f"prompts has {len(made.prompts):,} items; it must have 1 to {_MOST_PROMPTS}"
    for at, prompt in enumerate(made.prompts):
        where = f"prompts[{at}]"
        if not 1 <= len(prompt.tokens) <= _MOST_TOKENS:
            return f"{where}.tokens has {len(prompt.tokens):,} items; it must have 1 to {_MOST_TOKENS:,}"
        if not 1 <= len(prompt.answer) <= _MOST_ANSWER:
            return f"{where}.answer has {len(prompt.answer):,} items; it must have 1 to {_MOST_ANSWER}"
        ids = [*prompt.tokens, *(token for item in prompt.answer for token in (*item.ids, item.rounded_id))]
        if max(ids) >= made.vocabulary:
            return f"{where} has the token {max(ids):,}; the vocabulary has {made.vocabulary:,}"
        if not all(map(_in_order, prompt.answer)):
            return f"{where}.answer: ids and behind must have 2 to {_MOST_CANDIDATES} items each, from 0 upwards"
    return ""


def _in_order(item: Expected) -> bool:
    return (
        2 <= len(item.ids) == len(set(item.ids)) == len(item.behind) <= _MOST_CANDIDATES
        and item.behind[0] == 0
        and list(item.behind) == sorted(item.behind)
    )
