"""One answer in progress: what a request asks for, and what its run passes to the waiting client."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Protocol, cast

from rkruntime.errors import RKEdgeError, ServiceError
from rkruntime.model import Model
from rkruntime.serve.queue import Client
from rkruntime.text.answer import Answer, AnswerReader

SaveAnswer = Callable[[Answer, bool], Awaitable[None]]


@dataclass(frozen=True)
class Prompt:
    """The start of a run.

    Attributes:
        tokens: The whole prompt.
        begun: Ids of an interrupted answer that is resumed, which end the prompt.
        notes: Notes for the client, such as how many turns were dropped.
    """

    tokens: list[int]
    begun: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class GenerationRequest:
    """A request from any interface.

    Attributes:
        prompt: Makes the prompt once the model is loaded; called in a thread.
        client: The client whose turn the request takes.
        sampling: Values by Sampling's field names; others keep the model's own.
        save: Called once with the answer and whether it is complete, however a run that has begun ends. A cancel must
            not cut the call short. Its exception goes to the client if nothing else went wrong.
    """

    prompt: Callable[[Model], Prompt]
    client: Client
    request_id: str
    max_new_tokens: int | None = None
    stop: tuple[str, ...] = ()
    sampling: Mapping[str, float | int] = field(default_factory=dict)
    save: SaveAnswer | None = None


@dataclass(frozen=True)
class Started:
    """The run has begun: which model answers, which wishes were ignored, and what else the client should know."""

    model: Model
    ignored: tuple[str, ...]
    notes: tuple[str, ...]
    text: str  # what there is of an answer that is resumed; empty for a new answer


@dataclass(frozen=True)
class Outcome:
    """The end of an answer. Times in seconds; `reused` prompt tokens were in the KV cache already."""

    answer: Answer
    reused: int
    queue_s: float
    prefill_s: float
    total_s: float
    emulated: bool


Item = Started | str | Outcome


class Outlet(Protocol):
    """Takes the texts of an answer at once, without waking up a task for them."""

    @property
    def behind(self) -> bool:
        """Whether the client has not yet read what was sent before."""

    def push(self, texts: list[str]) -> bool:
        """Send texts now, unless the client is behind or gone; returns whether they were."""


class Run:
    """One request in progress. Texts that wait for their client are joined, so a slow client does not hold up the NPU.

    Attributes:
        reader: Reader of the answer; set once the prompt is made.
        closing: Set once the run is to stop, for example because its client is gone.
        outlet: Takes texts at once; None if a task takes them with `take`.
    """

    def __init__(self, work: Callable[[Run], Coroutine[Any, Any, None]]) -> None:
        self.reader: AnswerReader | None = None
        self.closing = asyncio.Event()
        self.outlet: Outlet | None = None
        self._items: list[Item] = []
        self._waited_for = self._late = False
        self._error: BaseException | None = None
        self._ended = False
        self._wake = asyncio.Event()
        self._task = asyncio.create_task(work(self))
        self._task.add_done_callback(self._cancelled)

    def _cancelled(self, _: object) -> None:
        if not self._ended:  # before its first step
            self.end(stopped())

    def put(self, item: Item) -> None:
        """Add an item for the client; called by the run's work."""
        self._items.append(item)
        self._wake.set()

    def put_texts(self, texts: list[str]) -> None:
        """Add texts, one for each token."""
        outlet = self.outlet
        if outlet is not None:
            if self._waited_for and not self._items and outlet.push(texts):
                return
            self._late = self._late or outlet.behind
        self._items += texts
        self._wake.set()

    def end(self, error: BaseException | None) -> None:
        """End the items, perhaps with an error; called by the run's work."""
        if error is not None:
            # The traceback's frames would keep the prompt in memory for as long as the run is referenced.
            error.__cause__ = error.__context__ = None
            error = error.with_traceback(None)
        self._error, self._ended = error, True
        self._wake.set()

    async def take(self) -> list[Item]:
        """Wait for items and return them: a Started, texts, an Outcome; none at the end. Raises the run's error.

        There is a text for each token, or a single one if texts have waited for the client.
        """
        self._waited_for = True
        try:
            await self._wake.wait()
        finally:
            self._waited_for = False
        self._wake.clear()
        items, self._items = self._items, []
        items, self._late = _joined(items) if self._late else items, False
        if self._ended:
            self._wake.set()
            if not items and self._error is not None:
                raise self._error
        return items

    async def close(self) -> None:
        """Stop the run if it is in progress, and wait for it; may be called from anywhere, and twice."""
        self.closing.set()
        if not self._task.done():
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)


def _joined(items: Sequence[Item]) -> list[Item]:
    """Return the items with adjacent texts joined."""
    found: list[Item] = []
    for is_text, several in groupby(items, lambda item: isinstance(item, str)):
        group = list(several)
        found += ["".join(cast("list[str]", group))] if is_text else group
    return found


def stopped() -> RKEdgeError:
    """Return the error for an answer that ended although its client did not ask for that."""
    return ServiceError("The answer was stopped before its end.", hint="Ask again.", details={"retry_after_s": 1})
