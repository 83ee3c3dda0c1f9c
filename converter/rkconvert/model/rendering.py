"""Render conversations with a checkpoint's chat template, an untrusted program, in a process with limits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from rkruntime.bundle.manifest import MAX_TEMPLATE
from rkruntime.errors import BundleError, CheckpointError, ContextFullError, UsageError
from rkruntime.printable import well_formed
from rkruntime.text import prompt_process
from rkruntime.text.confined import CallLimits, Confined

_MAX_TEXT: Final = 1 << 20
_HINT: Final = "Use the chat_template.jinja of the model that this one was made from."
_child: Final = Confined(prompt_process.CHILD, "The chat template")
_LIMITS: Final = CallLimits(cpu_s=2)


def rendered(
    source: str,
    conversations: Sequence[Sequence[Mapping[str, str]]],
    special_tokens: Mapping[str, str],
    *,
    add_generation_prompt: bool = True,
) -> list[str]:
    """Render each conversation as transformers' apply_chat_template does; empty if it is refused.

    Half of a surrogate pair becomes U+FFFD, as in every prompt.

    Raises:
        CheckpointError: The first conversation is refused, or a limit was reached: 2 s of CPU time, 1 GiB.
        HostError: The process cannot be started.
    """
    if len(source) > MAX_TEMPLATE:
        raise CheckpointError(f"The chat template has more than {MAX_TEMPLATE:,} characters.", hint=_HINT)
    try:
        outcomes = prompt_process.render(
            _child, source, conversations, special_tokens, _LIMITS, add_generation_prompt=add_generation_prompt
        )
    except BundleError as error:
        raise CheckpointError(error.message, hint=_HINT) from error
    if "error" in outcomes[0]:
        raise CheckpointError(f"The chat template cannot be rendered: {outcomes[0]['error']}.", hint=_HINT)
    if any(len(outcome.get("text", "")) > _MAX_TEXT for outcome in outcomes):
        raise CheckpointError(
            f"The chat template turns one message into more than {_MAX_TEXT:,} characters.", hint=_HINT
        )
    return [well_formed(outcome.get("text", "")) for outcome in outcomes]


def encoded(
    tokenizer: bytes,
    where: object,
    template: tuple[str, str, Mapping[str, str]],
    questions: Mapping[str, str],
    max_context: int,
) -> dict[str, tuple[list[int], list[int]]]:
    """Return ids of questions in the template, as a board makes them, and of a text for each, if they fit the context.

    Args:
        tokenizer, where: See `try_out`.
        template: The template's source, system role and special tokens, likewise.
        questions: The texts, by question.

    Raises:
        CheckpointError: A prompt cannot be built.
        HostError: The process cannot be started.
    """
    try_out(tokenizer, where, *template)
    found = {}
    for question, text in questions.items():
        try:
            messages = [["user", question, None]]
            prompt, _ = _child.call("prompt", _LIMITS, messages=messages, max_context=max_context, drop=False)
            plain, _ = _child.call("encode", _LIMITS, text=text, max_context=max_context, cut=False)
        except ContextFullError:
            continue
        except (BundleError, UsageError) as error:
            raise CheckpointError(error.message, hint=_HINT) from error
        found[question] = prompt["tokens"], plain["tokens"]
    return found


def try_out(tokenizer: bytes, where: object, source: str, system_role: str, special_tokens: Mapping[str, str]) -> None:
    """Build prompts as the board will.

    Args:
        tokenizer: Content of tokenizer.json; `where` names its origin in messages.

    Raises:
        CheckpointError: A prompt cannot be built.
        HostError: The process cannot be started.
    """
    try:
        prompt_process.open_in(_child, tokenizer, where, source, system_role, special_tokens)
    except BundleError as error:
        raise CheckpointError(error.message, hint=error.hint) from error
