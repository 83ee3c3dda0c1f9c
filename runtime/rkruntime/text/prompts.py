"""Prompts that fit the context, made of conversations. All of it costs time that grows with what was given, so both
ends are bounded: `rkruntime.text.prompt_process` runs it where it can be ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, Protocol

from rkruntime.errors import BundleError, ContextFullError, UsageError
from rkruntime.text.template import Message, Part, Template
from rkruntime.text.vocabulary import Vocabulary

if TYPE_CHECKING:
    from rkruntime.text.tokenizer import Tokenizer

# A prompt may fill the context but for these (seen: "max context: 1020" for a context of 1024).
RESERVED: Final = 4


class Prompts(Protocol):
    """Makes prompts with a bundle's tokenizer and template."""

    @property
    def vocabulary(self) -> Vocabulary:
        """What ids stand for."""
        ...

    def prompt(self, messages: Sequence[Message], max_context: int, *, drop: bool = False) -> tuple[list[int], int]:
        """Token ids of a conversation up to where its answer begins, and how many turns were dropped for that.

        Args:
            messages: maybe a system message, then user and assistant in turn.
            max_context: in tokens; there is room left for an answer's beginning.
            drop: leave out the oldest turns (a question and its answer) until it fits; the system message stays.

        Raises:
            ContextFullError: it does not fit.
            UsageError: the template does not take these roles.
            BundleError: the template or the tokenizer failed.
        """
        ...

    def check(self, messages: Sequence[Message]) -> None:
        """Raise UsageError if the template does not take these roles."""
        ...

    def encode(self, text: str, max_context: int) -> list[int]:
        """Ids of a plain text, without `<bos>`; never one of a control token.

        Raises:
            ContextFullError: it is certain not to fit.
        """
        ...


class PromptMaker:
    """See `Prompts`."""

    def __init__(self, tokenizer: Tokenizer, template: Template) -> None:
        self._tokenizer, self._template = tokenizer, template

    @property
    def vocabulary(self) -> Vocabulary:
        """See `Prompts`."""
        return self._tokenizer

    def prompt(self, messages: Sequence[Message], max_context: int, *, drop: bool = False) -> tuple[list[int], int]:
        """See `Prompts`."""
        messages = [self._said(message) for message in messages]
        fitting = _Fitting(self._tokenizer, self._template, messages, max_context)
        # A message has a token at least.
        low, high = max(0, len(messages) - max_context + 1) // 2, fitting.turns
        if low and not drop:
            raise _too_long(f"The conversation has {len(messages):,} messages", max_context)
        tokens = fitting.without(low)
        if tokens is not None:
            return tokens, low
        low += 1
        if not drop or (best := fitting.without(high)) is None:
            raise fitting.error(high if drop else 0)
        # Fewer turns have fewer tokens: the least that must go is found by halving.
        while low < high:
            middle = (low + high) // 2
            tokens = fitting.without(middle)
            if tokens is None:
                low = middle + 1
            else:
                best, high = tokens, middle
        return best, high

    def _said(self, message: Message) -> Message:
        """With the ids of its own text only, whoever kept them: a prompt holds nothing that the text does not say."""
        if message.tokens is None or self._tokenizer.saying(message.tokens, message.content) == message.tokens:
            return message
        return replace(message, tokens=None)

    def check(self, messages: Sequence[Message]) -> None:
        """See `Prompts`."""
        self._template.parts(messages)

    def encode(self, text: str, max_context: int) -> list[int]:
        """See `Prompts`."""
        if len(text) > self._tokenizer.longest * max_context:
            raise _too_long(f"The text has {len(text):,} characters", max_context)
        return self._tokenizer.encode(text)

    def try_out(self) -> None:
        """Make some prompts. Raises BundleError if template or tokenizer cannot be used."""
        for roles in ("u", "su", "uau", "suauau"):
            for content in ("Hello, what is this?", " \n two\n\nlines 🙂 ", "x"):
                messages = [Message({"u": "user", "s": "system", "a": "assistant"}[role], content) for role in roles]
                try:
                    self._tokenizer.assemble(self._template.parts(messages))
                except UsageError as error:
                    if roles == "u":
                        raise BundleError(f"The chat template refuses a plain question: {error.message}") from error


class _Fitting:
    """One conversation, its turns left out from the oldest on."""

    def __init__(self, tokenizer: Tokenizer, template: Template, messages: Sequence[Message], max_context: int) -> None:
        self._template, self._longest, self._max_context = template, tokenizer.longest, max_context
        system = 1 if messages and messages[0].role == "system" else 0
        self._system, self._rest = messages[:system], messages[system:]
        self._room = max_context - RESERVED
        # Most texts between control tokens come again with fewer turns: each is encoded once.
        self._encode = lru_cache(maxsize=None)(lambda text: tuple(tokenizer.encode(text)))

    @property
    def turns(self) -> int:
        """How many can be left out."""
        return max(0, len(self._rest) - 1) // 2

    def _parts(self, dropped: int) -> list[Part]:
        return self._template.parts([*self._system, *self._rest[2 * dropped :]])

    def without(self, dropped: int) -> list[int] | None:
        """The prompt without so many turns; None if it does not fit, which is known early."""
        parts = self._parts(dropped)
        if self._least(parts) > self._room:
            return None
        ids: list[int] = []
        for part in parts:
            ids += self._ids(part)
            if len(ids) > self._room:
                return None
        return ids

    def _ids(self, part: Part) -> tuple[int, ...]:
        return self._encode(part) if isinstance(part, str) else (part,) if isinstance(part, int) else part

    def _least(self, parts: Sequence[Part]) -> int:
        """No encoding has fewer tokens."""
        return sum(-(-len(part) // self._longest) if isinstance(part, str) else len(self._ids(part)) for part in parts)

    def error(self, dropped: int) -> ContextFullError:
        """What to say if it does not fit."""
        parts = self._parts(dropped)
        if (least := self._least(parts)) > self._room:
            return _too_long(f"The conversation has at least {least:,} tokens with this message", self._max_context)
        count = sum(len(self._ids(part)) for part in parts)
        what = f"The conversation has {count:,} tokens with this message"
        return _too_long(what, self._max_context, prompt_tokens=count)


def _too_long(what: str, max_context: int, **details: Any) -> ContextFullError:
    return ContextFullError(
        f"{what}; the context holds {max_context:,}, of which {RESERVED} are the runtime's own.",
        details={**details, "max_context": max_context},
    )
