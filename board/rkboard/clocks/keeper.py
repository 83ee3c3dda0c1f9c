"""The keeper: sets clocks as a line on standard input asks, and restores them when the input closes or at a signal.

It answers with lines of JSON: `set` or `error`, then, if standard output is still read, `restored`. A request names
kinds of clocks and values, never paths.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import struct
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any, Final

from rkboard.clocks.setting import Saved, Setter
from rkboard.clocks.state import SCHEMA, State, StateFile, started, with_saved
from rkboard.clocks.wishes import Wish, goals
from rkboard.doctor.visit import glance
from rkruntime.errors import HostError, RKEdgeError, UsageError
from rkruntime.schema import build
from rkruntime.words import counted

_MOST_BYTES: Final = 4096
_PATIENCE_S: Final = 10.0
_ENDING: Final = frozenset({signal.SIGTERM, signal.SIGINT, signal.SIGHUP})


class _Ended(BaseException):
    """A signal asks the keeper to end."""


@dataclass
class Held:
    """Clocks that are held. `changed`: differences found at the end; `left`: notes from restoring them."""

    saved: Sequence[Saved]
    notes: Sequence[str]
    changed: Sequence[str] = ()
    left: Sequence[str] = ()


class Keeper:
    """Holds the clocks of the tree below `root`."""

    def __init__(self, root: Path) -> None:
        self._root, self._setter, self._file = root, Setter(str(root)), StateFile(root)

    def restore(self) -> list[str]:
        """Restore what a killed keeper has left; return notes.

        Raises:
            BusyError: A keeper is at work.
            HostError: The kernel does not take a value; the other clocks are restored, and this one stays noted.
        """
        if self._file.read() is None:
            return []
        with self._file.lock():
            return self._restore()

    def _restore(self) -> list[str]:
        state = self._file.read()
        if state is None:
            return []
        notes: list[str] = []
        failed, problems = [], []
        for saved in reversed(state.saved):
            try:
                notes += filter(None, [self._setter.restore(saved)])
            except HostError as error:  # noqa: PERF203 - there are a handful
                failed.append(saved)
                problems.append(error.message)
        if failed:
            self._file.write(with_saved(state, failed[::-1]))
            raise HostError(
                f"{counted(len(failed), 'clock')} could not be restored: {' '.join(problems)}",
                hint="sudo rkedge clocks --restore tries it again; a reboot restores every clock.",
            )
        self._file.remove()
        return notes

    @contextmanager
    def held(self, wish: Wish, uid: int) -> Iterator[Held]:
        """Hold clocks while the block runs, and restore them however it ends.

        Raises:
            RKEdgeError: The clocks cannot be set, and are as before; or they cannot be restored.
        """
        with self._file.lock():
            left = self._restore()
            chosen, notes = goals(glance(self._root), wish)
            held = Held([Saved.of(goal) for goal in chosen], [*left, *notes])
            own = os.getpid()
            self._file.write(State(SCHEMA, own, started(own), uid, time.time(), tuple(held.saved)))
            try:
                for one in held.saved:
                    self._setter.hold(one)
                yield held
                held.changed = [text for one in held.saved if (text := self._setter.differs(one))]
            except RKEdgeError:
                with suppress(HostError):  # the first error says more
                    self._restore()
                raise
            except BaseException:  # a signal too: whatever ends the keeper, the clocks go back
                self._restore()
                raise
            held.left = self._restore()


def keep(root: Path) -> int:
    """Serve the connection on standard input and output; return the exit status."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)  # except where it waits
    for number in _ENDING:
        signal.signal(number, _end)
    keeper = Keeper(root)
    try:
        wish = _request()
        if wish.restore:
            keeper.restore()
            _answer({"event": "restored", "changed": [], "notes": []})
            return 0
        with keeper.held(wish, _peer()) as held:
            rows = [{"name": one.name, "from": one.before or None, "to": one.set} for one in held.saved]
            _answer({"event": "set", "clocks": rows, "notes": held.notes})
            with suppress(_Ended):
                _wait(None)
        _answer({"event": "restored", "changed": held.changed, "notes": held.left})
    except RKEdgeError as error:
        _answer({"event": "error", **error.as_dict()})
        return error.exit_code
    except _Ended:
        return 0
    return 0


def _end(_number: int, _frame: FrameType | None) -> None:
    raise _Ended


def _wait(seconds: float | None) -> bytes:
    """Read standard input for at most this time; empty if it closes or nothing comes. Raises _Ended at a signal."""
    try:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDING)
        ready, _, _ = select.select([0], [], [], seconds)
        return os.read(0, _MOST_BYTES) if ready else b""
    except OSError:
        return b""
    finally:
        signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)


def _request() -> Wish:
    """Read the wish in the first line of input. Raises UsageError."""
    line, end = b"", time.monotonic() + _PATIENCE_S
    while b"\n" not in line and len(line) < _MOST_BYTES and (block := _wait(max(0.0, end - time.monotonic()))):
        line += block
    try:
        data = json.loads(line)
    except (ValueError, RecursionError):
        raise UsageError("That was not a request for clocks.", hint="`rkedge clocks -- COMMAND` makes one.") from None
    if not isinstance(data, dict):
        raise UsageError("A request for clocks is an object.")
    return build(Wish, data, lambda what: UsageError(f"In the request for clocks {what}."))


def _peer() -> int:
    """Return the user at the other end of the socket; if it is not a socket, this process's own."""
    with suppress(OSError), socket.socket(fileno=os.dup(0)) as link:
        _, uid, _ = struct.unpack("3i", link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i")))
        return int(uid)
    return os.getuid()


def _answer(event: dict[str, Any]) -> None:
    """Tell whoever is still connected. The clocks are restored in any case."""
    with suppress(OSError):
        os.write(1, f"{json.dumps(event)}\n".encode())
