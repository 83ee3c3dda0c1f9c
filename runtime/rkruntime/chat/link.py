"""An ssh process that runs `rkedge attach` on a board: messages to it, and its events, each of them checked."""

from __future__ import annotations

import json
import os
import select
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from typing import IO, Any, Final

from rkruntime.chat.attach import ALIVE, ALIVE_S, GONE, MAX_LINE
from rkruntime.engine.generation import FinishReason
from rkruntime.errors import BusyError, NoSuchSessionError, ServiceError, UsageError
from rkruntime.printable import one_line
from rkruntime.terminal import say
from rkruntime.words import counted

_MOST_LINES: Final = 1_000_000
# The beginning of each event's line.
_EVENT: Final = b'{"type"'
# Seconds for a login: ssh may ask for a password, for which sshd waits this long by default.
_LOGIN_S: Final = 120.0
# Seconds from the board's first output to the first event: a busy board takes some to start Python.
_GREETING_S: Final = 30.0
# Seconds of silence after which an `rkedge attach` that sends ALIVE every ALIVE_S seconds counts as gone.
_FROZEN_S: Final = 6.0 * ALIVE_S
# Seconds between checks of whether ssh still runs, as one of its children may keep its output open.
_LOOK_S: Final = 0.5
_READ: Final = 1 << 16
_MOST_NOTES: Final = 200
_LONGEST_NOTE: Final = 4096


class BrokenError(Exception):
    """The connection, or the daemon behind it, is gone.

    Attributes:
        told: The board's message about the reason, if any.
    """

    def __init__(self, told: ServiceError | None = None) -> None:
        super().__init__()
        self.told = told


class Link:
    """An ssh process and the lines that pass through it. If no event ever comes, the link breaks on its own."""

    def __init__(self, command: Sequence[str]) -> None:
        # ssh keeps ignoring SIGINT if it is ignored at the start: Ctrl-C is to stop the answer, not the connection.
        before = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            pipe = subprocess.PIPE
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe)
        except OSError as error:
            raise ServiceError(
                f"{command[0]} cannot be started: {error.strerror or error}.", hint="Install the OpenSSH client."
            ) from error
        finally:
            signal.signal(signal.SIGINT, before)
        self._notes = threading.Thread(target=self._pass_on, daemon=True)
        self._notes.start()
        self._writing = threading.Lock()
        self._readable = select.poll()
        self._readable.register(self._pipes[1], select.POLLIN)
        self._received = bytearray()
        self._any = False
        # Time by which a line must come; None once one has come from a board that does not send ALIVE.
        self._deadline: float | None = time.monotonic() + _LOGIN_S
        self._alive = False

    @property
    def _pipes(self) -> tuple[IO[bytes], IO[bytes]]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        return self._process.stdin, self._process.stdout

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a message; from any thread. Raises BrokenError, or UsageError for one that no board reads."""
        line = json.dumps(message).encode() + b"\n"
        if len(line) > MAX_LINE:
            raise UsageError(f"The message is over {MAX_LINE >> 20} MB long as JSON.", hint="Ask about a part of it.")
        with self._writing:
            try:
                self._pipes[0].write(line)
                self._pipes[0].flush()
            except (OSError, ValueError) as error:
                raise BrokenError from error

    def events(self) -> Iterator[dict[str, Any]]:
        """Yield the events up to an `end`.

        Raises:
            BrokenError: The connection broke before the `end`.
            ServiceError: The board sent something invalid. The connection is closed, as later lines match no request.
        """
        if self._alive:
            self._deadline = time.monotonic() + _FROZEN_S
        for _ in range(_MOST_LINES):
            try:
                event = _event(self._line())
            except ServiceError:
                self.close()
                raise
            if event is None:
                continue
            self._alive = self._alive or event["type"] == ALIVE
            self._deadline = time.monotonic() + _FROZEN_S if self._alive else None
            if event["type"] != ALIVE:
                yield event
            if event["type"] == "end":
                return
        self.close()
        raise nonsense("endless lines")

    def _line(self) -> bytes:
        """Return the next line, or MAX_LINE bytes of an endless one. Raises BrokenError, also for a cut-off line."""
        looked_at = 0
        while (end := self._received.find(b"\n", looked_at)) < 0 and len(self._received) < MAX_LINE:
            looked_at = len(self._received)
            self._received += self._more()
        size = end + 1 or len(self._received)
        line = bytes(self._received[:size])
        del self._received[:size]
        return line

    def _more(self) -> bytes:
        """Wait for what the board sends next. Raises BrokenError if nothing more comes."""
        while True:
            late = self._deadline is not None and time.monotonic() > self._deadline
            if late and not self._alive:
                self.kill()
                raise BrokenError(self._silent())
            exited = self._process.poll() is not None
            try:
                ready = self._readable.poll(0 if exited or late else _LOOK_S * 1000)
                data = os.read(self._pipes[1].fileno(), _READ) if ready else None
            except (OSError, ValueError):  # the pipe is already closed
                raise BrokenError from None
            if data:
                if not self._any and self._deadline is not None:
                    self._any, self._deadline = True, time.monotonic() + _GREETING_S
                return data
            if data is not None or exited:
                raise BrokenError
            if late:  # and nothing is waiting, as it would if only this process had been stopped (Ctrl-Z)
                self.kill()
                raise BrokenError(ServiceError(f"The board has sent nothing for {counted(_FROZEN_S, 'second')}."))

    def _silent(self) -> ServiceError:
        seconds = counted(_GREETING_S if self._any else _LOGIN_S, "second")
        what = f"the board sent text, but no answer within {seconds}" if self._any else f"nothing came within {seconds}"
        return ServiceError(
            f"No daemon answered over ssh: {what}.",
            hint="Log in by hand: start-up files such as ~/.bashrc must neither wait nor read for a command over ssh.",
        )

    def _pass_on(self) -> None:
        """Show what ssh, or the board through it, prints on standard error. ssh's own prompts go to the terminal."""
        assert self._process.stderr is not None
        with self._process.stderr as stream:
            for number, line in enumerate(iter(partial(stream.readline, _LONGEST_NOTE), b"")):
                if number < _MOST_NOTES:
                    say(one_line(line.decode("utf-8", "replace").rstrip("\r\n")), err=True)

    def kill(self) -> None:
        """End ssh at once, from any thread, which also ends another thread's wait for a line."""
        self._process.terminate()  # on SIGTERM, ssh restores a terminal on which it asks for a password
        try:
            self._process.wait(_LOOK_S)
        except subprocess.TimeoutExpired:
            self._process.kill()

    def close(self) -> int:
        """End ssh; returns its exit code."""
        for pipe in self._pipes:
            with suppress(OSError):
                pipe.close()
        try:
            return self._process.wait(3)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()
        finally:
            # A child of ssh, such as the master of shared connections, may keep the pipe open.
            self._notes.join(1)


def nonsense(what: str) -> ServiceError:
    """Return the error for a board that sent something other than an event."""
    hint = "Compare `rkedge --version` here and there; something else may be answering instead."
    return ServiceError(f"The board sent {what}.", hint=hint)


def is_number(value: Any) -> bool:
    """Whether a board's value is a number that can be shown."""
    return type(value) in (int, float) and abs(value) < 1e9


def _are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(item, str) for item in value)


def mapping(value: Any) -> dict[str, Any]:
    """Return a board's value if it is an object, else an empty one."""
    return value if isinstance(value, dict) else {}


# The fields that each kind of event must have, which are all that are used here.
_FIELDS: Final[Mapping[str, Mapping[str, Callable[[Any], bool]]]] = {
    "begin": {"notes": _are_texts, "ignored": _are_texts},
    "text": {"text": lambda value: isinstance(value, str)},
    "done": {
        "tokens": lambda value: type(value) is int and 0 <= value < 1e9,
        "tokens_per_s": is_number,
        "reason": lambda value: value in [reason.value for reason in FinishReason],
    },
    "error": {},
    "end": {"status": lambda value: type(value) is int, "body": lambda value: value is None or isinstance(value, dict)},
}
_LEFT_OUT: Final[Mapping[str, Any]] = {"tokens": 0, "tokens_per_s": 0.0, "body": None, "ignored": []}


def _event(line: bytes) -> dict[str, Any] | None:
    """Parse the event in a line; None if the line is something else, such as the output of a login script.

    Output without a line feed precedes the event in the same line.

    Raises:
        ServiceError: The event is invalid or damaged.
    """
    if len(line) >= MAX_LINE:
        raise nonsense("an endless line")
    start = line.find(_EVENT)
    try:
        event = json.loads(line[max(start, 0) :])
        json.dumps(event, ensure_ascii=False).encode()  # a lone surrogate can be neither shown nor saved
    except RecursionError:
        raise nonsense("something nested too deeply") from None
    except UnicodeEncodeError:
        raise nonsense("invalid characters") from None
    except ValueError:
        if start >= 0:  # if it were skipped, its text would be missing, or its `end` waited for
            raise nonsense("a damaged event") from None
        return None
    if not isinstance(event, dict):
        return None
    if not isinstance(event.get("type"), str):
        raise nonsense("something that is not an event")
    for name, holds in _FIELDS.get(event["type"], {}).items():
        if name in _LEFT_OUT:
            event.setdefault(name, _LEFT_OUT[name])
        if name not in event or not holds(event[name]):
            raise nonsense(f"{event['type']!r} with an invalid or missing {name!r}")
    return event


def result_of(end: Mapping[str, Any]) -> dict[str, Any]:
    """Return the body of an `end`. Raises ServiceError for a refusal, BrokenError if the daemon is gone."""
    body = mapping(end["body"])
    if end["status"] >= 400:
        error = error_of(end["status"], body)
        raise BrokenError(error) if _is_gone(body) else error
    return body


def error_of(status: int, body: Mapping[str, Any]) -> ServiceError:
    """Return the daemon's own words as an error, whose class depends on the HTTP status."""
    error = body.get("error")
    message = error.get("message") if isinstance(error, dict) else error
    kind = {404: NoSuchSessionError, 429: BusyError}.get(status, ServiceError)
    return kind(f"The daemon says: {message or status}", hint="")


def _is_gone(body: Mapping[str, Any]) -> bool:
    """Whether the board says that its daemon is gone; it may come back."""
    return mapping(body.get("error")).get("code") == GONE
