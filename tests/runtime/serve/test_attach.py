"""The forced command's end: every line gets an `end`, and a key's owner reaches no conversation but their own."""

from __future__ import annotations

import io
import json
import os
import pwd
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rkruntime import cli
from rkruntime.chat import attach
from rkruntime.chat.attach import ALIVE, GONE, Bridge
from rkruntime.errors import ServiceError

from .conftest import acting_as

NOBODY = pwd.getpwnam("nobody").pw_uid
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="takes another user's place, which root alone can")


@pytest.fixture(scope="module")
def open_daemon(start_daemon: Callable[..., Any]) -> Any:
    """One whose socket every user of this machine can open."""
    return start_daemon("listen: {socket_mode: '0666'}\nsessions: {max_mb: 1}", port=False)


class _Client(io.RawIOBase):
    """Writes its lines and stays until each has its `end`, or the time for that is over."""

    def __init__(self, lines: list[bytes], ends: int | None = None) -> None:
        self._lines = list(lines)
        self._wanted = len(lines) if ends is None else ends
        self._done = threading.Event()
        self.seen = b""

    def readline(self, size: int | None = -1, /) -> bytes:
        if self._lines:
            return self._lines.pop(0)
        self._done.wait(20)
        return b""

    def write(self, data: Any, /) -> int:
        self.seen += data
        if self.seen.count(b'{"type": "end"') >= self._wanted:
            self._done.set()
        return len(data)


def told(path: Path, user: str | None, *lines: Any, uid: int | None = None) -> list[dict[str, Any]]:
    """What comes back for lines, given as JSON or as bytes, but for that it is alive."""
    given = [line if isinstance(line, bytes) else json.dumps(line).encode() + b"\n" for line in lines]
    client: Any = _Client(given)
    with acting_as(uid):
        Bridge(path, user, client, client).run()
    events = [json.loads(line) for line in client.seen.splitlines()]
    return [event for event in events if not (isinstance(event, dict) and event["type"] == ALIVE)]


def statuses(events: list[dict[str, Any]]) -> list[int]:
    return [event["status"] for event in events if event["type"] == "end"]


DEEP = b"[" * 900 + b"]" * 900


@pytest.mark.parametrize(
    "line",
    [
        {"op": "read", "session": "\ud800"},
        {"op": "change", "session": "\udfff", "body": {}},
        {"op": "read", "session": ["\ud800"]},
        {"op": "read", "session": None},
        {"op": "read"},
        {"op": "\ud800"},
        {"op": "ask", "session": "a", "body": {"content": "\ud800", "max_tokens": "\ud800"}},
        {"op": "ask", "session": "a", "body": 7},
        {"op": "ask", "session": "a", "body": [1]},
        {"op": "change", "session": "a", "body": {"conversation": {"schema": "\ud800"}}},
        b'{"op": "ask", "session": "a", "body": {"content": %s}}\n' % DEEP,
        b'{"op": "read", "session": %s}\n' % DEEP,
        {"op": "read", "session": "x\r\nX-RKEdge-User: bob"},
    ],
    ids=range(13),
)
def test_every_line_has_an_end(open_daemon: Any, line: Any) -> None:
    events = told(open_daemon.socket, None, line, {"op": "hello"})
    first, second = statuses(events)
    assert 400 <= first < 500
    assert second == 200


@pytest.mark.parametrize("line", [b"\xff\n", b"[]\n", b"{}\n", b'{"op": 1}\n', b"[" * 100_000 + b"\n", b"\n", b"{"])
def test_what_is_no_line_ends_it(open_daemon: Any, line: bytes) -> None:
    assert statuses(told(open_daemon.socket, None, line, {"op": "hello"})) == [400]


ANSWERS = [
    b"",
    b"nonsense\r\n\r\n",
    b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\n{]}",
    b"HTTP/1.1 200 OK\r\nContent-Length: 1800\r\n\r\n" + b"[" * 1800,
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 19\r\n\r\nService Unavailable",
    b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\n\xff\xff\xff\xff",
    b"HTTP/1.1 200 OK\r\nContent-Length: 900\r\n\r\n{}",
]


@pytest.fixture
def impostor(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A socket behind which something else answers."""
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
        listener.listen()

        def answer() -> None:
            one, _ = listener.accept()
            with one:
                one.recv(1 << 16)
                one.sendall(request.param)
                one.shutdown(socket.SHUT_WR)
                # A close with something unread would break the connection.
                while one.recv(1 << 16):
                    pass

        thread = threading.Thread(target=answer)
        thread.start()
        yield path
        thread.join(10)


@pytest.mark.parametrize("impostor", ANSWERS, indirect=True, ids=range(len(ANSWERS)))
def test_whatever_the_daemon_says_there_is_an_end(impostor: Path) -> None:
    assert statuses(told(impostor, None, {"op": "hello"})) == [502]


def stream(*lines: bytes, last: bytes = b"0\r\n\r\n", chunked: bool = True) -> bytes:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/x-ndjson\r\n"
    if not chunked:
        return head + b"Connection: close\r\n\r\n" + b"".join(lines)
    body = b"".join(b"%x\r\n%b\r\n" % (len(line), line) for line in lines)
    return head + b"Transfer-Encoding: chunked\r\n\r\n" + body + last


TEXT, DONE, FAILED = b'{"type":"text","text":"a"}\n', b'{"type":"done"}\n', b'{"type":"error","error":{}}\n'
CUT = {
    "no last chunk": stream(TEXT, TEXT, last=b""),
    "no event": stream(last=b""),
    "an empty stream": stream(),
    "a last chunk and no done": stream(TEXT, TEXT),
    "within a chunk's size": stream(TEXT, last=b"1"),
    "within a chunk": stream(TEXT, last=b"10\r\n" + TEXT[:7]),
    "within the last event": stream(TEXT, last=b"10\r\n" + DONE[:-1]),
    "a line that is not an event": stream(TEXT, b"[]\n"),
    "without chunks": stream(TEXT, chunked=False),
    "without chunks, within the last event": stream(TEXT, DONE[:-1], chunked=False),
}


@pytest.mark.parametrize("impostor", CUT.values(), indirect=True, ids=CUT)
def test_an_answer_that_is_cut_is_told_as_such(impostor: Path) -> None:
    *events, end = told(impostor, None, {"op": "ask", "session": "a", "body": {"content": "?"}})
    assert (end["status"], end["body"]["error"]["code"]) == (502, "daemon_gone")
    assert {"type": "done"} not in events


WHOLE = {
    "done": stream(TEXT, DONE),
    "an error": stream(TEXT, FAILED),
    "without chunks": stream(TEXT, DONE, chunked=False),
}


@pytest.mark.parametrize("impostor", WHOLE.values(), indirect=True, ids=WHOLE)
def test_an_answer_with_its_end_is_whole(impostor: Path) -> None:
    assert statuses(told(impostor, None, {"op": "ask", "session": "a", "body": {"content": "?"}})) == [200]


@pytest.mark.parametrize("op", ["ask", "change"])
@pytest.mark.parametrize("size", [1_100_000, 15_000_000])
def test_a_body_that_is_too_large_is_refused_with_its_reason(
    start_daemon: Callable[..., Any], op: str, size: int
) -> None:
    daemon = start_daemon("limits: {body_mb: 1}", port=False)
    body = {"content": "a" * size} if op == "ask" else {"system": "a" * size}
    end = told(daemon.socket, None, {"op": op, "session": "x", "body": body})[-1]
    assert end["status"] == 413
    assert "larger than 1,000,000 bytes" in end["body"]["error"]["message"]


def test_a_stop_right_behind_the_question_is_heard(start_daemon: Callable[..., Any]) -> None:
    slow = start_daemon(port=False, RKEMU_TOKEN_US="200000")
    ask = {"op": "ask", "session": "a", "body": {"content": "What is the RK3588?"}}

    for _ in range(5):
        client: Any = _Client([json.dumps(line).encode() + b"\n" for line in (ask, {"op": "stop"})], ends=1)
        Bridge(slow.socket, None, client, client).run()
        events = [json.loads(line) for line in client.seen.splitlines()]
        assert statuses(events) == [499]
        assert "done" not in [event["type"] for event in events]


def test_a_daemon_that_freezes_is_given_up(start_daemon: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """But not one that has nothing to send yet, however long that takes."""
    monkeypatch.setattr(attach, "_EVERY_S", 0.1)
    monkeypatch.setattr(attach, "_FROZEN_S", 1)
    reads = start_daemon(port=False, RKEMU_PROMPT_TOKEN_US="150000", RKEMU_TOKEN_US="300000")
    ask = {"op": "ask", "session": "a", "body": {"content": "What is the RK3588?", "max_tokens": 4}}
    assert statuses(told(reads.socket, None, ask)) == [200]
    thaw = threading.Timer(15, reads.process.send_signal, [signal.SIGCONT])
    freeze = threading.Timer(1, reads.process.send_signal, [signal.SIGSTOP])
    thaw.start()
    freeze.start()
    try:
        *_, end = told(reads.socket, None, ask)
        assert (end["status"], end["body"]["error"]["code"]) == (502, GONE)
        assert "answered nobody for 1 second" in end["body"]["error"]["message"]
        with pytest.raises(ServiceError, match="does not answer"):
            attach.fetch(reads.socket, "/api/generate", {"model": ""})
    finally:
        thaw.cancel()
        reads.process.send_signal(signal.SIGCONT)


def test_without_a_daemon_there_is_an_end(tmp_path: Path) -> None:
    assert statuses(told(tmp_path / "nothing", None, {"op": "hello"})) == [503]


@as_root
def test_people_behind_one_account_cannot_reach_each_other(open_daemon: Any) -> None:
    """An ordinary account, whose authorized_keys have `attach --user ann` and `attach --user bob`."""
    path = open_daemon.socket
    for user in ("ann", "bob"):
        change = {"op": "change", "session": "diary", "body": {"system": user}}
        assert statuses(told(path, user, change, uid=NOBODY)) == [200]
    read, delete = {"op": "read", "session": "diary"}, {"op": "delete", "session": "diary"}
    for user in ("ann", "bob"):
        assert told(path, user, read, uid=NOBODY)[-1]["body"]["system"] == user
    assert statuses(told(path, None, read, uid=NOBODY)) == [404]
    assert statuses(told(path, "ann", read)) == [404]
    assert statuses(told(path, "ann", delete, read, uid=NOBODY)) == [200, 404]
    assert told(path, "bob", read, uid=NOBODY)[-1]["body"]["system"] == "bob"


@as_root
def test_filling_the_store_costs_nobody_else(open_daemon: Any) -> None:
    path = open_daemon.socket
    bob = {"op": "change", "session": "diary", "body": {"system": "bob's"}}
    for name, uid in (("bob", NOBODY), ("carol", None)):
        assert statuses(told(path, name, bob, uid=uid)) == [200]
    fill = [
        {"op": "change", "session": f"fill{number}", "body": {"system": "x" * size}}
        for number, size in enumerate([50_000, 8_000, 900_000] * 10)
    ]
    found = statuses(told(path, "ann", *fill, uid=NOBODY))
    assert set(found) == {200, 507}
    for name, uid in (("bob", NOBODY), ("carol", None)):
        assert told(path, name, {"op": "read", "session": "diary"}, uid=uid)[-1]["body"]["system"] == "bob's"
        more = {"op": "change", "session": "more", "body": {"system": "y" * 20_000}}
        assert statuses(told(path, name, more, uid=uid)) == [200]


@pytest.mark.parametrize("name", ["", "a/b", "..", "a+b", "x" * 65, "é", "-x"])
def test_a_user_is_a_name(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["attach", f"--user={name}"]) == 2
    assert ("cannot be the name of a user" if name else "it is empty") in capsys.readouterr().err


def test_a_client_that_is_gone(open_daemon: Any) -> None:
    """What could not be written is an error at the end, after the daemon was told to stop."""
    asked = io.BytesIO(b'{"op": "hello"}\n')
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "wb", buffering=0) as out, pytest.raises(BrokenPipeError):
        Bridge(open_daemon.socket, None, asked, out).run()


def test_a_socket_that_systemd_holds_for_a_daemon_that_does_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rkruntime.chat.attach._HELLO_S", 0.2)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as held:
        held.bind(str(tmp_path / "socket"))
        held.listen()
        (end,) = told(tmp_path / "socket", None, {"op": "hello"})
    assert (end["status"], end["body"]["error"]["code"]) == (503, GONE)
    assert "is open, but no daemon answers there" in end["body"]["error"]["message"]
    assert "journalctl -u rkedge" in end["body"]["error"]["message"]


def test_it_says_all_the_time_that_it_is_alive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rkruntime.chat.attach._HELLO_S", 1.0)
    monkeypatch.setattr("rkruntime.chat.attach.ALIVE_S", 0.1)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as held:
        held.bind(str(tmp_path / "socket"))
        held.listen()
        client: Any = _Client([b'{"op": "hello"}\n'])
        Bridge(tmp_path / "socket", None, client, client).run()
    kinds = [json.loads(line)["type"] for line in client.seen.splitlines()]
    assert set(kinds) == {ALIVE, "end"}
    assert kinds.count("end") == 1
    assert kinds.index("end") > 3
