"""Take a request from queue to answer: its turn, the model, the run, and text as it arrives, for all interfaces."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import NamedTuple, TypeVar
from weakref import ref

from rkruntime.abi import within
from rkruntime.bundle.manifest import Manifest
from rkruntime.engine.generation import RESERVED, Event, Finished, FinishReason, Request, Sampling
from rkruntime.engine.worker.encode import PER_RUN_SAMPLING
from rkruntime.errors import (
    BodyError,
    BundleError,
    BusyError,
    ContextFullError,
    RKEdgeError,
    TimeLimitError,
    UsageError,
    WorkerError,
)
from rkruntime.model import Model
from rkruntime.serve.cancel import time_limit
from rkruntime.serve.clocks import Clocks
from rkruntime.serve.host import Host
from rkruntime.serve.memory import AnswerMemory
from rkruntime.serve.metrics import Metrics
from rkruntime.serve.prompt_cache import PromptCaches
from rkruntime.serve.queue import DAEMON, Client, FairQueue
from rkruntime.serve.run import GenerationRequest, Outcome, Prompt, Run, Started, stopped
from rkruntime.serve.sessions import SessionStore
from rkruntime.serve.settings import Settings
from rkruntime.text.answer import AnswerReader
from rkruntime.text.template import Message
from rkruntime.threads import in_thread
from rkruntime.words import counted

log = logging.getLogger("rkedge")

T = TypeVar("T")


class Embedded(NamedTuple):
    """Vectors of texts, float32 in little-endian order; the number of tokens; the model; how many texts were cut."""

    vectors: Sequence[bytes]
    tokens: int
    model: str
    emulated: bool
    cut: int


class Service:
    """The daemon without its sockets.

    Attributes:
        memory: Memory of the answers of the model used last.
    """

    def __init__(self, settings: Settings, host: Host | None = None) -> None:
        self.settings = settings
        self.host = host or Host(settings)
        self.queue = FairQueue(settings.limits.queue, settings.limits.wait_s)
        self.memory: AnswerMemory | None = None
        self._known: ref[Model] | None = None
        self.sessions = SessionStore(
            settings.sessions.place,
            int(settings.sessions.max_mb * 1e6),
            settings.sessions.max_number,
        )
        self.caches = PromptCaches(
            settings.prompt_cache.place,
            settings.prompt_cache.max_mb,
            settings.prompt_cache.min_tokens,
        )
        self.clocks = Clocks(settings.hold_clocks_s)
        self._answering: AnswerReader | None = None
        self.metrics = Metrics(self.queue, self.host, self._begun)
        self.last_used = time.monotonic()
        # How many reloads have ended, and the error of the last one.
        self.reloads = 0
        self.reload_error: RKEdgeError | None = None

    def start(self, wanted: GenerationRequest) -> Run:
        """Queue a request. The caller must close the run."""
        return Run(lambda run: self._run(wanted, run))

    def _begun(self) -> int:
        """Return the number of tokens so far of the answer being computed."""
        reader = self._answering
        return reader.generated if reader else 0

    async def _run(self, wanted: GenerationRequest, run: Run) -> None:
        outcome = "cancelled"
        start = time.monotonic()
        try:
            try:
                async with self.queue.turn(wanted.client) as queue_s:
                    result = await self._answered(wanted, run, queue_s)
            except BaseException:  # Whatever ends the run, even a cancellation: keep what there is of the answer.
                try:
                    await _save(wanted, run.reader)
                except RKEdgeError as error:
                    # The client must hear what interrupted the answer.
                    log.error("request %s: the interrupted answer was not saved: %s", wanted.request_id, error.message)
                raise
            # Saved after the turn, so that others use the NPU meanwhile.
            await _save(wanted, run.reader)
            run.put(result)
            outcome = "ok"
            run.end(None)
        except RKEdgeError as error:
            outcome = type(error).__name__
            # Refusals are only counted by default; a client that keeps asking would fill the log.
            level = logging.DEBUG if isinstance(error, BusyError) else logging.WARNING
            # A template's message can contain the user's words, so only the client gets it.
            said = "" if isinstance(error, (UsageError, BundleError)) else f": {error.message}"
            log.log(level, "request %s: %s%s", wanted.request_id, outcome, said)
            run.end(error)
        except asyncio.CancelledError:
            run.end(stopped())
            raise
        except Exception as error:
            outcome = "bug"
            log.exception("request %s", wanted.request_id)
            run.end(error)
        finally:
            self.last_used = time.monotonic()
            self.metrics.ended(outcome, time.monotonic() - start)

    async def _answered(self, wanted: GenerationRequest, run: Run, queue_s: float) -> Outcome:
        try:
            with _time_limit(self.settings.limits.request_s), self.clocks.held():
                return await self._generate(wanted, run, queue_s)
        finally:
            self._answering = None

    async def _generate(self, wanted: GenerationRequest, run: Run, queue_s: float) -> Outcome:
        start = time.monotonic()
        model = await self._model()
        prompt: Prompt = await self._prepared(model, wanted.prompt, model)
        request, ignored = self._request(wanted, model, prompt)
        reader = AnswerReader(model.prompts.vocabulary, len(prompt.tokens), wanted.stop, prompt.begun)
        run.reader = self._answering = reader
        started = Started(model, ignored, prompt.notes, reader.text)
        if not request.max_new_tokens:
            return self._at_its_limit(run, started, reader, prompt, model, queue_s)
        began, first = time.monotonic(), 0.0

        def take(events: list[Event]) -> bool:
            nonlocal first
            if not first:
                first = time.monotonic()
                run.put(started)
            texts: list[str] = []
            try:
                for event in events:
                    if text := reader.feed(event):
                        texts.append(text)
                    if reader.done:
                        return False
            finally:
                if texts:
                    run.put_texts(texts)
            return True

        try:
            request = await self.caches.prepare(model, request)
            await self.caches.deliver(model, request, take)
        except WorkerError as error:
            await self.host.lost(error)
            raise
        answer = reader.answer()
        self.host.succeeded()
        reused = min(await self.caches.finished(model, request, answer), answer.prompt_tokens)
        now = time.monotonic()
        outcome = Outcome(answer, reused, queue_s, (first or now) - began, now - start, model.engine.info.emulated)
        self._report(wanted, outcome, ignored)
        if answer.reason is FinishReason.ABORT:
            raise stopped()
        return outcome

    async def _model(self) -> Model:
        """Return the model; if it is another one than before, forget what was kept for that one."""
        model = await self.host.model()
        if self._known is None or self._known() is not model:
            self._known = ref(model)
            self.last_used = time.monotonic()
            self.memory = AnswerMemory(model.prompts.vocabulary)
            self.caches.forget()
        return model

    async def _prepared(self, model: Model, work: Callable[..., T], *args: object) -> T:
        """Run `work`, which makes a prompt, in a thread. If the process is lost, the model is loaded again."""
        try:
            return await in_thread(work, *args, stop=model.prompts.hurry)
        except RKEdgeError as error:
            if model.prompts.lost:
                await self.host.lost(error)
            raise

    def _at_its_limit(
        self, run: Run, started: Started, reader: AnswerReader, prompt: Prompt, model: Model, queue_s: float
    ) -> Outcome:
        """End a resumed answer that already has its full length."""
        run.put(started)
        if text := reader.feed(Finished(FinishReason.LENGTH, len(prompt.tokens), 0)):
            run.put(text)
        return Outcome(reader.answer(), 0, queue_s, 0.0, 0.0, model.engine.info.emulated)

    def _request(self, wanted: GenerationRequest, model: Model, prompt: Prompt) -> tuple[Request, tuple[str, ...]]:
        room = model.engine.info.max_context - RESERVED
        if prompt.begun and len(prompt.tokens) > room:  # the answer to be resumed has already filled the context
            return Request(prompt.tokens, 0, model.stop_tokens), ()
        if len(prompt.tokens) > room:
            raise ContextFullError(
                f"The prompt has {len(prompt.tokens):,} tokens; the context has room for {room:,}.",
                details={"prompt_tokens": len(prompt.tokens), "max_context": model.engine.info.max_context},
            )
        limits = [count for count in (wanted.max_new_tokens, self.settings.limits.max_new_tokens) if count]
        sampling, ignored = self._sampling(wanted, model)
        left = max(0, min(limits) - len(prompt.begun)) if limits else -1
        return Request(prompt.tokens, left, model.stop_tokens, sampling), ignored

    def _sampling(self, wanted: GenerationRequest, model: Model) -> tuple[Sampling | None, tuple[str, ...]]:
        """Return the run's sampling if the runtime accepts one, else the names of the fields that must be ignored."""
        if not wanted.sampling:
            return None, ()
        changed = model.sampling.changed(wanted.sampling)
        if changed == model.sampling:
            return None, ()
        if within(model.engine.info.release, PER_RUN_SAMPLING, ""):
            return changed, ()
        names = tuple(wanted.sampling)
        if self.settings.per_request_sampling == "refuse":
            raise BodyError(
                f"{', '.join(names)}: RKLLM {model.engine.info.release} takes sampling only when it loads a model; "
                "per request it needs 1.3.0.",
                hint="Omit it, or set it in the daemon's settings.",
                details={"param": names[0]},
            )
        return None, names

    def _report(self, wanted: GenerationRequest, outcome: Outcome, ignored: Sequence[str]) -> None:
        answer = outcome.answer
        self.metrics.answered(answer, outcome.reused, outcome.queue_s, outcome.prefill_s)
        log.info(
            "request %s: %d prompt tokens (%d reused), %d generated, %s, queued %.3f s, first token %.3f s, %.3f s%s",
            wanted.request_id,
            answer.prompt_tokens,
            outcome.reused,
            len(answer.tokens),
            answer.reason.value,
            outcome.queue_s,
            outcome.prefill_s,
            outcome.total_s,
            f"; ignored: {', '.join(ignored)}" if ignored else "",
        )
        if self.settings.log_prompts:
            log.info("request %s answered: %r", wanted.request_id, answer.text)

    @property
    def name(self) -> str:
        """Name of the served bundle."""
        return self.host.name

    async def check(self, messages: Sequence[Message], client: Client) -> None:
        """Have the loaded model's template check a conversation, in a turn of its own. Without a model, any passes.

        Raises:
            UsageError: The template refuses it.
            BusyError, BundleError.
        """
        async with self.queue.turn(client):
            model = self.host.current
            if model is not None:
                await self._prepared(model, model.prompts.check, messages)

    async def embed(
        self, texts: Sequence[str], client: Client, hold: Callable[[int], None], *, cut: bool = False
    ) -> Embedded:
        """Return a vector of length 1 for each text: the normalized mean of the last layer's output over its tokens.

        Each text takes its own turn, so that others wait for at most one. Vectors are float32, little-endian.

        Args:
            hold: Called at the first vector with the size of all vectors in bytes; may refuse it.
            cut: Use the beginning of a text that is longer than the context.

        Raises:
            BusyError, ContextFullError, TimeLimitError, UnsupportedCallError, RKEdgeError.
            ServiceError: Another model was loaded meanwhile; its vectors cannot be compared with those before.
        """
        vectors: list[bytes] = []
        made_by: Manifest | None = None
        emulated, shortened = False, 0
        total, left = 0, self.settings.limits.request_s
        for text in texts:
            async with self.queue.turn(client):
                start = time.monotonic()
                with _time_limit(left, self.settings.limits.request_s):
                    model = await self._model()
                    made_by, emulated = made_by or model.bundle.manifest, model.engine.info.emulated
                    if model.bundle.manifest != made_by:
                        raise stopped()
                    tokens, whole = await self._tokens_of(model, text, cut)
                    vector = await self._vector_of(model, tokens)
            left -= time.monotonic() - start
            if not vectors:
                hold(len(texts) * len(vector))
            vectors.append(vector)
            total += len(tokens)
            shortened += not whole
        self.last_used = time.monotonic()
        return Embedded(vectors, total, made_by.name if made_by else self.name, emulated, shortened)

    async def _tokens_of(self, model: Model, text: str, cut: bool) -> tuple[list[int], bool]:
        """Return a text's tokens, and whether they are complete."""
        most = model.engine.info.max_context
        encode = partial(model.prompts.encode, text, most, cut=cut)
        tokens = [model.bundle.manifest.bos_token_id, *await self._prepared(model, encode)]
        if cut and len(tokens) > most - RESERVED:
            return tokens[: most - RESERVED], False
        if len(tokens) > most - RESERVED:
            raise ContextFullError(
                f"The text has {len(tokens):,} tokens, which is longer than the model's context length of {most:,}"
                f" tokens, of which the runtime reserves {RESERVED}.",
                hint="Cut it into shorter pieces.",
                details={"prompt_tokens": len(tokens), "max_context": most},
            )
        return tokens, True

    async def _vector_of(self, model: Model, tokens: list[int]) -> bytes:
        self.caches.forget_position()
        try:
            vector: bytes = await in_thread(_vector, model, tokens, stop=model.engine.abort)
        except WorkerError as error:
            await self.host.lost(error)
            raise
        self.host.succeeded()
        return vector

    def take(self, settings: Settings) -> None:
        """Apply the settings that need neither the NPU nor a restart (`now` in the table of settings)."""
        self.settings = settings
        self.clocks.change(settings.hold_clocks_s)
        self.queue.length, self.queue.wait_s = settings.limits.queue, settings.limits.wait_s
        self.sessions.limit(int(settings.sessions.max_mb * 1e6), settings.sessions.max_number)

    async def change_model(self, settings: Settings) -> None:
        """Load the model of other settings between two answers, or the same one if it failed to load.

        Raises RKEdgeError if the old one stays, or does not load either.
        """
        async with self.queue.turn(DAEMON):
            if await in_thread(self.host.needs_load, settings):
                await self.host.change(settings)
            else:
                self.host.settings = settings
                await self.host.again()

    async def unload_if_idle(self) -> None:
        """Unload the model if there was no request for as long as the settings say."""
        limit = self.settings.idle_unload_s
        model = self.host.current
        if not limit or model is None or self.queue.busy:
            return
        if min(time.monotonic() - self.last_used, time.time() - model.loaded_at) > limit:
            async with self.queue.turn(DAEMON):
                await self.host.unload()


def _vector(model: Model, tokens: list[int]) -> bytes:
    """Compute the vector of a text, see `Service.embed`."""
    mean = model.engine.hidden_states(Request(tokens)).mean(axis=0)
    length = float((mean * mean).sum()) ** 0.5
    vector: bytes = (mean / length if length else mean).astype("<f4").tobytes()
    return vector


async def _save(wanted: GenerationRequest, reader: AnswerReader | None) -> None:
    """Pass the answer to `wanted.save`, if it was begun."""
    if wanted.save is not None and reader is not None:
        answer = reader.answer()
        await wanted.save(answer, answer.reason is not FinishReason.ABORT)


def _time_limit(seconds: float, whole: float | None = None) -> AbstractContextManager[None]:
    """Raise TimeLimitError in the block after `seconds`, which is what is left of `whole`."""
    taken = counted(whole or seconds, "second")
    return time_limit(seconds, lambda: TimeLimitError(f"The answer took longer than {taken} and was stopped."))
