"""Make prompts that fit the context from conversations. The time this takes grows with the input, so it is bounded:
`rkruntime.text.prompt_process` runs this module where it can be killed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Protocol

from rkruntime.engine.generation import RESERVED
from rkruntime.errors import BundleError, ContextFullError, UsageError
from rkruntime.text.template import Message, Template
from rkruntime.text.vocabulary import Vocabulary

if TYPE_CHECKING:
    from rkruntime.text.tokenizer import Part, Tokenizer


class Prompts(Protocol):
    """Make prompts with a bundle's tokenizer and template."""

    @property
    def vocabulary(self) -> Vocabulary:
        """The meaning of token ids."""
        ...

    def prompt(self, messages: Sequence[Message], max_context: int, *, drop: bool = False) -> tuple[list[int], int]:
        """Return token ids of a conversation up to its answer, and how many turns were dropped to make room.

        Args:
            messages: Optionally a system message, then user and assistant alternating.
            max_context: Context in tokens; a few are kept free for the beginning of an answer.
            drop: Drop the oldest turns (a question and its answer) until the prompt fits; the system message stays.

        Raises:
            ContextFullError: The prompt does not fit.
            UsageError: The template does not accept these roles.
            BundleError: The template or the tokenizer failed.
        """
        ...

    def check(self, messages: Sequence[Message]) -> None:
        """Raise UsageError if the template does not accept these roles."""
        ...

    def encode(self, text: str, max_context: int, *, cut: bool = False) -> list[int]:
        """Return ids of a plain text, without `<bos>`; never the id of a control token.

        Args:
            cut: If the text does not fit, return its first `max_context` ids.

        Raises:
            ContextFullError: The text is certain not to fit.
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
        # A message has at least one token.
        low, high = max(0, len(messages) - max_context + 1) // 2, fitting.turns
        if low and not drop:
            raise _too_long(f"the conversation has {len(messages):,} messages", max_context)
        tokens = fitting.without(low)
        if tokens is not None:
            return tokens, low
        low += 1
        if not drop or (best := fitting.without(high)) is None:
            raise fitting.error(high if drop else 0)
        # Fewer turns have fewer tokens, so a binary search finds how few must go.
        while low < high:
            middle = (low + high) // 2
            tokens = fitting.without(middle)
            if tokens is None:
                low = middle + 1
            else:
                best, high = tokens, middle
        return best, high

    def _said(self, message: Message) -> Message:
        """Drop a message's ids unless they match its text, as a prompt must not contain anything else."""
        if message.tokens is None or self._tokenizer.saying(message.tokens, message.content) == message.tokens:
            return message
        return replace(message, tokens=None)

    def check(self, messages: Sequence[Message]) -> None:
        """See `Prompts`."""
        self._template.parts(messages)

    def encode(self, text: str, max_context: int, *, cut: bool = False) -> list[int]:
        """See `Prompts`."""
        most = self._tokenizer.longest * max_context
        if cut:
            return self._tokenizer.encode(text[:most])[:max_context]
        if len(text) > most:
            raise _too_long(f"the text has {len(text):,} characters", max_context)
        return self._tokenizer.encode(text)

    def try_out(self) -> None:
        """Make some trial prompts. Raises BundleError if template or tokenizer cannot be used."""
        for roles in ("u", "su", "uau", "suauau"):
            made = []
            for content in ("Hello, what is this?", " \n two\n\nlines 🙂 ", "x"):
                messages = [Message({"u": "user", "s": "system", "a": "assistant"}[role], content) for role in roles]
                try:
                    made.append(tuple(self._tokenizer.assemble(self._template.parts(messages))))
                except UsageError as error:
                    if roles == "u":
                        raise BundleError(f"The chat template refuses a plain question: {error.message}") from error
            if len(made) > 1 and len(set(made)) == 1:  # an empty file, for instance
                raise BundleError("The chat template leaves out what is asked: every question has the same prompt.")


class _Fitting:
    """One conversation, whose oldest turns can be left out."""

    def __init__(self, tokenizer: Tokenizer, template: Template, messages: Sequence[Message], max_context: int) -> None:
        self._template, self._longest, self._max_context = template, tokenizer.longest, max_context
        system = 1 if messages and messages[0].role == "system" else 0
        self._system, self._rest = messages[:system], messages[system:]
        self._room = max_context - RESERVED
        # Most texts between control tokens recur with fewer turns, so each is encoded once.
        self._encode = lru_cache(maxsize=None)(lambda text: tuple(tokenizer.encode(text)))

    @property
    def turns(self) -> int:
        """How many turns can be left out."""
        return max(0, len(self._rest) - 1) // 2

    def _parts(self, dropped: int) -> list[Part]:
        return self._template.parts([*self._system, *self._rest[2 * dropped :]])

    def without(self, dropped: int) -> list[int] | None:
        """Return the prompt without the `dropped` oldest turns, or None as soon as it is clear that it does not fit."""
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
        """Return a lower bound on the number of tokens, without encoding the text."""
        return sum(-(-len(part) // self._longest) if isinstance(part, str) else len(self._ids(part)) for part in parts)

    def error(self, dropped: int) -> ContextFullError:
        """Return the error for a prompt that does not fit without the `dropped` oldest turns."""
        parts = self._parts(dropped)
        if (least := self._least(parts)) > self._room:
            return _too_long(f"with this message, the conversation has at least {least:,} tokens", self._max_context)
        count = sum(len(self._ids(part)) for part in parts)
        what = f"with this message, the conversation has {count:,} tokens"
        return _too_long(what, self._max_context, prompt_tokens=count)


def _too_long(what: str, max_context: int, **details: Any) -> ContextFullError:
    # LiteLLM and LangChain recognize a full context by two of these phrases.
    return ContextFullError(
        f"The prompt is too long: {what}, and is longer than the model's context length of {max_context:,} tokens, of"
        f" which the runtime reserves {RESERVED}.",
        details={**details, "max_context": max_context},
    )
