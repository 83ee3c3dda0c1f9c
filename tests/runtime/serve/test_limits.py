"""What one client can take from others: places, connections, time, files. Slower is all it can make them."""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import resource
import signal
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from rkconvert.demo import questions
from rkruntime.chat.attach import UnixConnection

from .conftest import acting_as, read_response

QA = {row.question: row.answer for row in questions()}
FIRST = "What is the RK3588?"
HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
NOBODY = pwd.getpwnam("nobody").pw_uid
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="takes another user's place, which root alone can")


@pytest.fixture(scope="module")
def small(start_daemon: Callable[..., Any]) -> Any:
    """A daemon with few places, whose socket every user of this machine can open."""
    limits = "limits: {connections: 16, write_s: 2, header_s: 60}"
    daemon = start_daemon(f"{limits}\nlisten: {{socket_mode: '0666'}}", RKEMU_TOKEN_US="20000")
    daemon.idle = min(sockets(daemon) for _ in range(10) if not time.sleep(0.02))
    return daemon


def sockets(daemon: Any) -> int:
    """How many the daemon has open: its own and those of clients."""
    links = []
    for path in Path(f"/proc/{daemon.process.pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            links.append(str(path.readlink()))
    return sum(link.startswith("socket:") for link in links)


@pytest.fixture
def hold(small: Any) -> Iterator[Callable[..., socket.socket]]:
    """Connections that stay open to the end of the test; the kernel takes little of what they do not read."""
    with ExitStack() as opened:

        def connect(kind: str, data: bytes = b"", uid: int | None = None) -> socket.socket:
            one = opened.enter_context(socket.socket(socket.AF_UNIX if kind == "unix" else socket.AF_INET))
            one.settimeout(20)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            with acting_as(uid):
                one.connect(str(small.socket) if kind == "unix" else ("127.0.0.1", small.port))
            # Above the limit the daemon may have closed it already.
            with contextlib.suppress(OSError):
                one.sendall(data)
            return one

        yield connect


def tcp_status(daemon: Any, data: bytes = HEALTH) -> int:
    with socket.create_connection(("127.0.0.1", daemon.port), timeout=20) as one:
        one.sendall(data)
        return read_response(one).status


def is_open(one: socket.socket) -> bool:
    """Whether the daemon holds it still; takes what there is to read."""
    one.setblocking(False)
    try:
        while one.recv(1 << 20):
            pass
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


@pytest.mark.parametrize("data", [b"", b"GET /health HT", HEALTH], ids=["silent", "half a head", "used"])
@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_those_who_only_connect_take_no_place(
    small: Any, hold: Callable[..., socket.socket], kind: str, data: bytes
) -> None:
    held = [hold(kind, data) for _ in range(60)]
    start = time.monotonic()
    assert small.request("GET", "/health")[0] == 200
    assert tcp_status(small) == 200
    assert small.ask(FIRST) == QA[FIRST]
    # That is, without waiting for the others' time to be over.
    assert time.monotonic() - start < 10
    assert sum(map(is_open, held)) <= 16


def test_a_request_keeps_its_place_whatever_is_connected(small: Any, hold: Callable[..., socket.socket]) -> None:
    body = json.dumps({"content": FIRST, "temperature": 0}).encode()
    head = f"POST /sessions/kept/messages HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    asking = hold("unix", head + body)
    small.wait_until(lambda: small.request("GET", "/status")[2]["queue"]["busy"])
    for _ in range(60):
        hold("unix")
    text = read_response(asking).read().decode()
    assert "".join(json.loads(line).get("text", "") for line in text.splitlines()) == QA[FIRST]


@pytest.mark.parametrize(
    ("kind", "path"),
    [("unix", "/openapi.json"), ("unix", "/health"), ("unix", "/sessions/long"), ("tcp", "/openapi.json")],
)
def test_who_does_not_read_is_not_waited_for(
    small: Any, hold: Callable[..., socket.socket], kind: str, path: str
) -> None:
    put = {"system": "x" * 2_000_000}
    # A request may end a moment after its connection.
    small.wait_until(lambda: small.request("PUT", "/sessions/long", put)[0] == 200)
    assert small.request("PUT", "/sessions/long", put, {"X-RKEdge-User": "ann"})[0] == 200
    request = f"GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n".encode()
    held = [hold(kind, request * 400) for _ in range(8)]
    assert small.request("GET", "/health")[0] == 200
    assert small.request("GET", "/status", headers={"X-RKEdge-User": "ann"})[0] == 200
    assert tcp_status(small) == 200
    assert len(held) == 8
    small.wait_until(lambda: sockets(small) <= small.idle, 60)


def test_connections_that_wait_to_be_closed_are_counted(small: Any, hold: Callable[..., socket.socket]) -> None:
    """An answer that is complete, and of which the client takes nothing, keeps its connection open a while."""
    small.wait_until(lambda: sockets(small) <= small.idle)
    request = b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n"
    for number in range(120):
        # With the right number of requests the last answer is handed over, and what the kernel does not take stays.
        hold("unix", (request + b"\r\n") * (number // 24 + 8) + request + b"Connection: close\r\n\r\n")
        time.sleep(0.03)
    # The one that asks is closed a moment after its answer.
    small.wait_until(lambda: sockets(small) <= small.idle + 16, 1)


def test_a_slow_reader_that_reads_gets_everything(small: Any, hold: Callable[..., socket.socket]) -> None:
    """The limit is for no progress, not for little."""
    assert small.request("PUT", "/sessions/long", {"system": "x" * 1_000_000})[0] == 200
    one = hold("unix", b"GET /sessions/long HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
    size, start = 0, time.monotonic()
    while part := one.recv(100_000):
        size += len(part)
        time.sleep(0.3)
    assert size > 1_000_000
    assert time.monotonic() - start > 2


@as_root
def test_one_user_has_a_share_of_the_requests(small: Any, hold: Callable[..., socket.socket]) -> None:
    ask = json.dumps({"messages": [{"role": "user", "content": FIRST}], "stream": True}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(ask)}\r\n\r\n".encode()
    held = [hold("unix", head + ask, NOBODY) for _ in range(12)]
    statuses = [read_response(one).status for one in held[4:]]
    assert 429 in statuses
    assert small.ask("Does it work?") == QA["Does it work?"]


def test_embeddings_end_with_their_client(start_daemon: Callable[..., Any]) -> None:
    daemon = start_daemon(port=False, RKEMU_TOKEN_US="20000", RKEMU_PROMPT_TOKEN_US="2000")
    body = json.dumps({"input": ["word " * 300] * 64}).encode()
    one = UnixConnection(daemon.socket)
    one.request("POST", "/v1/embeddings", body, {"Content-Type": "application/json"})
    daemon.wait_until(lambda: daemon.request("GET", "/status")[2]["queue"]["busy"])
    # Others wait for one text, not for all.
    assert daemon.ask("Does it work?") == QA["Does it work?"]
    assert daemon.request("GET", "/status")[2]["queue"]["busy"]
    one.close()
    daemon.wait_until(lambda: not daemon.request("GET", "/status")[2]["queue"]["busy"], 5)


def test_embeddings_after_many_failures_that_are_not_in_a_row(start_daemon: Callable[..., Any]) -> None:
    """A daemon that makes nothing else: each failure is the first one, after which the model is loaded at once."""
    daemon = start_daemon(port=False)

    def embedding() -> int:
        status, _, _ = daemon.request("POST", "/v1/embeddings", {"input": "What"})
        return int(status)

    def dead() -> bool:
        return worker not in daemon.workers()

    for _ in range(6):
        assert embedding() == 200
        (worker,) = daemon.workers()
        os.kill(worker, signal.SIGKILL)
        daemon.wait_until(dead)
    assert embedding() == 200
    assert daemon.metric("rkedge_worker_restarts") == 6


def test_embeddings_have_a_time_limit(start_daemon: Callable[..., Any]) -> None:
    daemon = start_daemon("limits: {request_s: 2}", port=False, RKEMU_PROMPT_TOKEN_US="3000")
    status, _, body = daemon.request("POST", "/v1/embeddings", {"input": ["word " * 300] * 5})
    assert (status, body["error"]["code"]) == (504, "time_limit")
    assert "2 seconds" in body["error"]["message"]
    assert daemon.request("POST", "/v1/embeddings", {"input": "short"})[0] == 200


def test_without_free_files_it_waits_quietly(start_daemon: Callable[..., Any]) -> None:
    daemon = start_daemon()
    pid = daemon.process.pid
    _, hard = resource.prlimit(pid, resource.RLIMIT_NOFILE)
    highest = max(int(path.name) for path in Path(f"/proc/{pid}/fd").iterdir())
    before = resource.prlimit(pid, resource.RLIMIT_NOFILE, (highest + 3, hard))
    with ExitStack() as opened:
        for _ in range(100):
            opened.enter_context(socket.create_connection(("127.0.0.1", daemon.port)))
        daemon.wait_until(lambda: "no connection can be accepted" in daemon.log)
        time.sleep(1.5)
        assert daemon.log.count("no connection can be accepted") == 1
        assert len(daemon.log.splitlines()) < 20
    resource.prlimit(pid, resource.RLIMIT_NOFILE, before)
    daemon.wait_until(lambda: tcp_status(daemon) == 200)


def test_files_are_asked_for_at_the_start(start_daemon: Callable[..., Any]) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard))
    try:
        daemon = start_daemon()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert resource.prlimit(daemon.process.pid, resource.RLIMIT_NOFILE)[0] >= 600


def test_nobody_can_fill_the_log(small: Any) -> None:
    before = len(small.log)
    for data in (
        b"nonsense\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: localhost\r\nConnection: upgrade\r\nUpgrade: h2c\r\n\r\n",
    ):
        for _ in range(20):
            with socket.create_connection(("127.0.0.1", small.port), timeout=20) as one:
                one.sendall(data)
                one.recv(1000)
    assert len(small.log) == before
