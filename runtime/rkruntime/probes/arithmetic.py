"""Probe whether the library computes Gemma 2's sliding window and soft-caps, by the bundle's references."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Final, TypeAlias

from rkruntime.bundle.references import Row, Window, divergence
from rkruntime.probes.trial import NO_ROWS, Observation, Trial
from rkruntime.words import counted

UNDECIDED: Final = "undecided"
Floats: TypeAlias = Sequence[float]
_NO_REFERENCES: Final = (
    "Not asked: the bundle has nothing to compare with. Convert it with --references, and for the window with a"
    " --max-context of a quarter more than the window"
)
# Shares of the way from one model's logits to the other's: a result is decided if it is this near to one end, with a
# standard error of at most this.
_NEAR: Final = 0.4
_CERTAIN: Final = 0.15


def window(trial: Trial) -> Observation:
    """Whether layers with a sliding window see no further back than it reaches: 4,096 tokens in Gemma 2.

    Asked for single tokens behind a prompt of 5,000, whose end repeats its beginning, where the float model says
    another one with its window than without. `honoured`: the window's tokens come. `ignored`: those of a model that
    sees everything; long conversations get answers that Gemma 2 was not trained to give. `undecided`: some of each, or
    other ones. That beginning is the needle; whether it is found decides nothing, as every other layer sees it anyway.
    """
    references = trial.model.bundle.read_references()
    found = references and references.window
    context = trial.model.engine.info.max_context
    if not found:
        return Observation(f"{_NO_REFERENCES}.")
    if context and len(found.tokens) >= context:
        return Observation(f"Not asked: it was loaded with a context of {context:,} tokens.")
    said = [trial.next_token(list(found.tokens[: fork.length])) for fork in found.forks]
    return _decided(found, said)


def _decided(found: Window, said: list[int | None]) -> Observation:
    votes = [
        sum(token == getattr(fork, name) for token, fork in zip(said, found.forks, strict=True))
        for name in ("windowed", "whole")
    ]
    result = UNDECIDED
    if max(votes) * 2 > len(said) and 0 in votes:
        result = "honoured" if votes[0] else "ignored"
    says = (
        f"Of {counted(len(said), 'token')} after prompts of up to {found.forks[-1].length:,}, {votes[0]} are those with"
        f" the window of {found.window:,}, {votes[1]} those without."
    )
    return Observation(says, {"said": said, "forks": [fork.length for fork in found.forks]}, result)


def logits_cap(trial: Trial) -> Observation:
    """Whether the soft-cap of the logits is computed.

    `capped`: the logits are those of the float model. `uncapped`: those without it; the likeliest token stays the same,
    but sampling is sharper than Gemma 2's. `undecided`: rounding hides it, or the logits are neither.
    """
    return _nearest(trial, lambda row: row.logits_uncapped)


def attention_cap(trial: Trial) -> Observation:
    """Whether the soft-cap of attention scores is computed; results as for logits. Without it, answers are others."""
    return _nearest(trial, lambda row: row.attention_uncapped)


def _nearest(trial: Trial, without: Callable[[Row], tuple[float, ...]]) -> Observation:
    references = trial.model.bundle.read_references()
    caps = references and references.caps
    if not caps:
        return Observation(f"{_NO_REFERENCES}.")
    rows = trial.logits(trial.request(tokens=list(caps.tokens)))
    if rows is None:
        return Observation(NO_ROWS)
    found = [[float(rows[row.at][token]) for token in row.ids] for row in caps.rows]
    share, error = _share([(row.capped, without(row), mine) for row, mine in zip(caps.rows, found, strict=True)])
    near, far = (
        sum(divergence(side(row), mine) for row, mine in zip(caps.rows, found, strict=True)) / len(found)
        for side in (lambda row: row.capped, without)
    )
    result = UNDECIDED
    if error <= _CERTAIN:
        result = "capped" if abs(share) <= _NEAR else "uncapped" if abs(share - 1) <= _NEAR else UNDECIDED
    says = (
        f"Its logits are {near:.2g} nats from the float model's and {far:.2g} from those without the soft-cap, and"
        f" {share:.2f} +- {error:.2f} of the way to them."
    )
    return Observation(says, {"with": near, "without": far, "share": share, "error": error}, result)


def _share(rows: Sequence[tuple[Floats, Floats, Floats]]) -> tuple[float, float]:
    """How far logits are on the way from one model's to another's, 0 to 1, and the standard error of that.

    Rounding goes in every direction, and a soft-cap in one: so this tells them apart where a distance does not.
    """
    ways, moves = [], []
    for near, far, found in rows:
        ways += _centred([b - a for a, b in zip(near, far, strict=True)])
        moves += _centred([b - a for a, b in zip(near, found, strict=True)])
    length = sum(way * way for way in ways)
    if not length:
        return 0.0, math.inf
    share = sum(way * move for way, move in zip(ways, moves, strict=True)) / length
    rest = sum((move - share * way) ** 2 for way, move in zip(ways, moves, strict=True)) / len(ways)
    return share, math.sqrt(rest / length)


def _centred(values: Floats) -> list[float]:
    """Logits mean the same with any number added to all."""
    middle = sum(values) / len(values)
    return [value - middle for value in values]
