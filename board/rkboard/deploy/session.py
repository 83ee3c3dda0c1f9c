"""A connection to a board, at whose other end `rkboard.deploy.there` runs as root."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from rkboard.deploy.there import MARK, ORDER
from rkruntime.errors import BundleError, ServiceError
from rkruntime.remote import Remote, missing_tool, refused_by_sudo, ssh_command

_THERE: Final = Path(__file__).with_name("there")
_PACKAGE: Final = "rkboard.deploy.there"
_BLOCK: Final = 1 << 20
_MOST_BYTES: Final = 64 << 20
_MOST_LINE: Final = 1 << 20
# Three times the longest silence of a board that follows its log (`_QUIET_S` in there/follow.py).
_QUIET_S: Final = 180.0
_MOST_TEXT: Final = 4000
# Limit for a whole answer. A model of 10 GB is read from an SD card three times: for its hash, to load it, and to load
# the previous one if that fails.
_PATIENCE_S: Final = 5400.0
# Limit for an answer that needs neither the disk nor the daemon's model.
_SOON_S: Final = 120.0
_SOON: Final = ("look", "log")
_MOST_COPIES: Final = 3
# Limit for the board to say why it stopped reading.
_LAST_S: Final = 5.0
# Loads the modules from standard input into sys.modules, where they find each other; the rest of the input is theirs.
_LOADER: Final = """\
import json, sys, types
stream = sys.stdin.buffer
for name, text in json.loads(stream.read(int(stream.readline(20)))):
    module = sys.modules[name] = types.ModuleType(name)
    exec(compile(text, name, 'exec'), module.__dict__)
sys.modules['rkboard.deploy.there.talk'].main(json.loads(stream.readline()))
"""
_AS_ROOT: Final = f"""\
import os, sys
loader = {_LOADER!r}
if os.geteuid():
    try:
        os.execvp('sudo', ['sudo', '-n', '--', sys.executable, '-I', '-c', loader])
    except OSError as error:
        sys.exit('sudo: ' + str(error))
exec(loader)
"""
_SUDO_HINT: Final = (
    "Log in as root (root@BOARD), or let this account use sudo without a password for as long as you need it:"
    " docs/deploy.md says how."
)


class Session:
    """Requests to a board, one after the other.

    Args:
        destination: For ssh, such as `user@board`.
        root: Another file tree of that machine; changing it does not need root.
        say: Called with lines about progress.
        endless: The board may send any amount, until the session ends.

    Raises:
        ServiceError: The board cannot be reached, has no Python 3.9, or sudo asks for a password.
        UsageError: The command for ssh cannot be read.
    """

    def __init__(self, destination: str, say: Callable[[str], None], root: str = "/", *, endless: bool = False) -> None:
        self.destination = destination
        self._say = say
        code = _AS_ROOT if root == "/" else _LOADER
        words = ("python3", "-I", "-c", f"exec({code!r})")
        self._remote = Remote(
            ssh_command(destination, *map(shlex.quote, words)),
            MARK,
            _MOST_LINE if endless else _MOST_BYTES,
            endless=endless,
        )
        self._ended = self._answered = False
        sources = [[_PACKAGE, (_THERE / "__init__.py").read_text()]]
        sources += [[f"{_PACKAGE}.{name}", (_THERE / f"{name}.py").read_text()] for name in ORDER]
        text = json.dumps(sources).encode()
        self._remote.send(b"%d\n" % len(text) + text + json.dumps(root).encode() + b"\n")

    def __enter__(self) -> Session:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._ended:
            self._remote.end(2.0)

    def call(self, op: str, **given: Any) -> dict[str, Any]:
        """Ask for an operation and return its answer.

        Raises:
            ServiceError: It is refused, or the connection breaks.
        """
        patience = _SOON_S if op in _SOON else _PATIENCE_S
        heard = self._remote.send(json.dumps({"op": op, **given}).encode() + b"\n")
        return self._answer(patience if heard else _LAST_S)

    def _answer(self, patience: float = _PATIENCE_S) -> dict[str, Any]:
        end = time.monotonic() + patience
        while line := self._remote.line(max(0.0, end - time.monotonic())):
            event = _event(line, self.destination)
            self._answered = True
            if event["event"] == "says":
                self._say(str(event.get("text"))[:_MOST_TEXT])
            elif event["event"] == "error":
                raise self._refusal(event)
            else:
                return event
        raise self._failed()

    def follow(self, lines: int) -> None:
        """Pass on the last lines of the daemon's log and all that follow. Raises ServiceError when the log ends."""
        self._remote.send(json.dumps({"op": "follow", "lines": lines}).encode() + b"\n")
        while line := self._remote.line(_QUIET_S):
            event = _event(line, self.destination)
            if event["event"] != "says":
                raise self._refusal(event if event["event"] == "error" else {"message": "The log has ended."})
            if text := text_of(event, "text"):  # an empty text only tests whether somebody is still connected
                self._say(text)
        raise self._failed()

    def _refusal(self, event: Mapping[str, Any]) -> ServiceError:
        message, hint = (str(event.get(key, ""))[:_MOST_TEXT] for key in ("message", "hint"))
        return ServiceError(f"{self.destination}: {message}", hint=hint.replace("USER@BOARD", self.destination))

    def send(self, files: Mapping[str, tuple[int, Path]], progress: Callable[[int, int], None]) -> None:
        """Send what the board lacks of files, given as size and path by SHA-256.

        Raises:
            BundleError: A file is shorter than it should be.
            ServiceError: It is refused, or the connection breaks.
        """
        left = dict(files)
        for _ in range(_MOST_COPIES):
            left = self._send_all(left, progress)
            if not left:
                return
        names = ", ".join(path.name for _, path in left.values())
        raise ServiceError(
            f"{names} arrives damaged on {self.destination}.", hint="Check its disk and memory: rkedge doctor, dmesg."
        )

    def _send_all(
        self, files: Mapping[str, tuple[int, Path]], progress: Callable[[int, int], None]
    ) -> dict[str, tuple[int, Path]]:
        """Send files; return those that arrived damaged."""
        held = names_of(self.call("held", files={digest: size for digest, (size, _) in files.items()}), "held")
        total, before, wrong = sum(size for size, _ in files.values()), 0, {}
        for digest, (size, path) in files.items():
            offset = held.get(digest)
            if not isinstance(offset, int) or not 0 <= offset <= size:
                raise _nonsense(self.destination)
            start = before

            def at(done: int, start: int = start) -> None:
                progress(start + done, total)

            at(offset)
            if not self._send(digest, size, offset, path, at):
                wrong[digest] = (size, path)
            before += size
        return wrong

    def _send(self, digest: str, size: int, offset: int, path: Path, progress: Callable[[int], None]) -> bool:
        request = {"op": "receive", "digest": digest, "size": size, "offset": offset}
        self._remote.send(json.dumps(request).encode() + b"\n")
        with path.open("rb") as file:
            file.seek(offset)
            while offset < size:
                block = file.read(min(_BLOCK, size - offset))
                if not block:
                    self._ended = True
                    self._remote.end(0.2)
                    raise BundleError(f"{path} became shorter while it was being sent.")
                if not self._remote.send(block):
                    self._answer(_LAST_S)  # raises with the board's reason, if it sent one
                    raise self._failed()
                offset += len(block)
                progress(offset)
        return self._answer().get("right") is True

    def _failed(self) -> ServiceError:
        self._ended = True
        status = self._remote.end(5.0)
        notes = self._remote.notes
        details = {"lines": notes, "exit": status}
        where = self.destination
        if not self._answered and (tool := missing_tool(notes)):
            hint = _SUDO_HINT if tool == "sudo" else "On the board: sudo apt install python3"
            return ServiceError(f"{where} has no {tool}.", hint=hint, details=details)
        if not self._answered and refused_by_sudo(notes):
            return ServiceError(f"sudo on {where} asks for a password, or refuses.", hint=_SUDO_HINT, details=details)
        if self._remote.flooded:
            return _nonsense(where)
        if status is None:
            hint = "A disk or a driver there may hang: log in and look at dmesg."
            return ServiceError(f"{where} does not answer any more.", hint=hint, details=details)
        if status == 255 or not notes:
            return ServiceError(
                f"The connection to {where} broke, or could not be made.",
                hint=f"If `ssh {where} true` works, start the same command again: it continues where it stopped.",
                details=details,
            )
        return ServiceError(
            f"What ran on {where} ended with {status}.",
            hint="Start the same command again: it continues where it stopped."
            if self._answered
            else "It needs Python 3.9 or later there: python3 --version",
            details=details,
        )


def _event(line: bytes, destination: str) -> dict[str, Any]:
    try:
        event = json.loads(line.removeprefix(MARK), parse_constant=_not_json)
    except (ValueError, RecursionError):
        raise _nonsense(destination) from None
    if not isinstance(event, dict) or event.get("event") not in ("says", "done", "error"):
        raise _nonsense(destination)
    return event


def _not_json(text: str) -> None:
    """Refuse NaN and the infinities, which Python's json would accept. Raises ValueError."""
    raise ValueError(text)


def _nonsense(destination: str) -> ServiceError:
    return ServiceError(
        f"{destination} sent something that is not an answer.", hint=f"What does this print? ssh {destination} true"
    )


def text_of(answer: Mapping[str, Any], key: str) -> str:
    """Return a text in an answer; empty if there is none."""
    found = answer.get(key)
    return found[:_MOST_TEXT] if isinstance(found, str) else ""


def names_of(answer: Mapping[str, Any], *keys: str) -> dict[str, Any]:
    """Return the mapping at a path of keys in an answer; empty if there is none."""
    found: Any = answer
    for key in keys:
        found = found.get(key) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else {}


def list_of(answer: Mapping[str, Any], key: str) -> Sequence[Any]:
    """Return a list in an answer; empty if there is none."""
    found = answer.get(key)
    return found if isinstance(found, list) else []
