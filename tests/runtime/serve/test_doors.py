"""Who comes in, and as whom: by the listener, whatever a client does with its connection, its headers or its name."""

from __future__ import annotations

import json
import os
import pwd
import random
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYetError
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from rkruntime.chat.attach import UnixConnection
from rkruntime.errors import HostError, UsageError
from rkruntime.serve.doors import door_of
from rkruntime.serve.server import open_sockets, unix_socket
from rkruntime.serve.settings import Listen

from .conftest import acting_as, read_response

KEYS = {"ann": "a" * 32, "bob": "b" * 32}
RESET = struct.pack("ii", 1, 0)
CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="takes other users' places, which root alone can")


@pytest.fixture(scope="module")
def guarded(start_daemon: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A daemon with keys, whose Unix socket every user of this machine can open."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text("".join(f"{name} {key}\n" for name, key in KEYS.items()) + f"{'c' * 32}\n{'d' * 32}\n")
    keys.chmod(0o600)
    return start_daemon(f"listen: {{api_keys: {keys}, socket_mode: '0666'}}")


def request_bytes(method: str, path: str, body: Any = None, **headers: str) -> bytes:
    data = b"" if body is None else json.dumps(body).encode()
    given = {"Host": "localhost", **({"Content-Length": str(len(data))} if data else {})}
    given.update({name.replace("_", "-"): value for name, value in headers.items()})
    head = "".join(f"{name}: {value}\r\n" for name, value in given.items() if value)
    return f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + data


@contextmanager
def connected(daemon: Any, kind: str) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX if kind == "unix" else socket.AF_INET) as one:
        one.settimeout(20)
        one.connect(str(daemon.socket) if kind == "unix" else ("127.0.0.1", daemon.port))
        yield one


def status(daemon: Any, kind: str, data: bytes) -> int:
    with connected(daemon, kind) as one:
        one.sendall(data)
        return read_response(one).status


def keyed(daemon: Any, key: str, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
    with connected(daemon, "tcp") as one:
        one.sendall(request_bytes(method, path, body, Authorization=f"Bearer {key}", **headers))
        response = read_response(one)
        return response.status, json.loads(response.read())


# --- connections that are reset


@pytest.mark.parametrize("name", ["bob", None], ids=["named", "unnamed"])
def test_a_reset_connection_is_not_the_unix_socket(guarded: Any, name: str | None) -> None:
    """The kernel hands out what came before a reset, and then says that the connection has no client."""
    put = {"system": "bob's"}
    assert keyed(guarded, KEYS["bob"], "PUT", "/sessions/diary", put)[0] == 200
    before = sorted((guarded.state / "state" / "sessions").glob("*/*"))
    chance = random.Random(1)
    headers = {"Host": "evil.example", "X-RKEdge-User": name or ""}
    attacks = [
        request_bytes("DELETE", "/sessions/diary", **headers),
        request_bytes("PUT", "/sessions/diary", {"system": "mine"}, **headers),
        request_bytes("PUT", "/sessions/new", {"system": "mine"}, **headers),
        request_bytes("POST", "/v1/chat/completions", CHAT, **headers),
    ]
    computed = guarded.metric("rkedge_generated_tokens_total")
    for number in range(200):
        data = attacks[number % len(attacks)]
        cut = chance.randrange(len(data)) if chance.random() < 0.3 else 0
        one = socket.create_connection(("127.0.0.1", guarded.port))
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        with suppress(OSError):
            for part in (data[:cut], data[cut:] * chance.choice([1, 1, 3])):
                one.sendall(part)
                time.sleep(chance.choice([0, 0, 0, 0.0002, 0.005]))
        one.close()
    time.sleep(0.3)
    assert keyed(guarded, KEYS["bob"], "GET", "/sessions/diary")[1]["system"] == "bob's"
    assert sorted((guarded.state / "state" / "sessions").glob("*/*")) == before
    assert guarded.metric("rkedge_generated_tokens_total") == computed
    # Clients of the Unix socket are known all the same.
    assert guarded.request("GET", "/sessions/diary", headers={"X-RKEdge-User": "bob"})[0] == 200


def test_what_listens_to_a_network_has_keys_for_ever() -> None:
    """Other settings, read while the daemon runs, cannot take them away from a socket that stays open."""

    class Wide:
        family = socket.AF_INET
        type = socket.SOCK_STREAM

        def getsockname(self) -> tuple[str, int]:
            return "0.0.0.0", 8080

        def getsockopt(self, *_: int) -> int:
            return 1

        def setsockopt(self, *_: int) -> None:
            pass

    listener: Any = Wide()
    with pytest.raises(UsageError, match="no API keys"):
        door_of(listener, {})
    door = door_of(listener, {"k" * 32: "ann"})
    with pytest.raises(UsageError, match="no API keys"):
        door.check({})
    Wide.family = socket.AF_VSOCK
    with pytest.raises(UsageError, match="not on"):
        door_of(listener, {"k" * 32: "ann"})


# --- web pages

EVIL = "http://evil.example:8080"
PAGES = [
    ("GET", None, {"Host": "evil.example:8080"}, 403),
    ("GET", None, {"Host": ""}, 400),
    ("GET", None, {"Host": "localhost.evil.example"}, 403),
    ("GET", None, {"Host": "0.0.0.0:8080"}, 403),
    ("GET", None, {"Host": "evil.example:8080", "Origin": EVIL}, 403),
    ("GET", None, {"Host": "localhost:8080", "Origin": EVIL}, 403),
    ("GET", None, {"Host": "localhost:8080", "Origin": "http://localhost:3000"}, 403),
    ("GET", None, {"Host": "localhost:8080", "Origin": "null"}, 403),
    ("GET", None, {"Host": "localhost:8080", "Origin": "ftp://localhost:8080"}, 403),
    ("GET", None, {"Host": "localhost:8080", "Sec-Fetch-Site": "cross-site"}, 403),
    ("GET", None, {"Host": "localhost:8080", "Sec-Fetch-Site": "same-site"}, 403),
    ("POST", CHAT, {"Sec-Fetch-Site": "cross-site", "Origin": EVIL, "Content-Type": "text/plain"}, 403),
    ("POST", CHAT, {"Origin": "http://localhost", "Content-Type": "text/plain"}, 415),
    ("POST", CHAT, {"Origin": "http://localhost"}, 415),
    ("POST", CHAT, {"Sec-Fetch-Mode": "no-cors", "Content-Type": "text/plain"}, 415),
    ("POST", CHAT, {"User-Agent": "Mozilla/5.0 (old)", "Content-Type": "application/x-www-form-urlencoded"}, 415),
    ("POST", CHAT, {"User-Agent": "Mozilla/5.0", "Content-Type": "text/plain; a=application/json"}, 415),
    # The page that the daemon itself hands out, and programs.
    ("GET", None, {"Host": "localhost:8080", "Sec-Fetch-Site": "none", "User-Agent": "Mozilla/5.0"}, 200),
    ("GET", None, {"Host": "[::1]:8080"}, 200),
    (
        "POST",
        CHAT,
        {
            "Host": "127.0.0.1:8080",
            "Origin": "http://127.0.0.1:8080",
            "Sec-Fetch-Site": "same-origin",
            "Content-Type": "application/json; charset=utf-8",
        },
        200,
    ),
    ("POST", CHAT, {"User-Agent": "curl/8.5.0", "Content-Type": "application/x-www-form-urlencoded"}, 200),
    ("POST", CHAT, {}, 200),
]


@pytest.mark.parametrize("kind", ["unix", "tcp"])
@pytest.mark.parametrize(("method", "body", "headers", "wanted"), PAGES, ids=range(len(PAGES)))
def test_pages_of_others_are_kept_out_by_every_door(
    daemon: Any, kind: str, method: str, body: Any, headers: dict[str, str], wanted: int
) -> None:
    path = "/v1/chat/completions" if method == "POST" else "/sessions"
    assert status(daemon, kind, request_bytes(method, path, body, **headers)) == wanted


@pytest.mark.parametrize("kind", ["unix", "tcp"])
@pytest.mark.parametrize("host", ["LOCALHOST", "localhost.", "LocalHost.:8080", "127.0.0.1", "[::1]:80"])
def test_names_have_no_case_and_a_target_may_be_a_whole_url(daemon: Any, kind: str, host: str) -> None:
    for target in ("/sessions", f"http://{host}/sessions", f"HTTP://{host}/sessions?a=b"):
        assert status(daemon, kind, f"GET {target} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()) == 200, target
    assert status(daemon, kind, f"GET http://{host} HTTP/1.1\r\nHost: {host}\r\n\r\n".encode()) == 200


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_no_spelling_of_a_request_leads_around(daemon: Any, kind: str) -> None:
    host = b"Host: evil.example\r\n"
    for attack in (
        b"GET /sessions HTTP/1.0\r\n\r\n",
        b"GET /sessions HTTP/1.0\r\n" + host + b"\r\n",
        b"GET http://localhost/sessions HTTP/1.1\r\n" + host + b"\r\n",
        b"GET http://evil.example/sessions HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET http://localhost@evil.example/sessions HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET http:///sessions HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET ftp://localhost/sessions HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET http://localhosthttp://localhost/sessions HTTP/1.1\r\nHost: localhost\r\n\r\n",
        b"GET /sessions HTTP/1.1\r\nHost: localhost..\r\n\r\n",
        b"GET /sessions HTTP/1.1\r\nHost: localhost.evil.example\r\n\r\n",
        b"GET /health/../sessions HTTP/1.1\r\n" + host + b"\r\n",
        b"GET /sessions HTTP/1.1\r\nHost: localhost\r\n" + host + b"\r\n",
        b"GET /sessions HTTP/1.1\r\nHost: localhost\r\nOrigin: http://localhost\r\nOrigin: http://evil.example\r\n\r\n",
        b"GET /sessions HTTP/1.1\r\nHost: localhost, evil.example\r\n\r\n",
        b"GET /sessions HTTP/1.1\r\nHost: localhost@evil.example\r\n\r\n",
        b"OPTIONS /sessions/a HTTP/1.1\r\n" + host + b"Access-Control-Request-Method: PUT\r\n\r\n",
    ):
        assert 400 <= status(daemon, kind, attack) < 500, attack
    # The second of two in one piece is looked at like the first.
    with connected(daemon, kind) as one:
        one.sendall(b"GET /status HTTP/1.1\r\nHost: localhost\r\n\r\nGET /status HTTP/1.1\r\n" + host + b"\r\n")
        seen = b""
        while seen.count(b"HTTP/1.1 ") < 2:
            seen += one.recv(4096)
        assert seen.startswith(b"HTTP/1.1 200 ")
        assert b"HTTP/1.1 403 " in seen


def test_answers_are_for_no_other_page(daemon: Any) -> None:
    for path in ("/status", "/", "/v1/models", "/nowhere"):
        _, headers, _ = daemon.request("GET", path)
        assert headers["Cross-Origin-Resource-Policy"] == "same-origin"
        assert headers["X-Content-Type-Options"] == "nosniff"
        assert "Access-Control-Allow-Origin" not in headers


# --- names


def asked_as(uid: int, daemon: Any, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
    with acting_as(uid):
        one = UnixConnection(daemon.socket)
        one.connect()
    try:
        given = {name.replace("_", "-"): value for name, value in headers.items()}
        one.request(method, path, None if body is None else json.dumps(body), given)
        response = one.getresponse()
        return response.status, json.loads(response.read())
    finally:
        one.close()


NOBODY, DAEMON = (pwd.getpwnam(name).pw_uid for name in ("nobody", "daemon"))
UNKNOWN = 54321


@as_root
def test_a_user_of_the_machine_is_its_login_name(guarded: Any) -> None:
    for uid in (NOBODY, DAEMON, UNKNOWN):
        assert asked_as(uid, guarded, "PUT", "/sessions/mine", {"system": str(uid)})[0] == 200
    for uid, user in ((NOBODY, "nobody"), (DAEMON, "daemon"), (UNKNOWN, f"uid-{UNKNOWN}")):
        assert asked_as(uid, guarded, "GET", "/sessions/mine")[1]["system"] == str(uid)
        assert (guarded.state / "state" / "sessions" / user / "mine.json").exists()
    for uid in (NOBODY, UNKNOWN):
        for user in ("daemon", "root", "ann"):
            assert asked_as(uid, guarded, "GET", "/sessions", X_RKEdge_User=user) == (200, {"sessions": []})
            assert asked_as(uid, guarded, "DELETE", "/sessions/mine", X_RKEdge_User=user)[0] == 404
    # Its own name is itself; root may be anybody.
    assert asked_as(NOBODY, guarded, "GET", "/sessions/mine", X_RKEdge_User="nobody")[0] == 200
    assert asked_as(0, guarded, "GET", "/sessions/mine", X_RKEdge_User="daemon")[1]["system"] == str(DAEMON)


@as_root
def test_people_behind_one_account_are_apart(guarded: Any) -> None:
    """As those whose keys have forced commands in one account's authorized_keys."""
    for user in ("ann", "bob"):
        assert asked_as(DAEMON, guarded, "PUT", "/sessions/talk", {"system": user}, X_RKEdge_User=user)[0] == 200
    for user in ("ann", "bob"):
        assert asked_as(DAEMON, guarded, "GET", "/sessions/talk", X_RKEdge_User=user)[1]["system"] == user
        # The same name from another account is somebody else, and so is the key's.
        assert asked_as(NOBODY, guarded, "GET", "/sessions/talk", X_RKEdge_User=user)[0] == 404
        assert keyed(guarded, KEYS[user], "GET", "/sessions/talk")[0] == 404
    assert asked_as(DAEMON, guarded, "GET", "/sessions/talk")[0] == 404


def test_names_that_nobody_may_give(guarded: Any) -> None:
    for name in ("network", "local", "uid-1", f"key-{'0' * 16}", "pi+ann", "../ann", "", "\xc3\xa9", "a" * 65):
        answer = guarded.request("GET", "/sessions", headers={"X-RKEdge-User": name})
        assert answer[0] in (400, 403), (name, answer)


@pytest.mark.parametrize(
    "sign", [{"Origin": "http://localhost"}, {"Sec-Fetch-Site": "same-origin"}, {"User-Agent": "Mozilla/5.0"}]
)
def test_a_browser_names_nobody(guarded: Any, sign: dict[str, str]) -> None:
    assert guarded.request("GET", "/sessions", headers=sign)[0] == 200
    assert guarded.request("GET", "/sessions", headers={**sign, "X-RKEdge-User": "ann"})[0] == 403


def test_two_names_are_none(guarded: Any) -> None:
    attack = b"GET /sessions HTTP/1.1\r\nHost: localhost\r\nX-RKEdge-User: root\r\nX-RKEdge-User: ann\r\n\r\n"
    assert status(guarded, "unix", attack) == 403


def test_each_key_has_conversations_of_its_own(guarded: Any) -> None:
    keys = [*KEYS.values(), "c" * 32, "d" * 32]
    for key in keys:
        assert keyed(guarded, key, "PUT", "/sessions/same", {"system": key})[0] == 200
    for key in keys:
        assert keyed(guarded, key, "GET", "/sessions/same")[1]["system"] == key
    assert keyed(guarded, KEYS["ann"], "GET", "/sessions/same", X_RKEdge_User="ann")[0] == 200
    assert keyed(guarded, KEYS["ann"], "GET", "/sessions/same", X_RKEdge_User="bob")[0] == 403
    assert keyed(guarded, "e" * 32, "GET", "/sessions/same", X_RKEdge_User="bob")[0] == 401
    # A key's name is the user's name, whatever it comes in by.
    assert guarded.request("GET", "/sessions/same", headers={"X-RKEdge-User": "ann"})[2]["system"] == KEYS["ann"]


def test_tcp_without_keys_is_one_user_who_is_nobody_else(daemon: Any) -> None:
    assert status(daemon, "tcp", request_bytes("PUT", "/sessions/page", {"system": "x"})) == 200
    assert status(daemon, "tcp", request_bytes("GET", "/sessions/page")) == 200
    assert status(daemon, "tcp", request_bytes("GET", "/sessions/page", X_RKEdge_User="root")) == 403
    assert daemon.request("GET", "/sessions/page")[0] == 404
    assert (daemon.state / "state" / "sessions" / "network" / "page.json").exists()


def test_conversations_are_nobody_elses_whatever_the_mask(start_daemon: Callable[..., Any]) -> None:
    before = os.umask(0)
    try:
        open_handed = start_daemon("prompt_cache: {max_mb: 50, min_tokens: 20}", port=False)
    finally:
        os.umask(before)
    open_handed.lines("/sessions/a/messages", {"content": "word " * 60, "max_tokens": 2})
    folders = [open_handed.state / name for name in ("state", "cache")]
    kept = [path for folder in folders for path in (folder, *folder.rglob("*"))]
    assert {path.suffix for path in kept} >= {".json", ".kv"}
    assert [path for path in kept if path.stat().st_mode & 0o077] == []
    assert Path(open_handed.socket).stat().st_mode & 0o777 == 0o660


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_connections_do_not_wait_for_acknowledgements(host: str) -> None:
    """Made by us or by systemd: asyncio takes neither for TCP, since their protocol number is 0."""
    try:
        listener = socket.create_server((host, 0), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError:
        pytest.skip(f"no {host} here")
    with listener, socket.socket(fileno=os.dup(listener.fileno())) as inherited:
        door_of(inherited, {})
        with socket.create_connection(listener.getsockname()[:2]), listener.accept()[0] as one:
            assert one.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_two_daemons_at_once_on_one_socket(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that has bound its socket and does not listen yet is not taken for one that is gone."""
    path, bound, go_on = tmp_path / "socket", threading.Event(), threading.Event()
    chmod = Path.chmod

    def pause(self: Path, mode: int) -> None:
        if not bound.is_set():
            bound.set()
            go_on.wait(30)
        chmod(self, mode)

    monkeypatch.setattr(Path, "chmod", pause)
    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(unix_socket, path, 0o600)
        assert bound.wait(30)
        second = pool.submit(unix_socket, path, 0o600)
        with suppress(NotYetError):
            second.exception(0.3)
        go_on.set()
        with first.result():
            assert isinstance(second.exception(), UsageError)
            with socket.socket(socket.AF_UNIX) as client:
                client.connect(str(path))


def test_a_socket_of_a_daemon_that_accepts_nobody(tmp_path: Path) -> None:
    """Nobody waits for it, and it is not taken for an old one."""
    path = tmp_path / "socket"
    with ExitStack() as opened:
        listener = opened.enter_context(socket.socket(socket.AF_UNIX))
        listener.bind(str(path))
        listener.listen(0)
        for _ in range(4):
            client = opened.enter_context(socket.socket(socket.AF_UNIX))
            client.setblocking(False)
            with suppress(BlockingIOError):
                client.connect(str(path))
        with pytest.raises(UsageError, match="already listens"):
            unix_socket(path, 0o600)
    unix_socket(path, 0o600).close()  # now it is an old one


def test_a_port_that_is_taken_leaves_no_socket_behind(tmp_path: Path) -> None:
    path = tmp_path / "socket"
    with socket.create_server(("127.0.0.1", 0)) as other:
        with pytest.raises(HostError, match="Cannot listen"):
            open_sockets(path, Listen(port=other.getsockname()[1]))
        assert not path.exists()
    path.write_text("")
    with pytest.raises(UsageError, match="is not a socket"):
        open_sockets(path, Listen(port=0))
    assert path.read_text() == ""
