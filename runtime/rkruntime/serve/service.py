"""One request's way: its turn in the queue, the model, the run, and text as it comes. The interfaces stand on this."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass, field, replace
from typing import Any, Final

from rkruntime.answer import Answer, AnswerReader
from rkruntime.conversation import RESERVED
from rkruntime.errors import BodyError, ContextFullError, RKEdgeError, TimeLimitError, WorkerError
from rkruntime.generation import GREEDY, Request, Sampling
from rkruntime.serve.host import Host, Model
from rkruntime.serve.memory import AnswerMemory
from rkruntime.serve.metrics import Metrics
from rkruntime.serve.prompt_cache import PromptCaches
from rkruntime.serve.queue import FairQueue
from rkruntime.serve.sessions import SessionStore
from rkruntime.serve.settings import Settings, state_folder

log = logging.getLogger("rkedge")

# The first release whose run takes sampling and a limit of its own.
PER_RUN_SAMPLING: Final = (1, 3, 0)
_FIELDS: Final = ("temperature", "top_k", "top_p", "repeat_penalty", "frequency_penalty", "presence_penalty")


@dataclass(frozen=True)
class Prompt:
    """What a run starts from.

    Attributes:
        tokens: the whole prompt.
        begun: ids of an answer that was broken off, which are the prompt's end: it is taken up behind them.
        notes: for the client, such as how many turns were dropped.
    """

    tokens: list[int]
    begun: tuple[int, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Ask:
    """A request, whatever interface it came by.

    Attributes:
        prompt: makes the prompt once the model is there.
        client: whose turn it is.
        sampling: names of Sampling's fields and what they shall be; None is the model's own.
    """

    prompt: Callable[[Model], Prompt]
    client: str
    request_id: str
    max_new_tokens: int | None = None
    stop: tuple[str, ...] = ()
    sampling: Mapping[str, float | int | None] = field(default_factory=dict)


@dataclass(frozen=True)
class Begin:
    """The first event is there: what was asked for and cannot be had, and what else the client should know."""

    ignored: tuple[str, ...]
    notes: tuple[str, ...]
    text: str  # of the answer that is taken up, empty for a new one


@dataclass(frozen=True)
class Outcome:
    """The end of an answer. Times in seconds; `reused` prompt tokens were in the KV cache already."""

    answer: Answer
    reused: int
    queue_s: float
    prefill_s: float
    total_s: float
    emulated: bool


Item = Begin | str | Outcome


class _Channel:
    """From the run to the client: what has gathered is taken at once, so a slow client costs the NPU nothing."""

    def __init__(self) -> None:
        self._items: list[Item] = []
        self._error: BaseException | None = None
        self._closed = False
        self._wake = asyncio.Event()

    def put(self, item: Item) -> None:
        self._items.append(item)
        self._wake.set()

    def close(self, error: BaseException | None) -> None:
        self._error, self._closed = error, True
        self._wake.set()

    async def take(self) -> list[Item]:
        """All that is there, at least one; empty at the end. Raises what ended the run."""
        await self._wake.wait()
        self._wake.clear()
        items, self._items = self._items, []
        if self._closed:
            self._wake.set()
            if not items and self._error is not None:
                raise self._error
        return items


class Service:
    """The daemon without its sockets."""

    def __init__(self, settings: Settings, host: Host | None = None) -> None:
        self.settings = settings
        self.host = host or Host(settings)
        self.queue = FairQueue(settings.limits.queue, settings.limits.wait_s)
        self.memory = AnswerMemory()
        self.sessions = SessionStore(
            settings.sessions.folder or state_folder("state") / "sessions", int(settings.sessions.max_mb * 1e6)
        )
        self.caches = PromptCaches(
            settings.prompt_cache.folder or state_folder("cache") / "prompts",
            settings.prompt_cache.max_mb,
            settings.prompt_cache.min_tokens,
        )
        self.metrics = Metrics(self)
        self.last_used = time.monotonic()

    async def stream(self, ask: Ask) -> AsyncGenerator[list[Item], None]:
        """What there is of the answer, in lists: a Begin, texts, an Outcome. Closing it early stops the run.

        Raises:
            BusyError, ContextFullError, TimeLimitError, RKEdgeError: before the first list, or within the answer.
        """
        channel = _Channel()
        task = asyncio.create_task(self._run(ask, channel))
        try:
            while items := await channel.take():
                yield items
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task

    async def _run(self, ask: Ask, channel: _Channel) -> None:
        outcome = "cancelled"
        start = time.monotonic()
        try:
            async with self.queue.turn(ask.client) as queue_s:
                limit = self.settings.limits.request_s
                try:
                    await asyncio.wait_for(self._generate(ask, channel, queue_s), limit)
                except asyncio.TimeoutError:
                    raise TimeLimitError(f"The answer took longer than {limit:g} seconds and was stopped.") from None
            outcome = "ok"
            channel.close(None)
        except RKEdgeError as error:
            outcome = type(error).__name__
            channel.close(error)
        except asyncio.CancelledError as error:
            channel.close(error)
            raise
        except Exception as error:
            outcome = "bug"
            log.exception("request %s", ask.request_id)
            channel.close(error)
        finally:
            self.last_used = time.monotonic()
            self.metrics.ended(outcome, time.monotonic() - start)

    async def _generate(self, ask: Ask, channel: _Channel, queue_s: float) -> None:
        start = time.monotonic()
        model = await self.host.model()
        prompt = ask.prompt(model)
        request, ignored = self._request(ask, model, prompt)
        reader = AnswerReader(model.tokenizer, len(prompt.tokens), ask.stop, prompt.begun)
        begin = Begin(ignored, prompt.notes, reader.text)
        began, first = time.monotonic(), 0.0
        try:
            request = await self.caches.prepare(model, request)
            async with aclosing(model.engine.agenerate(request)) as events:
                async for event in events:
                    if not first:
                        first = time.monotonic()
                        channel.put(begin)
                    if text := reader.feed(event):
                        channel.put(text)
                    if reader.done:
                        break
        except WorkerError as error:
            await self.host.lost(error)
            raise
        answer = reader.answer()
        self.host.succeeded()
        reused = self.caches.finished(model, request, answer)
        now = time.monotonic()
        outcome = Outcome(answer, reused, queue_s, (first or now) - began, now - start, model.engine.info.emulated)
        self._report(ask, outcome)
        channel.put(outcome)

    def _request(self, ask: Ask, model: Model, prompt: Prompt) -> tuple[Request, tuple[str, ...]]:
        room = model.engine.info.max_context - RESERVED
        if len(prompt.tokens) > room:
            raise ContextFullError(
                f"The prompt has {len(prompt.tokens):,} tokens; the context has room for {room:,}.",
                details={"prompt_tokens": len(prompt.tokens), "max_context": model.engine.info.max_context},
            )
        limits = [count for count in (ask.max_new_tokens, self.settings.limits.max_new_tokens) if count]
        sampling, ignored = self._sampling(ask, model)
        left = min(limits) - len(prompt.begun) if limits else -1
        return Request(prompt.tokens, left, model.stop_tokens, sampling), ignored

    def _sampling(self, ask: Ask, model: Model) -> tuple[Sampling | None, tuple[str, ...]]:
        """The run's sampling where the runtime takes one; else what of it must be ignored."""
        wanted = {name: ask.sampling[name] for name in _FIELDS if ask.sampling.get(name) is not None}
        changed = resolve_sampling(model.sampling, wanted)
        if changed == model.sampling:
            return None, ()
        if tuple(map(int, model.engine.info.release.split("b")[0].split("."))) >= PER_RUN_SAMPLING:
            return changed, ()
        names = tuple(wanted)
        if self.settings.per_request_sampling == "refuse":
            raise BodyError(
                f"{', '.join(names)}: RKLLM {model.engine.info.release} takes sampling when it loads a model only; "
                "per request it needs 1.3.0.",
                hint="Leave it out, or set it in the daemon's settings.",
                details={"param": names[0]},
            )
        return None, names

    def _report(self, ask: Ask, outcome: Outcome) -> None:
        answer = outcome.answer
        self.metrics.answered(outcome)
        log.info(
            "request %s: %d prompt tokens (%d reused), %d generated, %s, queued %.3f s, first token %.3f s, %.3f s",
            ask.request_id,
            answer.prompt_tokens,
            outcome.reused,
            len(answer.tokens),
            answer.reason.value,
            outcome.queue_s,
            outcome.prefill_s,
            outcome.total_s,
        )
        if self.settings.log_prompts:
            log.info("request %s answered: %r", ask.request_id, answer.text)

    async def change(self, settings: Settings) -> None:
        """Take other settings between two answers. Raises RKEdgeError; then the old ones stay."""
        async with self.queue.turn("daemon"):
            if self.host.needs_load(settings):
                await self.host.change(settings)
                self.memory.clear()
                self.caches.forget()
            else:
                self.host.settings = settings
            self.settings = settings
            self.queue.length, self.queue.wait_s = settings.limits.queue, settings.limits.wait_s

    async def unload_if_idle(self) -> None:
        """Free the NPU if nobody has asked for long enough."""
        limit = self.settings.idle_unload_s
        if limit and self.host.current and not self.queue.busy and time.monotonic() - self.last_used > limit:
            async with self.queue.turn("daemon"):
                await self.host.unload()
                self.caches.forget()


def resolve_sampling(base: Sampling, wanted: Mapping[str, Any]) -> Sampling:
    """`base` with a request's wishes put over it; a temperature or top_p of 0 is greedy in every respect."""
    if wanted.get("temperature") == 0 or wanted.get("top_p") == 0:
        return GREEDY
    if base == GREEDY and wanted.get("temperature") is not None:
        base = Sampling()
    return replace(base, **wanted)
