"""Progress of long work: bars with bytes, rate and time left on a terminal, plain lines elsewhere."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Final

from rich.progress import (
    BarColumn,
    DownloadColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)

from rkruntime.terminal import console, say

Advance = Callable[[int], None]
Show = Callable[[str, int, int], None]
# Seconds between two log lines, so that the log of an hour's work stays readable.
_LOG_EVERY: Final = 30.0


class Reporter:
    """Reports the progress of long work; silent if `quiet`."""

    def __init__(self, quiet: bool = False) -> None:
        self.quiet = quiet
        self._console = console(stderr=True)

    def note(self, text: str) -> None:
        """Print one line for the user."""
        if not self.quiet:
            self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    @contextmanager
    def bar(self, title: str, total: int) -> Iterator[Advance]:
        """Show work over `total` bytes; the function yielded takes the bytes of each step."""
        if self.quiet or not total:
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

    @contextmanager
    def steps(self) -> Iterator[Show]:
        """Show work that keeps its own count; the function yielded takes a title, the count so far and the total."""
        if self.quiet:
            yield lambda *_: None
        elif self._console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            with Progress(*columns, console=self._console) as progress:
                tasks: dict[str, TaskID] = {}

                def show(title: str, done: int, total: int) -> None:
                    if title not in tasks:
                        tasks[title] = progress.add_task(title, total=total)
                    progress.update(tasks[title], completed=done, total=total)

                yield show
        else:
            yield _StepLog(self).show


class _StepLog:
    """Steps in a file or pipe: a line when one starts, when it is finished, and every half minute between."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter, self._title, self._last = reporter, "", 0.0

    def show(self, title: str, done: int, total: int) -> None:
        now = time.monotonic()
        if title == self._title and done < total and now - self._last < _LOG_EVERY:
            return
        self._title, self._last = title, now
        self._reporter.note(f"{title}: {done} of {total}")


class _Log:
    """Progress in a file or pipe: a line at the end, and one every half minute before."""

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
            say(
                f"{self._title}: {self._done / 1e6:,.1f} of {self._total / 1e6:,.1f} MB,"
                f" {rate / 1e6:,.0f} MB/s, {left:,.0f} s left",
                err=True,
            )


QUIET: Final = Reporter(quiet=True)
