"""The parent's end of the pipe for commands."""

from __future__ import annotations

import os
import select
import threading
import time
from collections import deque
from collections.abc import Iterable


class CommandPipe:
    """Commands on their way to the worker, from any thread.

    An interrupt at any moment loses nothing and sends nothing twice: Python runs signal handlers between calls, but
    not between assignments. Data left unsent by an interrupt is sent before the next command.

    Args:
        fd: The write end of a non-blocking pipe.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._lock = threading.RLock()
        self._outgoing: deque[memoryview] = deque()
        self._writing = False
        # Of `_part`, the first part of `_outgoing`, `_sent` bytes are sent, plus those in `_counts`, not yet added up.
        self._part = memoryview(b"")
        self._sent = 0
        self._counts: list[int] = []
        self._writable = select.poll()
        self._writable.register(fd, select.POLLOUT)

    def send(self, command: Iterable[bytes | memoryview], timeout: float) -> None:
        """Send a command (see protocol.pack_command). If called by a signal's handler during a send, only queue it.

        Raises:
            TimeoutError: The worker has not read it within `timeout` seconds.
            OSError: The worker is gone.
        """
        parts = [memoryview(part).cast("B") for part in command if len(part)]
        with self._lock:
            self._outgoing.extend(parts)
            if self._writing:
                return
            self._writing = True
            try:
                self._flush(time.monotonic() + timeout)
            finally:
                self._writing = False

    def _flush(self, deadline: float) -> None:
        while self._outgoing:
            if self._part is not self._outgoing[0]:
                self._part, self._sent, self._counts = self._outgoing[0], 0, []
            self._sent, self._counts = self._sent + sum(self._counts), []
            if self._sent == len(self._part):
                self._outgoing.popleft()
                continue
            try:
                rest = self._part[self._sent :]
                self._counts.extend(map(os.write, (self._fd,), (rest,)))  # one call, unlike append(os.write(...))
            except BlockingIOError:
                wait = deadline - time.monotonic()
                if wait <= 0:
                    raise TimeoutError from None
                self._writable.poll(wait * 1000)

    def close(self) -> None:
        """Close the pipe once no other thread writes to it; may be called twice."""
        with self._lock:
            fd, self._fd = self._fd, -1
            if fd >= 0:
                os.close(fd)
