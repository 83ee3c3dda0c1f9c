"""A client of the daemon that reads its streams, and what the demo model answers."""

from __future__ import annotations

import json
import socket
from typing import Any

from rkconvert.demo import questions

QA = {row.question: row.answer for row in questions()}
FIRST = "What is the RK3588?"


def text_of(events: list[dict[str, Any]]) -> str:
    return "".join(event["text"] for event in events if event["type"] == "text")


def idle(daemon: Any) -> bool:
    return daemon.request("GET", "/status")[2]["queue"] == {"waiting": 0, "busy": False}


def begin_stream(daemon: Any, path: str, body: Any, until: bytes) -> tuple[socket.socket, bytes]:
    """Send a request and read until a text has come."""
    one = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    one.settimeout(20)
    one.connect(str(daemon.socket))
    data = json.dumps(body).encode()
    one.sendall(f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n".encode() + data)
    seen = b""
    while until not in seen:
        part = one.recv(4096)
        assert part, seen
        seen += part
    return one, seen
