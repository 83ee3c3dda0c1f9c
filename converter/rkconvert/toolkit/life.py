"""Signs of life of a session of processes that says nothing for a long time, as Linux's /proc shows them."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

# Below this share of one processor a silent program waits for something that does not come.
_BUSY: Final = 0.02
_LOOK_EVERY: Final = 5.0
_TICKS: Final = os.sysconf("SC_CLK_TCK")


class Life:
    """How long a session has done nothing: no output (`sign`), no processor time, no paging from disk."""

    def __init__(self, session: int) -> None:
        self._session = session
        self._start = self._last = self._looked = time.monotonic()
        self._beat = self._start
        self._used, self._faults = 0.0, 0

    def due(self, interval: float) -> bool:
        """Whether a heartbeat is due: once in `interval` seconds."""
        now = time.monotonic()
        if now - self._beat < interval:
            return False
        self._beat = now
        return True

    @property
    def seconds(self) -> float:
        """Since the start."""
        return time.monotonic() - self._start

    def sign(self) -> None:
        """It said something."""
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
    """Of each process of a session what proc(5) has in its stat from field 3 on: state, parent, group, session ..."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            # The name in parentheses may hold anything.
            fields = path.read_bytes().rpartition(b")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session:
            yield fields


def _usage(session: int) -> tuple[float, int]:
    """Processor seconds and major page faults of a session's processes."""
    stats = list(_stats(session))
    return sum(int(fields[11]) + int(fields[12]) for fields in stats) / _TICKS, sum(int(fields[9]) for fields in stats)


def runs(session: int) -> bool:
    """Whether any process of a session still runs, be it for the moment that an end by signal takes."""
    return any(fields[0] not in (b"Z", b"X") for fields in _stats(session))


def peak_memory(pid: int) -> int:
    """Most resident memory that a process has had, in bytes; 0 when it is gone."""
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except (OSError, ValueError):
        pass
    return 0
