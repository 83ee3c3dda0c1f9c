"""How long GET /health takes while somebody does the worst to the daemon that we know: median and slowest.

Another process presses: four threads send the same again and again.
"""

from __future__ import annotations

import http.client
import json
import multiprocessing
import shutil
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.bench._report import Report
from tests.bench._servers import Server, daemon_of, prepare, script
from tests.runtime.conftest import build_double, with_file

from rkconvert.demo import checkpoint
from rkruntime import cli
from rkruntime.bundle.manifest import open_bundle

LIMITS = """
One run of each, on a PC: what the machine does besides counts too, the slowest of so few most of all.
"""
COUNT, PAUSE_S, PRESSING = 300, 0.02, 4
CHAT = "/v1/chat/completions"
TEMPLATE = (
    "{{{{ bos_token }}}}{{% if 'go' in messages[-1].content %}}{evil}{{% endif %}}"
    "{{% for m in messages %}}<start_of_turn>{{{{ m.role }}}}\n{{{{ m.content }}}}<end_of_turn>\n{{% endfor %}}"
    "<start_of_turn>model\n"
)
EVIL = {
    "a template without end": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "a template that grows": "{% set x = namespace(y='ab' * 1000000) %}"
    "{% for i in range(99999) %}{% set x.y = x.y ~ x.y %}{% endfor %}",
}


def _chat(content: str, count: int = 1, **more: Any) -> bytes:
    messages = [{"role": "assistant" if at % 2 else "user", "content": content} for at in range(count)]
    return json.dumps({"messages": messages, "max_tokens": 64, **more}, ensure_ascii=False).encode()


# All have nearly limits.body_mb, 4 MB, or the number of values that a body may have.
REQUESTS: dict[str, tuple[str, str, bytes]] = {
    "one message of words": ("POST", CHAT, _chat("word " * 790_000)),
    "one message of control tokens": ("POST", CHAT, _chat("<start_of_turn>" * 260_000)),
    "one message with a wide letter": ("POST", CHAT, _chat("🙂" + "a" * 3_900_000)),
    "4,095 messages": ("POST", CHAT, _chat("a b " * 225, 4095, drop_oldest=True)),
    "65,000 values": ("POST", CHAT, _chat("go", junk=[{"a": 1}] * 32_000, x="🙂" + "a" * 3_000_000)),
    "too many values": ("POST", CHAT, b'{"a": [' + b"[]," * 1_300_000 + b"[]]}"),
    "pieces of one byte": ("POST", CHAT, b""),
    "a conversation written": ("PUT", "/sessions/long", json.dumps({"system": "x" * 3_900_000}).encode()),
    "a conversation read": ("GET", "/sessions/long", b""),
    "256 embeddings": ("POST", "/v1/embeddings", json.dumps({"input": ["word"] * 256}).encode()),
}


def _send(url: str, method: str, path: str, body: bytes) -> None:
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
    with suppress(OSError, http.client.HTTPException):
        connection.request(method, path, body, {"Content-Type": "application/json"})
        connection.getresponse().read()
    connection.close()


def _send_pieces(url: str) -> None:
    parts = urlsplit(url)
    with suppress(OSError), socket.create_connection((parts.hostname, parts.port), timeout=60) as one:
        one.sendall(f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        one.sendall(b"1\r\n \r\n" * 1_000_000)
        one.recv(1000)


def _press(send: Callable[[], None], sent: Any) -> None:
    def again() -> None:
        while True:
            send()
            with sent.get_lock():
                sent.value += 1

    threads = [threading.Thread(target=again) for _ in range(PRESSING)]
    for thread in threads:
        thread.start()


@contextmanager
def pressed(send: Callable[[], None]) -> Iterator[Any]:
    """Another process that presses; the value is how often it did."""
    context = multiprocessing.get_context("fork")
    sent = context.Value("L")
    process = context.Process(target=_press, args=(send, sent), daemon=True)
    process.start()
    try:
        time.sleep(0.5)
        yield sent
    finally:
        process.kill()
        process.join()


def health(server: Server) -> list[float]:
    """Milliseconds of each of COUNT requests, each over a connection of its own."""
    parts, took = urlsplit(server.url), []
    for _ in range(COUNT):
        start = time.perf_counter()
        connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=60)
        connection.request("GET", "/health")
        if connection.getresponse().status != 200:
            raise SystemExit("/health is not healthy")
        connection.close()
        took.append((time.perf_counter() - start) * 1000)
        time.sleep(PAUSE_S)
    return took


def row(report: Report, name: str, server: Server, send: Callable[[], None] | None = None) -> None:
    """Measure beside one kind of pressure."""
    sent = 0
    if send is None:
        took = health(server)
    else:
        with pressed(send) as counted:
            took = health(server)
            sent = counted.value
    report.figure("GET /health", f"beside {name}", took, "ms", note=f"{sent} sent" if send else "")
    report.figure("the slowest GET /health", f"beside {name}", max(took), "ms")


def _bodies(report: Report, here: Path) -> None:
    with daemon_of(here) as server:
        row(report, "nothing", server)
        _send(server.url, *REQUESTS["a conversation written"])
        for name, request in REQUESTS.items():
            send = (lambda: _send_pieces(server.url)) if name == "pieces of one byte" else None
            row(report, name, server, send or (lambda request=request: _send(server.url, *request)))  # type: ignore[misc]


def _templates(report: Report, here: Path) -> None:
    for name, evil in EVIL.items():
        with_file(open_bundle(here / "canned"), "chat_template.jinja", TEMPLATE.format(evil=evil))
        with daemon_of(here) as server:
            row(report, name, server, lambda: _send(server.url, "POST", CHAT, _chat("go")))


def _libraries(report: Report, here: Path) -> None:
    prepare(here)
    script(here, 1_000_000, 0)
    ask = _chat("Go.", max_tokens=16_384, stream=True)
    with daemon_of(here, here / "librkllmrt.so", RKCANNED=str(here / "script")) as server:
        row(report, "a library that floods tokens", server, lambda: _send(server.url, "POST", CHAT, ask))
    library = build_double("1.2.3", here)
    for name, line in (("empty lines", "\n"), ("long lines", "x" * 4000 + "\n")):
        with daemon_of(here, library, RKDOUBLE="init-flood-beside", RKDOUBLE_LINE=line) as server:
            row(report, f"a library that prints {name}", server, lambda: _send(server.url, "POST", CHAT, ask))


def main() -> int:
    """Measure beside bodies, templates and libraries."""
    report = Report("serve_health", __doc__ or "", limits=LIMITS)
    with tempfile.TemporaryDirectory() as place:
        cli.main(["convert", str(checkpoint()), "-q", "-o", f"{place}/canned"])
        for number, part in enumerate((_bodies, _libraries, _templates)):
            here = Path(place) / str(number)
            shutil.copytree(Path(place) / "canned", here / "canned")
            part(report, here)
    return report.close()


if __name__ == "__main__":
    sys.exit(main())
