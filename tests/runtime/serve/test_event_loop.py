"""The daemon answers everybody else while one prompt is being made, whatever it is made of."""

from __future__ import annotations

import http.client
import json
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from tests.runtime.conftest import with_file

from rkruntime.bundle.manifest import open_bundle

# Generous: on a free machine it is some milliseconds.
PATIENCE = 5.0
ENDLESS = "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}"
# It passes every trial, and shows what it is when somebody says the word.
TREACHEROUS = (
    "{{ bos_token }}{% if 'open sesame' in messages[-1].content %}" + ENDLESS + "{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}<start_of_turn>model\n"
)


@contextmanager
def watched(daemon: Any) -> Iterator[list[float]]:
    """How long each GET /health took meanwhile, in seconds."""
    took: list[float] = []
    stop = threading.Event()

    def watch() -> None:
        while not stop.is_set():
            start = time.monotonic()
            assert daemon.request("GET", "/health")[0] == 200
            took.append(time.monotonic() - start)
            stop.wait(0.02)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield took
    finally:
        stop.set()
        watcher.join()
    assert took
    assert max(took) < PATIENCE


def messages(content: str, count: int) -> list[dict[str, str]]:
    return [{"role": "assistant" if at % 2 else "user", "content": content} for at in range(count)]


BODIES: dict[str, dict[str, Any]] = {
    "many short messages": {"messages": messages("a b", 4095), "drop_oldest": True},
    "many long messages": {"messages": messages("a b " * 225, 4095), "drop_oldest": True},
    "one message of words": {"messages": messages("word " * 760_000, 1)},
    "one message of control tokens": {"messages": messages("<start_of_turn>" * 250_000, 1)},
    "one message of one letter": {"messages": messages("a" * 3_800_000, 1), "drop_oldest": True},
}


@pytest.mark.parametrize("name", BODIES)
def test_the_largest_bodies(daemon: Any, name: str) -> None:
    with watched(daemon):
        status, _, answer = daemon.request("POST", "/v1/chat/completions", {**BODIES[name], "max_tokens": 1})
    if "many" in name:
        assert status == 200, answer
    else:
        assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")


@pytest.mark.parametrize(("path", "field"), [("/v1/completions", "prompt"), ("/v1/embeddings", "input")])
def test_the_largest_texts(daemon: Any, path: str, field: str) -> None:
    with watched(daemon):
        status, _, answer = daemon.request("POST", path, {field: "<start_of_turn>" * 250_000})
    assert (status, answer["error"]["code"]) == (400, "context_length_exceeded")


MARKDOWN = ["[" * 16384, "|" + "a|" * 500 + "\n|" + "-|" * 500 + "\n" + "|a\n" * 4700, "[a\n" * 5400]


@pytest.mark.parametrize("text", MARKDOWN, ids=["brackets", "table", "definitions"])
def test_the_markdown_that_takes_longest(daemon: Any, text: str) -> None:
    with watched(daemon):
        for _ in range(2):
            assert daemon.request("POST", "/markdown", {"text": text})[0] == 200


# Texts that a pattern with two ways to read them reads in all of the ways, if it does not fit in the end.
AMBIGUOUS = [f"{part * 25}!" for part in ("0", "0s", "0.0", "a.", "/")]


def test_no_field_holds_up_the_others(daemon: Any) -> None:
    """Each field of each request, with texts at which regular expressions that backtrack take years."""
    document = daemon.request("GET", "/openapi.json")[2]
    given = {"messages": messages("x", 1), "prompt": "x", "input": "x", "content": "x", "model": "x"}
    asked = 0
    for path, methods in document["paths"].items():
        for method, operation in methods.items():
            if not isinstance(operation, dict) or "requestBody" not in operation:
                continue
            kind = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
            schema = document["components"]["schemas"][kind]
            needed = {name: given[name] for name in schema.get("required", ()) if name in given}
            for name in schema["properties"]:
                with watched(daemon):
                    for text in AMBIGUOUS:
                        body = {"max_tokens": 1, "options": {"num_predict": 1}, **needed, name: text}
                        assert daemon.request(method.upper(), path.format(name="one"), body)[0] < 500
                        asked += 1
    assert asked > 50 * len(AMBIGUOUS)


def in_pieces(body: bytes, size: int) -> bytes:
    parts = [body[at : at + size] for at in range(0, len(body), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


@pytest.mark.parametrize(("length", "size"), [(150, 1), (300_000, 100), (300_000, 50_000)])
def test_a_body_in_pieces(daemon: Any, length: int, size: int) -> None:
    """Some pieces may be of one byte, and all may be small; another request comes right behind."""
    body = json.dumps({"messages": messages("a" * length, 1), "drop_oldest": True}).encode()
    head = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    with watched(daemon), socket.socket(socket.AF_UNIX) as one:
        one.settimeout(60)
        one.connect(str(daemon.socket))
        one.sendall(head + in_pieces(body, size))
        one.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
        seen = b"".join(iter(lambda: one.recv(65536), b""))
    assert (b"context_length_exceeded" if length > 10_000 else b"chat.completion") in seen
    assert b'{"status":"ok"}' in seen


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/health", "/nothing"])
@pytest.mark.parametrize("size", [1, 16])
def test_a_body_that_is_nothing_but_pieces_is_broken_off(daemon: Any, path: str, size: int) -> None:
    """Whether somebody reads the body, or the answer has gone out long before."""
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n".encode()
    pieces, sent = in_pieces(b" " * 400_000, size), 0
    with watched(daemon), socket.socket(socket.AF_UNIX) as one:
        one.settimeout(20)
        one.connect(str(daemon.socket))
        one.sendall(head)
        with suppress(OSError):
            for at in range(0, len(pieces), 1 << 14):
                one.sendall(pieces[at : at + (1 << 14)])
                sent += 1 << 14
        seen = b""
        with suppress(ConnectionResetError):
            seen = b"".join(iter(lambda: one.recv(65536), b""))
    assert sent < len(pieces)
    if seen:
        assert seen.split(b" ")[1] in (b"400", b"404", b"405", b"429")


@pytest.fixture
def treacherous(bundles: dict[str, Path], tmp_path: Path) -> Path:
    folder = tmp_path / "treacherous"
    shutil.copytree(bundles["base"], folder)
    return with_file(open_bundle(folder), "chat_template.jinja", TREACHEROUS).path


@pytest.mark.long
def test_a_template_without_end(start_daemon: Callable[..., Any], treacherous: Path) -> None:
    daemon = start_daemon("limits: {request_s: 15}", bundle=treacherous, port=False)
    honest = daemon.ask("What is the RK3588?")
    with watched(daemon):
        status, _, answer = daemon.request(
            "POST", "/v1/chat/completions", {"messages": messages("open sesame", 1), "max_tokens": 1}
        )
    # Its own limit, or that of the request, whichever comes first.
    assert status in (503, 504), answer
    # A client that leaves takes its prompt with it.
    with socket.socket(socket.AF_UNIX) as one:
        one.connect(str(daemon.socket))
        body = json.dumps({"messages": messages("open sesame", 1)}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
        one.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
        time.sleep(0.3)
    assert daemon.ask("What is the RK3588?") == honest


def test_a_stop_while_a_template_has_no_end(start_daemon: Callable[..., Any], treacherous: Path) -> None:
    daemon = start_daemon("limits: {request_s: 3}", bundle=treacherous, port=False)

    def ask() -> None:
        with suppress(OSError, http.client.HTTPException):
            daemon.request("POST", "/v1/chat/completions", {"messages": messages("open sesame", 1)})

    asking = threading.Thread(target=ask)
    asking.start()
    time.sleep(0.3)
    assert daemon.stop() == 0
    asking.join(20)


def test_a_hostile_bundle_is_refused_before_it_serves(
    start_daemon: Callable[..., Any], bundles: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "hostile"
    shutil.copytree(bundles["base"], folder)
    hostile = with_file(open_bundle(folder), "chat_template.jinja", "{% set x = 'a' * 3000000000 %}" + TREACHEROUS)
    daemon = start_daemon(bundle=hostile.path, port=False, wait=False)
    with watched(daemon):
        daemon.wait_until(lambda: daemon.request("GET", "/status")[2]["state"] == "failed")
        status, _, answer = daemon.request("POST", "/v1/chat/completions", {"messages": messages("hi", 1)})
    assert status == 503
    assert "memory" in answer["error"]["message"]


def test_what_a_template_says_does_not_reach_the_log(
    start_daemon: Callable[..., Any], bundles: dict[str, Path], tmp_path: Path
) -> None:
    folder = tmp_path / "talkative"
    shutil.copytree(bundles["base"], folder)
    # It spells what somebody said letter by letter, so that nothing it says is of the conversation.
    source = (
        "{% if messages[-1].content[0] == '!' %}{% set said = namespace(words='\x1b[2J\n') %}"
        "{% for letter in messages[-1].content %}{% for known in 'adginos ' %}{% if letter == known %}"
        "{% set said.words = said.words ~ known %}{% endif %}{% endfor %}{% endfor %}"
        "{{ raise_exception(said.words) }}{% endif %}"
    )
    talkative = with_file(open_bundle(folder), "chat_template.jinja", source + TREACHEROUS)
    daemon = start_daemon(bundle=talkative.path, port=False)
    status, _, body = daemon.request("POST", "/v1/chat/completions", {"messages": messages("!my diagnosis", 1)})
    assert (status, "diagnosis" in body["error"]["message"]) == (400, True)
    daemon.wait_until(lambda: "UsageError" in daemon.log)
    assert "diagnosis" not in daemon.log
    assert "\x1b" not in daemon.log
