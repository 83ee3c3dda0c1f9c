"""The queue for the NPU: one request at a time, clients in turn, with limits on how many may wait and how long."""

from __future__ import annotations

import asyncio
import math
import time
from collections import OrderedDict, deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from rkruntime.errors import BusyError
from rkruntime.serve.users import shares
from rkruntime.words import counted

# Account, name within the account, and a label by which the client itself separates its turns.
Client = tuple[str, str, str]
# The daemon's own work, which always has a place in the queue.
DAEMON: Final[Client] = ("", "", "")
# Weight of the last run in the moving average that estimates the next run's duration.
_RECENT = 0.2


class _Line:
    """The waiting requests, as a tree of clients: at each level, the branches take turns."""

    def __init__(self) -> None:
        self.count = 0
        self._parts: OrderedDict[str, _Line] = OrderedDict()
        self._futures: deque[asyncio.Future[None]] = deque()

    def waiting(self, path: tuple[str, ...]) -> int:
        """Count the requests that wait below `path`."""
        if not path:
            return self.count
        part = self._parts.get(path[0])
        return part.waiting(path[1:]) if part else 0

    def add(self, path: tuple[str, ...], future: asyncio.Future[None]) -> None:
        """Join the line."""
        self.count += 1
        if path:
            self._parts.setdefault(path[0], _Line()).add(path[1:], future)
        else:
            self._futures.append(future)

    def remove(self, path: tuple[str, ...], future: asyncio.Future[None]) -> None:
        """Leave the line."""
        self.count -= 1
        if not path:
            self._futures.remove(future)
            return
        part = self._parts[path[0]]
        part.remove(path[1:], future)
        if not part.count:
            del self._parts[path[0]]

    def pop(self) -> asyncio.Future[None]:
        """Remove and return the next in line; its branch moves to the end of its level."""
        self.count -= 1
        if not self._parts:
            return self._futures.popleft()
        key, part = self._parts.popitem(last=False)
        future = part.pop()
        if part.count:
            self._parts[key] = part
        return future


class FairQueue:
    """A lock whose waiters take turns: accounts, names within an account, and a client's own labels.

    A client with many requests does not hold up others, whatever labels it uses.

    Args:
        length: Most requests waiting, all clients together.
        wait_s: Longest wait of a client, in seconds. The daemon's own work waits as long as the answers before it take.
    """

    def __init__(self, length: int, wait_s: float) -> None:
        self.length = length
        self.wait_s = wait_s
        self._line = _Line()
        self._busy = False
        self._run_s = 1.0

    def __len__(self) -> int:
        """Return the number of waiting requests."""
        return self._line.count

    @property
    def busy(self) -> bool:
        """Whether someone has the turn."""
        return self._busy

    @asynccontextmanager
    async def turn(self, client: Client) -> AsyncIterator[float]:
        """Wait for the turn and keep it for the block; the value is the time waited in seconds.

        Raises:
            BusyError: Too many requests are waiting, or this one waited too long.
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

    async def _wait(self, client: Client) -> None:
        if client != DAEMON:
            self._check_room(client)
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._line.add(client, future)
        try:
            await asyncio.wait({future}, timeout=None if client == DAEMON else self.wait_s)
        except asyncio.CancelledError:
            if not self._given_up(client, future):
                self._pass_on()
            raise
        if self._given_up(client, future):
            raise self._refusal(f"The NPU was busy for {counted(self.wait_s, 'second')}, which is the limit.")

    def _check_room(self, client: Client) -> None:
        if len(self) >= self.length:
            raise self._refusal(f"{len(self)} requests are already waiting for the NPU, which is the limit.")
        for path, limit in shares(client, self.length):
            if self._line.waiting(path) >= limit:
                raise self._refusal(
                    f"{limit} of your requests are already waiting for the NPU, which is the limit for one user."
                )

    def _given_up(self, client: Client, future: asyncio.Future[None]) -> bool:
        """Leave the queue; False if the turn came at the same moment."""
        if future.done():
            return False
        self._line.remove(client, future)
        return True

    def _pass_on(self) -> None:
        """Give the turn to whoever is next, if anyone."""
        self._busy = bool(self._line.count)
        if self._busy:
            self._line.pop().set_result(None)

    def _refusal(self, message: str) -> BusyError:
        seconds = max(1, math.ceil(self._run_s * (len(self) + 1)))
        return BusyError(message, details={"retry_after_s": min(seconds, 600), "waiting": len(self)})
