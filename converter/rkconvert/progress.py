"""How long work reports itself: bars with bytes, rate and time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

Advance = Callable[[int], None]
# Seconds between two lines of a log: an hour of work stays readable.
_LOG_EVERY: Final = 30.0


class Reporter:
    """Where long work says what it does; `quiet` says nothing."""

    def __init__(self, quiet: bool = False) -> None:
        self._quiet = quiet
        self._console = Console(stderr=True)

    def note(self, text: str) -> None:
        """One line for a person."""
        if not self._quiet:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[Advance]:
        """A piece of work over `total` bytes; the function that is handed out takes the bytes of each step."""
        if self._quiet:
            yield lambda _: None
        elif self._console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                DownloadColumn(),
                TransferSpeedColumn(),
                TimeRemainingColumn(),
            )
            with Progress(*columns, console=self._console) as progress:
                task = progress.add_task(title, total=total)
                yield lambda done: progress.advance(task, done)
        else:
            yield _Log(title, total).advance


class _Log:
    """Progress for a file or a pipe: a line at the end, and one every half minute before."""

    def __init__(self, title: str, total: int) -> None:
        self._title, self._total, self._done = title, total, 0
        self._start = self._last = time.monotonic()
        self._lock = threading.Lock()

    def advance(self, done: int) -> None:
        with self._lock:
            self._done += done
            now = time.monotonic()
            if self._done < self._total and now - self._last < _LOG_EVERY:
                return
            self._last = now
            rate = self._done / max(now - self._start, 1e-6)
            left = max(0, self._total - self._done) / max(rate, 1e-6)
            print(  # noqa: T201
                f"{self._title}: {self._done / 1e6:,.1f} of {self._total / 1e6:,.1f} MB,"
                f" {rate / 1e6:,.0f} MB/s, {left:,.0f} s left",
                file=sys.stderr,
                flush=True,
            )


QUIET: Final = Reporter(quiet=True)
