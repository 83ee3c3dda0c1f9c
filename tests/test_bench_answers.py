"""How the benchmark of servers reads their answers: what counts as an event, when a token came, and what is wrong."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest
from tests.bench._answers import Answer, ask
from tests.bench._servers import Server


def chunk(text: str) -> bytes:
    return b"data: " + json.dumps({"choices": [{"delta": {"content": text}}]}).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"


@contextmanager
def serving(status: int, parts: list[bytes]) -> Iterator[Server]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            self.end_headers()
            for part in parts:
                self.wfile.write(part)

        def log_message(self, *_: object) -> None: ...

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield Server("one", f"http://127.0.0.1:{server.server_port}/v1/chat/completions", "m", 0)
        finally:
            server.shutdown()
            thread.join()


ROLE = b'data: {"choices": [{"delta": {"role": "assistant"}}]}\n\n'
FAILED = b'data: {"error": {"message": "no"}}\n\n'


@pytest.mark.parametrize(
    ("status", "parts", "events", "fails"),
    [
        (200, [ROLE, chunk("a "), chunk("€"), DONE], ["a ", "€"], False),
        (200, [ROLE + chunk("a ") + chunk("€")[:20], chunk("€")[20:] + DONE], ["a ", "€"], False),
        (200, [chunk("a"), chunk(""), DONE], ["a"], False),
        (200, [ROLE, chunk("a ")], ["a "], True),
        (200, [ROLE, chunk("a "), FAILED], ["a "], True),
        (503, [FAILED], [], True),
    ],
)
def test_events(status: int, parts: list[bytes], events: list[str], fails: bool) -> None:
    with serving(status, parts) as server:
        answer = ask(server)
    assert [text for _, text in answer.events] == events
    assert bool(answer.failure) == fails


def test_a_server_that_is_gone_is_a_failure() -> None:
    with serving(200, []) as server:
        pass
    assert ask(server).failure


@pytest.mark.parametrize("cut", [lambda text: list(text), lambda text: [text[:4], text[4:]]], ids=["letters", "pieces"])
def test_a_token_has_come_with_its_last_letter(cut: Callable[[str], list[str]]) -> None:
    """However the server cuts the text: here each piece takes a second."""
    tokens = ["ab", "cd", "efg"]
    pieces = cut("".join(tokens))
    answer = Answer([(float(at), piece) for at, piece in enumerate(pieces)])
    arrived = [next(at for at in range(len(pieces)) if len("".join(pieces[: at + 1])) >= end) for end in (2, 4, 7)]
    assert answer.gaps(tokens) == [arrived[1] - arrived[0], arrived[2] - arrived[1]]
