"""What a request leaves behind when it fails, and what its client hears."""

from __future__ import annotations

import asyncio
import json
import weakref
from collections.abc import AsyncGenerator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from starlette.applications import Starlette
from starlette.testclient import TestClient
from starlette.types import ASGIApp

from rkruntime.errors import ContextFullError
from rkruntime.serve.app import openapi
from rkruntime.serve.http import Bodies, Stream
from rkruntime.serve.native import Sessions
from rkruntime.serve.service import Run
from rkruntime.serve.sessions import SessionStore
from rkruntime.serve.users import User
from rkruntime.serve.validate import Validator


class Words(str):
    """A long prompt of which somebody can ask whether it is still there."""

    __slots__ = ("__weakref__",)


def known(app: ASGIApp) -> ASGIApp:
    async def asked(scope: Any, receive: Any, send: Any) -> None:
        await app({**scope, "rkedge.user": User("ann"), "rkedge.id": "1"}, receive, send)

    return asked


def test_a_refused_question_to_a_session_is_forgotten(tmp_path: Path) -> None:
    async def refuse(run: Run) -> None:
        run.end(ContextFullError("too long"))

    store = SessionStore(tmp_path / "sessions", 1 << 20, 100)
    service: Any = SimpleNamespace(sessions=store, start=lambda _: Run(refuse))
    sessions = Sessions(service, Bodies(Validator(openapi()), 1 << 20, 5))
    with TestClient(known(Starlette(routes=sessions.routes()))) as client:
        answer = client.post("/sessions/a/messages", json={"content": "word"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "context_length_exceeded")
    assert not sessions._runs


def test_an_error_that_is_kept_holds_no_prompt() -> None:
    held: list[weakref.ref[Words]] = []

    async def fail(run: Run) -> None:
        prompt = Words("word " * 1000)
        held.append(weakref.ref(prompt))
        try:
            try:
                raise ValueError(prompt)
            except ValueError as error:
                raise ContextFullError("too long") from error
        except ContextFullError as error:
            run.end(error)

    async def main() -> None:
        run = Run(fail)
        await asyncio.sleep(0.01)
        assert run._ended
        assert held[0]() is None

    asyncio.run(main())


def test_a_stream_ends_with_an_event_and_is_closed_whatever_goes_wrong() -> None:
    closed = []

    async def chunks() -> AsyncGenerator[bytes, None]:
        yield b"first\n"
        raise ZeroDivisionError

    async def close() -> None:
        closed.append(True)

    def failed(error: Exception) -> bytes:
        return f"{type(error).__name__}\n".encode()

    client = TestClient(known(Stream(chunks(), "text/plain", failed=failed, close=close)))
    assert client.get("/").text == "first\nZeroDivisionError\n"
    assert closed == [True]


def test_only_what_the_schema_knows_is_kept() -> None:
    schemas = {
        "Thing": {
            "type": "object",
            "properties": {
                "count": {"type": ["integer", "null"]},
                "share": {"type": "number"},
                "parts": {"anyOf": [{"type": "string"}, {"type": "array", "items": {"$ref": "#/x/Part"}}]},
                "free": {"type": "object"},
            },
        },
        "Part": {"type": "object", "required": ["text"], "properties": {"text": {"type": "string"}}},
    }
    body = {
        "count": 3.0,
        "share": 2.0,
        "parts": [{"text": "a", "foreign": [[]]}],
        "free": {"any": None},
        "foreign": {"count": 1},
    }
    read = Validator({"components": {"schemas": schemas}}).read("Thing", body)
    expected = {"count": 3, "share": 2.0, "parts": [{"text": "a"}], "free": {"any": None}}
    # As JSON, which tells 3 from 3.0.
    assert json.dumps(read) == json.dumps(expected)
    assert Validator({"components": {"schemas": schemas}}).read("Thing", {"count": None}) == {}
