"""A chat with a model on this machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from rkruntime.bundle.manifest import Bundle
from rkruntime.chat.repl import Note, Turn
from rkruntime.engine.generation import FinishReason, Request
from rkruntime.errors import ContextFullError, WorkerError
from rkruntime.text.answer import Answer, AnswerReader
from rkruntime.text.conversation import Conversation
from rkruntime.text.prompt_process import PromptProcess
from rkruntime.words import counted, dropped_turns

if TYPE_CHECKING:
    from rkruntime.engine.engine import Engine


class LocalChat:
    """See `rkruntime.chat.repl.ChatBackend`.

    Args:
        bundle: Bundle whose tokenizer, template and stop tokens are used.
        load: Starts the worker and loads the model; called again after the worker is gone.
        max_new_tokens: Limit per answer; -1 for as many as the context holds.
        drop_oldest: Drop the oldest turns when the context is full.
    """

    def __init__(
        self,
        bundle: Bundle,
        load: Callable[[], Engine],
        *,
        system: str = "",
        max_new_tokens: int = -1,
        drop_oldest: bool = False,
    ) -> None:
        self._load = load
        self._prompts = PromptProcess(bundle)
        self._conversation = Conversation(self._prompts, system)
        self._stop_tokens = frozenset(bundle.manifest.stop_token_ids)
        self._max_new_tokens = max_new_tokens
        self._drop_oldest = drop_oldest
        try:
            self._engine: Engine | None = load()
        except BaseException:  # The prompts' process must end with it, even after Ctrl-C.
            self._prompts.close()
            raise
        self._answered = self._generated = 0
        self.last: Turn | None = None
        info = self._engine.info
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
        engine = self._running_engine()
        tokens, dropped = self._conversation.prompt(text, engine.info.max_context, drop=self._drop_oldest)
        if dropped:
            yield Note(f"The context was full: {dropped_turns(dropped)}.")
        reader = AnswerReader(self._prompts.vocabulary, len(tokens))
        start = time.monotonic()
        first = 0.0
        failed = False
        try:
            with closing(engine.generate(self._request(tokens))) as events:
                for event in events:
                    first = first or time.monotonic() - start
                    if piece := reader.feed(event):
                        yield piece
        except WorkerError:
            failed, self._engine = True, None
            raise
        except Exception:  # After any error the turn is dropped; after Ctrl-C what there is is kept.
            failed = True
            raise
        finally:
            if not failed:
                self._keep(text, reader.answer(), dropped, first, time.monotonic() - start)

    def _request(self, tokens: list[int]) -> Request:
        return Request(tokens, max_new_tokens=self._max_new_tokens, stop_tokens=self._stop_tokens)

    def _running_engine(self) -> Engine:
        if self._engine is None or not self._engine.alive:
            self._engine = self._load()
        return self._engine

    def _keep(self, text: str, answer: Answer, dropped: int, first_s: float, total_s: float) -> None:
        self.last = Turn(len(answer.tokens), answer.reason, first_s, answer.rate(first_s, total_s))
        self._answered += 1
        self._generated += self.last.tokens
        if answer.tokens or answer.reason is not FinishReason.ABORT:  # As the daemon does: nothing said is an answer.
            self._conversation.add(text, answer, dropped)

    def stop(self) -> None:
        """See `ChatBackend`."""
        if self._engine is not None:
            self._engine.abort()

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
        limit = self._running_engine().info.max_context
        try:
            return f"{len(self._conversation.prompt('', limit)[0]):,} of {limit:,}"
        except ContextFullError:
            return f"all of {limit:,}"

    def close(self) -> None:
        """End the worker and the process that makes prompts."""
        self._prompts.close()
        if self._engine is not None:
            self._engine.close()
