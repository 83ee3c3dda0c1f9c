"""Read the worker's records in an event loop, which watches a descriptor and never blocks."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from typing import Any, Final, TypeVar

from rkruntime.engine.worker.process import LOG_PAUSE, SMALL_READ, Limiting, WorkerProcess
from rkruntime.engine.worker.protocol import TOKEN, TOKENIZE, Record
from rkruntime.errors import WorkerError
from rkruntime.threads import in_thread

E = TypeVar("E")
_TICK: Final = 0.5


class AsyncRecords:
    """The records of one run.

    Args:
        turn: Held while records are read, and never across an await.
        answered: Answers a record that is a question of the library (see protocol.TOKENIZE); returns whether it is one.
    """

    def __init__(
        self,
        worker: WorkerProcess,
        turn: AbstractContextManager[None],
        answered: Callable[[Record], bool],
    ) -> None:
        self._worker, self._turn, self._answered = worker, turn, answered
        self._loop = asyncio.get_running_loop()
        # Copies of the descriptors' numbers, as another thread may close the pipes.
        self._records_fd, self._log_fd = worker.records_fd, worker.log_fd
        self._waiter: asyncio.Future[None] | None = None
        self._failed: WorkerError | None = None
        self._received = 0
        self._check: Callable[[], float] = self._wake
        self._timer = self._loop.call_later(_TICK, self._tick)
        self._log_timer: asyncio.TimerHandle | None = None
        if worker.log_open:
            self._watch_log()

    def _waiting(self) -> Record | None:
        """Return the next record if it has arrived, answering the library's questions before it."""
        record = self._worker.buffered()
        while record is not None and record.kind >= TOKENIZE and self._answered(record):
            record = self._worker.buffered()
        return record

    async def next(self, timeout: float, wanted: Callable[[], bool], limiting: Limiting) -> Record | None:
        """See WorkerProcess.next_record; returns None as soon as `wanted` returns False."""
        deadline = time.monotonic() + timeout
        while True:
            timeout, deadline = limiting(timeout, deadline)
            with self._turn:
                if not wanted():
                    return None
                if record := self._waiting():
                    return record
            if self._failed is not None:
                raise self._failed
            if time.monotonic() > deadline:
                await self.kill()
                raise self._worker.hung(timeout)
            if self._received >= SMALL_READ:  # there is more to read, but other tasks get their turn first
                await asyncio.sleep(0)
            else:
                await self._readable(deadline)
            with self._turn:
                if wanted():
                    self._look(self._receive)

    async def each(
        self,
        timeout: float,
        wanted: Callable[[], bool],
        limiting: Limiting,
        event_of: Callable[[Record], E],
        take: Callable[[list[E]], bool],
    ) -> None:
        """Call `take` with the events of each read, until it or `wanted` returns False.

        The loop itself calls `take` as soon as there are events: one more turn of the loop, as a task needs to wake up,
        would double a token's CPU time. `event_of` is called while the turn is held. Raises what both functions and
        WorkerProcess.next_record raise.
        """
        # The time limit that was exceeded, or None.
        ended: asyncio.Future[float | None] = self._loop.create_future()
        limit, deadline = timeout, time.monotonic() + timeout

        def look() -> None:
            nonlocal limit, deadline
            if ended.done():
                return
            try:
                more = self._hand_over(wanted, event_of, take)
                if more:
                    limit, deadline = timeout, time.monotonic() + timeout
                elif more is not None:
                    ended.set_result(None)
            except Exception as error:  # the task that waits raises it
                ended.set_exception(error)

        def check() -> float:
            nonlocal limit, deadline
            look()
            limit, deadline = limiting(limit, deadline)
            left = deadline - time.monotonic()
            if left < 0 and not ended.done():
                ended.set_result(limit)
            return max(0.0, min(left, _TICK))

        self._watch(self._records_fd, look)
        self._check = check
        self._timer.cancel()
        self._tick()  # another reader may already have put events into the buffer
        try:
            exceeded = await ended
        finally:
            self._check = self._wake
            self._unwatch(self._records_fd)
        if exceeded is not None:
            await self.kill()
            raise self._worker.hung(exceeded)

    async def kill(self) -> None:
        """Kill the worker without holding up the event loop, which must hear why even if it is cancelled meanwhile."""
        with suppress(asyncio.CancelledError):
            await in_thread(self._worker.kill)

    def _hand_over(
        self, wanted: Callable[[], bool], event_of: Callable[[Record], E], take: Callable[[list[E]], bool]
    ) -> bool | None:
        """Read once and pass complete events to `take`; returns whether to go on, or None if nothing has come.

        Each call costs a token that comes alone a microsecond or more: this is why it is written out.
        """
        events: list[E] = []
        try:
            with self._turn:
                if not wanted():
                    return False
                try:
                    self._worker.receive()
                except WorkerError as error:
                    self._failed = self._failed or error
                while (record := self._worker.buffered()) is not None:
                    if record.kind == TOKEN:
                        events.append(event_of(record))
                    elif record.kind < TOKENIZE or not self._answered(record):
                        events.append(event_of(record))
                        if not wanted():
                            break
            if self._failed is not None:
                raise self._failed
        except Exception:  # what has come before an error counts
            if events and not take(events):
                return False
            raise
        return take(events) if events else None

    async def _readable(self, deadline: float) -> None:
        """Wait until there may be something to read. Watch the descriptor only here, as each event costs CPU time."""
        self._waiter = self._loop.create_future()
        self._watch(self._records_fd, self._wake)
        alarm = self._loop.call_later(max(0.0, deadline - time.monotonic()), self._wake)
        try:
            await self._waiter
        finally:
            self._waiter = None
            alarm.cancel()
            self._unwatch(self._records_fd)

    def _watch(self, fd: int, callback: Callable[[], object]) -> None:
        """Watch a descriptor. A loop has one watcher per descriptor, and a new one replaces the last."""
        self._worker.watchers[self._loop, fd] = self
        self._loop.add_reader(fd, callback)

    def _unwatch(self, fd: int) -> None:
        if self._worker.watchers.get((self._loop, fd)) is self:
            del self._worker.watchers[self._loop, fd]
            self._loop.remove_reader(fd)

    def _wake(self) -> float:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)
        return _TICK

    def _receive(self) -> None:
        self._received = self._worker.receive()

    def _tick(self) -> None:
        self._look(self._worker.check_alive)
        # Another reader may have buffered the record that is being waited for.
        self._timer = self._loop.call_later(self._check(), self._tick)

    def _look(self, work: Callable[[], Any]) -> None:
        try:
            work()
        except WorkerError as error:
            self._failed = self._failed or error
            self._wake()

    def _watch_log(self) -> None:
        self._log_timer = None
        self._watch(self._log_fd, self._read_log)

    def _read_log(self) -> None:
        more = self._worker.read_log()
        if more or not self._worker.log_open:
            self._unwatch(self._log_fd)
        if more:  # other tasks get their turn first
            self._log_timer = self._loop.call_later(LOG_PAUSE, self._watch_log)

    def close(self) -> None:
        """Stop watching the worker's descriptors."""
        self._timer.cancel()
        if self._log_timer is not None:
            self._log_timer.cancel()
        self._unwatch(self._log_fd)
