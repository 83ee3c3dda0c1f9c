"""Turn the events of a run into an answer: whole characters, stop strings, counts, and why it ended."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Generator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from rkruntime.engine.generation import Event, Finished, FinishReason, Perf, Request, Token
from rkruntime.errors import RunError
from rkruntime.text.vocabulary import Detokenizer, Vocabulary

if TYPE_CHECKING:
    from rkruntime.engine.engine import Engine

# Why an answer is not whole, in words.
UNFINISHED: Final[Mapping[FinishReason, str]] = {
    FinishReason.LENGTH: "the limit of tokens was reached",
    FinishReason.ABORT: "stopped",
    FinishReason.PAUSE: "paused",
}


@dataclass(frozen=True)
class Answer:
    """A finished answer.

    Attributes:
        text: Text without the stop string, if one ended it.
        tokens: Every generated id, including those from the stop string on, as they too are in the KV cache.
        prompt_tokens: Tokens of the prompt, without those of a resumed answer.
        perf: The runtime's own figures, if it has any and the run was not cut short.
        begun: Number of `tokens` that come from an earlier, interrupted run.
    """

    text: str
    tokens: tuple[int, ...]
    reason: FinishReason
    prompt_tokens: int
    perf: Perf | None = None
    begun: int = 0

    def rate(self, first_token_s: float, total_s: float) -> float:
        """Return tokens per second: the runtime's own figure if it has one, else measured from the first token."""
        if self.perf and self.perf.generate_ms > 0:
            return self.perf.generate_tokens / self.perf.generate_ms * 1000
        seconds = total_s - first_token_s
        return (len(self.tokens) - self.begun - 1) / seconds if seconds > 0 else 0.0


class StopStrings:
    """Cut a text at the first of some strings, even one spread over several pieces.

    Text is held back only while it may be the beginning of one of the strings.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self._strings = tuple(string for string in strings if string)
        self._held = ""
        self.found: str | None = None

    def push(self, text: str) -> str:
        """Add `text`; return what is now certain to be part of the answer, nothing once a string was found."""
        if not self._strings:
            return text
        if self.found is not None:
            return ""
        text = self._held + text
        hits = [(at, string) for string in self._strings if (at := text.find(string)) >= 0]
        if hits:
            at, self.found = min(hits)
            self._held = ""
            return text[:at]
        keep = max(self._overlap(text, string) for string in self._strings)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    @staticmethod
    def _overlap(text: str, string: str) -> int:
        """Return the length of the longest proper prefix of `string` that `text` ends with."""
        longest = min(len(text), len(string) - 1)
        return next((size for size in range(longest, 0, -1) if text.endswith(string[:size])), 0)

    def finish(self) -> str:
        """Return the text that was held back and is part of the answer after all."""
        held, self._held = self._held, ""
        return held


class AnswerReader:
    """Turn the events of one run into the text they add.

    Args:
        prompt_tokens: Tokens of the run's prompt, including `begun`.
        begun: Ids of an interrupted answer that this run resumes; they precede the run's own ids.

    Attributes:
        done: Whether no further event is needed: the run has ended, or a stop string was found.
    """

    def __init__(
        self, vocabulary: Vocabulary, prompt_tokens: int, stop: Sequence[str] = (), begun: Sequence[int] = ()
    ) -> None:
        self._vocab_size = vocabulary.vocab_size
        self._detokenizer = Detokenizer(vocabulary)
        self._stops, self._may_stop = StopStrings(stop), any(stop)
        self._prompt_tokens = prompt_tokens
        self._text: list[str] = []
        self._tokens: list[int] = []
        self._finished: Finished | None = None
        self._begun = len(begun)
        self.done = False
        for token_id in begun:
            self.feed(Token(token_id))

    @property
    def text(self) -> str:
        """The text that is certain so far."""
        return "".join(self._text)

    @property
    def tokens(self) -> int:
        """Number of tokens generated so far."""
        return len(self._tokens)

    @property
    def generated(self) -> int:
        """Number of `tokens` that this run has generated."""
        return len(self._tokens) - self._begun

    def feed(self, event: Event) -> str:
        """Return the text that this event adds, often none. Raises RunError for an id outside the vocabulary."""
        if isinstance(event, Finished):
            self._finished, self.done = event, True
            return self._flush()
        if event.token_id >= self._vocab_size:
            raise RunError(
                f"The runtime reported the token id {event.token_id:,}, but the model has only {self._vocab_size:,}.",
                hint="The model file and its tokenizer may be from different models: convert again.",
            )
        self._tokens.append(event.token_id)
        text = self._detokenizer.push(event.token_id)
        if self._may_stop:
            text = self._stops.push(text)
            self.done = self._stops.found is not None
        self._text.append(text)
        return text

    def _flush(self) -> str:
        text = self._stops.push(self._detokenizer.finish()) + self._stops.finish()
        self._text.append(text)
        return text

    def answer(self) -> Answer:
        """Return the answer so far, with the reason ABORT if neither the run nor a stop string has ended it."""
        if self._finished is None and self._stops.found is None:
            self._flush()
        reason = FinishReason.ABORT if self._finished is None else self._finished.reason
        return Answer(
            text=self.text,
            tokens=tuple(self._tokens),
            reason=FinishReason.STOP if self._stops.found is not None else reason,
            prompt_tokens=(self._finished.prompt_tokens if self._finished else self._prompt_tokens) - self._begun,
            perf=self._finished.perf if self._finished else None,
            begun=self._begun,
        )


def stream_answer(
    engine: Engine, request: Request, vocabulary: Vocabulary, stop: Sequence[str] = ()
) -> Generator[str | Answer, None, None]:
    """Yield pieces of text as they become certain, then the Answer. Closing it early, or a stop string, aborts the run.

    Raises:
        RunError, WorkerError: From the engine.
    """
    reader = AnswerReader(vocabulary, len(request.tokens), stop)
    events = engine.generate(request)
    try:
        for event in events:
            if text := reader.feed(event):
                yield text
            if reader.done:
                break
    finally:
        events.close()
    yield reader.answer()


async def astream_answer(
    engine: Engine, request: Request, vocabulary: Vocabulary, stop: Sequence[str] = ()
) -> AsyncGenerator[str | Answer, None]:
    """Like `stream_answer`, for asyncio."""
    reader = AnswerReader(vocabulary, len(request.tokens), stop)
    async with aclosing(engine.agenerate(request)) as events:
        async for event in events:
            if text := reader.feed(event):
                yield text
            if reader.done:
                break
    yield reader.answer()
