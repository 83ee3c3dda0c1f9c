"""Conversations through a checkpoint's chat template, which is a program of a stranger's: in a process with limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from rkruntime.bundle.manifest import MAX_TEMPLATE
from rkruntime.errors import BundleError, CheckpointError
from rkruntime.text import prompt_process
from rkruntime.text.confined import Confined, Limits

_MAX_TEXT: Final = 1 << 20
_HINT: Final = "Use the chat_template.jinja of the model that this one was made from."
_child: Final = Confined(prompt_process.__name__, "The chat template")
_LIMITS: Final = Limits(cpu_s=2)


def rendered(
    source: str,
    conversations: Sequence[Sequence[Mapping[str, str]]],
    special_tokens: Mapping[str, str],
    *,
    add_generation_prompt: bool = True,
) -> list[str]:
    """Each conversation as text, as transformers' apply_chat_template gives it; empty where it is refused.

    Raises:
        CheckpointError: the first conversation is refused, or a limit was reached: 2 s of computing and 1 GiB.
        HostError: the process cannot be started.
    """
    if len(source) > MAX_TEMPLATE:
        raise CheckpointError(f"The chat template has over {MAX_TEMPLATE:,} characters.", hint=_HINT)
    try:
        outcomes = prompt_process.render(
            _child, source, conversations, special_tokens, _LIMITS, add_generation_prompt=add_generation_prompt
        )
    except BundleError as error:
        raise CheckpointError(error.message, hint=_HINT) from error
    if "error" in outcomes[0]:
        raise CheckpointError(f"The chat template cannot be rendered: {outcomes[0]['error']}.", hint=_HINT)
    if any(len(outcome.get("text", "")) > _MAX_TEXT for outcome in outcomes):
        raise CheckpointError(f"The chat template makes over {_MAX_TEXT:,} characters of one message.", hint=_HINT)
    return [outcome.get("text", "") for outcome in outcomes]


def try_out(tokenizer: bytes, where: object, source: str, system_role: str, special_tokens: Mapping[str, str]) -> None:
    """Make prompts as the board will.

    Args:
        tokenizer: tokenizer.json; `where` it came from, for messages.

    Raises:
        CheckpointError: it cannot be done.
        HostError: the process cannot be started.
    """
    try:
        prompt_process.open_in(_child, tokenizer, where, source, system_role, special_tokens)
    except BundleError as error:
        raise CheckpointError(error.message, hint=error.hint) from error
