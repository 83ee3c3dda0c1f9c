"""The process above the worker, which sees to it that nothing outlives the worker, nor the worker its parent.

A library may start processes in sessions of their own, which no signal to the worker's group reaches. They remain
descendants, though, and a subreaper inherits them when their parents exit. The worker's parent is someone else's
program and cannot be a subreaper, so this process stands between the two.
"""

from __future__ import annotations

import ctypes
import os
import resource
import signal
from contextlib import suppress
from pathlib import Path
from typing import Final, NoReturn

_PR_SET_PDEATHSIG: Final = 1
_PR_SET_CHILD_SUBREAPER: Final = 36
_SIGNALS: Final = (signal.SIGCHLD, signal.SIGTERM)
# Seconds between checks for the parent. The worker itself notices at once that its command pipe is closed.
_LOOK: Final = 1.0


def keep() -> None:
    """Fork, and return in the worker.

    The calling process becomes the keeper. It exits with the worker's status when the worker does; if its own parent is
    gone or SIGTERM arrives, it kills the worker and exits. Either way, it kills all descendants.
    """
    keeper, parent = os.getpid(), os.getppid()
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    worker = os.fork()
    if worker:
        _keep(worker, parent)
    # In case the keeper is killed. The signal is sent when the forking thread ends; the keeper has no other.
    _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != keeper:
        os._exit(1)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)


def _prctl(option: int, value: int) -> None:
    # An option that a kernel lacks matters only if a library misbehaves.
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _keep(worker: int, parent: int) -> NoReturn:
    # The worker's exit must show on its pipes.
    os.closerange(0, os.sysconf("SC_OPEN_MAX"))
    status = _wait(worker, parent)
    _kill_children()
    if status is not None and os.WIFEXITED(status):
        os._exit(os.WEXITSTATUS(status))
    number = signal.SIGKILL if status is None else os.WTERMSIG(status)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with suppress(OSError, ValueError):
        signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _SIGNALS)
    os.kill(os.getpid(), number)
    os._exit(1)


def _wait(worker: int, parent: int) -> int | None:
    """Wait for the worker; returns its status, or None if it must be killed."""
    while os.getppid() == parent:
        with suppress(ChildProcessError):
            while (ended := os.waitpid(-1, os.WNOHANG))[0]:
                if ended[0] == worker:
                    return ended[1]
        received = signal.sigtimedwait(_SIGNALS, _LOOK)
        if received is not None and received.si_signo == signal.SIGTERM:
            return None
    return None


def _kill_children() -> None:
    """Kill children until none is left: the children of a killed child become this process's."""
    with suppress(ChildProcessError):
        while True:
            for child in _children():
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(child, signal.SIGKILL)
            os.wait()


def _children() -> list[int]:
    """List pids of children from /proc/PID/stat, as not every kernel has /proc/PID/task/TID/children."""
    found, own = [], os.getpid()
    for entry in Path("/proc").iterdir():
        # A program's name, in parentheses, may contain anything.
        with suppress(OSError, ValueError, IndexError):
            if int((entry / "stat").read_bytes().rpartition(b")")[2].split()[1]) == own:
                found.append(int(entry.name))
    return found
