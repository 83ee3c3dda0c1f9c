"""Ollama's interface: /api/chat, /generate, /embed, /embeddings, /tags, /show, /ps, /version."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from rkruntime.bundle.manifest import MANIFEST, Manifest, open_bundle
from rkruntime.errors import UsageError
from rkruntime.model import Model
from rkruntime.serve.api.generate import (
    AnswerStream,
    StartedRun,
    WholeChat,
    client_of,
    collect,
    embedded,
    embedded_headers,
    emulated_header,
    generation_request,
    numbers,
    refuse_tools,
    started_run,
    text_prompt,
)
from rkruntime.serve.api.http import (
    BodyReader,
    error_body,
    json_response,
    refuse_together,
    routes,
    while_connected,
)
from rkruntime.serve.run import Outcome, Prompt, SaveAnswer
from rkruntime.serve.service import Service
from rkruntime.serve.threads import read_in_thread, with_data
from rkruntime.text.template import Message

_encode = json.JSONEncoder(ensure_ascii=False, separators=(",", ":")).encode
# A duration of nothing, as Go reads it, or a bare zero. Each repetition ends in a unit, so that there is one way to
# read a text: with several, a client's could keep the event loop busy for years.
_ZERO: Final = re.compile(r"(?:0+(?:\.0+)?(?:ns|us|ms|s|m|h))+|0+(?:\.0+)?")
# How a line carries an answer's text: in a message, or in its own field.
Shape = Callable[[str], dict[str, Any]]


def _as_message(text: str) -> dict[str, Any]:
    return {"message": {"role": "assistant", "content": text}}


def _as_response(text: str) -> dict[str, Any]:
    return {"response": text}


def _time(seconds: float | None = None) -> str:
    moment = datetime.fromtimestamp(time.time() if seconds is None else seconds, timezone.utc)
    return moment.isoformat().replace("+00:00", "Z")


def _nanoseconds(seconds: float) -> int:
    return max(0, int(seconds * 1e9))


def _failed(error: Exception) -> bytes:
    return (_encode(error_body(error, "ollama")) + "\n").encode("utf-8", "replace")


def _figures(outcome: Outcome) -> dict[str, Any]:
    answer = outcome.answer
    return {
        "done": True,
        "done_reason": answer.reason.value,
        "total_duration": _nanoseconds(outcome.queue_s + outcome.total_s),
        "load_duration": 0,
        "prompt_eval_count": answer.prompt_tokens,
        "prompt_eval_duration": _nanoseconds(outcome.prefill_s),
        "eval_count": len(answer.tokens),
        "eval_duration": _nanoseconds(outcome.total_s - outcome.prefill_s),
    }


def _line(model: Model, shape: Shape, text: str) -> dict[str, Any]:
    return {"model": model.bundle.manifest.name, "created_at": _time(), **shape(text), "done": False}


def _stream(started: StartedRun, shape: Shape) -> AnswerStream:
    model = started.start.model

    def event(text: str) -> bytes:
        return (_encode(_line(model, shape, text)) + "\n").encode("utf-8", "replace")

    def end(outcome: Outcome) -> bytes:
        return (_encode({**_line(model, shape, ""), **_figures(outcome)}) + "\n").encode()

    return AnswerStream(started, "application/x-ndjson", event, end, failed=_failed, close=started.run.close)


def _details(manifest: Manifest) -> dict[str, Any]:
    return {
        "parent_model": manifest.source.name,
        "format": "rkllm" if manifest.target == "toolkit" else "rkemu",
        "family": manifest.family,
        "families": [manifest.family],
        "parameter_size": manifest.size,
        "quantization_level": manifest.dtype,
    }


def _read_manifest(bundle: Path) -> Manifest:
    """The manifest of a bundle, parsed again only when its file has changed. Raises BundleError."""
    try:
        found = (bundle / MANIFEST).stat()
    except OSError:
        return open_bundle(bundle).manifest
    return _parsed(bundle, (found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns))


@lru_cache(maxsize=1)
def _parsed(bundle: Path, _state: tuple[int, ...]) -> Manifest:
    return open_bundle(bundle).manifest


def _vectors(vectors: Sequence[bytes], end: Mapping[str, Any]) -> bytes:
    """The response, encoded vector by vector, since no other thread runs while a piece of JSON is encoded."""
    return f'{{"embeddings":[{",".join(_encode(numbers(vector)) for vector in vectors)}],{_encode(end)[1:]}'.encode()


def _is_zero(keep_alive: object) -> bool:
    """Whether a number of seconds, or a duration such as `0s`, is 0; with that, Ollama's clients unload a model."""
    if isinstance(keep_alive, str):
        return _ZERO.fullmatch(keep_alive) is not None
    return keep_alive == 0 and keep_alive is not None


class OllamaEndpoints:
    """The endpoints. Any model name stands for the one model that is served; answers give its real name."""

    def __init__(self, service: Service, bodies: BodyReader) -> None:
        self._service = service
        self._bodies = bodies

    def routes(self) -> list[Route]:
        """For the application."""
        return routes(
            "ollama",
            ("POST", "/api/chat", self._chat),
            ("POST", "/api/generate", self._generate),
            ("POST", "/api/embed", self._embed),
            ("POST", "/api/embeddings", self._embed_one),
            ("POST", "/api/show", self._show),
            ("GET", "/api/tags", self._tags),
            ("GET", "/api/ps", self._ps),
            ("GET", "/api/version", self._version),
        )

    async def _chat(self, request: Request) -> Response:
        body = await self._bodies.read(request, "OllamaChat")
        refuse_tools(body, request, self._service)
        messages = [Message(item["role"], item.get("content") or "") for item in body.get("messages", ())]
        if not messages:
            return await self._load_only(request, body, _as_message)
        chat = WholeChat(request, self._service, messages, drop=bool(body.get("truncate")))
        return await self._answer(request, body, chat.prompt, _as_message, chat.save)

    async def _generate(self, request: Request) -> Response:
        body = await self._bodies.read(request, "OllamaGenerate")
        refuse_together(body, "raw", "system")
        text, system = body.get("prompt", ""), body.get("system", "")
        if not text:
            return await self._load_only(request, body, _as_response)
        if body.get("raw"):
            prompt = text_prompt(text)
        else:
            messages = [Message("system", system)] if system else []
            prompt = WholeChat(request, self._service, [*messages, Message("user", text)]).prompt
        return await self._answer(request, body, prompt, _as_response)

    async def _load_only(self, request: Request, body: Mapping[str, Any], shape: Shape) -> Response:
        """Answer a request without a prompt: load the model, so that the next one finds it ready, or unload it."""
        for name in ("system", "options", "raw", "truncate"):
            if body.get(name):
                request.scope["rkedge.ignored"].add(name)

        unload = _is_zero(body.get("keep_alive"))
        if not unload:
            self._keeps(request, body)

        async def change() -> str:
            async with self._service.queue.turn(client_of(request, {})):
                if not unload:
                    return (await self._service.host.model()).bundle.manifest.name
                await self._service.host.unload()
                return self._service.name

        line = {"model": await while_connected(request, change()), "created_at": _time(), **shape("")}
        return json_response({**line, "done": True, "done_reason": "unload" if unload else "load"})

    async def _embed(self, request: Request) -> Response:
        body = await self._bodies.read(request, "OllamaEmbed")
        texts, start = [body["input"]] if isinstance(body["input"], str) else body["input"], time.monotonic()
        found = await embedded(request, self._service, body, texts, cut=body.get("truncate", True))
        end = {
            "model": found.model,
            "total_duration": _nanoseconds(time.monotonic() - start),
            "load_duration": 0,
            "prompt_eval_count": found.tokens,
        }
        content = await read_in_thread(_vectors, found.vectors, end)
        return Response(content, headers=embedded_headers(found), media_type="application/json")

    async def _embed_one(self, request: Request) -> Response:
        body = await self._bodies.read(request, "OllamaEmbeddings")
        found = await embedded(request, self._service, body, [body["prompt"]])
        content = {"embedding": numbers(found.vectors[0])}
        return json_response(content, headers=emulated_header(found.emulated))

    async def _answer(
        self,
        request: Request,
        body: Mapping[str, Any],
        prompt: Callable[[Model], Prompt],
        shape: Shape,
        save: SaveAnswer | None = None,
    ) -> Response:
        options = body.get("options") or {}
        self._keeps(request, body)
        # -1 means no limit and -2 the rest of the context, which is the same here.
        limit = options.get("num_predict", -1)
        wanted = generation_request(request, prompt, options, int(limit) if limit > 0 else None, save)
        started = await started_run(request, self._service.start(wanted))
        if body.get("stream", True):
            return _stream(started, shape)
        outcome = await collect(request, started)
        text = outcome.answer.text
        return await with_data(
            len(text),
            lambda: json_response(
                {**_line(started.start.model, shape, text), **_figures(outcome)}, headers=started.headers
            ),
        )

    def _keeps(self, request: Request, body: Mapping[str, Any]) -> None:
        if body.get("keep_alive") is not None:  # the settings say how long, for all clients
            request.scope["rkedge.ignored"].add("keep_alive")

    async def _manifest(self) -> Manifest:
        model = self._service.host.current
        if model is not None:
            return model.bundle.manifest
        bundle = self._service.host.settings.bundle
        if bundle is None:
            raise UsageError("No bundle is configured.")
        # Without a model, each access may have to parse the file.
        return await read_in_thread(_read_manifest, bundle)

    async def _card(self) -> dict[str, Any]:
        manifest = await self._manifest()
        record = manifest.files[manifest.model_file]
        model = self._service.host.current
        return {
            "name": manifest.name,
            "model": manifest.name,
            "modified_at": _time(model.loaded_at if model else None),
            "size": record.size,
            "digest": record.sha256,
            "details": _details(manifest),
        }

    async def _tags(self, request: Request) -> Response:
        return json_response({"models": [await self._card()]})

    async def _ps(self, request: Request) -> Response:
        model = self._service.host.current
        if model is None:
            return json_response({"models": []})
        idle = self._service.settings.idle_unload_s
        until = _time(time.time() + idle) if idle else "9999-12-31T23:59:59Z"
        loaded = {"expires_at": until, "size_vram": 0, "context_length": model.engine.info.max_context}
        return json_response({"models": [{**await self._card(), **loaded}]})

    async def _show(self, request: Request) -> Response:
        await self._bodies.read(request, "OllamaShow")
        manifest = await self._manifest()
        info = {
            "general.architecture": manifest.family,
            "general.parameter_count": manifest.parameters,
            f"{manifest.family}.context_length": manifest.max_context,
        }
        return json_response(
            {
                "modelfile": f"# made by {manifest.created_by or 'rkedge'}\nFROM {manifest.model_file}\n",
                "parameters": "",
                "template": "",
                "license": manifest.licence,
                "details": _details(manifest),
                "model_info": info,
                "capabilities": ["completion"],
            }
        )

    async def _version(self, request: Request) -> Response:
        return json_response({"version": version("rkedge")})
