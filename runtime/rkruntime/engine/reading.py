"""Watch how far a load has read its model file: 9 GB take ten minutes on a slow SD card, which is not a hang."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

# Bytes per second: an assumption, slower than any SD card of today.
_SLOWEST: Final = 8_000_000
# Seconds that a load may go on after each sign that it is reading.
_PATIENCE: Final = 60.0
# Bytes that are such a sign. A hung load reads a little, too: pages of a program that had been dropped from memory.
_SIGN: Final = 4_000_000
# A load that reads its file more often than this counts as hung.
_MOST_PASSES: Final = 4


def load_limit(seconds: float, size: int) -> float:
    """Return the seconds after which loading `size` bytes counts as hung: at least what reading them may take."""
    return max(seconds, size / _SLOWEST)


class Reading:
    """The progress of a load, according to its process's I/O counter.

    Args:
        keeper: Pid of the process above the worker.
        size: Size of the model file, in bytes.
        progress: Called with lines such as `reading 9.5 GB, 34 %`.
    """

    def __init__(self, keeper: int, size: int, progress: Callable[[str], None] | None) -> None:
        self._keeper, self._size, self._progress = keeper, size, progress
        self._read = 0

    def more_time(self) -> float:
        """Return until when (time.monotonic()) the load may go on; 0 if little was read since the last sign."""
        read = read_bytes(self._keeper)
        if read < self._read + _SIGN or read > self._size * _MOST_PASSES:
            return 0.0
        self._read = read
        if self._progress is not None:
            self._progress(f"reading {self._size / 1e9:.1f} GB, {min(99, read * 100 // max(1, self._size))} %")
        return time.monotonic() + _PATIENCE


def read_bytes(keeper: int) -> int:
    """Return the bytes that a keeper's worker has read from disks, mapped pages included; 0 if unknown."""
    return _figure(keeper, "io", r"^read_bytes: (\d+)$")


def peak_bytes(keeper: int) -> int:
    """Return the peak resident memory of a keeper's worker in bytes; 0 if unknown."""
    return _figure(keeper, "status", r"^VmHWM:\s+(\d+) kB$") * 1024


def _figure(keeper: int, name: str, pattern: str) -> int:
    with suppress(OSError, ValueError, IndexError):
        worker = int(Path(f"/proc/{keeper}/task/{keeper}/children").read_text().split(maxsplit=1)[0])
        found = re.search(pattern, Path(f"/proc/{worker}/{name}").read_text(), re.MULTILINE)
        return int(found[1]) if found else 0
    return 0
