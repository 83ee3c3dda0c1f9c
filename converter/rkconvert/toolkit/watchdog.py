"""Watchdog for a session of processes that prints nothing for a long time: its activity, as Linux's /proc shows it."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

# Below this share of one CPU, a silent program is waiting for something that never comes.
_BUSY: Final = 0.02
_LOOK_EVERY: Final = 5.0
_TICKS: Final = os.sysconf("SC_CLK_TCK")


class Watchdog:
    """Measures how long a session has been idle: no output (`feed`), no CPU time, no paging from disk."""

    def __init__(self, session: int) -> None:
        self._session = session
        self._start = self._active = self._looked = self._beat = time.monotonic()
        self._used, self._faults = 0.0, 0

    def heartbeat_due(self, interval: float) -> bool:
        """Whether it is time for a heartbeat: once every `interval` seconds."""
        now = time.monotonic()
        if now - self._beat < interval:
            return False
        self._beat = now
        return True

    @property
    def seconds(self) -> float:
        """Seconds since the start."""
        return time.monotonic() - self._start

    def feed(self) -> None:
        """Record that the session printed something."""
        self._active = time.monotonic()

    def idle_seconds(self) -> float:
        """Return the seconds since the last activity."""
        now = time.monotonic()
        if now - self._looked >= _LOOK_EVERY:
            used, faults = _usage(self._session)
            if used - self._used > _BUSY * (now - self._looked) or faults - self._faults > now - self._looked:
                self._active = now
            self._used, self._faults, self._looked = used, faults, now
        return now - self._active


def _stats(session: int) -> Iterator[list[bytes]]:
    """Yield fields 3 and later of each session process's stat, as in proc(5): state, parent, group, session ..."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name in parentheses may hold anything.
            fields = path.read_bytes().rpartition(b")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session:
            yield fields


def _usage(session: int) -> tuple[float, int]:
    """Return CPU seconds and major page faults of a session's processes."""
    stats = list(_stats(session))
    return sum(int(fields[11]) + int(fields[12]) for fields in stats) / _TICKS, sum(int(fields[9]) for fields in stats)


def is_running(session: int) -> bool:
    """Whether any process of a session still runs, even for the moment that dying of a signal takes."""
    return any(fields[0] not in (b"Z", b"X") for fields in _stats(session))


def peak_memory(pid: int) -> int:
    """Return the peak resident memory of a process, in bytes; 0 if it is gone."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return 0


def out_of_memory_kills() -> int:
    """Return how many processes the kernel has killed for lack of memory since boot; 0 if it does not report this."""
    try:
        found = re.search(r"^oom_kill (\d+)$", Path("/proc/vmstat").read_text(), re.MULTILINE)
        return int(found[1]) if found else 0
    except OSError:
        return 0
