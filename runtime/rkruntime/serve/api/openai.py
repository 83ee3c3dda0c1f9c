"""OpenAI's interface: /v1/chat/completions, /v1/completions, /v1/embeddings, /v1/models."""

from __future__ import annotations

import base64
import json
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from json.encoder import encode_basestring
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from rkruntime.errors import BodyError
from rkruntime.serve.api.generate import (
    AnswerStream,
    StartedRun,
    WholeChat,
    collect,
    embedded,
    emulated_header,
    generation_request,
    numbers,
    refuse_tools,
    started_run,
    text_of,
    text_prompt,
)
from rkruntime.serve.api.http import (
    BodyReader,
    error_body,
    json_response,
    refuse_together,
    routes,
)
from rkruntime.serve.run import GenerationRequest, Outcome
from rkruntime.serve.service import Service
from rkruntime.serve.threads import read_in_thread, with_data
from rkruntime.text.template import Message

_DONE: Final = b"data: [DONE]\n\n"
_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode


def _event(data: str) -> bytes:
    return f"data: {data}\n\n".encode("utf-8", "replace")


def _failed(error: Exception) -> bytes:
    return _event(_encode(error_body(error, "openai")))


def _usage(outcome: Outcome) -> dict[str, Any]:
    prompt, generated = outcome.answer.prompt_tokens, len(outcome.answer.tokens)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
        "prompt_tokens_details": {"cached_tokens": outcome.reused},
    }


class _Chunks:
    """The events of one streamed answer.

    The part that events share is encoded once: in a stream of short texts, it is most of the bytes.
    """

    def __init__(self, started: StartedRun, *, chat: bool, usage: bool) -> None:
        self._started = started
        self._chat = chat
        self._with_usage = usage
        self._head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": "chat.completion.chunk" if chat else "text_completion",
            "created": int(time.time()),
            "model": started.start.model.bundle.manifest.name,
        }
        notes = started.start.notes
        self._notes = {"rkedge": {"notes": notes}} if notes else {}
        before, after = _encode(self._with([self._choice("\0", None)])).split('"\\u0000"')
        self._before, self._after = f"data: {before}".encode("utf-8", "replace"), f"{after}\n\n".encode()

    def _with(self, choices: Sequence[Any], **more: Any) -> dict[str, Any]:
        return {**self._head, "choices": choices, **more}

    def _choice(self, text: str | None, reason: str | None, **delta: Any) -> dict[str, Any]:
        if not self._chat:
            return {"index": 0, "text": text or "", "logprobs": None, "finish_reason": reason}
        content = {} if text is None else {"content": text}
        return {"index": 0, "delta": {**delta, **content}, "logprobs": None, "finish_reason": reason}

    def opening(self) -> bytes:
        """Return the event before the text."""
        if not self._chat:
            return b""
        return _event(_encode(self._with([self._choice("", None, role="assistant")], **self._notes)))

    def event(self, text: str) -> bytes:
        """Return the event for a part of the text."""
        return self._before + encode_basestring(text).encode("utf-8", "replace") + self._after

    def end(self, outcome: Outcome) -> bytes:
        """Return the last events: why the answer ended, and its usage if asked for."""
        last = _event(_encode(self._with([self._choice(None, outcome.answer.reason.value)])))
        usage = _event(_encode(self._with([], usage=_usage(outcome)))) if self._with_usage else b""
        return last + usage + _DONE

    def whole(self, outcome: Outcome) -> dict[str, Any]:
        """Return the response to a request without `stream`."""
        answer = outcome.answer
        choice: dict[str, Any] = {"index": 0, "logprobs": None, "finish_reason": answer.reason.value}
        if self._chat:
            self._head["object"] = "chat.completion"
            choice["message"] = {"role": "assistant", "content": answer.text}
        else:
            choice["text"] = answer.text
        return self._with([choice], usage=_usage(outcome), **self._notes)


class OpenAIEndpoints:
    """The endpoints of OpenAI's interface."""

    def __init__(self, service: Service, bodies: BodyReader) -> None:
        self._service = service
        self._bodies = bodies

    def routes(self) -> list[Route]:
        """Return the routes for the application."""
        return routes(
            "openai",
            ("POST", "/v1/chat/completions", self._chat),
            ("POST", "/v1/completions", self._complete),
            ("POST", "/v1/embeddings", self._embed),
            ("GET", "/v1/models", self._models),
            ("GET", "/v1/models/{model:path}", self._model),
        )

    async def _chat(self, request: Request) -> Response:
        body = await self._bodies.read(request, "ChatRequest")
        refuse_tools(body, request, self._service)
        roles = {"developer": "system"}
        messages = [
            Message(roles.get(item["role"], item["role"]), text_of(item["content"])) for item in body["messages"]
        ]
        chat = WholeChat(request, self._service, messages, drop=bool(body.get("drop_oldest")))
        limit = body.get("max_completion_tokens") or body.get("max_tokens")
        if body.get("max_tokens", limit) != limit:
            refuse_together(body, "max_completion_tokens", "max_tokens")
        wanted = generation_request(request, chat.prompt, body, limit, chat.save)
        return await self._answer(request, body, wanted, chat=True)

    async def _complete(self, request: Request) -> Response:
        body = await self._bodies.read(request, "CompletionRequest")
        given = body["prompt"]
        prompt = text_prompt(given if isinstance(given, str) else given[0])
        # OpenAI's own default, which clients of this older interface rely on.
        wanted = generation_request(request, prompt, body, body.get("max_tokens", 16))
        return await self._answer(request, body, wanted, chat=False)

    async def _answer(self, request: Request, body: Any, wanted: GenerationRequest, *, chat: bool) -> Response:
        started = await started_run(request, self._service.start(wanted))
        usage = bool(body.get("stream_options", {}).get("include_usage"))
        chunks = _Chunks(started, chat=chat, usage=usage)
        if not body.get("stream") and "stream_options" in body:
            request.scope["rkedge.ignored"].add("stream_options")
        if body.get("stream"):
            return AnswerStream(
                started,
                "text/event-stream",
                chunks.event,
                chunks.end,
                opening=chunks.opening(),
                failed=_failed,
                close=started.run.close,
            )
        return await self._whole(chunks, await collect(request, started), started.headers)

    async def _whole(self, chunks: _Chunks, outcome: Outcome, headers: Mapping[str, str]) -> Response:
        size = len(outcome.answer.text)
        return await with_data(size, lambda: json_response(chunks.whole(outcome), headers=headers))

    async def _embed(self, request: Request) -> Response:
        body = await self._bodies.read(request, "EmbeddingRequest")
        texts = [body["input"]] if isinstance(body["input"], str) else body["input"]
        found = await embedded(request, self._service, body, texts)
        shown = _base64 if body.get("encoding_format") == "base64" else numbers
        end = {"model": found.model, "usage": {"prompt_tokens": found.tokens, "total_tokens": found.tokens}}
        content = await read_in_thread(_embeddings, found.vectors, shown, end)
        return Response(content, headers=emulated_header(found.emulated), media_type="application/json")

    def _card(self) -> dict[str, Any]:
        model = self._service.host.current
        created = int(model.loaded_at) if model else int(time.time())
        return {"id": self._service.name, "object": "model", "created": created, "owned_by": "rkedge"}

    async def _models(self, request: Request) -> Response:
        return json_response({"object": "list", "data": [self._card()]})

    async def _model(self, request: Request) -> Response:
        if request.path_params["model"] not in (self._service.name, f"{self._service.name}:latest"):
            raise BodyError(
                f"There is no model {request.path_params['model'][:80]!r}; this daemon has {self._service.name!r}.",
                details={"status": 404, "param": "model", "code": "model_not_found"},
            )
        return json_response(self._card())


def _embeddings(vectors: Sequence[bytes], shown: Callable[[bytes], Any], end: Mapping[str, Any]) -> bytes:
    """Encode the response vector by vector, since no other thread runs while a piece of JSON is encoded."""
    data = ",".join(
        _encode({"object": "embedding", "index": at, "embedding": shown(vector)}) for at, vector in enumerate(vectors)
    )
    return f'{{"object":"list","data":[{data}],{_encode(end)[1:]}'.encode()


def _base64(vector: bytes) -> str:
    return base64.b64encode(vector).decode()
