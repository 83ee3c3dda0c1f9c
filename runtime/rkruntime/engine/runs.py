"""Runs on a loaded model, one at a time: events for plain loops and asyncio, and a clean end in every case."""

from __future__ import annotations

import asyncio
import contextlib
import time
import weakref
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from functools import partial
from typing import Final

from rkruntime.abi import since, within
from rkruntime.engine.connection import WorkerConnection, closed_meanwhile, in_use
from rkruntime.engine.generation import (
    RESERVED,
    ArrayEvent,
    Finished,
    HiddenStates,
    Logits,
    Request,
    Token,
    check_limit,
)
from rkruntime.engine.loading import LoadOptions, ModelInfo, check_prompt_cache
from rkruntime.engine.observed import Observed
from rkruntime.engine.worker import protocol
from rkruntime.engine.worker.decode import array_of, error_of, finished_of, sizes_of
from rkruntime.engine.worker.encode import method, run_command
from rkruntime.engine.worker.events import AsyncRecords
from rkruntime.engine.worker.protocol import Record
from rkruntime.errors import ContextFullError, RunError, UsageError, WorkerError, WorkerProtocolError
from rkruntime.files import as_path
from rkruntime.schema import check_value
from rkruntime.stop import Stop

# More tokens than any release accepts, for a library that does not report its context.
_LONGEST_CONTEXT: Final = 1 << 15
# Seconds per token that a library may take to read a prompt, ten times what Gemma 2 2B takes on an RK3588 (598 ms for
# 128 tokens: https://github.com/airockchip/rknn-llm/blob/main/benchmark.md), as a needless kill costs more than a late
# one.
_READING: Final = 0.05


class _Holder:
    """An object that only the iterator of a run holds, so that it is collected with the iterator.

    Attributes:
        over: Whether nobody reads the iterator any more, though an exception may still keep it alive.
    """

    over = False


class Runs:
    """The runs of one worker.

    Attributes:
        active: Number of the current run; None without one.
        observed: What the runs have shown.
    """

    def __init__(self, connection: WorkerConnection, options: LoadOptions, info: ModelInfo) -> None:
        self.active: int | None = None
        self.observed = Observed(info.release, info.max_context)
        self._abandoned = False
        # Number of the run that was aborted last, and until when it must have ended.
        self._aborted: tuple[int, float] | None = None
        self._read_at = 0.0
        # Weak reference to the owner of the `active` run: as long as that iterator lives, only it may end the run.
        self._holder: Callable[[], _Holder | None] = _nobody
        self._late_rows = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._requests: Sequence[Request] = ()
        self._connection, self._options, self._info = connection, options, info
        self._worker = connection.worker

    def check_free(self) -> None:
        """Raise the error of a worker that is gone, or RunError if a run is in progress and still being read."""
        self._connection.check()
        if self._forgotten() or (self._loop is not None and self._loop.is_closed()):
            self.finish(self._options.token_timeout)
        if self.active is not None:
            raise in_use()

    def events(
        self, requests: Sequence[Request], mode: str, stop: Stop | None = None
    ) -> Generator[tuple[int, ArrayEvent], None, None]:
        """Run prompts; yields each event with its prompt's number. Closing the iterator, or `stop`, aborts the run."""
        with self._connection.explained(), contextlib.ExitStack() as stopping:
            mine, timeout = _Holder(), self._options.token_timeout
            try:
                self._start(mine, requests, mode)
                if stop is not None:
                    stopping.enter_context(stop.ending(self.abort))
                more = True
                while more:
                    with self._connection.turn():
                        record = self._connection.next(timeout, time.monotonic() + timeout, self._limiting)
                        event = self._event(record)
                        more = self.active is not None
                    if self._connection.closing:
                        raise closed_meanwhile()
                    yield record.batch, event
            except Exception as error:  # whatever it is, the run must not go on
                mine.over = True
                if isinstance(error, WorkerProtocolError):
                    self._worker.end(grace=0)  # nothing more is asked of it
                self.settle(mine, timeout)
                raise
            except BaseException:  # the iterator is closed, or Ctrl-C: no other error takes its place
                mine.over = True
                self._settle_quietly(mine)
                raise

    async def events_async(self, request: Request) -> AsyncGenerator[ArrayEvent, None]:
        """Like `events`, for one prompt and asyncio; see Engine.agenerate."""
        mine, timeout = _Holder(), self._options.token_timeout
        async with self._in_loop(mine, request) as records:
            more = True
            while more:
                record = await records.next(timeout, lambda: self._goes_on(mine), self._limiting)
                if record is None:
                    raise closed_meanwhile()
                with self._connection.turn():
                    event = self._event(record)
                    more = self.active is not None
                if self._connection.closing:
                    raise closed_meanwhile()
                yield event

    async def deliver(self, request: Request, take: Callable[[list[ArrayEvent]], bool]) -> None:
        """Like `events`, for one prompt and asyncio, but without waking a task for each event; see Engine.deliver."""
        mine, ended = _Holder(), False

        def checked(events: list[ArrayEvent]) -> bool:
            nonlocal ended
            if self._connection.closing:
                raise closed_meanwhile()
            # A malformed end also ends the run, but as an error.
            ended = not take(events) or (self.active is None and isinstance(events[-1], Finished))
            return not ended

        async with self._in_loop(mine, request) as records:
            timeout, wanted = self._options.token_timeout, partial(self._goes_on, mine)
            await records.each(timeout, wanted, self._limiting, self._event, checked)
            if not ended:
                raise closed_meanwhile()

    @contextlib.asynccontextmanager
    async def _in_loop(self, mine: _Holder, request: Request) -> AsyncGenerator[AsyncRecords, None]:
        """Begin a run for the block, and end it afterwards if it is still going on."""
        self._connection.check()
        with self._connection.explained():
            records = AsyncRecords(self._worker, self._connection.turn(), self._connection.answered)
            try:
                for _ in range(2):  # a task that closes a forgotten iterator takes two steps to begin
                    if self.active is not None and not self._forgotten():
                        await asyncio.sleep(0)
                if self._forgotten():
                    await self._settle_async(self._holder(), records)
                try:
                    self._start(mine, [request], "generate")
                    self._loop = asyncio.get_running_loop()
                    yield records
                except WorkerProtocolError:
                    await records.kill()  # nothing more is asked of it
                    raise
                finally:
                    await self._settle_async(mine, records)
            finally:
                records.close()

    def _start(self, mine: _Holder, requests: Sequence[Request], mode: str) -> None:
        check_value("requests", Sequence[Request], requests)
        if not requests:
            raise UsageError("There is no request to run.")
        self.check_free()
        with self._connection.turn():
            self.check_free()
            self._begin(mine, requests, mode)
        longest = self._info.max_context or _LONGEST_CONTEXT
        lengths = [longest if request.length is None else request.length for request in requests]
        self._read_at = time.monotonic() + _READING * sum(lengths)

    def _begin(self, mine: _Holder, requests: Sequence[Request], mode: str) -> None:
        for request in requests:
            check_limit(request.max_new_tokens)
            if request.save_prompt_cache is not None:
                check_prompt_cache(as_path("save_prompt_cache", request.save_prompt_cache), saved=False)
        header, data = run_command(requests, mode, self._info.release, self._options)
        kept = self._kept(requests)
        empties = self.observed.empties_template(requests, fresh=kept == 0)
        added = 0 if empties else max(map(self.observed.adds, requests))
        for request in requests:
            self._check_room(request, kept or 0, added)
        limit = self._limit(requests, (kept or 0) + added)
        header["limit"] = limit
        if kept is not None and all(request.length is not None for request in requests):
            header["max_new_tokens"] = limit
        elif limit < header["max_new_tokens"]:
            # Only the library knows how full the context is. Since 1.3.0, given a limit, it would drop the start of the
            # conversation to reach it. That is a guess (docs/emulator.md), but passing no limit is right in any case.
            header["max_new_tokens"] = -1
        self._requests, self._rows_due = requests, set(range(len(requests)))
        self._worker.drain_log()
        self._worker.alarm = ""
        # Releases may return rows for more than the prompt, but never for more than the context has room for.
        most_rows = self._info.max_context or _LONGEST_CONTEXT
        limits = {"batches": self._options.n_batch, "most_tokens": limit, "most_rows": most_rows}
        self._abandoned = False
        self._late_rows = 0 if mode == "generate" else most_rows
        if empties:
            self._empty_template()
        self.observed.begins(fresh=kept == 0)
        self._holder, self.active = weakref.ref(mine), self._connection.number + 1
        self._connection.begin(header, data, mode=mode, **limits)

    def _empty_template(self) -> None:
        try:
            self._connection.ask(method("set_chat_template", "", "", ""), self._options.token_timeout)
        except RunError as error:
            self.observed.template_stays(error)
        else:
            self.observed.template_set(empty=True)

    def _kept(self, requests: Sequence[Request]) -> int | None:
        """Return how many positions of the context are in use before these prompts; None if the library cannot say."""
        if not any(request.keep_history for request in requests):
            return 0
        if not within(self._info.release, since("rkllm_get_kv_cache_size"), ""):
            return None
        try:
            reply = self._connection.ask(method("kv_cache_sizes"), self._options.token_timeout)
        except RunError:  # the library refuses to say
            return None
        return max([0, *sizes_of(reply)])

    def _limit(self, requests: Sequence[Request], before: int) -> int:
        """Return the most tokens that an answer may have; -1 only for a library that does not report its context.

        Boards are reported not to end an answer when the context is full, but to drop the oldest tokens, the prompt
        included. Only a program that asks for both `n_keep` and more tokens than there is room for gets this behavior.
        """
        asked = requests[0].max_new_tokens if requests[0].max_new_tokens > 0 else self._options.max_new_tokens
        if not self._info.max_context or (asked > 0 and self._options.n_keep is not None):
            return asked
        longest = max(request.length or 0 for request in requests)
        room = max(1, self._info.max_context - RESERVED - before - longest)
        return min(asked, room) if asked > 0 else room

    def _check_room(self, request: Request, kept: int, added: int) -> None:
        length, most = len(request.tokens) + added, self._info.max_context
        template = f" with the {added:,} of the runtime's own template" if added else ""
        # To fill the reserved positions too, a continued conversation would lose its beginning.
        continues = f" after the conversation's {kept:,}" if kept and self._options.n_keep is None else ""
        if 0 < most <= (length + kept + RESERVED if continues else length):
            raise ContextFullError(
                f"The prompt has {length:,} tokens{template}{continues}, but prompt and answer together must fit into"
                f" {most:,}.",
                details={"prompt_tokens": length, "max_context": most},
            )

    def _event(self, record: Record) -> ArrayEvent:
        if record.kind == protocol.TOKEN and not self._worker.alarm:
            return Token(record.value, record.data)
        return self._rare_event(record)

    def _rare_event(self, record: Record) -> ArrayEvent:
        """Return the event of a record that is not a token. Raises the error that the worker sent or the log shows."""
        # Done first, as an interrupt before it would leave a run that nothing ends.
        if record.kind == protocol.ERROR or (
            record.kind == protocol.FINISHED and record.batch == self._options.n_batch - 1
        ):
            self._ended()
        self._worker.drain_log()
        if record.kind == protocol.ERROR:
            error = error_of(record)
            # An alarm in the log says more than "it returned -1", whichever arrives first.
            if not (self._worker.alarm and type(error) is RunError):
                raise error
        if self._worker.alarm:
            raise RunError(f"The run failed; the runtime logged: {self._worker.alarm}")
        if record.kind in (protocol.LOGITS, protocol.HIDDEN):
            return self._array(record)
        finished = finished_of(record)
        self.observed.finished(self._requests, finished)
        return finished

    def _ended(self) -> None:
        self.active = self._loop = None
        self._holder, self._abandoned = _nobody, False

    def _array(self, record: Record) -> Logits | HiddenStates:
        array = array_of(record)
        if record.batch in self._rows_due:  # rows of the prompt; later ones are the answer's
            self._rows_due.remove(record.batch)
            self.observed.check_rows(self._requests[record.batch], len(array.values))
        return array

    def abort(self) -> None:
        """Ask the current run, if any, to end; from any thread. A fork has no run."""
        run = self.active if self._worker.owner.here else None
        if run is not None and self._connection.gone is None and not self._connection.closed:
            # If the worker is gone by now, the iterator reports it.
            with contextlib.suppress(WorkerError, OSError):
                self._send_abort(run)

    def _send_abort(self, run: int) -> None:
        if self._aborted is None or self._aborted[0] != run:  # a second abort does not extend the time
            self._aborted = run, max(time.monotonic(), self._read_at) + self._options.abort_timeout
        self._connection.send({"call": "abort", "run": run})

    def _limiting(self, seconds: float, end: float) -> tuple[float, float]:
        """Return the time limit of the current wait, given the usual one: an aborted run has less time."""
        if self._aborted is None or self._aborted[0] != self.active or self._aborted[1] >= end:
            return seconds, end
        return self._options.abort_timeout, self._aborted[1]

    @property
    def given_up(self) -> bool:
        """Whether a wait for the end of a run was interrupted."""
        return self._abandoned

    def finish(self, timeout: float) -> None:
        """Settle the current run, whoever began it."""
        self.settle(self._holder(), timeout)

    def settle(self, mine: _Holder | None, timeout: float) -> None:
        """End a run whose events are no longer wanted, and wait for it, so that the next one starts clean.

        An interrupt may have lost the run's last event, or come before it was sent. So the worker gets a separate
        command, the fence, which it answers when the run is over; everything that comes before the answer is dropped.
        """
        if self._abandon(mine):
            with self._connection.turn():
                self._fence()
                self._connection.next(*self._limiting(timeout, time.monotonic() + timeout), self._limiting)
                self._ended()

    async def _settle_async(self, mine: _Holder | None, records: AsyncRecords) -> None:
        if self._abandon(mine):
            with self._connection.turn():
                self._fence()
            # The next run, or closing the model, may end this one first.
            if await records.next(self._options.token_timeout, lambda: self._goes_on(mine), self._limiting):
                self._ended()

    def _fence(self) -> None:
        self._connection.begin({"call": "fence"}, late_rows=self._late_rows)

    def _goes_on(self, mine: _Holder | None) -> bool:
        """Whether the current run belongs to the iterator of `mine`."""
        return self.active is not None and self._holder() is mine

    def _forgotten(self) -> bool:
        """Whether nobody will end the current run, because an interrupt came while it was being ended, or earlier."""
        holder = self._holder()
        return self._abandoned or (self.active is not None and (holder is None or holder.over))

    def _abandon(self, mine: _Holder | None) -> bool:
        """Abort the run of `mine` if it is going on. If interrupted while it ends, leave the rest to the next run."""
        if not self._goes_on(mine):
            return False
        if self._connection.closed or self._worker.ended or not self._worker.owner.here:
            return False
        self._abandoned, self._aborted = True, None  # the time limit counts from now, when somebody waits for the end
        assert self.active is not None
        self._send_abort(self.active)
        return True

    def _settle_quietly(self, mine: _Holder) -> None:
        """Settle for an iterator that is closed, collected or interrupted: the next call reports what failed."""
        with contextlib.suppress(WorkerError, RunError), self._connection.explained():
            self.settle(mine, self._options.token_timeout)


def _nobody() -> None:
    return None
