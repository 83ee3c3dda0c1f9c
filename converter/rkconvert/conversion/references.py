"""What probes on a board compare a library with: the float model as it is, without its window, without a soft-cap.

The long prompt is a list of facts that starts over at its end: what comes next there stands at its beginning, further
back than the sliding window reaches. Where the model says different tokens with and without the window, a board's token
shows which of the two it computes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from itertools import count
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from rkconvert.conversion.expected import weights_of
from rkconvert.model.float_model import FloatModel
from rkconvert.model.rendering import encoded
from rkconvert.model.tokenizer import tokenizer_bytes
from rkconvert.output.paths import without_paths
from rkconvert.progress import Advance
from rkconvert.target import ModelSpec
from rkruntime.bundle.manifest import TOKENIZER
from rkruntime.bundle.references import REFERENCES, Caps, Fork, References, Row, Window, divergence
from rkruntime.engine.generation import RESERVED
from rkruntime.errors import RKEdgeError

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

# Shape of the long prompt: its length as a multiple of the window, how many tokens of its beginning are repeated at its
# end, and how many positions are compared, all of which lie beyond the first window.
_BEYOND: Final = 1.22
_AGAIN: Final = 160
_COMPARED: Final = 128
_MOST_FORKS: Final = 4
# Margin in logits that both models must have for their token: rounding changes less, as far as the self-test shows.
_SURE: Final = 0.25
_MOST_SHORT: Final = 64
# Rows kept for each soft-cap: those that it changes most.
_ROWS: Final = 4
_CANDIDATES: Final = 16
# Passes over the weights.
_PASSES: Final = 4
_DIGITS: Final = 4
_QUESTION: Final = "Count from 1 to 9, with commas."
_ANSWER: Final = "1, 2, 3, 4, 5, 6, 7, 8, 9"
_NAMES: Final = ("Ada", "Ben", "Cleo", "Dora", "Emil", "Fay", "Gus", "Hana", "Ivo", "June", "Kim")
_THINGS: Final = ("lamps", "ropes", "maps", "drums", "coats", "keys", "boats")


def needed_reads(spec: ModelSpec) -> int:
    """Return the bytes of weights that are read at most."""
    return spec.model.nbytes * _PASSES


def references(spec: ModelSpec, advance: Advance) -> tuple[References | None, str]:
    """Return the references, or None, and a note on them. No failure here is worth losing a model file."""
    try:
        with np.errstate(all="ignore"):
            found, says = _computed(spec, advance)
        # Read them as a board will: what a board would refuse is not written. Logits that are not finite end here, too.
        return References.from_json(json.dumps(found.as_dict()).encode(), REFERENCES), says
    except MemoryError:
        return None, "there is not enough memory"
    except (RKEdgeError, OSError) as error:
        return None, without_paths(error.message if isinstance(error, RKEdgeError) else error.strerror or str(error))


def _computed(spec: ModelSpec, advance: Advance) -> tuple[References, str]:
    weights, config = weights_of(spec), spec.config

    def model(**changes: Any) -> FloatModel:
        return FloatModel(weights, replace(config, **changes), advance)

    length, says = _long(spec)
    short, facts = _ids(spec, length)
    asked = [short, [*facts[: length - _AGAIN], *facts[1 : _AGAIN + 1]]] if length else [short]
    near, *far = model().logits(asked, _COMPARED)
    window = None
    if far:
        (whole,) = model(sliding_layers=(False,) * len(config.sliding_layers)).logits(asked[1:], _COMPARED)
        window = _forks(config.sliding_window, asked[1], far[0], whole)
        says = says if window else "the window changes no token of the long prompt"
    return References(window, _caps(short, near, model)), says


def _long(spec: ModelSpec) -> tuple[int, str]:
    """Return the length of the long prompt in tokens, 0 if there is none, and a note on it."""
    config = spec.config
    if not config.sliding_window or not any(config.sliding_layers):
        return 0, "the model has no sliding window"
    length = max(int(config.sliding_window * _BEYOND), config.sliding_window + _COMPARED + 1, 2 * _AGAIN)
    if length + RESERVED + 1 > spec.max_context:
        return 0, f"the window is not probed, which takes a context of {length + RESERVED + 1:,} tokens"
    return length, f"with a prompt of {length:,} tokens for the window"


def _ids(spec: ModelSpec, length: int) -> tuple[list[int], list[int]]:
    """Return a question in the template with an answer that the model is sure of, and `length` tokens of facts."""
    file, template = spec.model.tokenizer_folder / TOKENIZER, spec.template
    parts = template.source, template.system_role, template.special_tokens
    facts = (
        f"{at}. {_NAMES[at % 11]} has {at * 37 % 89 + 2} {_THINGS[at % 7]} in house {at * 53 % 97}.\n"
        for at in count(1)
    )
    text = ""
    while len(text) < 8 * length:
        text += next(facts)
    asked = {_QUESTION: _ANSWER, "Which?": text}
    found = encoded(tokenizer_bytes(file), file, parts, asked, 1 << 20)
    question, answer = found[_QUESTION]
    return [*question, *answer][:_MOST_SHORT], [spec.config.bos_token_id, *found["Which?"][1]][:length]


def _forks(window: int, tokens: list[int], near: Floats, whole: Floats) -> Window | None:
    forks = []
    for at, (mine, other) in enumerate(zip(near, whole, strict=True), len(tokens) - len(near) + 1):
        ids, margins = (mine.argmax(), other.argmax()), (_margin(mine), _margin(other))
        if ids[0] != ids[1] and min(margins) >= _SURE:
            forks.append(Fork(at, int(ids[0]), int(ids[1]), _rounded(min(margins))))
    best = sorted(forks, key=lambda fork: -fork.margin)[:_MOST_FORKS]
    return Window(window, tuple(tokens), tuple(sorted(best, key=lambda fork: fork.length))) if best else None


def _margin(row: Floats) -> float:
    second, first = np.partition(row, -2)[-2:]
    return float(first - second)


def _caps(tokens: list[int], plain: Floats, model: Callable[..., FloatModel]) -> Caps | None:
    config = model().config
    if not (config.final_logit_softcapping and config.attn_logit_softcapping):
        return None
    (logits,) = model(final_logit_softcapping=0.0).logits([tokens], len(tokens))
    (attention,) = model(attn_logit_softcapping=0.0).logits([tokens], len(tokens))
    rows = [_row(at, *variants) for at, variants in enumerate(zip(plain, logits, attention, strict=True))]
    chosen = {
        row.at: row
        for name in ("logits_uncapped", "attention_uncapped")
        for row in sorted(rows, key=lambda row: -divergence(row.capped, getattr(row, name)))[:_ROWS]
    }
    return Caps(tuple(tokens), tuple(chosen[at] for at in sorted(chosen)))


def _row(at: int, *variants: Floats) -> Row:
    ids = [int(index) for index in np.argsort(-variants[0], kind="stable")[:_CANDIDATES]]
    return Row(at, tuple(ids), *(tuple(map(_rounded, variant[ids])) for variant in variants))


def _rounded(value: float | np.float32) -> float:
    return round(float(value), _DIGITS)
