"""Signs of life of a session of processes that prints nothing for a long time, read from Linux's /proc."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

# Below this share of one CPU, a silent program is waiting for something that never comes.
_BUSY: Final = 0.02
_LOOK_EVERY: Final = 5.0
_TICKS: Final = os.sysconf("SC_CLK_TCK")


class Life:
    """How long a session has been idle: no output (`sign`), no CPU time, no paging from disk."""

    def __init__(self, session: int) -> None:
        self._session = session
        self._start = self._last = self._looked = time.monotonic()
        self._beat = self._start
        self._used, self._faults = 0.0, 0

    def due(self, interval: float) -> bool:
        """Whether a heartbeat is due: once every `interval` seconds."""
        now = time.monotonic()
        if now - self._beat < interval:
            return False
        self._beat = now
        return True

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    def sign(self) -> None:
        """Record that the session printed something."""
        self._last = time.monotonic()

    def silence(self) -> float:
        """Seconds since the last sign of life."""
        now = time.monotonic()
        if now - self._looked >= _LOOK_EVERY:
            used, faults = _usage(self._session)
            if used - self._used > _BUSY * (now - self._looked) or faults - self._faults > now - self._looked:
                self._last = now
            self._used, self._faults, self._looked = used, faults, now
        return now - self._last


def _stats(session: int) -> Iterator[list[bytes]]:
    """Fields 3 and later of each session process's stat, as in proc(5): state, parent, group, session ..."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name in parentheses may hold anything.
            fields = path.read_bytes().rpartition(b")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session:
            yield fields


def _usage(session: int) -> tuple[float, int]:
    """CPU seconds and major page faults of a session's processes."""
    stats = list(_stats(session))
    return sum(int(fields[11]) + int(fields[12]) for fields in stats) / _TICKS, sum(int(fields[9]) for fields in stats)


def runs(session: int) -> bool:
    """Whether any process of a session still runs, even for the moment that dying of a signal takes."""
    return any(fields[0] not in (b"Z", b"X") for fields in _stats(session))


def peak_memory(pid: int) -> int:
    """Peak resident memory of a process, in bytes; 0 if it is gone."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return 0
