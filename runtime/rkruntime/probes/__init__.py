"""Ask a board's library what it really does where reports of boards disagree: a few short runs answer each question.

RKEdge is written to be right either way, so no answer here is an error.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

from rkruntime.errors import HostError, RKEdgeError, UnsupportedCallError
from rkruntime.probes import arithmetic, cache, runs
from rkruntime.probes.trial import Observation, Trial

__all__ = ["FAILED", "LOST", "QUESTIONS", "UNDECIDED", "Observation", "OpenQuestion", "Trial", "answer", "is_harmful"]


# Results that any question may have: an error, or a board that was lost each time.
FAILED: Final = "failed"
LOST: Final = "lost"
# The result of a comparison that fits neither case.
UNDECIDED: Final = arithmetic.UNDECIDED


class OpenQuestion(NamedTuple):
    """A question about the library.

    Attributes:
        risky: Whether asking is reported to have crashed a board.
        slow: Whether asking may take minutes on a board.
        harmful: Results that make answers worse, whatever RKEdge does; for every question, `failed` is one too.
    """

    text: str
    answer: Callable[[Trial], Observation]
    risky: bool = False
    slow: bool = False
    harmful: tuple[str, ...] = ()


# Asked in this order: the first question needs the first run of a fresh model.
QUESTIONS: Final[Mapping[str, OpenQuestion]] = {
    "template": OpenQuestion(
        "Does it add its chat template, or another <bos>, to token ids?", runs.template, harmful=("bos",)
    ),
    "reuse": OpenQuestion("Does it reuse what is in its cache?", runs.reuse),
    "end": OpenQuestion("Does it end an answer by itself, and is the end token passed on?", runs.end),
    "end-tokens": OpenQuestion("Which end tokens end an answer?", runs.end_tokens),
    "abort": OpenQuestion(
        "Does a run end when it is aborted, and is the next one right?", runs.abort, harmful=("other",)
    ),
    "hidden": OpenQuestion("Which rows have hidden states?", runs.hidden, harmful=("other",)),
    "logits": OpenQuestion("Which rows have logits?", runs.logits, harmful=("other",)),
    "logits-cap": OpenQuestion(
        "Does it compute the soft-cap of the logits?", arithmetic.logits_cap, harmful=("uncapped",)
    ),
    "attention-cap": OpenQuestion(
        "Does it compute the soft-cap of attention?", arithmetic.attention_cap, harmful=("uncapped",)
    ),
    "history": OpenQuestion("How full is the cache in a continued conversation?", cache.history),
    "logits-cache": OpenQuestion("Does the cache survive a run in logits mode?", cache.logits_cache),
    "window": OpenQuestion("Does it honour the sliding window?", arithmetic.window, slow=True, harmful=("ignored",)),
    "pause": OpenQuestion("Does the run after a paused one read its prompt?", cache.pause, risky=True),
    "pause-cache": OpenQuestion("Does the cache survive a pause?", cache.pause_cache, risky=True),
    "prompt-cache": OpenQuestion("Does a prompt cache file work?", runs.prompt_cache, risky=True, harmful=("other",)),
}


def is_harmful(name: str, result: str) -> bool:
    """Whether a result of one of QUESTIONS makes answers worse, or the library failed."""
    return result in (FAILED, LOST, *QUESTIONS[name].harmful)


def answer(name: str, trial: Trial) -> Observation:
    """Try one of QUESTIONS. A failure is an answer, too: `facts` has the error."""
    try:
        return QUESTIONS[name].answer(trial)
    except UnsupportedCallError as error:
        return Observation(f"Not with this release: {error.message}")
    except HostError as error:  # a missing package
        return Observation(f"Not asked: {error.message}")
    except RKEdgeError as error:
        return Observation(f"It FAILED: {error.message}", {"error": error.as_dict()}, FAILED)
