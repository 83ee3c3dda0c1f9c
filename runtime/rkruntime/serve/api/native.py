"""The daemon's own interface: conversations that it keeps. `rkedge chat user@board` and the page use it.

If the client disconnects, the partial answer is kept. The client may come back and have it continued, or ask something
else, which leaves the partial answer as it is.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from typing import Any, Final, NamedTuple
from weakref import WeakValueDictionary

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from rkruntime.errors import BodyError, InputError, NoSuchSessionError, UsageError
from rkruntime.model import Model
from rkruntime.serve.api.generate import (
    AnswerStream,
    StartedRun,
    client_of,
    dropping_notes,
    generation_request,
    started_run,
    stops,
)
from rkruntime.serve.api.http import (
    BodyReader,
    Stream,
    error_body,
    json_response,
    refuse_together,
    routes,
    while_connected,
)
from rkruntime.serve.api.last_answer import (
    Received,
    age,
    answer_options,
    changed_elsewhere,
    check_after,
    checked,
    moment,
    with_broken,
    without_answer_to,
)
from rkruntime.serve.cancel import time_limit
from rkruntime.serve.run import Outcome, Prompt, Run
from rkruntime.serve.service import Service
from rkruntime.serve.sessions import damaged
from rkruntime.serve.threads import on_disk, read_in_thread
from rkruntime.serve.users import User, check_name
from rkruntime.text.answer import Answer, AnswerReader
from rkruntime.text.conversation import SCHEMA, Conversation, check_conversation
from rkruntime.text.template import Message

# Seconds in which the daemon notices that a client is gone; the client may have come back to ask something else.
_GOING_S: Final = 0.5
# Most seconds that a read of a conversation waits while a stopped answer is being added to it.
_KEEPING_S: Final = 3.0

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def _line(kind: str, **values: Any) -> bytes:
    return (_encode({"type": kind, **values}) + "\n").encode("utf-8", "replace")


@dataclass(frozen=True)
class _Place:
    """A session: its user and its name."""

    user: User
    name: str

    @classmethod
    def of(cls, request: Request) -> _Place:
        return cls(request.scope["rkedge.user"], check_name(request.path_params["name"], "session"))


@dataclass
class _Turn:
    """A question to a session, in progress.

    Attributes:
        data: The session as it was stored.
        number: The name that the client gave the answer.
        drop: Drop the oldest turns if the context has no room for them.
        begun: Ids of the answer that is resumed; only the model that generated them can continue it.
        received: What the client has received of that answer.
        made_by: Fingerprint of a model (see Manifest): first the one behind `begun`, then the one that answers.
        conversation: Set when the prompt is made.
        dropped: Turns that the prompt had no room for.
    """

    data: Mapping[str, Any]
    question: str
    number: str
    options: Mapping[str, Any]
    drop: bool = False
    begun: tuple[int, ...] = ()
    received: Received = field(default_factory=Received)
    made_by: str = ""
    conversation: Conversation | None = None
    dropped: int = 0

    def prompt(self, model: Model) -> Prompt:
        fingerprint = model.bundle.manifest.fingerprint
        if self.begun and self.made_by != fingerprint:
            raise NoSuchSessionError("That answer was begun by another model.", hint="Ask again.")
        if max(self.begun, default=0) >= model.prompts.vocabulary.vocab_size:
            raise NoSuchSessionError("What is kept of that answer is not from this model.", hint="Ask again.")
        # Checked before the run, whose tokens would be kept and then taken for what the client has received.
        self.received.check(AnswerReader(model.prompts.vocabulary, 0, stops(self.options), self.begun).text)
        self.made_by = fingerprint
        conversation = Conversation(model.prompts)
        conversation.restore(self.data if self.begun else with_broken(self.data))
        # Made as for the question's first run: the same turns must precede a resumed answer.
        context = model.engine.info.max_context
        tokens, self.dropped = conversation.prompt(self.question, context, drop=self.drop)
        self.conversation = conversation
        return Prompt([*tokens, *self.begun], self.begun, dropping_notes(self.dropped))

    def kept(self, answer: Answer, whole: bool) -> dict[str, Any] | None:
        """Return the session after the answer; None if that ended before its first token: the client asks again."""
        assert self.conversation is not None
        if whole:
            self.conversation.add(self.question, answer, self.dropped)
            return {**self.conversation.as_dict(), "number": self.number, "reason": answer.reason.value}
        if not answer.tokens:
            return None
        broken = {
            "question": self.question,
            "text": answer.text,
            "tokens": list(answer.tokens),
            "model": self.made_by,
            "drop": self.drop,
            "options": dict(self.options),
            **moment(),
        }
        return {**self.conversation.as_dict(), "number": self.number, "broken": broken}


class _Current(NamedTuple):
    """A run that answers in a session, and the client's name for its answer."""

    run: Run
    number: str


def _update(body: dict[str, Any]) -> dict[str, Any]:
    """Return the body of a change, with its `conversation` reduced to known fields. Raises BodyError."""
    refuse_together(body, "clear", "conversation")
    if "conversation" not in body:
        return body
    try:
        conversation = check_conversation(body["conversation"])
    except InputError as error:
        raise _not_a_conversation(error.message) from error
    roles = [item["role"] for item in conversation["messages"]]
    if roles != ["user", "assistant"] * (len(roles) // 2):
        raise _not_a_conversation("The messages of a conversation must be from user and assistant in turn.")
    return {**body, "conversation": conversation}


def _not_a_conversation(what: str) -> BodyError:
    return BodyError(what, details={"param": "conversation"})


class SessionEndpoints:
    """The endpoints of /sessions."""

    def __init__(self, service: Service, bodies: BodyReader) -> None:
        self._service = service
        self._store = service.sessions
        self._bodies = bodies
        self._runs: dict[_Place, _Current] = {}
        self._locks: WeakValueDictionary[_Place, asyncio.Lock] = WeakValueDictionary()

    def routes(self) -> list[Route]:
        """Return the routes for the application."""
        return routes(
            "openai",
            ("GET", "/sessions", self._list),
            ("GET", "/sessions/{name}", self._read),
            ("PUT", "/sessions/{name}", self._change),
            ("DELETE", "/sessions/{name}", self._delete),
            ("POST", "/sessions/{name}/messages", self._ask),
            ("POST", "/sessions/{name}/resume", self._resume),
        )

    async def _list(self, request: Request) -> Response:
        return await read_in_thread(self._listed, request.scope["rkedge.user"])

    def _listed(self, user: User) -> Response:
        return json_response({"sessions": [asdict(item) for item in self._store.titled(user)]})

    def _order(self, place: _Place) -> asyncio.Lock:
        """Return the lock to hold while a session is read and changed, since large sessions are read in a thread."""
        return self._locks.setdefault(place, asyncio.Lock())

    async def _read(self, request: Request) -> Response:
        place = _Place.of(request)
        if (current := self._runs.get(place)) and current.run.closing.is_set():
            # A stopped answer is being kept; wait for it, but not for a library that hangs.
            await asyncio.wait([asyncio.ensure_future(current.run.close())], timeout=_KEEPING_S)
        request.scope["rkedge.held"].at_least(self._store.size(place.user, place.name))
        return await read_in_thread(lambda: json_response(with_broken(self._stored(place))))

    async def _delete(self, request: Request) -> Response:
        place = _Place.of(request)
        async with self._order(place):
            await self._take_over(place)
            await on_disk(self._store.delete, place.user, place.name)
        return json_response({"deleted": place.name})

    async def _change(self, request: Request) -> Response:
        place = _Place.of(request)
        body = await self._bodies.read(request, "SessionUpdate", _update)
        async with self._order(place):
            await self._check_idle(place, body)
            await self._take_over(place)
            if "conversation" in body:
                await while_connected(request, self._check_template(request, body))
            await on_disk(self._write_changed, place, body)
        return json_response({"changed": place.name})

    async def _check_template(self, request: Request, body: Mapping[str, Any]) -> None:
        """Raise BodyError if the loaded model's template refuses the conversation."""
        conversation = body["conversation"]
        turns = [(item["role"], item["content"]) for item in conversation["messages"]]
        if system := body.get("system", conversation["system"]):
            turns.insert(0, ("system", system))
        try:
            await self._service.check([Message(*turn) for turn in (*turns, ("user", ""))], client_of(request, body))
        except UsageError as error:
            raise _not_a_conversation(error.message) from error

    def _write_changed(self, place: _Place, body: Mapping[str, Any]) -> None:
        if "after" in body:
            check_after(self._data(place), body)
        stored = None if "conversation" in body else self._data(place)
        data = body["conversation"] if stored is None else stored
        system = body.get("system", data["system"])
        # The daemon's own notes are not taken from a client, and are dropped together with the turns.
        # An answer that was begun under another system prompt is not resumed.
        other = "broken" in data and system != data["system"]
        own = () if "conversation" in body or body.get("clear") or other else ("number", "reason", "broken")
        kept = check_conversation(with_broken(data) if other else data)
        kept |= {key: data[key] for key in own if key in data} | {"system": system}
        if body.get("clear"):
            kept["messages"] = []
        if kept != stored:  # clearing a session that does not exist changes nothing
            self._store.write(place.user, place.name, kept)

    def _data(self, place: _Place) -> dict[str, Any]:
        try:
            return self._stored(place)
        except NoSuchSessionError:
            return {"schema": SCHEMA, "system": "", "messages": []}

    def _stored(self, place: _Place) -> dict[str, Any]:
        """Read and check a session. Raises NoSuchSessionError, or HostError for a file that cannot be read."""
        stored = self._store.read(place.user, place.name)
        try:
            return {**checked(stored, self._bodies), **check_conversation(stored)}
        except InputError as error:
            raise damaged(place.name, error.message.rstrip(".")) from error

    async def _take_over(self, place: _Place) -> None:
        """End a session's current answer: there is one at a time, so a new request, on any connection, ends it."""
        current = self._runs.pop(place, None)
        if current is not None:
            await current.run.close()

    async def _check_idle(self, place: _Place, body: Mapping[str, Any]) -> None:
        """Raise BodyError if an answer that this client does not know of is being written."""
        current = self._runs.get(place)
        if current and "after" in body and current.number not in (body["after"], body.get("id")):
            with suppress(TimeoutError), time_limit(_GOING_S, TimeoutError):
                await current.run.closing.wait()
                return  # the session as it is kept decides
            raise changed_elsewhere()

    async def _ask(self, request: Request) -> Response:
        place = _Place.of(request)
        body = await self._bodies.read(request, "SessionMessage")
        drop = bool(body.get("drop_oldest"))
        async with self._order(place):
            await self._check_idle(place, body)
            await self._take_over(place)
            question, number = body["content"], body.get("id", "")
            stored = await read_in_thread(self._data, place)
            check_after(stored, body)
            data = without_answer_to(stored, question, number)
            run = self._start(request, place, _Turn(data, question, number, answer_options(body), drop))
        return await self._answer(request, place, run, 0)

    async def _resume(self, request: Request) -> Response:
        place = _Place.of(request)
        body = await self._bodies.read(request, "SessionResume")
        received = Received(body.get("received", 0), body.get("sha256", ""))
        async with self._order(place):
            await self._take_over(place)
            data = await read_in_thread(self._stored, place)
            self._check_answer(place, data, body["id"])
            if "broken" not in data:
                received.check(data["messages"][-1]["content"])
                return Stream(_rest(data, received), "application/x-ndjson", failed=_failed)
            run = self._start(request, place, self._broken(data, received))
        return await self._answer(request, place, run, received.characters)

    def _check_answer(self, place: _Place, data: Mapping[str, Any], number: str) -> None:
        """Raise NoSuchSessionError unless the session's last answer, partial or complete, has this name."""
        if (
            not number
            or data.get("number") != number
            or not ("broken" in data or ("reason" in data and data["messages"]))
        ):
            raise NoSuchSessionError(
                f"The session {place.name!r} has no answer {number!r} to resume.", hint="Ask again."
            )

    def _broken(self, data: Mapping[str, Any], received: Received) -> _Turn:
        """Return the turn that resumes a partial answer. Raises NoSuchSessionError."""
        broken = data["broken"]
        if age(broken) > self._service.settings.sessions.resume_s:
            raise NoSuchSessionError("That answer was interrupted too long ago to resume.", hint="Ask again.")
        begun = tuple(broken["tokens"])
        options, drop = broken["options"], broken.get("drop", False)
        return _Turn(data, broken["question"], data["number"], options, drop, begun, received, broken["model"])

    def _start(self, request: Request, place: _Place, turn: _Turn) -> Run:
        async def save(answer: Answer, whole: bool) -> None:
            await on_disk(self._save, place, turn, answer, whole)

        wanted = generation_request(request, turn.prompt, turn.options, turn.options.get("max_tokens"), save)
        # Registered at once, while it still waits for its turn.
        run = self._service.start(wanted)
        self._runs[place] = _Current(run, turn.number)
        return run

    def _save(self, place: _Place, turn: _Turn, answer: Answer, whole: bool) -> None:
        data = turn.kept(answer, whole)
        if data is not None:
            self._store.write(place.user, place.name, data)

    async def _answer(self, request: Request, place: _Place, run: Run, received: int) -> Response:
        async def close() -> None:
            # The run stays registered, so that requests that arrive meanwhile wait for it too and find what was kept.
            await run.close()
            if (current := self._runs.get(place)) and current.run is run:
                del self._runs[place]

        try:
            started = await started_run(request, run)
        except BaseException:  # A client that leaves cancels this task; the session must not keep the run.
            await close()
            raise
        opening = _opening(started, received, request.scope["rkedge.ignored"].names)
        return AnswerStream(started, "application/x-ndjson", _text, _done, opening=opening, failed=_failed, close=close)


def _failed(error: Exception) -> bytes:
    return _line("error", **error_body(error, "openai"))


def _text(text: str) -> bytes:
    return _line("text", text=text)


def _opening(started: StartedRun, received: int, ignored: list[str]) -> bytes:
    """Return what is sent before new text: the begin event, and earlier text that the client does not have."""
    info = started.start.model.engine.info
    begin = _line(
        "begin",
        notes=started.start.notes,
        ignored=ignored,
        emulated=info.emulated,
        max_context=info.max_context,
    )
    late = started.start.text[received:]
    return begin + (_text(late) if late else b"")


def _done(outcome: Outcome) -> bytes:
    answer = outcome.answer
    return _line(
        "done",
        reason=answer.reason.value,
        prompt_tokens=answer.prompt_tokens,
        reused_tokens=outcome.reused,
        tokens=len(answer.tokens),
        queue_s=outcome.queue_s,
        first_token_s=outcome.queue_s + outcome.prefill_s,
        tokens_per_s=answer.rate(outcome.prefill_s, outcome.total_s),
    )


async def _rest(data: Mapping[str, Any], received: Received) -> AsyncGenerator[bytes, None]:
    """Yield the rest of an answer that was finished while its client was away."""
    if text := data["messages"][-1]["content"][received.characters :]:
        yield _line("text", text=text)
    yield _line("done", reason=data["reason"])
