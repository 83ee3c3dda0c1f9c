"""Work in a thread that another thread may end."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rkruntime.errors import ServiceError


class Stop:
    """Ends what is done at the moment, such as waiting for a process, and whatever would be begun next."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._ends: list[Callable[[], object]] = []
        self.asked = False

    def ask(self) -> None:
        """From any thread."""
        with self._lock:
            self.asked = True
            for end in self._ends:
                end()

    def check(self, _: object = None) -> None:
        """Raise ServiceError if the work shall end."""
        if self.asked:
            raise stopped_work()

    @contextmanager
    def ending(self, end: Callable[[], object]) -> Iterator[None]:
        """Call `end` if the work shall end while the block runs, or already. It must be quick, and raise nothing."""
        with self._lock:
            self._ends.append(end)
            if self.asked:
                end()
        try:
            yield
        finally:
            with self._lock:
                self._ends.remove(end)


def stopped_work() -> ServiceError:
    """Nobody waits any more for what was begun."""
    return ServiceError("The daemon is being stopped, and loads no model.", hint="Ask again when it is back.")
