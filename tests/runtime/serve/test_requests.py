"""What a request leaves behind when it fails, and what its client hears."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import threading
import time
import weakref
from collections.abc import AsyncGenerator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from starlette.applications import Starlette
from starlette.datastructures import Headers
from starlette.testclient import TestClient
from starlette.types import ASGIApp

from rkruntime.errors import BundleError, ContextFullError, ServiceError, UsageError
from rkruntime.serve import doors
from rkruntime.serve.api.http import BodyReader, Stream
from rkruntime.serve.api.native import SessionEndpoints
from rkruntime.serve.api.ollama import OllamaEndpoints, _read_manifest
from rkruntime.serve.api.openai import OpenAIEndpoints
from rkruntime.serve.api.validate import Ignored, Validator
from rkruntime.serve.app import openapi
from rkruntime.serve.connections import Requests
from rkruntime.serve.host import Host
from rkruntime.serve.run import Run
from rkruntime.serve.service import Service
from rkruntime.serve.sessions import SessionStore
from rkruntime.serve.settings import PromptCache, Sessions, Settings
from rkruntime.serve.threads import LARGE, on_disk, with_data
from rkruntime.serve.users import User
from rkruntime.testing import fake_manifest, fake_model

LOOP: list[int] = []


class Words(str):
    """A long prompt of which somebody can ask whether it is still there."""

    __slots__ = ("__weakref__",)


def known(app: ASGIApp) -> ASGIApp:
    async def asked(scope: Any, receive: Any, send: Any) -> None:
        LOOP[:] = [threading.get_ident()]
        with Requests(9, 1 << 24).one(User("ann")) as held:
            await app(
                {
                    **scope,
                    "rkedge.user": User("ann"),
                    "rkedge.held": held,
                    "rkedge.id": "1",
                    "rkedge.ignored": Ignored(),
                },
                receive,
                send,
            )

    return asked


def sessions_of(store: SessionStore, work: Any = None) -> SessionEndpoints:
    async def check(*_: Any) -> None:
        pass

    service: Any = SimpleNamespace(sessions=store, start=lambda _: Run(work), check=check)
    return SessionEndpoints(service, BodyReader(Validator(openapi()), 1 << 20, 5))


def test_a_refused_question_to_a_session_is_forgotten(tmp_path: Path) -> None:
    async def refuse(run: Run) -> None:
        run.end(ContextFullError("too long"))

    store = SessionStore(tmp_path / "sessions", 1 << 20, 100)
    sessions = sessions_of(store, refuse)
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
    ignored = Ignored()
    read = Validator({"components": {"schemas": schemas}}).read("Thing", body, ignored)
    expected = {"count": 3, "share": 2.0, "parts": [{"text": "a"}], "free": {"any": None}}
    # As JSON, which tells 3 from 3.0.
    assert json.dumps(read) == json.dumps(expected)
    assert ignored.names == ["parts[].foreign", "foreign"]
    assert Validator({"components": {"schemas": schemas}}).read("Thing", {"count": None}, Ignored()) == {}


def conversation(*contents: str, system: str = "") -> dict[str, Any]:
    roles = ("user", "assistant")
    messages = [{"role": roles[at % 2], "content": content} for at, content in enumerate(contents)]
    return {"schema": "rkedge-conversation/1", "system": system, "messages": messages}


@pytest.mark.parametrize("loaded", [True, False])
def test_a_conversation_that_the_template_refuses_is_not_taken(tmp_path: Path, loaded: bool) -> None:
    """As far as there is a model whose template can be asked."""
    service, model = service_of(tmp_path, None), fake_model()
    seen: list[list[tuple[str, str]]] = []

    def check(messages: Any) -> None:
        seen.append([(item.role, item.content) for item in messages])
        if messages[0].role == "system":
            raise UsageError("The model's template refuses this conversation: no system.", hint="Change it.")

    model.prompts.check = check  # type: ignore[method-assign]
    service.host._model = model if loaded else None
    sessions = SessionEndpoints(service, BodyReader(Validator(openapi()), 1 << 20, 5))
    with TestClient(known(Starlette(routes=sessions.routes()))) as client:
        assert client.put("/sessions/a", json={"conversation": conversation("Q", "A")}).status_code == 200
        for body in (
            {"conversation": conversation("Q", "no", system="Be kind.")},
            {"conversation": conversation("Q", "no"), "system": "Be kind."},
        ):
            answer = client.put("/sessions/a", json=body)
            assert answer.status_code == (400 if loaded else 200)
            assert ("no system" in answer.text) == loaded
            if loaded:
                assert answer.json()["error"]["param"] == "conversation"
                assert client.get("/sessions/a").json() == conversation("Q", "A")
    expected = [("user", "Q"), ("assistant", "no"), ("user", "")]
    assert seen[1:] == [[("system", "Be kind."), *expected]] * 2 * loaded


def test_a_session_that_nothing_came_of_is_not_there(tmp_path: Path) -> None:
    store = SessionStore(tmp_path / "sessions", 1 << 20, 100)
    with TestClient(known(Starlette(routes=sessions_of(store).routes()))) as client:
        for body in ({}, {"clear": True}, {"clear": False}, {"system": ""}):
            assert client.put("/sessions/a", json=body).status_code == 200
            assert store.list(User("ann")) == []
        assert client.put("/sessions/a", json={"system": "Be kind."}).status_code == 200
        assert client.put("/sessions/a", json={"system": ""}).status_code == 200
        assert client.get("/sessions/a").json() == conversation()


PARTIAL: dict[str, Any] = {
    "question": "Q",
    "text": "A",
    "tokens": [65],
    "model": fake_manifest().fingerprint,
    "drop": False,
    "options": {},
    "boot": "",
    "since_boot": 0,
    "at": time.time(),
}


WRONG: list[dict[str, Any]] = [
    *({"broken": value} for value in (5, "x", [], {}, True, None)),
    *({"broken": PARTIAL | {name: value}} for name in PARTIAL for value in ([[]], 5, None, {"a": []}, "x", True)),
    *({"broken": {name: PARTIAL[name] for name in PARTIAL if name != missing}} for missing in PARTIAL),
    *({"broken": PARTIAL | {"tokens": value}} for value in ([], [-1], ["a"], [1 << 31], [1.5], [1 << 20])),
    *({"broken": PARTIAL | {name: value}} for name in ("at", "since_boot") for value in (10**400, -(10**400), 1e308)),
    *(
        {"broken": PARTIAL | {"options": {name: value}}}
        for name in ("max_tokens", "temperature", "top_k", "stop", "content", "x")
        for value in (-5, [1], {"a": 1}, "x", None, True, 3.0, 10**400)
    ),
    *({"number": value} for value in (5, None, [])),
    *({"reason": value} for value in ("bored", 5, None)),
]


def test_whatever_a_hand_has_written_into_a_session_is_no_bug(tmp_path: Path) -> None:
    service = service_of(tmp_path, fake_model(*["Yes."] * 2 * len(WRONG)))
    sessions = SessionEndpoints(service, BodyReader(Validator(openapi()), 1 << 20, 5))
    base = {**conversation("Q", "A"), "number": "q"}
    with TestClient(known(Starlette(routes=sessions.routes()))) as client:
        for wrong in WRONG:
            for method, path, body in (
                ("POST", "/sessions/a/resume", {"id": "q"}),
                ("POST", "/sessions/a/messages", {"content": "R", "id": "q"}),
                ("PUT", "/sessions/a", {"system": "Be kind."}),
            ):
                service.sessions.write(User("ann"), "a", base | wrong)
                answer = client.request(method, path, json=body)
                assert answer.status_code in (200, 404, 503), (wrong, answer.text)
                assert "bug" not in answer.text
                if answer.status_code == 503:
                    assert "damaged" in answer.text


def test_a_question_that_is_put_again_stands_once(tmp_path: Path) -> None:
    """Its client could not have the rest of the answer, for that was too long ago."""
    service = service_of(tmp_path, fake_model("Yes.", "Yes.", "Yes."))
    sessions = SessionEndpoints(service, BodyReader(Validator(openapi()), 1 << 20, 5))
    partial = PARTIAL | {"question": "R", "text": "B"}
    with TestClient(known(Starlette(routes=sessions.routes()))) as client:
        for content, number, expected in (
            ("R", "r", ["Q", "A", "R", "Yes."]),
            ("R", "s", ["Q", "A", "R", "B", "R", "Yes."]),
            ("S", "r", ["Q", "A", "R", "B", "S", "Yes."]),
        ):
            service.sessions.write(User("ann"), "a", conversation("Q", "A") | {"number": "r", "broken": partial})
            assert client.post("/sessions/a/messages", json={"content": content, "id": number}).status_code == 200
            kept = client.get("/sessions/a").json()["messages"]
            assert [item["content"] for item in kept] == expected


def test_a_question_whose_answer_did_not_arrive_stands_once(tmp_path: Path) -> None:
    """It was complete and kept, and its client was away: a retry with the same id takes its place."""
    service = service_of(tmp_path, fake_model("One.", "Two.", "Three.", "Four."))
    sessions = SessionEndpoints(service, BodyReader(Validator(openapi()), 1 << 20, 5))
    with TestClient(known(Starlette(routes=sessions.routes()))) as client:
        for content, number, expected in (
            ("Q", "q", ["Q", "One."]),
            ("Q", "q", ["Q", "Two."]),
            ("Q", "r", ["Q", "Two.", "Q", "Three."]),
            ("R", "r", ["Q", "Two.", "Q", "Three.", "R", "Four."]),
        ):
            assert client.post("/sessions/a/messages", json={"content": content, "id": number}).status_code == 200
            kept = client.get("/sessions/a").json()["messages"]
            assert [item["content"] for item in kept] == expected


@pytest.mark.parametrize("size", [10, 2 * LARGE])
def test_no_session_is_read_or_written_in_the_event_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
) -> None:
    """However small: a disk can take its time for a byte."""
    store = SessionStore(tmp_path / "sessions", 1 << 22, 100)
    threads: list[int] = []

    def noting(work: Any) -> Any:
        def noted(*args: Any) -> Any:
            threads.append(threading.get_ident())
            return work(*args)

        return noted

    for name in ("read", "write", "delete"):
        monkeypatch.setattr(store, name, noting(getattr(store, name)))
    messages = [{"role": "user", "content": "a" * size}, {"role": "assistant", "content": "b"}]
    body = {"conversation": {"schema": "rkedge-conversation/1", "messages": messages}}
    with TestClient(known(Starlette(routes=sessions_of(store).routes()))) as client:
        assert client.put("/sessions/a", json=body).status_code == 200
        assert client.get("/sessions/a").json()["messages"] == messages
        assert client.delete("/sessions/a").status_code == 200
    assert len(threads) == 3
    assert LOOP[0] not in threads


def test_files_have_one_writer_and_nobody_waits_for_it(tmp_path: Path) -> None:
    """A disk that takes its time, and clients of many sessions that come, go away and stop the daemon."""
    store = SessionStore(tmp_path / "sessions", 1 << 24, 1000)
    writing, most, done, left = [0], [0], [], threading.Event()
    write = store.write

    def slowly(user: User, name: str, data: Any) -> None:
        writing[0] += 1
        most[0] = max(most[0], writing[0])
        left.wait(60)
        time.sleep(0.01)
        write(user, name, data)
        done.append((name, data["system"]))
        writing[0] -= 1

    async def change(name: str, number: int) -> None:
        await on_disk(slowly, User("ann"), name, {"system": number})

    async def main() -> float:
        """How long the loop stood still at most."""
        tasks = [asyncio.create_task(change(f"s{at % 5}", at)) for at in range(40)]
        await asyncio.sleep(0.02)
        longest, last = 0.0, time.monotonic()
        for at, task in enumerate(tasks):
            # Also more than once: a client that leaves, and then the daemon's end.
            for _ in range(at % 4):
                task.cancel()
                await asyncio.sleep(0)
            longest, last = max(longest, time.monotonic() - last), time.monotonic()
        left.set()
        await asyncio.gather(*tasks, return_exceptions=True)
        assert [task.cancelled() for task in tasks] == [at % 4 > 0 for at in range(40)]
        return longest

    assert asyncio.run(main()) < 5
    assert most == [1]
    assert done == [(f"s{at % 5}", at) for at in range(40)]
    assert {name: store.read(User("ann"), name)["system"] for name, _ in done} == {f"s{at % 5}": at for at in range(40)}


def test_changes_of_a_session_do_not_overtake_each_other(tmp_path: Path) -> None:
    store = SessionStore(tmp_path / "sessions", 1 << 22, 100)
    user, sessions = User("ann"), sessions_of(store)
    store.write(user, "a", {"schema": "rkedge-conversation/1", "system": "", "messages": []})
    slow, read = threading.Event(), store.read

    def reading(*args: Any) -> dict[str, Any]:
        data = read(*args)
        slow.wait(0.3)
        return data

    store.read = reading  # type: ignore[method-assign]
    store.size = lambda *_: LARGE  # type: ignore[method-assign]
    with TestClient(known(Starlette(routes=sessions.routes()))) as client:
        first = threading.Thread(target=client.put, args=("/sessions/a",), kwargs={"json": {"system": "old"}})
        first.start()
        time.sleep(0.1)
        assert client.delete("/sessions/a").status_code == 200
        first.join()
    assert store.list(user) == []


def test_two_at_a_time_work_on_large_data() -> None:
    running, most = [0], [0]
    lock = threading.Lock()

    def work() -> None:
        with lock:
            running[0] += 1
            most[0] = max(most[0], running[0])
        time.sleep(0.02)
        with lock:
            running[0] -= 1

    async def main() -> None:
        await asyncio.gather(*(with_data(LARGE, work) for _ in range(12)))

    asyncio.run(main())
    assert most == [2]


def test_a_login_name_is_looked_up_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def look_up(uid: int) -> str:
        asked.append(uid)
        time.sleep(0.05)
        return f"user{uid}"

    monkeypatch.setattr(doors, "login_name", look_up)
    with socket.socket(socket.AF_UNIX) as listener:
        door = doors.UnixDoor(listener)

        async def main() -> list[User]:
            users = [door.user(uid, Headers()) for uid in (1, 2) * 20]
            return [*await asyncio.gather(*users), await door.user(1, Headers())]

        assert {user.account for user in asyncio.run(main())} == {"user1", "user2"}
    assert sorted(asked) == [1, 2]


def test_a_manifest_is_parsed_again_when_it_has_changed(bundles: dict[str, Path], tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    shutil.copytree(bundles["base"], bundle)
    first = _read_manifest(bundle)
    assert _read_manifest(bundle) is first
    manifest = bundle / "rkedge.yaml"
    manifest.write_text(manifest.read_text().replace(f"name: {first.name}", "name: other"))
    assert _read_manifest(bundle).name == "other"
    manifest.unlink()
    with pytest.raises(BundleError):
        _read_manifest(bundle)


def named(name: str) -> Any:
    model = fake_model("Yes.", "Yes.", "Yes.", max_context=100 * len(name))
    model.bundle = replace(model.bundle, manifest=replace(model.bundle.manifest, name=name))
    return model


def service_of(folder: Path, model: Any) -> Service:
    settings = Settings(sessions=Sessions(folder / "s"), prompt_cache=PromptCache(folder / "c"))
    return Service(settings, Host(settings, lambda *_: model))


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "Why?"}]}),
        ("/api/chat", {"model": "x", "messages": [{"role": "user", "content": "Why?"}]}),
        ("/api/chat", {"model": "x", "messages": []}),
        ("/api/generate", {"model": "x", "prompt": "Why?"}),
        ("/sessions/a/messages", {"content": "Why?"}),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_names_the_model_that_gave_it(tmp_path: Path, path: str, body: Any, stream: bool) -> None:
    """Whatever is loaded by the time its client hears of it."""
    first, second = named("first"), named("second, which is longer")
    service = service_of(tmp_path, first)
    model = service.host.model

    async def model_and_then_another() -> Any:
        found = await model()
        service.host._model, service.host.name = second, "second"
        return found

    service.host.model = model_and_then_another  # type: ignore[method-assign]
    bodies = BodyReader(Validator(openapi()), 1 << 20, 5)
    apis = [kind(service, bodies).routes() for kind in (OpenAIEndpoints, OllamaEndpoints, SessionEndpoints)]
    with TestClient(known(Starlette(routes=[route for each in apis for route in each]))) as client:
        answer = client.post(path, json=body | ({} if "sessions" in path else {"stream": stream}))
    assert answer.status_code == 200, answer.text
    assert "second" not in answer.text
    assert ('"max_context":500}' if "sessions" in path else '"first"') in answer.text


def test_vectors_of_two_models_are_not_one_answer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        service = service_of(tmp_path, named("first"))

        async def tokens_of(model: Any, *_: object) -> tuple[list[int], bool]:
            return [2], True

        async def vector_of(model: Any, _: object) -> bytes:
            service.host._model = after
            return b"1234"

        monkeypatch.setattr(service, "_tokens_of", tokens_of)
        monkeypatch.setattr(service, "_vector_of", vector_of)
        after = named("first")
        result = await service.embed(["a", "b"], ("ann", "", ""), lambda _: None)
        assert result[:3] == ([b"1234"] * 2, 2, "first")
        after = named("second")
        with pytest.raises(ServiceError, match="stopped before its end"):
            await service.embed(["a", "b"], ("ann", "", ""), lambda _: None)

    asyncio.run(main())


def test_a_run_that_is_stopped_before_its_first_step_has_an_end() -> None:
    async def work(run: Run) -> None:
        raise AssertionError

    async def main() -> None:
        run = Run(work)
        await run.close()
        with pytest.raises(ServiceError, match="stopped before its end"):
            await asyncio.wait_for(run.take(), 20)

    asyncio.run(main())
