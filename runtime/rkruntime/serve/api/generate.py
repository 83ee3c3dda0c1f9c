"""Code shared by the interfaces: make a GenerationRequest of a body, and an answer or a stream of a run's items."""

from __future__ import annotations

import struct
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from starlette.requests import Request
from starlette.types import Receive, Scope, Send

from rkruntime.engine.generation import PER_REQUEST
from rkruntime.errors import BodyError
from rkruntime.model import Model
from rkruntime.serve.api.http import Stream, while_connected
from rkruntime.serve.api.turns import alternating
from rkruntime.serve.connections import CONNECTION, Connection, Held
from rkruntime.serve.memory import AnswerMemory
from rkruntime.serve.queue import Client
from rkruntime.serve.run import GenerationRequest, Item, Outcome, Prompt, Run, SaveAnswer, Started, stopped
from rkruntime.serve.service import Embedded, Service
from rkruntime.serve.threads import LARGE
from rkruntime.serve.users import User
from rkruntime.text.answer import Answer
from rkruntime.text.conversation import Conversation
from rkruntime.text.template import Message, no_question
from rkruntime.threads import in_thread
from rkruntime.words import counted, dropped_turns

NOTES_HEADER: Final = "X-RKEdge-Notes"
EMULATED_HEADER: Final = "X-RKEdge-Emulated"
_NO_TOOLS: Final = "Leave them out. With `tools: ignore` in the daemon's settings, they are left out here."
# Most characters of a number's text per byte of its float.
_AS_TEXT: Final = 6


@dataclass(frozen=True)
class StartedRun:
    """A stream whose first items have arrived, so that its status is known."""

    start: Started
    first: list[Item]
    run: Run

    @property
    def headers(self) -> dict[str, str]:
        """Headers with facts that the client should have before the answer."""
        headers = emulated_header(self.start.model.engine.info.emulated)
        return {**headers, NOTES_HEADER: " ".join(self.start.notes)} if self.start.notes else headers


def emulated_header(emulated: bool) -> dict[str, str]:
    """Return the header that marks what an emulated runtime has computed."""
    return {EMULATED_HEADER: "1"} if emulated else {}


def text_of(content: Any) -> str:
    """Return a message's content, given as a string or as a list of text parts, as a string."""
    return content if isinstance(content, str) else "".join(part["text"] for part in content or ())


def client_of(request: Request, body: Mapping[str, Any]) -> Client:
    """Return the client whose turn a request takes; its `user` field only separates turns of this client."""
    return (*request.scope["rkedge.user"].path, str(body.get("user") or ""))


def stops(body: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the stop strings of a request, which has one, a list, or none."""
    stop = body.get("stop") or ()
    return (stop,) if isinstance(stop, str) else tuple(filter(None, stop))


def generation_request(
    request: Request,
    prompt: Callable[[Model], Prompt],
    body: Mapping[str, Any],
    max_new_tokens: int | None,
    save: SaveAnswer | None = None,
) -> GenerationRequest:
    """Make a GenerationRequest from the fields that all interfaces share."""
    return GenerationRequest(
        prompt=prompt,
        client=client_of(request, body),
        request_id=request.scope["rkedge.id"],
        max_new_tokens=max_new_tokens,
        stop=stops(body),
        sampling={name: body[name] for name in PER_REQUEST if name in body},
        save=save,
    )


def dropping_notes(dropped: int) -> tuple[str, ...]:
    """Return the note to a client that the context had no room for `dropped` turns; none for 0."""
    return (f"The context was full: {dropped_turns(dropped)}.",) if dropped else ()


class WholeChat:
    """A conversation that its client sends as a whole; this daemon's answers in it get their generated ids back.

    Args:
        drop: Drop the oldest turns if the context has no room for all.
    """

    def __init__(self, request: Request, service: Service, messages: Sequence[Message], *, drop: bool = False) -> None:
        self._user: User = request.scope["rkedge.user"]
        self._service, self._drop = service, drop
        self._messages = messages if service.settings.strict_roles else alternating(messages)
        self._memory: AnswerMemory | None = None

    def prompt(self, model: Model) -> Prompt:
        """See GenerationRequest."""
        messages = self._messages
        if not messages or messages[-1].role != "user":
            raise no_question(messages)
        self._memory = self._service.memory
        recalled = self._memory.recall(self._user, messages) if self._memory else list(messages)
        system = recalled.pop(0).content if messages[0].role == "system" else ""
        conversation = Conversation(model.prompts, system, recalled[:-1])
        tokens, dropped = conversation.prompt(messages[-1].content, model.engine.info.max_context, drop=self._drop)
        return Prompt(tokens, notes=dropping_notes(dropped))

    async def save(self, answer: Answer, whole: bool) -> None:
        """Remember the ids of a complete answer, as the client will send it back as text. See GenerationRequest."""
        if whole and self._memory:
            # The memory of the model that answered, as another model may be loaded by now.
            what = self._user, self._messages, answer.text, answer.tokens
            if sum(len(message.content) for message in self._messages) < LARGE:
                self._memory.remember(*what)
            else:
                await in_thread(self._memory.remember, *what)


def text_prompt(text: str) -> Callable[[Model], Prompt]:
    """Return a function that makes the prompt of a plain text: `<bos>` and its tokens, without a template."""

    def build(model: Model) -> Prompt:
        tokens = model.prompts.encode(text, model.engine.info.max_context)
        return Prompt([model.bundle.manifest.bos_token_id, *tokens])

    return build


async def started_run(request: Request, run: Run) -> StartedRun:
    """Wait for the first items of a run that was just started; the caller must close the run.

    Raises:
        RKEdgeError: The request was refused, or failed before its first item.
        ClientDisconnect: The client is gone; the run is stopped.
    """
    try:
        first = await while_connected(request, run.take())
        if not isinstance(first[0], Started):
            raise stopped()
    except BaseException:  # even a cancel: nobody else knows of the run
        await run.close()
        raise
    for name in first[0].ignored:
        request.scope["rkedge.ignored"].add(name)
    return StartedRun(first[0], first[1:], run)


async def items(started: StartedRun) -> AsyncGenerator[list[Item], None]:
    """Yield all items after the Started."""
    yield started.first
    while batch := await started.run.take():
        yield batch


async def collect(request: Request, started: StartedRun) -> Outcome:
    """Wait for the end of the answer.

    Raises:
        RKEdgeError: The run failed.
        ClientDisconnect: The client is gone; the run is stopped.
    """

    async def last() -> Outcome:
        outcome = None
        async for batch in items(started):
            outcome = batch[-1] if batch else None
        if not isinstance(outcome, Outcome):
            raise stopped()
        return outcome

    started.run.outlet = _Nowhere()
    try:
        return await while_connected(request, last())
    finally:
        await started.run.close()


async def embedded(
    request: Request, service: Service, body: Mapping[str, Any], texts: Sequence[str], *, cut: bool = False
) -> Embedded:
    """Return the vectors of texts, after counting the response's memory towards the user's."""
    held: Held = request.scope["rkedge.held"]
    client = client_of(request, body)
    vectors = service.embed(texts, client, lambda size: held.at_least(_AS_TEXT * size), cut=cut)
    return await while_connected(request, vectors)


def embedded_headers(found: Embedded) -> dict[str, str]:
    """Return headers with facts that the client should have about vectors."""
    note = f"The beginning stands for {counted(found.cut, 'text')} that the context had no room for."
    return {**emulated_header(found.emulated), **({NOTES_HEADER: note} if found.cut else {})}


def numbers(vector: bytes) -> Sequence[float]:
    """Return a vector's numbers."""
    return struct.unpack(f"<{len(vector) // 4}f", vector)


def refuse_tools(body: Mapping[str, Any], request: Request, service: Service) -> None:
    """Raise BodyError for a request with tools that the model may call, unless the settings have them ignored."""
    ignored = ("none", "auto", None) if service.settings.tools == "ignore" else ("none",)
    for name, choice in (("tools", "tool_choice"), ("functions", "function_call")):
        if body.get(name) and body.get(choice) in ignored:
            request.scope["rkedge.ignored"].add(name)
        elif body.get(name):
            raise BodyError(f"{name}: this model cannot call tools.", hint=_NO_TOOLS, details={"param": name})


class _Nowhere:
    """The outlet of an answer that is sent as a whole: it drops the texts, as the outcome has them all."""

    behind = False

    def push(self, _: list[str]) -> bool:
        return True


class _ToConnection:
    """The outlet of a stream: texts go to the client's connection."""

    def __init__(self, connection: Connection, event: Callable[[str], bytes]) -> None:
        self._connection, self._event = connection, event

    @property
    def behind(self) -> bool:
        return self._connection.behind

    def push(self, texts: list[str]) -> bool:
        return self._connection.push(b"".join(map(self._event, texts)))


class AnswerStream(Stream):
    """An answer as it comes: an event for each token, or one for all tokens that came while the client did not read.

    Args:
        opening: Bytes to send before the answer's text.
        event: Encodes a text.
        end: Encodes the end.
        failed, close: See Stream.
    """

    def __init__(
        self,
        started: StartedRun,
        media_type: str,
        event: Callable[[str], bytes],
        end: Callable[[Outcome], bytes],
        *,
        opening: bytes = b"",
        failed: Callable[[Exception], bytes],
        close: Callable[[], Awaitable[None]],
    ) -> None:
        super().__init__(self._parts(opening), media_type, started.headers, failed=failed, close=close)
        self._started, self._event, self._end = started, event, end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI. After the opening, texts go to the connection as they come."""
        connection: Connection | None = scope["state"].get(CONNECTION)
        if connection:
            self._started.run.outlet = _ToConnection(connection, self._event)
        await super().__call__(scope, receive, send)

    async def _parts(self, opening: bytes) -> AsyncGenerator[bytes, None]:
        async for batch in items(self._started):
            if part := opening + b"".join(map(self._encoded, batch)):
                yield part
            opening = b""

    def _encoded(self, item: Item) -> bytes:
        if isinstance(item, Outcome):
            return self._end(item)
        assert isinstance(item, str)
        return self._event(item)
