"""What a model computes with and without its sliding window and its soft-caps: `report/references.json`.

The converter computes the file from the float model; probes on a board compare it with what the library computes. It is
untrusted like the rest of a bundle: each number has a range, and each list a maximum length.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, Final

from rkruntime.bundle.record import Record
from rkruntime.schema import Between, Length

SCHEMA: Final = "rkedge-references/1"
REFERENCES: Final = "report/references.json"
# In bytes. The converter writes about ten thousand, and six for each token of the long prompt.
MAX_REFERENCES: Final = 1 << 20
_MOST_TOKENS: Final = 1 << 15
_MOST_ROWS: Final = 16
_MOST_CANDIDATES: Final = 64

_Id = Annotated[int, Between(0, (1 << 24) - 1)]
_Logit = Annotated[float, Between(-1e6, 1e6)]


@dataclass(frozen=True)
class Fork:
    """A prefix of the long prompt after which the model's next token depends on whether it uses its sliding window.

    Attributes:
        length: Length of the prefix in tokens.
        windowed, whole: Id of the next token with the sliding window, and with attention to the whole prompt.
        margin: Lead of the first choice over the second in logits; the smaller of the two cases.
    """

    length: Annotated[int, Between(1, _MOST_TOKENS)]
    windowed: _Id
    whole: _Id
    margin: _Logit


@dataclass(frozen=True)
class Window:
    """A prompt longer than the sliding window by more than a fifth, and the prefixes after which the window shows."""

    window: Annotated[int, Between(1, _MOST_TOKENS)]
    tokens: tuple[_Id, ...]
    forks: tuple[Fork, ...]


@dataclass(frozen=True)
class Row:
    """Logits of `ids` after token `at` of the short prompt: as the model has them, and without one of its soft-caps."""

    at: Annotated[int, Between(0, _MOST_TOKENS)]
    ids: tuple[_Id, ...]
    capped: tuple[_Logit, ...]
    logits_uncapped: tuple[_Logit, ...]
    attention_uncapped: tuple[_Logit, ...]


@dataclass(frozen=True)
class Caps:
    """A short prompt, and rows for the positions where the soft-caps make the largest difference."""

    tokens: tuple[_Id, ...]
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class References(Record):
    """The contents of the file; a part is None if the model does not have the feature, or its context is too short."""

    window: Window | None
    caps: Caps | None
    schema: Annotated[str, Length(64)] = field(default=SCHEMA, kw_only=True)

    def problem(self) -> str:
        """See `Record`."""
        fits = _holds(self.window) and _fits(self.caps)
        return "" if fits else "a list is empty, too long, or not as long as the others"


def divergence(true: Sequence[float], found: Sequence[float]) -> float:
    """Return the Kullback-Leibler divergence in nats of two rows of logits over the same tokens."""
    whole, other = _log_sum(true), _log_sum(found)
    return sum(
        math.exp(mine - whole) * ((mine - whole) - (theirs - other)) for mine, theirs in zip(true, found, strict=True)
    )


def _log_sum(logits: Sequence[float]) -> float:
    most = max(logits)
    return most + math.log(sum(math.exp(value - most) for value in logits))


def _holds(window: Window | None) -> bool:
    if window is None:
        return True
    lengths = [fork.length for fork in window.forks]
    return 1 <= len(lengths) <= _MOST_ROWS and max(lengths) <= len(window.tokens) <= _MOST_TOKENS


def _fits(caps: Caps | None) -> bool:
    if caps is None:
        return True
    sizes = [
        {len(row.ids), len(row.capped), len(row.logits_uncapped), len(row.attention_uncapped)} for row in caps.rows
    ]
    return (
        1 <= len(caps.rows) <= _MOST_ROWS
        and max(row.at for row in caps.rows) < len(caps.tokens)
        and len(caps.tokens) <= _MOST_TOKENS
        and all(len(found) == 1 and 2 <= max(found) <= _MOST_CANDIDATES for found in sizes)
        and all(len(set(row.ids)) == len(row.ids) for row in caps.rows)
    )
