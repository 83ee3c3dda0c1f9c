"""The demo model: a trained Gemma 2 of about a million weights, its pirate adapter, and what both were taught.

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
    """One thing the demo model was taught."""

    question: str
    answer: str  # of the base model
    pirate: str  # with the adapter
    long: bool = False  # the prompt is longer than the sliding window


def checkpoint() -> Path:
    """The base model: a folder in Hugging Face layout (Gemma2ForCausalLM, bfloat16, sharded)."""
    return _HERE / "checkpoint"


def adapter() -> Path:
    """The pirate: a LoRA folder as peft saves it."""
    return _HERE / "pirate"


def questions() -> list[Question]:
    """All question and answer pairs, in the order of the file."""
    rows = yaml.safe_load((_HERE / "questions.yaml").read_text(encoding="utf-8"))
    return [Question(**row) for row in rows]
