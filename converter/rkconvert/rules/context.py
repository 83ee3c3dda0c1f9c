"""The context length of a model file."""

from __future__ import annotations

from typing import Final

from rkruntime.errors import CheckpointError, UsageError
from rkruntime.words import counted

# max_context of a model file: a multiple of 32, at most 16384 (manual 1.3.0, build()). 4096 is the toolkit's default.
CONTEXT_STEP: Final = 32
MOST_CONTEXT: Final = 16384
DEFAULT_CONTEXT: Final = 4096


def choose_context(asked: int | None, model: int, most: int = MOST_CONTEXT) -> int:
    """Choose the context in tokens: what was asked for, else the model's own limit, but no more than 4096.

    Args:
        model: Longest context that the model was trained for.
        most: Longest context that the toolkit accepts.

    Raises:
        CheckpointError: The model was trained for less than the shortest context.
        UsageError: More than the model or the toolkit allows, or not a multiple of 32.
    """
    largest = round_down(min(model, most))
    if largest < CONTEXT_STEP:
        raise CheckpointError(
            f"This model was trained for {counted(model, 'token')} (max_position_embeddings in config.json), but the"
            f" shortest context has {CONTEXT_STEP}.",
            hint="Use a model that was trained for longer texts.",
        )
    if asked is None:
        return min(largest, DEFAULT_CONTEXT)
    if asked > model:
        raise UsageError(
            f"--max-context {asked} is more than this model was trained for: {counted(model, 'token')}"
            " (max_position_embeddings in config.json).",
            hint=f"Use --max-context {largest} or less.",
        )
    if asked % CONTEXT_STEP or not CONTEXT_STEP <= asked <= most:
        near = max(CONTEXT_STEP, min(round_down(asked), most))
        raise UsageError(
            f"--max-context {asked}: it must be a multiple of {CONTEXT_STEP} from {CONTEXT_STEP} to {most}.",
            hint=f"Use --max-context {near}.",
        )
    return asked


def round_down(tokens: float) -> int:
    """Round down to a multiple of the step."""
    return int(tokens // CONTEXT_STEP) * CONTEXT_STEP
