"""The board's end of `rkedge chat user@board`: relays JSON lines on standard input and output to the daemon's socket.

Each line requests one of OPERATIONS; events and an `end` come back. Nothing else is possible: an SSH key with this as
its forced command can hold its own conversations, but no more.
"""

from __future__ import annotations

import grp
import http.client
import json
import os
import pwd
import socket
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Final, NamedTuple
from urllib.parse import quote

from rkruntime.errors import ServiceError
from rkruntime.words import counted

MAX_LINE: Final = 16 << 20
# Error code of an `end`, for any request: the daemon exited or its connection broke.
GONE: Final = "daemon_gone"
# Event that says that this process is alive, sent at the start of a request and every ALIVE_S seconds until its end.
ALIVE: Final = "alive"
ALIVE_S: Final = 10.0
_STREAM: Final = "application/x-ndjson"
# The last event of an answer; without one of these, the answer was interrupted.
_LAST: Final = ("done", "error")
# Group whose members may use the service; see board/systemd.
GROUP: Final = "rkedge"
# Seconds without data from the daemon: it sends nothing while a request waits for its turn, nor during prefill.
_SILENCE_S: Final = 3600
# Seconds for a GET of `fetch`, which the daemon answers at once.
_LOOK_S: Final = 5
# Seconds between checks of whether a silent daemon still answers anybody, and seconds that it may take to answer one: a
# board that swaps can be slow, and an answer that was broken off needlessly can be continued.
_EVERY_S: Final = 10
_FROZEN_S: Final = 60
# Seconds for the greeting: systemd opens the socket before it starts the daemon, which takes a busy board some seconds.
_HELLO_S: Final = 30


_NOT_UP: Final = (
    "{} is open, but no daemon answers there: it is starting, fails to, or hangs."
    " If it is a service: systemctl status rkedge, and journalctl -u rkedge. If `rkedge up` started it: rkedge down."
)


class Operation(NamedTuple):
    """A request to the daemon; `{session}` in the path is the line's session."""

    method: str
    path: str


OPERATIONS: Final[Mapping[str, Operation]] = {
    "hello": Operation("GET", "/status"),
    "list": Operation("GET", "/sessions"),
    "read": Operation("GET", "/sessions/{session}"),
    "change": Operation("PUT", "/sessions/{session}"),
    "delete": Operation("DELETE", "/sessions/{session}"),
    "ask": Operation("POST", "/sessions/{session}/messages"),
    "resume": Operation("POST", "/sessions/{session}/resume"),
}


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path, timeout_s: float = _SILENCE_S) -> None:
        super().__init__("localhost", timeout=timeout_s)
        self._path = path

    def connect(self) -> None:
        """See http.client."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        try:
            self.sock.connect(str(self._path))
        except OSError as error:
            self.sock.close()
            if isinstance(error, PermissionError):
                raise _forbidden(self._path) from error
            raise ServiceError(
                f"No daemon answers on {self._path}: {error.strerror or error}.",
                hint="Start it there: rkedge up BUNDLE, or, if it is a service, systemctl start rkedge.",
            ) from error

    def shut(self) -> None:
        """Shut the connection down, which ends another thread's wait for an answer."""
        if self.sock is not None:
            with suppress(OSError):  # it has ended meanwhile
                self.sock.shutdown(socket.SHUT_RDWR)


class Watch:
    """Watches a connection during a block, and shuts it once the daemon answers nobody any more.

    Attributes:
        frozen: Whether the connection was shut for that reason.
    """

    def __init__(self, path: Path, connection: UnixConnection) -> None:
        self.frozen = False
        self._path, self._connection = path, connection
        self._over = threading.Event()

    def __enter__(self) -> Watch:
        threading.Thread(target=self._look, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()

    def _look(self) -> None:
        while not self._over.wait(_EVERY_S):
            if not self._answers() and not self._over.is_set():
                self.frozen = True
                self._connection.shut()
                return

    def _answers(self) -> bool:
        """Whether the daemon answers on another connection; a refusal is an answer too."""
        other = UnixConnection(self._path, _FROZEN_S)
        try:
            other.request("GET", "/health")
            other.getresponse()
        except TimeoutError:
            return False
        except (ServiceError, OSError, http.client.HTTPException):
            return True  # if the daemon is gone, the watched connection has ended by itself
        finally:
            other.close()
        return True


def _forbidden(path: Path) -> ServiceError:
    """Return the error that says why this account may not use the socket."""
    group = next((each for each in grp.getgrall() if each.gr_name == GROUP), None)
    owners = list(_groups_of(path, path.parent))
    if group is None or (owners and group.gr_gid not in owners):
        return ServiceError(
            f"The daemon on {path} is another account's.", hint="Start one of your own: rkedge up BUNDLE"
        )
    try:
        account = pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        account = str(os.geteuid())
    if account in group.gr_mem and group.gr_gid not in os.getgroups():
        return ServiceError(
            f"This login is older than the membership of {account} in the group {GROUP}, and may not use {path}.",
            hint="Log out of the board and in again; a connection that ssh shares ends with: ssh -O exit BOARD",
        )
    return ServiceError(
        f"The account {account} may not use the daemon on {path}.",
        hint=f"On the board: sudo usermod -aG {GROUP} {account}, then log in again.",
    )


def _groups_of(*paths: Path) -> Iterator[int]:
    for path in paths:
        with suppress(OSError):
            yield path.stat().st_gid


def fetch(path: Path, target: str, body: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """GET a JSON object from the daemon at a socket, or POST a body and wait for the answer, however long it takes.

    Raises:
        ServiceError: There is no daemon, or it does not answer with an object.
    """
    connection = UnixConnection(path, _LOOK_S if body is None else _SILENCE_S)
    try:
        with Watch(path, connection):
            connection.request("GET" if body is None else "POST", target, None if body is None else json.dumps(body))
            found = json.loads(connection.getresponse().read(MAX_LINE))
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise ServiceError(f"The daemon on {path} does not answer: {error}.") from error
    finally:
        connection.close()
    if not isinstance(found, dict):
        raise ServiceError(f"What listens on {path} is not the daemon.")
    return found


class Bridge:
    """Execute the requests of one client in order; the request `stop` ends the current one.

    Args:
        user: Owner of the conversations, one of several behind the account; None for the account itself.
    """

    def __init__(self, path: Path, user: str | None, lines: BinaryIO, out: BinaryIO) -> None:
        self._path = path
        self._user = user
        self._lines = lines
        self._out = out
        self._writing = threading.Lock()
        self._connection: UnixConnection | None = None
        self._watch: Watch | None = None
        self._request: threading.Thread | None = None
        self._stopped = False
        self._unread: OSError | None = None

    def run(self) -> None:
        """Run until the input ends, then stop the current request. Raises OSError if the output cannot be written."""
        while line := self._lines.readline(MAX_LINE):
            message = _parse(line)
            if message is None:
                self._end(400, {"error": {"message": "Expected a JSON object with an 'op' field."}})
                break
            if message["op"] == "stop":
                self._stop()
                continue
            self._wait()
            self._stopped = False
            self._request = threading.Thread(target=self._carry_out, args=(message,), daemon=True)
            self._request.start()
        self._stop()
        self._wait()
        if self._unread is not None:
            raise self._unread

    def _wait(self) -> None:
        if self._request is not None:
            self._request.join()

    def _stop(self) -> None:
        self._stopped = True
        connection = self._connection
        if connection is not None:
            connection.shut()

    def _carry_out(self, message: Mapping[str, Any]) -> None:
        """Execute a request; every request gets an `end`, whatever it contains."""
        with self._alive():
            self._execute(message)

    @contextmanager
    def _alive(self) -> Iterator[None]:
        """Say during the block that this process is alive: the daemon may be silent for long, and ssh cannot tell."""
        over = threading.Event()

        def beat() -> None:
            while not over.is_set():
                self._write(json.dumps({"type": ALIVE}).encode() + b"\n")
                over.wait(ALIVE_S)

        threading.Thread(target=beat, daemon=True).start()
        try:
            yield
        finally:
            over.set()

    def _execute(self, message: Mapping[str, Any]) -> None:
        """See `_carry_out`."""
        try:
            method, path, body = _request(message)
        except (ValueError, RecursionError) as error:
            return self._end(400, {"error": {"message": f"This request is not possible: {error}."}})
        try:
            hello = message["op"] == "hello"
            self._connection = UnixConnection(self._path, _HELLO_S if hello else _SILENCE_S)
            self._connection.connect()
            # From here on, a `stop` finds a connection to shut down; an earlier one only set the flag.
            if self._stopped:
                return self._end(499, {})
            with Watch(self._path, self._connection) as self._watch:
                self._forward(method, path, body)
        except ServiceError as error:
            self._end(503, {"error": {"message": f"{error.message} {error.hint}", "code": GONE}})
        except (ValueError, RecursionError):
            self._end(502, {"error": {"message": "The daemon's response cannot be read."}})
        except TimeoutError:
            self._end(503, {"error": {"message": _NOT_UP.format(self._path), "code": GONE}})
        except (OSError, http.client.HTTPException) as error:
            self._broken_off(str(error) or type(error).__name__)
        finally:
            if self._connection is not None:
                self._connection.close()
                self._connection = None

    def _forward(self, method: str, path: str, body: bytes | None) -> None:
        assert self._connection is not None
        headers = {"Content-Type": "application/json"}
        if self._user is not None:
            headers["X-RKEdge-User"] = self._user
        # A daemon that refuses a body reads no more of it: why is in its answer.
        with suppress(BrokenPipeError, ConnectionResetError):
            self._connection.request(method, path, body, headers)
        response = self._connection.getresponse()
        if response.getheader("Content-Type", "").startswith(_STREAM):
            last = b""
            # HTTPResponse.readline cannot tell a truncated body from a complete one, but the last event can.
            while (line := response.readline()).endswith(b"\n"):
                self._write(line)
                last = line
            if _is_last(last):
                return self._end(response.status, {})
            return self._broken_off("its answer is incomplete")
        return self._end(response.status, json.loads(response.read() or b"{}"))

    def _broken_off(self, reason: str) -> None:
        if self._stopped:
            return self._end(499, {})
        what = f"The daemon disconnected: {reason}."
        if self._watch is not None and self._watch.frozen:
            what = f"The daemon has answered nobody for {counted(_FROZEN_S, 'second')}."
        return self._end(502, {"error": {"message": what, "code": GONE}})

    def _end(self, status: int, body: Any) -> None:
        self._write(json.dumps({"type": "end", "status": status, "body": body}).encode() + b"\n")

    def _write(self, line: bytes) -> None:
        with self._writing:
            try:
                self._out.write(line)
                self._out.flush()
            except OSError as error:  # the client is gone, so the input will end too
                self._unread = error
                self._stop()


def _request(message: Mapping[str, Any]) -> tuple[str, str, bytes | None]:
    """Return method, path and body of a line's request. Raises ValueError or RecursionError if it is impossible."""
    operation = OPERATIONS.get(message["op"])
    if operation is None:
        raise ValueError(f"there is no operation {message['op'][:40]!r}")
    path = operation.path.format(session=quote(str(message.get("session", "")), safe=""))
    body = json.dumps(message.get("body") or {}).encode() if operation.method in ("POST", "PUT") else None
    return operation.method, path, body


def _is_last(line: bytes) -> bool:
    event = json.loads(line or b"{}")
    return isinstance(event, dict) and event.get("type") in _LAST


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        message = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return message if isinstance(message, dict) and isinstance(message.get("op"), str) else None
