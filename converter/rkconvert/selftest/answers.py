"""What the outcomes say about questions that no public source answers, each as a sentence."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Final

import numpy as np

from rkconvert.selftest.cases import NO_VOCABULARY_FILE, TRAINED_HEAD
from rkconvert.selftest.run import NOT_RUN, CaseResult
from rkconvert.selftest.tiny import HEAD_WEIGHTS

_UNKNOWN: Final = "not known"
# Least bytes of a head: no type takes less than half a byte for each weight.
_LEAST_HEAD: Final = HEAD_WEIGHTS // 2
_SYSTEM_ROLE: Final = "system role not supported"

Outcomes = Sequence[CaseResult]


def answers(outcomes: Outcomes) -> dict[str, str]:
    """Return answers by question, in the order of a conversion."""
    return {question: answer(outcomes) for question, answer in _QUESTIONS.items()}


def _config(outcomes: Outcomes) -> str:
    first = outcomes[0]
    if first.worked or first.stage in ("build", "export"):
        return "yes"
    return f"no: {first.error['message']}" if first.stage == "load" else _UNKNOWN


def _tokenizer(outcomes: Outcomes) -> str:
    first = outcomes[0]
    if first.worked:
        return "yes"
    return f"probably not: {first.error['message']}" if first.stage == "export" else _UNKNOWN


def _template(outcomes: Outcomes) -> str:
    if any(_SYSTEM_ROLE in str(outcome.error).lower() for outcome in outcomes):
        return "no: the toolkit renders a system message, which Gemma's template refuses"
    if not any(outcome.worked for outcome in outcomes):
        return _UNKNOWN
    said = any(_SYSTEM_ROLE in outcome.log.lower() for outcome in outcomes)
    return f"yes{', though its log has the refusal of a system message' if said else ''}"


def _vocabulary_file(outcomes: Outcomes) -> str:
    asked = next(outcome for outcome in outcomes if outcome.case.asks == NO_VOCABULARY_FILE)
    if asked.status == NOT_RUN:
        return _UNKNOWN
    if asked.worked:
        return "yes"
    if not outcomes[0].worked:
        return f"{_UNKNOWN}: the same conversion fails with tokenizer.model, too"
    return f"no, keep tokenizer.model with a checkpoint: {asked.error['message']}"


def _head(outcomes: Outcomes) -> str:
    asked = next(outcome for outcome in outcomes if outcome.case.asks == TRAINED_HEAD)
    tied = outcomes[0]
    if not asked.worked:
        return f"it cannot be converted: {asked.error['message']}" if tied.worked and asked.error else _UNKNOWN
    if not (tied.content and asked.content):
        return _UNKNOWN
    more, tensors = len(asked.content) - len(tied.content), asked.made["file"]["tensors"] - tied.made["file"]["tensors"]
    if more >= _LEAST_HEAD:
        return f"yes: the file has {more:,} bytes and {tensors} tensors more than with the embedding as head"
    if more:
        return f"{_UNKNOWN}: a head has {_LEAST_HEAD:,} bytes or more, but the file's size differs by {more:,}"
    changed = _differences(asked, tied)
    if changed < _LEAST_HEAD // 2:
        return f"it seems to be lost: only {changed:,} bytes differ from the file with the embedding as head"
    # Two files of the same weights show whether a file's bytes depend on anything else.
    again = [item for item in outcomes[1:] if item.worked and item.case == replace(tied.case, adapter=True)]
    if again and _differences(again[0], tied) >= _LEAST_HEAD // 2:
        return f"{_UNKNOWN}: even files of the same weights differ"
    return f"{'yes' if again else 'probably'}: {changed:,} bytes differ from the file with the embedding as head"


def _differences(one: CaseResult, other: CaseResult) -> int:
    """Return the number of bytes that differ; the larger file's size if the sizes differ."""
    if len(one.content) != len(other.content):
        return max(len(one.content), len(other.content))
    return int(np.count_nonzero(np.frombuffer(one.content, np.uint8) != np.frombuffer(other.content, np.uint8)))


def _adapter(outcomes: Outcomes) -> str:
    asked = [outcome for outcome in outcomes if outcome.case.adapter and outcome.status != NOT_RUN]
    made = [outcome.made["lora_file"] for outcome in asked if outcome.worked]
    if not asked:
        return _UNKNOWN
    if not made:
        return f"no: {asked[0].error['message']}"
    return f"in {len(made)} of {len(asked)} cases, with {made[0]['size']:,} bytes and {made[0]['tensors']} tensors"


def _settings(outcomes: Outcomes) -> str:
    made: list[dict[str, Any]] = next((outcome.made["settings"] for outcome in outcomes if outcome.worked), [])
    said = [f"{item['name']} {item['said']} (asked: {' or '.join(item['asked'])})" for item in made if item["said"]]
    return "; ".join(said) or f"{_UNKNOWN}: its log does not say"


def _logits(outcomes: Outcomes) -> str:
    asked = [outcome for outcome in outcomes if outcome.verified]
    if problems := [outcome.problem for outcome in asked if outcome.problem]:
        return f"no: {problems[0]}"
    worst = [(max(item["kl"] for item in outcome.verified["prompts"]), outcome.case.name) for outcome in asked]
    texts = ", ".join(f"{kl:.2g} ({name})" for kl, name in worst)
    return f"yes; KL from the float model in nats: {texts}" if asked else _UNKNOWN


_QUESTIONS: Final[dict[str, Callable[[Outcomes], str]]] = {
    "Does it take the model's settings?": _config,
    "Does it take the tokenizer?": _tokenizer,
    "Is tokenizer.json alone enough?": _vocabulary_file,
    "Does it take Gemma's chat template?": _template,
    "Does it keep a trained head?": _head,
    "Does it write an adapter's file?": _adapter,
    "Does it compute logits (--verify)?": _logits,
    "What does it set in the file?": _settings,
}
