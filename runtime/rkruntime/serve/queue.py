"""Who is next on the NPU: one at a time, clients in turn, with a limit on how many wait and how long."""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from rkruntime.errors import BusyError
from rkruntime.words import counted

# Weight of the last run in the estimate of how long the next one takes.
_RECENT = 0.2


class FairQueue:
    """A lock whose waiters take turns by client, so that one client with many requests holds up nobody else.

    Args:
        length: how many may wait, all clients together.
        wait_s: how long one may wait, in seconds.
    """

    def __init__(self, length: int, wait_s: float) -> None:
        self.length = length
        self.wait_s = wait_s
        self._waiting: OrderedDict[str, deque[asyncio.Future[None]]] = OrderedDict()
        self._busy = False
        self._run_s = 1.0

    def __len__(self) -> int:
        """How many wait."""
        return sum(map(len, self._waiting.values()))

    @property
    def busy(self) -> bool:
        """Somebody has the turn."""
        return self._busy

    @asynccontextmanager
    async def turn(self, client: str) -> AsyncIterator[float]:
        """Wait for the turn and keep it for the block; the value is the time waited in seconds.

        Raises:
            BusyError: too many wait, or this one waited too long.
        """
        start = time.monotonic()
        if self._busy:
            await self._wait(client)
        self._busy = True
        began = time.monotonic()
        try:
            yield began - start
        finally:
            self._run_s += _RECENT * (time.monotonic() - began - self._run_s)
            self._pass_on()

    async def _wait(self, client: str) -> None:
        if len(self) >= self.length:
            raise self._refusal(f"The queue for the NPU is full: {counted(len(self), 'request')}.")
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.setdefault(client, deque()).append(future)
        try:
            await asyncio.wait_for(asyncio.shield(future), self.wait_s)
        except asyncio.TimeoutError:
            if self._given_up(client, future):
                raise self._refusal(
                    f"The NPU was busy for {counted(self.wait_s, 'second')}, which is the limit."
                ) from None
        except asyncio.CancelledError:
            if not self._given_up(client, future):
                self._pass_on()
            raise

    def _given_up(self, client: str, future: asyncio.Future[None]) -> bool:
        """Leave the queue; False if the turn came in the same moment."""
        if future.done():
            return False
        self._waiting[client].remove(future)
        if not self._waiting[client]:
            del self._waiting[client]
        return True

    def _pass_on(self) -> None:
        """Give the turn to the client that has waited for one the longest, or to nobody."""
        self._busy = bool(self._waiting)
        if self._waiting:
            client, futures = self._waiting.popitem(last=False)
            futures.popleft().set_result(None)
            if futures:
                self._waiting[client] = futures

    def _refusal(self, message: str) -> BusyError:
        seconds = max(1, math.ceil(self._run_s * (len(self) + 1)))
        return BusyError(message, details={"retry_after_s": min(seconds, 600), "waiting": len(self)})
