"""Have clocks held while a command runs: by the unit's keeper, or as root by a keeper of our own."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Final

from rkboard.clocks.keeper import Keeper
from rkboard.clocks.state import StateFile
from rkboard.clocks.wishes import Wish
from rkruntime import errors
from rkruntime.checks.keeper import SOCKET
from rkruntime.checks.machine import ROOT
from rkruntime.errors import HostError, RKEdgeError, UsageError
from rkruntime.program import own_command

GROUP: Final = "rkedge-clocks"
_INSTALL: Final = "docs/clocks.md installs it; without it, root can: sudo rkedge clocks -- COMMAND"
_MOST_BYTES: Final = 1 << 16
_PATIENCE_S: Final = 30.0
# Limit for systemd to restore what its keeper has left.
_AFTER_S: Final = 15.0


@dataclass
class Said:
    """The keeper's answers: which clocks it set, and at the end what had changed meanwhile."""

    clocks: Sequence[dict[str, Any]]
    notes: Sequence[str]
    changed: Sequence[str] = ()


class _Link:
    """A connection to a keeper, which restores the clocks when the connection closes."""

    def __init__(self, root: Path) -> None:
        self._root, self._own = root, root != ROOT or (os.geteuid() == 0 and not SOCKET.exists())
        self._socket = self._start() if self._own else self._connect()
        self._socket.settimeout(_PATIENCE_S)
        self._text = b""

    def _start(self) -> socket.socket:
        """Start a keeper of our own, out of reach of the terminal's signals."""
        ours, its = socket.socketpair()
        words = own_command("clocks", "--keep", "--root", str(self._root))
        with its:
            try:
                self._process = subprocess.Popen(
                    words, stdin=its.fileno(), stdout=its.fileno(), stderr=subprocess.DEVNULL, start_new_session=True
                )
            except OSError as error:
                raise HostError(f"The keeper of the clocks cannot be started: {error.strerror}.") from error
        return ours

    def _connect(self) -> socket.socket:
        link = socket.socket(socket.AF_UNIX)
        try:
            link.connect(str(SOCKET))
        except OSError as error:
            link.close()
            if error.errno in (errno.EACCES, errno.EPERM):
                raise HostError(
                    f"This account may not hold clocks: it is not in the group {GROUP}.",
                    hint=f"sudo usermod -aG {GROUP} $USER, then log in again. Its members may slow this board down.",
                ) from error
            raise HostError("The unit that holds clocks is not installed or not started.", hint=_INSTALL) from error
        return link

    def send(self, wish: Wish) -> None:
        with suppress(BrokenPipeError):
            self._socket.sendall(f"{json.dumps(asdict(wish))}\n".encode())

    def event(self) -> dict[str, Any]:
        """Return the keeper's next event; empty if the keeper is gone. Raises the error that it reports."""
        while b"\n" not in self._text and len(self._text) < _MOST_BYTES:
            try:
                block = self._socket.recv(_MOST_BYTES)
            except (TimeoutError, ConnectionError):
                return {}
            if not block:
                return {}
            self._text += block
        line, _, self._text = self._text.partition(b"\n")
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            return {}
        if not isinstance(event, dict):
            return {}
        if event.get("event") == "error":
            raise _error(event)
        return event

    def let_go(self) -> None:
        """Ask the keeper to restore the clocks."""
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)

    def close(self) -> None:
        self._socket.close()
        if self._own:
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(_PATIENCE_S)

    def make_up(self) -> None:
        """Restore the clocks in place of a keeper that was killed. Raises HostError."""
        if self._own:
            try:
                self._process.wait(_PATIENCE_S)
            except subprocess.TimeoutExpired:
                hint = "A driver may hang: sudo dmesg | rkedge diagnose -"
                raise HostError("The keeper of the clocks no longer answers.", hint=hint) from None
            Keeper(self._root).restore()
            return
        file, end = StateFile(self._root), time.monotonic() + _AFTER_S  # the unit restores them (ExecStopPost)
        while file.read() is not None:
            if time.monotonic() > end:
                hint = "sudo rkedge clocks --restore"
                raise HostError("The keeper of the clocks has ended without restoring them.", hint=hint)
            time.sleep(0.1)


def _error(event: dict[str, Any]) -> RKEdgeError:
    """Return the keeper's error as one of the class that it names."""
    kind = getattr(errors, str(event.get("error")), HostError)
    if not (isinstance(kind, type) and issubclass(kind, RKEdgeError)):
        kind = HostError
    return kind(str(event.get("message")), hint=str(event.get("hint")))


@contextmanager
def held(wish: Wish, root: Path = ROOT) -> Iterator[Said]:
    """Hold clocks while the block runs.

    Raises:
        HostError: No keeper can be reached, or the kernel does not take a value.
        RefusedError: Setting a clock could do harm, or could not be checked.
        BusyError: Somebody else holds the clocks.
    """
    link = _Link(root)
    try:
        link.send(wish)
        event = link.event()
        if event.get("event") != "set":
            link.make_up()
            raise HostError("The keeper of the clocks did not answer.", hint="journalctl -u 'rkedge-clocks@*'")
        said = Said(event.get("clocks", ()), event.get("notes", ()))
        try:
            yield said
        finally:
            link.let_go()
            last = link.event()
            said.changed = (*last.get("changed", ()), *last.get("notes", ()))
            if last.get("event") != "restored":
                link.make_up()
                said.changed = ("The keeper of the clocks was killed meanwhile. They are restored.",)
    finally:
        link.close()


def restore(root: Path = ROOT) -> Sequence[str]:
    """Restore what a killed keeper has left; return notes. Raises as `held` does."""
    if root != ROOT or os.geteuid() == 0:
        return Keeper(root).restore()
    link = _Link(root)
    try:
        link.send(Wish(restore=True))
        if link.event().get("event") != "restored":
            raise HostError("The keeper of the clocks did not answer.", hint="journalctl -u 'rkedge-clocks@*'")
    finally:
        link.close()
    return ()


def run(command: Sequence[str]) -> int:
    """Run a command on our terminal; return its exit status, or 128 plus the number of the signal that ended it.

    Ctrl-C is left to the command. SIGTERM and SIGHUP are passed on to it.

    Raises:
        UsageError: There is no such command.
    """
    process: subprocess.Popen[bytes] | None = None
    early: list[int] = []

    def pass_on(number: int, _: FrameType | None) -> None:
        if number not in (signal.SIGTERM, signal.SIGHUP):
            return
        if process is None:  # the command is just being started
            early.append(number)
        else:
            process.send_signal(number)

    # Handlers, because the command would inherit ignored signals. Those ignored before, as under nohup, stay ignored.
    handled = (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGHUP)
    meant = [number for number in handled if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, pass_on) for number in meant}
    try:
        process = subprocess.Popen(command)
        for number in early:
            process.send_signal(number)
        status = process.wait()
    except OSError as error:
        raise UsageError(f"{command[0]} cannot be started: {error.strerror}.") from error
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return status if status >= 0 else 128 - status


def check_command(command: Sequence[str]) -> None:
    """Raise UsageError unless there is such a program. Called before any clock is touched."""
    if shutil.which(command[0]) is None:
        raise UsageError(
            f"There is no program {command[0]}.", hint="Write it as in: rkedge clocks -- rkedge bench BUNDLE"
        )
