"""The child process of `rkruntime.text.prompt_process`, which runs a bundle's tokenizer and template.

Libraries are imported within the calls, so that an answer can name a library that is missing.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from rkruntime.printable import one_line
from rkruntime.text.confined import Answer, serve
from rkruntime.text.template import Message, load_template


class _Served:
    """Functions that the parent calls."""

    def __init__(self) -> None:
        self._tokenizer: Any = None
        self._maker: Any = None

    def load(self, given: dict[str, Any], data: bytes) -> Answer:
        """Read tokenizer.json; returns its vocabulary."""
        from rkruntime.text.tokenizer import Tokenizer

        self._tokenizer = Tokenizer.parse(data, Path(given["path"]))
        return {"control": self._tokenizer.control}, self._tokenizer.pack()

    def open(self, given: dict[str, Any], data: bytes) -> Answer:
        """Try out a template with the tokenizer."""
        from rkruntime.text.prompts import PromptMaker

        template = load_template(given["template"], given["system_role"], given["special_tokens"], self._tokenizer)
        self._maker = PromptMaker(self._tokenizer, template)
        self._maker.try_out()
        return {}, b""

    def prompt(self, given: dict[str, Any], data: bytes) -> Answer:
        """See `PromptProcess.prompt`."""
        tokens, dropped = self._maker.prompt(_messages(given), given["max_context"], drop=given["drop"])
        return {"tokens": tokens, "dropped": dropped}, b""

    def check(self, given: dict[str, Any], data: bytes) -> Answer:
        """See `PromptProcess.check`."""
        self._maker.check(_messages(given))
        return {}, b""

    def encode(self, given: dict[str, Any], data: bytes) -> Answer:
        """See `PromptProcess.encode`."""
        return {"tokens": self._maker.encode(given["text"], given["max_context"], cut=given["cut"])}, b""

    def render(self, given: dict[str, Any], data: bytes) -> Answer:
        """See `render`."""
        outcomes = [_outcome(given, messages) for messages in given["conversations"]]
        return {"outcomes": outcomes}, b""


def _outcome(given: dict[str, Any], messages: Any) -> dict[str, str]:
    try:
        program = _program(given["template"])
        asked = given["add_generation_prompt"]
        return {"text": program.render(messages, given["special_tokens"], add_generation_prompt=asked)}
    except MemoryError:
        raise
    except Exception as error:  # A template can fail in any way that Python can.
        return {"error": f"{type(error).__name__}: {one_line(str(error))[:500]}"}


@lru_cache(maxsize=2)
def _program(source: str) -> Any:
    from rkruntime.text.chat_jinja import Program

    return Program(source)


def _messages(given: dict[str, Any]) -> list[Message]:
    return [
        Message(role, content, None if tokens is None else tuple(tokens)) for role, content, tokens in given["messages"]
    ]


def main() -> None:
    """Run the child."""
    served = _Served()
    functions = (served.load, served.open, served.prompt, served.check, served.encode, served.render)
    serve({function.__name__: function for function in functions})
