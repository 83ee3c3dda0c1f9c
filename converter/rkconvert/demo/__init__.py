"""The demo model: a trained Gemma 2 of about a million weights, its pirate adapter, and what both were trained on.

`train.py` made `checkpoint/` and `pirate/` from `questions.yaml`.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import yaml

__all__ = ["Question", "adapter", "checkpoint", "questions"]

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class Question:
    """A question and the answers that the demo model was trained on."""

    question: str
    answer: str  # the base model's
    pirate: str  # with the adapter
    long: bool = False  # the prompt is longer than the sliding window


def checkpoint() -> Path:
    """Return the base model: a folder in Hugging Face layout (Gemma2ForCausalLM, bfloat16, sharded)."""
    return _HERE / "checkpoint"


def adapter() -> Path:
    """Return the pirate adapter: a LoRA folder as peft saves it."""
    return _HERE / "pirate"


def questions() -> list[Question]:
    """Return all questions with their answers, in the order of the file."""
    rows = yaml.safe_load((_HERE / "questions.yaml").read_text(encoding="utf-8"))
    return [Question(**row) for row in rows]
