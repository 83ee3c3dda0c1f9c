"""A chat with a model on this machine."""

from __future__ import annotations

import logging
import time
from collections.abc import Generator, Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from rkruntime.bundle.manifest import Bundle
from rkruntime.chat.repl import Note, Turn
from rkruntime.engine.generation import FinishReason, Request
from rkruntime.errors import ContextFullError, RKEdgeError, WorkerError
from rkruntime.stop import Stop
from rkruntime.text.answer import Answer, AnswerReader
from rkruntime.text.conversation import Conversation
from rkruntime.text.prompt_process import open_beside
from rkruntime.words import counted, dropped_turns

if TYPE_CHECKING:
    from rkruntime.engine.engine import Engine

log = logging.getLogger("rkedge")


class Load(Protocol):
    """Starts the worker and loads the model."""

    def __call__(self, *, stop: Stop = ...) -> Engine:
        """See LoadOptions for `stop`."""
        ...


class LocalChat:
    """See `rkruntime.chat.repl.ChatBackend`.

    Args:
        bundle: Bundle whose tokenizer, template and stop tokens are used.
        load: Called again after the worker is gone.
        max_new_tokens: Limit per answer; -1 for as many as the context holds.
        drop_oldest: Drop the oldest turns when the context is full.
    """

    def __init__(
        self,
        bundle: Bundle,
        load: Load,
        *,
        system: str = "",
        max_new_tokens: int = -1,
        drop_oldest: bool = False,
    ) -> None:
        self._load = load
        self._engine: Engine | None
        self._prompts, self._engine = open_beside(bundle, lambda stop: load(stop=stop))
        self._conversation = Conversation(self._prompts, system)
        self._stop_tokens = frozenset(bundle.manifest.stop_token_ids)
        self._max_new_tokens = max_new_tokens
        self._drop_oldest = drop_oldest
        self._answered = self._generated = 0
        self.last: Turn | None = None
        # Stops the current answer; None if there is none.
        self._stop: Stop | None = None
        # The engine that is answering; None once it was killed.
        self._answering: Engine | None = None
        info = self._engine.info
        self._max_context = info.max_context
        self.emulated = info.emulated
        kind = f"emulated runtime {info.release}" if info.emulated else f"runtime {info.release}"
        self.title = f"{bundle.manifest.name}: {kind}, context of {info.max_context:,} tokens"

    @property
    def system(self) -> str:
        """See `ChatBackend`."""
        return self._conversation.system

    def set_system(self, text: str) -> None:
        """See `ChatBackend`."""
        self._conversation.system = text

    def ask(self, text: str) -> Generator[str | Note, None, None]:
        """See `ChatBackend`.

        Raises:
            ContextFullError, RunError, WorkerError: The conversation stays as it was.
        """
        stop = self._stop = Stop()
        self.last = Turn(0, FinishReason.ABORT, 0.0, 0.0)
        try:
            prepared = self._prepared(text, stop)
            if prepared is not None:
                yield from self._answer(text, stop, *prepared)
        finally:
            self._stop = None

    def _prepared(self, text: str, stop: Stop) -> tuple[Engine, list[int], int] | None:
        """Return the model, the prompt, and the number of turns left out of it; None if stopped meanwhile."""
        try:
            engine = self._running_engine(stop)
            with stop.ending(self._prompts.hurry):
                return engine, *self._conversation.prompt(text, self._max_context, drop=self._drop_oldest)
        except RKEdgeError:
            if stop.asked:
                return None
            raise

    def _answer(
        self, text: str, stop: Stop, engine: Engine, tokens: list[int], dropped: int
    ) -> Generator[str | Note, None, None]:
        if dropped:
            yield Note(f"The context was full: {dropped_turns(dropped)}.")
        reader = AnswerReader(self._prompts.vocabulary, len(tokens))
        request = Request(tokens, max_new_tokens=self._max_new_tokens, stop_tokens=self._stop_tokens)
        start = time.monotonic()
        first = 0.0
        failed, self._answering = False, engine
        try:
            with closing(engine.generate(request, stop)) as events:
                for event in events:
                    first = first or time.monotonic() - start
                    if piece := reader.feed(event):
                        yield piece
        except Exception:  # An error drops the turn; Ctrl-C, even twice, keeps what there is.
            failed = not stop.asked or self._answering is engine
            if failed:
                raise
        finally:
            self._answering = None
            if not failed:
                self._keep(text, reader.answer(), dropped, first, time.monotonic() - start)

    def _running_engine(self, stop: Stop) -> Engine:
        if self._engine is None or not self._engine.alive:
            if self._engine is not None:
                _say_why(self._engine)
                self._engine.close()
            self._engine = self._load(stop=stop)
            self._max_context = self._engine.info.max_context
        return self._engine

    def _keep(self, text: str, answer: Answer, dropped: int, first_s: float, total_s: float) -> None:
        self.last = Turn(len(answer.tokens), answer.reason, first_s, answer.rate(first_s, total_s))
        self._answered += 1
        self._generated += self.last.tokens
        if answer.tokens or answer.reason is not FinishReason.ABORT:  # As in the daemon, an empty answer counts.
            self._conversation.add(text, answer, dropped)

    def stop(self) -> None:
        """See `ChatBackend`. The second time, the worker is killed: the next question loads the model again."""
        stop, engine = self._stop, self._answering
        if stop is None:
            return
        if stop.asked and engine is not None:
            self._answering = None
            engine.kill()
        stop.ask()

    def clear(self) -> None:
        """See `ChatBackend`."""
        self._conversation.clear()

    def take_back(self) -> str | None:
        """See `ChatBackend`."""
        return self._conversation.take_back()

    def save(self, path: Path) -> None:
        """See `ChatBackend`."""
        self._conversation.save(path)

    def load(self, path: Path) -> None:
        """See `ChatBackend`."""
        self._conversation.load(path)

    def stats(self) -> Mapping[str, str]:
        """See `ChatBackend`."""
        return {
            "model": self.title,
            "answers": f"{self._answered}, {counted(self._generated, 'token')} generated",
            "context": f"{self._used()} tokens used, {counted(len(self._conversation.messages) // 2, 'turn')}",
            "last answer": self.last.summary(self.emulated) if self.last else "(none)",
        }

    def _used(self) -> str:
        limit = self._max_context
        try:
            return f"{len(self._conversation.prompt('', limit)[0]):,} of {limit:,}"
        except ContextFullError:
            return f"all of {limit:,}"

    def close(self) -> None:
        """End the worker and the process that makes prompts."""
        self._prompts.close()
        if self._engine is not None:
            self._engine.close()


def _say_why(engine: Engine) -> None:
    """Log why the worker of an engine is gone, unless it was stopped."""
    try:
        engine.check()
    except WorkerError as error:
        log.warning("%s The model is loaded again.", error.message)
    except RKEdgeError:
        pass
