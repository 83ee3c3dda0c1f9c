"""Conversations through a checkpoint's chat template, which is a program of a stranger's.

Jinja's sandbox keeps it from everything outside, but lets it loop and grow for ever. So what came with a checkpoint is
tried out first in a process of its own, with limits: `rendered_apart`.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from typing import Any, Final

from rkruntime.errors import CheckpointError
from rkruntime.template import template_environment

_EOS: Final = "<eos>"
_MAX_TEMPLATE: Final = 1 << 20
_MAX_TEXT: Final = 1 << 20
_SECONDS: Final = 2
_MEMORY: Final = 1 << 30


def render(
    source: str, messages: Sequence[Mapping[str, str]], bos_token: str, *, add_generation_prompt: bool = True
) -> str:
    """A conversation as text, as transformers' apply_chat_template gives it; CheckpointError if that cannot be done."""
    if len(source) > _MAX_TEMPLATE:
        raise CheckpointError(f"The chat template has over {_MAX_TEMPLATE:,} characters.")
    try:
        text = (
            template_environment()
            .from_string(source)
            .render(messages=messages, bos_token=bos_token, eos_token=_EOS, add_generation_prompt=add_generation_prompt)
        )
    except Exception as error:  # A template can do anything that Python can do wrong.
        raise CheckpointError(
            f"The chat template cannot be rendered: {str(error)[:500] or type(error).__name__}."
        ) from error
    return text


def rendered_apart(source: str, conversations: Sequence[Sequence[Mapping[str, str]]], bos: str) -> list[str]:
    """Each conversation rendered in a process that may take 2 s of computing and 1 GiB; empty where it is refused.

    Raises:
        CheckpointError: the first conversation is refused, or the process came to its limits.
    """
    outcomes = json.loads(_answer(json.dumps([source, conversations, bos])))
    if "error" in outcomes[0]:
        raise CheckpointError(outcomes[0]["error"])
    return [outcome.get("text", "") for outcome in outcomes]


@cache
def _answer(question: str) -> str:
    child = [sys.executable, "-I", "-m", __name__]
    try:
        done = subprocess.run(
            child, input=question, capture_output=True, text=True, encoding="utf-8", timeout=50 * _SECONDS
        )
    except subprocess.TimeoutExpired:
        done = None
    if done is None or done.returncode:
        raise CheckpointError(
            f"The chat template cannot be rendered: it takes more than {_SECONDS} seconds of computing or"
            f" {_MEMORY >> 30} GiB of memory for a conversation of one message.",
            hint="Use the chat_template.jinja of the model that this one was made from.",
        )
    return done.stdout


def _outcome(source: str, messages: Any, bos: str) -> dict[str, str]:
    try:
        text = render(source, messages, bos)
    except CheckpointError as error:
        return {"error": error.message}
    if len(text) > _MAX_TEXT:
        return {"error": f"The chat template makes {len(text):,} characters of one message."}
    return {"text": text}


def _main() -> None:
    resource.setrlimit(resource.RLIMIT_CPU, (_SECONDS, _SECONDS))
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    source, conversations, bos = json.loads(sys.stdin.buffer.read())
    json.dump([_outcome(source, messages, bos) for messages in conversations], sys.stdout)


if __name__ == "__main__":
    _main()
