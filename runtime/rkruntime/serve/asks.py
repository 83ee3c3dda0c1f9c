"""What the interfaces share: a request's fields to an Ask, and an answer's items to one answer or to a stream."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from starlette.requests import Request

from rkruntime.conversation import Conversation
from rkruntime.errors import RKEdgeError, ServiceError
from rkruntime.generation import FinishReason
from rkruntime.serve.host import Model
from rkruntime.serve.http import while_connected
from rkruntime.serve.service import Ask, Begin, Item, Outcome, Prompt, Service
from rkruntime.template import Message

IGNORED_HEADER: Final = "X-RKEdge-Ignored"
EMULATED_HEADER: Final = "X-RKEdge-Emulated"
_SAMPLING: Final = ("temperature", "top_p", "top_k", "repeat_penalty", "frequency_penalty", "presence_penalty")


@dataclass(frozen=True)
class Begun:
    """A stream whose first items are there, so that its status is known."""

    begin: Begin
    model: Model
    first: list[Item]
    rest: AsyncGenerator[list[Item], None]

    @property
    def headers(self) -> dict[str, str]:
        """What a client should know before the answer."""
        headers = {EMULATED_HEADER: "1"} if self.model.engine.info.emulated else {}
        return {**headers, IGNORED_HEADER: ", ".join(self.begin.ignored)} if self.begin.ignored else headers


def text_of(content: Any) -> str:
    """A message's content, given as a text or as a list of text parts."""
    return content if isinstance(content, str) else "".join(part["text"] for part in content or ())


def ask_of(
    request: Request, prompt: Callable[[Model], Prompt], body: Mapping[str, Any], max_new_tokens: int | None
) -> Ask:
    """An Ask with the fields that all interfaces name alike."""
    stop = body.get("stop") or ()
    client = f"{request.scope['rkedge.client']}/{body.get('user') or ''}"
    return Ask(
        prompt=prompt,
        client=client,
        request_id=request.scope["rkedge.id"],
        max_new_tokens=max_new_tokens,
        stop=(stop,) if isinstance(stop, str) else tuple(filter(None, stop)),
        sampling={name: body.get(name) for name in _SAMPLING},
    )


def chat_prompt(service: Service, messages: Sequence[Message], *, drop: bool = False) -> Callable[[Model], Prompt]:
    """The prompt of a whole conversation, with the ids of those answers that this daemon gave."""

    def build(model: Model) -> Prompt:
        if not messages or messages[-1].role != "user":
            return Prompt(model.template.render(messages))
        system = messages[0].content if messages[0].role == "system" else ""
        turns = service.memory.recall(messages)[1 if messages[0].role == "system" else 0 : -1]
        conversation = Conversation(model.template, system, turns)
        tokens, dropped = conversation.fitting_prompt(messages[-1].content, model.engine.info.max_context, drop=drop)
        return Prompt(tokens, notes=(f"{dropped} oldest turns were dropped",) if dropped else ())

    return build


def text_prompt(text: str) -> Callable[[Model], Prompt]:
    """The prompt of a plain text: `<bos>` and its tokens, no template."""

    def build(model: Model) -> Prompt:
        return Prompt([model.bundle.manifest.bos_token_id, *model.tokenizer.encode(text)])

    return build


async def begin(request: Request, service: Service, ask: Ask) -> Begun:
    """Wait for the first items.

    Raises:
        RKEdgeError: the request is refused, or failed before it said anything.
        ClientDisconnect: the client is gone; the run is cancelled.
    """
    stream = service.stream(ask)
    try:
        first = await while_connected(request, stream.__anext__())
    except BaseException:
        await stream.aclose()
        raise
    model = service.host.current
    if not isinstance(first[0], Begin) or model is None:
        await stream.aclose()
        raise ServiceError("The model went away as the answer began.", details={"retry_after_s": 1})
    return Begun(first[0], model, first[1:], stream)


async def items(begun: Begun) -> AsyncGenerator[list[Item], None]:
    """All items from the first on. Closing it early stops the run."""
    try:
        yield begun.first
        async for batch in begun.rest:
            yield batch
    finally:
        await begun.rest.aclose()


async def collect(request: Request, begun: Begun) -> Outcome:
    """The end of the answer.

    Raises:
        RKEdgeError: the run failed.
        ClientDisconnect: the client is gone; the run is cancelled.
    """

    async def last() -> Outcome:
        async for batch in items(begun):
            if batch and isinstance(batch[-1], Outcome):
                return batch[-1]
        raise ServiceError("The answer has no end.")

    try:
        return complete(await while_connected(request, last()))
    finally:
        await begun.rest.aclose()


def complete(outcome: Outcome) -> Outcome:
    """`outcome` if the answer is whole. Raises ServiceError for one that something else stopped."""
    if outcome.answer.reason is FinishReason.ABORT:
        raise stopped()
    return outcome


def stopped() -> RKEdgeError:
    """An answer ended, and nobody who asked for it wanted that."""
    return ServiceError("The answer was stopped before its end.", hint="Ask again.", details={"retry_after_s": 1})


def split(batch: Sequence[Item]) -> tuple[str, Outcome | None]:
    """The text of a batch as one piece, and the outcome if it is there."""
    last = batch[-1] if batch and isinstance(batch[-1], Outcome) else None
    return "".join(item for item in batch if isinstance(item, str)), last
