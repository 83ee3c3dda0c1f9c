"""What requests hold in memory: bounded for each of them by its size, and for each user by a share."""

from __future__ import annotations

import json
import os
import random
import socket
import threading
import tracemalloc
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rkruntime.errors import BodyError, BusyError
from rkruntime.serve.api import validate
from rkruntime.serve.api.validate import parse_json
from rkruntime.serve.connections import Requests
from rkruntime.serve.users import User

SIZE = 4_000_000


def repeated(item: bytes) -> bytes:
    return b"[" + item * ((SIZE - 2) // len(item)) + b"0]"


HOSTILE = {
    "empty lists": repeated(b"[],"),
    "empty objects": repeated(b"{},"),
    "lists of one": repeated(b"[1],"),
    "objects of one": repeated(b'{"a":1},'),
    "short texts": repeated(b'"ab",'),
    "texts of quotes": repeated(rb'"\"",'),
    "texts of backslashes": repeated(rb'"\\",'),
    "whole numbers": repeated(b"300,"),
    "fractions": repeated(b"1e1,"),
    "names": b"{" + b",".join(b'"%06d":[]' % at for at in range(SIZE // 12)) + b"}",
    "behind a broken text": b'["\\\\\\" , \\\\", ' + repeated(b"[],")[1:],
    "cut in a text": repeated(b"[],")[:-1] + b'"',
}
LONG = {
    "letters": b'["%b"]' % (b"a" * SIZE),
    "brackets in a text": b'["%b"]' % (b"[{," * (SIZE // 3)),
    "escapes": b'["%b"]' % (rb"\"\\," * (SIZE // 5)),
    "one wide letter": b'["%b"]' % ("🙂".encode() + b"a" * SIZE),
    "many values and a wide letter": b'[%b"%b"]' % (b'{"ab":1},' * 30_000, "🙂".encode() + b"a" * (SIZE - 300_000)),
}


@pytest.mark.parametrize("name", [*HOSTILE, *LONG])
def test_a_body_takes_no_multiple_of_its_size(name: str) -> None:
    body = {**HOSTILE, **LONG}[name]
    code, data = "", None
    tracemalloc.start()
    try:
        data = parse_json(body)
    except BodyError as error:
        code = error.details["code"]
    kept, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    if name in HOSTILE:
        assert code == "too_many_values"
    else:
        assert data == json.loads(body)
    assert kept < 4 * len(body) + 10_000_000
    assert most < 8 * len(body) + 10_000_000


json_values = st.recursive(
    st.text(max_size=6) | st.sampled_from(['"', "\\", '\\"', "[,{", "\\\\"]) | st.integers(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=4),
)


@given(st.lists(json_values, min_size=1))
def test_values_are_counted_whatever_texts_hold(data: list[Any]) -> None:
    """The oracle counts what Python made of the body: each list and object has as many as stand in it, at least one."""

    def count(value: Any) -> int:
        inner = value.values() if isinstance(value, dict) else value if isinstance(value, list) else None
        return 0 if inner is None else max(1, len(inner)) + sum(map(count, inner))

    body = json.dumps(data, ensure_ascii=False).encode()
    with patch.object(validate, "_MAX_VALUES", count(data)):
        assert parse_json(body) == data
    with patch.object(validate, "_MAX_VALUES", count(data) - 1), pytest.raises(BodyError, match="more than"):
        parse_json(body)


USERS = [User("ann"), User("bob"), User("pi"), User("pi", "ann"), User("pi", "bob")]


@pytest.mark.parametrize("seed", range(5))
def test_shares(seed: int) -> None:
    """Any mix of requests: nobody is over a share with more than one, nothing is left, and one alone always may."""
    chance, limit = random.Random(seed), 1600
    requests = Requests(1000, limit)
    open_: dict[int, tuple[User, ExitStack, Any, list[int]]] = {}
    for number in range(400):
        if open_ and chance.random() < 0.4:
            open_.pop(chance.choice([*open_]))[1].close()
        else:
            user, stack = chance.choice(USERS), ExitStack()
            open_[number] = user, stack, stack.enter_context(requests.one(user)), [0]
        for _, _, held, size in open_.values():
            wanted = chance.choice([0, 10, 90, 300, 1000])
            if not any(other[3][0] for other in open_.values() if other[3] is not size):
                held.at_least(wanted)
                size[0] = max(size[0], wanted)
            with suppress(BusyError):
                held.at_least(wanted)
                size[0] = max(size[0], wanted)
        for path, most in (((), limit), *(((name,), limit // 4) for name in ("ann", "bob", "pi"))):
            sizes = [size[0] for user, _, _, size in open_.values() if user.path[: len(path)] == path and size[0]]
            assert len(sizes) <= 1 or sum(sizes) <= most
    for _, stack, _, _ in open_.values():
        stack.close()
    assert not requests._bytes


def resident_mb(daemon: Any) -> float:
    return int(Path(f"/proc/{daemon.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6


def test_many_large_bodies_of_one_user(start_daemon: Callable[..., Any]) -> None:
    """Some are answered, the others are told to come later, and memory stays far below that of all bodies."""
    daemon = start_daemon("limits: {memory_mb: 32}", port=False)
    body = b'{"messages": [{"role": "user", "content": "%b"}], "foreign": %b}'
    junk = body % ("🙂".encode() + b"a" * 3_000_000, b"[" + b'{"a":[1]},' * 20_000 + b"0]")
    conversation = b'{"conversation": {"schema": "rkedge-conversation/1", "messages": [], "x": %b}}'
    update = conversation % (b"[" + b"[{}]," * 20_000 + b'"%b"]' % (b"a" * 3_000_000))
    daemon.ask("Does it work?")
    before, most, stop = resident_mb(daemon), [0.0], threading.Event()

    def watch() -> None:
        while not stop.wait(0.01):
            most[0] = max(most[0], resident_mb(daemon))

    statuses: Counter[int] = Counter()

    def send(number: int) -> None:
        with suppress(OSError):
            if number % 2:
                statuses[daemon.request("POST", "/v1/chat/completions", junk)[0]] += 1
            else:
                statuses[daemon.request("PUT", "/sessions/one", update)[0]] += 1

    threads = [threading.Thread(target=watch), *(threading.Thread(target=send, args=(at,)) for at in range(40))]
    for thread in threads:
        thread.start()
    for thread in threads[1:]:
        thread.join()
    stop.set()
    threads[0].join()
    # 400: the context is not so long.
    assert statuses[429] > 0
    assert statuses[400] + statuses[200] > 0
    assert statuses.keys() <= {200, 400, 429}
    assert most[0] - before < 200


def test_large_answers_that_nobody_takes(start_daemon: Callable[..., Any]) -> None:
    daemon = start_daemon("limits: {memory_mb: 32}", port=False)
    assert daemon.request("PUT", "/sessions/long", {"system": "x" * 3_900_000})[0] == 200
    with ExitStack() as opened:
        waiting = [opened.enter_context(socket.socket(socket.AF_UNIX)) for _ in range(8)]
        for one in waiting:
            one.settimeout(20)
            one.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            one.connect(str(daemon.socket))
            one.sendall(b"GET /sessions/long HTTP/1.1\r\nHost: localhost\r\n\r\n")
        statuses = [one.recv(12)[9:] for one in waiting]
        assert sorted(set(statuses)) == [b"200", b"429"]
        assert statuses.count(b"200") == 2
        assert daemon.request("GET", "/sessions/long", headers={"X-RKEdge-User": "ann"})[0] == 404
    daemon.wait_until(lambda: daemon.request("GET", "/sessions/long")[0] == 200)
