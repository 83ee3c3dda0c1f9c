"""systemd's side of a service, by its documented protocols: sd_notify(3), sd_listen_fds(3), journald's levels."""

from __future__ import annotations

import logging
import os
import socket
import sys
import time
from contextlib import suppress
from typing import Any, Final

from rkruntime.errors import UsageError
from rkruntime.printable import one_line

_FIRST_FD: Final = 3
_MORE_TIME_USEC: Final = 60_000_000
# Python's log levels to syslog's, which journald reads between angle brackets.
_LEVELS: Final = {"DEBUG": 7, "INFO": 6, "WARNING": 4, "ERROR": 3, "CRITICAL": 2}


def notify(*fields: str) -> None:
    """Notify systemd, for instance `READY=1`; does nothing without it."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    if address.startswith("@"):
        address = "\0" + address[1:]
    # A service manager that no longer listens is not a reason to stop.
    with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as channel:
        channel.sendto("\n".join(fields).encode(), address)


def reloading() -> None:
    """Notify systemd that a reload has begun; READY=1 ends it, and `still_at_it` keeps it from timing out."""
    notify("RELOADING=1", f"MONOTONIC_USEC={time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000}")
    still_at_it()


def still_at_it() -> None:
    """Ask systemd for more time than TimeoutStartSec= allows; to be repeated until the work is done."""
    notify(f"EXTEND_TIMEOUT_USEC={_MORE_TIME_USEC}")


def watchdog_s() -> float | None:
    """Return the seconds between watchdog pings, half of systemd's timeout; None without a watchdog."""
    usec, pid = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID", str(os.getpid()))
    return int(usec) / 2e6 if usec.isdigit() and pid == str(os.getpid()) else None


def inherited_sockets() -> list[socket.socket]:
    """Return the sockets of a socket unit. Raises UsageError if systemd passed something else."""
    count = os.environ.get("LISTEN_FDS", "")
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or not count.isdigit():
        return []
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        os.environ.pop(name, None)
    return [_socket(fd) for fd in range(_FIRST_FD, _FIRST_FD + int(count))]


def _socket(fd: int) -> socket.socket:
    try:
        os.set_inheritable(fd, False)
        return socket.socket(fileno=fd)
    except OSError as error:
        raise UsageError(
            f"File descriptor {fd} from systemd is not a socket: {error.strerror}.",
            hint="The socket unit needs ListenStream=: see board/systemd/rkedge.socket.",
        ) from error


class _Printable(logging.Formatter):
    """One record is one line, whatever it contains; traceback lines follow it, indented."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 - logging's name
        return one_line(super().formatMessage(record))

    def formatException(self, ei: Any) -> str:  # noqa: N802 - logging's name
        return "\n".join(f"    {one_line(line)}" for line in super().formatException(ei).splitlines())

    def formatStack(self, stack_info: str) -> str:  # noqa: N802 - logging's name
        return "\n".join(f"    {one_line(line)}" for line in stack_info.splitlines())


class _Journal(_Printable):
    """A line with its level for journald, which adds the time itself."""

    def format(self, record: logging.LogRecord) -> str:
        level = _LEVELS.get(record.levelname, 6)
        return "\n".join(f"<{level}>{line}" for line in super().format(record).splitlines())


def log_to_stderr(level: str) -> None:
    """Set up logging: for journald if it reads standard error, else with time and level."""
    handler = logging.StreamHandler(sys.stderr)
    plain = _Printable("%(asctime)s %(levelname)s %(message)s")
    handler.setFormatter(_Journal("%(message)s") if "JOURNAL_STREAM" in os.environ else plain)
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    # uvicorn warns about every request that is not HTTP, and anyone can send those endlessly.
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    logging.getLogger("rkedge").setLevel(level.upper())
    # No line names these, and each would be looked up for each line.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
