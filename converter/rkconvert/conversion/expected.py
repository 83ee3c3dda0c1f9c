"""What a bundle's self-test expects: the float model's own answers to three questions, and how sure it is of them.

A pass over the weights costs the same for one token and for twenty, so each answer is guessed: a pass shows how far the
model agrees with the guess, and which token it says instead. The last pass also computes the rounded model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import cycle
from typing import TYPE_CHECKING, Final

import numpy as np

from rkconvert.adapters.merge import MergedWeights
from rkconvert.conversion.rounding import RoundedToo
from rkconvert.model.float_model import FloatModel
from rkconvert.model.rendering import encoded
from rkconvert.model.tokenizer import tokenizer_bytes
from rkconvert.output.paths import without_paths
from rkconvert.progress import Advance
from rkconvert.rules.quantized_types import EMULATOR_ONLY
from rkconvert.rules.type_names import UNQUANTIZED, QuantizedType, parse_type
from rkconvert.target import ModelSpec
from rkconvert.tensors.weights import Weights
from rkruntime.bundle.manifest import TOKENIZER
from rkruntime.bundle.selftest import SELFTEST, Expected, Question, SelfTest
from rkruntime.engine.generation import RESERVED
from rkruntime.errors import RKEdgeError
from rkruntime.text.template import END_OF_TURN
from rkruntime.words import counted

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]

# Questions whose answers can be guessed, with the guesses: a wrong one costs a pass and nothing else.
_QUESTIONS: Final = {
    "What is the capital of France? Answer with one word.": "Paris",
    "Repeat this: The quick brown fox jumps over the lazy dog.": "The quick brown fox jumps over the lazy dog.",
    "Count from 1 to 9, with commas.": "1, 2, 3, 4, 5, 6, 7, 8, 9",
}
_MOST_ANSWER: Final = 12
_CANDIDATES: Final = 5
# Passes over the weights, each of which takes longer than quantizing them. A model of up to _SMALL bytes, whose
# conversion takes no time, gets a pass for each token.
_PASSES: Final = 3
_SMALL: Final = 16 << 20
_DIGITS: Final = 4


@dataclass(frozen=True)
class _Asked:
    """A question, its ids, and the guess at its answer."""

    question: str
    tokens: list[int]
    guess: list[int]


def is_quick(spec: ModelSpec) -> bool:
    """Whether a self-test costs little beside any conversion of this model."""
    return spec.model.nbytes <= _SMALL


def needed_reads(spec: ModelSpec) -> int:
    """Return the bytes of weights that are read at most."""
    return spec.model.nbytes * _passes(spec)


def expected(spec: ModelSpec, stops: Sequence[int], advance: Advance) -> tuple[SelfTest | None, str]:
    """Return the self-test, or None, and a note on it. No failure here is worth losing a model file.

    Args:
        stops: Tokens that end an answer.
        advance: Called with the bytes of each block of weights read.
    """
    try:
        asked = list(_asked(spec, stops))
        if not asked:
            return None, "no question fits into the context"
        with np.errstate(all="ignore"):
            found = _described(spec, asked, _answers(spec, asked, stops, advance), stops)
        # Read it as a board will: what a board would refuse is not written. Logits that are not finite end here, too.
        test = SelfTest.from_json(json.dumps(found.as_dict()).encode(), SELFTEST)
    except MemoryError:
        return None, "there is not enough memory"
    except (RKEdgeError, OSError) as error:
        return None, without_paths(error.message if isinstance(error, RKEdgeError) else error.strerror or str(error))
    return test, _summary(test)


def _summary(test: SelfTest) -> str:
    steps = [step for prompt in test.prompts for step in prompt.answer]
    sure = sum(step.margin > test.tolerance for step in steps)
    return f"{sure} of {counted(len(steps), 'token')} are surer than rounding to {test.arithmetic} can change"


def _asked(spec: ModelSpec, stops: Sequence[int]) -> Iterator[_Asked]:
    file, template = spec.model.tokenizer_folder / TOKENIZER, spec.template
    parts = template.source, template.system_role, template.special_tokens
    end = [spec.tokenizer.added[END_OF_TURN]] if END_OF_TURN in spec.tokenizer.added else stops[:1]
    room = spec.max_context - _MOST_ANSWER
    if room <= RESERVED:
        return
    for question, (tokens, guess) in encoded(tokenizer_bytes(file), file, parts, _QUESTIONS, room).items():
        yield _Asked(question, tokens, [*guess, *end])


def _answers(
    spec: ModelSpec, asked: Sequence[_Asked], stops: Sequence[int], advance: Advance
) -> list[tuple[list[int], Floats, Floats]]:
    """Return the float model's own answers, each with the logits that chose its tokens, plain and rounded."""
    weights = weights_of(spec)
    model, guesses = FloatModel(weights, spec.config, advance), [item.guess[:_MOST_ANSWER] for item in asked]
    for _ in range(_passes(spec) - 1):
        rows = _rows(model, asked, guesses)
        answers = [_said(part, guess, stops) for part, guess in zip(rows, guesses, strict=True)]
        guesses = [_continued(answer, item.guess, stops) for answer, item in zip(answers, asked, strict=True)]
        if guesses == answers:
            break
    rows = _rows(RoundedToo(weights, spec.config, advance, _kind(spec.dtype)), asked, guesses)
    plain, other = rows[: len(asked)], rows[len(asked) :]
    answers = [_said(part, guess, stops) for part, guess in zip(plain, guesses, strict=True)]
    return [
        (answer, mine[: len(answer)], theirs[: len(answer)])
        for answer, mine, theirs in zip(answers, plain, other, strict=True)
    ]


def _rows(model: FloatModel, asked: Sequence[_Asked], guesses: Sequence[Sequence[int]]) -> list[Floats]:
    """Return logits for what follows each question, and each token of its guess."""
    # The last token does not have to be read: the logits after it are not used.
    read = [[*item.tokens, *guess[: _MOST_ANSWER - 1]] for item, guess in zip(asked, guesses, strict=True)]
    counts = [len(ids) - len(item.tokens) + 1 for ids, item in zip(read, asked, strict=True)]
    return [rows[-count:] for rows, count in zip(model.logits(read, _MOST_ANSWER), cycle(counts), strict=False)]


def _said(rows: Floats, guess: Sequence[int], stops: Sequence[int]) -> list[int]:
    """Return the model's own tokens, until the guess differs or the answer ends: further rows are of another text."""
    said: list[int] = []
    for at, row in enumerate(rows):
        said.append(int(row.argmax()))
        if said[-1] in stops or guess[at : at + 1] != said[-1:]:
            break
    return said


def _continued(answer: list[int], guess: list[int], stops: Sequence[int]) -> list[int]:
    """Return the answer so far, then what follows its last token in the first guess, or else the guess's end."""
    if answer[-1] in stops:
        return answer
    here = [at for at, token in enumerate(guess) if token == answer[-1]]
    nearest = min(here, key=lambda at: abs(at - len(answer)), default=len(guess) - 2)
    return [*answer, *guess[nearest + 1 :]][:_MOST_ANSWER]


def _described(
    spec: ModelSpec, asked: Sequence[_Asked], answers: Sequence[tuple[list[int], Floats, Floats]], stops: Sequence[int]
) -> SelfTest:
    questions, changes = [], [0.0]
    for item, (answer, plain, other) in zip(asked, answers, strict=True):
        steps = []
        for mine, theirs in zip(plain, other, strict=True):
            ids, (first, second) = _likeliest(mine, _CANDIDATES), _likeliest(theirs, 2)
            behind = mine[ids[0]] - mine[ids]
            compared = [*ids, first]
            changed = (mine[ids[0]] - mine[compared]) - (theirs[ids[0]] - theirs[compared])
            changes.append(float(np.abs(changed).max()))
            margin = _short(theirs[first] - theirs[second])
            steps.append(Expected(tuple(ids), tuple(map(_short, behind)), first, margin))
        questions.append(Question(item.question, tuple(item.tokens), tuple(steps), answer[-1] in stops))
    return SelfTest(spec.config.vocab_size, spec.dtype, _short(max(changes)), tuple(questions))


def _likeliest(row: Floats, count: int) -> list[int]:
    return [int(index) for index in np.argsort(-row, kind="stable")[:count]]


def _short(value: float | np.float32) -> float:
    return round(float(value), _DIGITS)


def _passes(spec: ModelSpec) -> int:
    return _MOST_ANSWER + 1 if is_quick(spec) else _PASSES


def _kind(dtype: str) -> QuantizedType | None:
    return None if dtype in (*EMULATOR_ONLY, UNQUANTIZED) else parse_type(dtype)


def weights_of(spec: ModelSpec) -> Weights:
    """Return the weights, with a separate adapter merged: what a board computes is the same but for rounding."""
    if spec.lora is None:
        return spec.model.weights
    checkpoint = spec.model.checkpoint
    return MergedWeights(checkpoint.weights, checkpoint.config, (spec.lora,))
