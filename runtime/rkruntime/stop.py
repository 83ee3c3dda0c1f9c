"""Work in one thread that another thread may stop."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rkruntime.errors import ServiceError


class Stop:
    """A request to stop the current work, such as waiting for a process, and whatever would begin next."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # the handler of a signal may ask in the thread that works
        self._ends: list[Callable[[], object]] = []
        self.asked = False

    def ask(self) -> None:
        """Ask the work to stop, from any thread."""
        with self._lock:
            self.asked = True
            for end in self._ends:
                end()

    def check(self, _: object = None) -> None:
        """Raise ServiceError if a stop was requested."""
        if self.asked:
            raise ServiceError("The load was stopped.", hint="Load the model again.")

    @contextmanager
    def ending(self, end: Callable[[], object]) -> Iterator[None]:
        """Call `end` if a stop is requested before or while the block runs. `end` must be quick and must not raise."""
        with self._lock:
            self._ends.append(end)
            if self.asked:
                end()
        try:
            yield
        finally:
            with self._lock:
                self._ends.remove(end)
