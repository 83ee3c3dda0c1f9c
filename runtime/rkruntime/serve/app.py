"""The ASGI application: access, the routes of all interfaces, and the daemon's own pages."""

from __future__ import annotations

import asyncio
import re
import time
import uuid
from collections.abc import Collection, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, get_args

import yaml
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rkruntime.checks.machine import npu_load
from rkruntime.engine.generation import PER_REQUEST, MaxNewTokens, Sampling
from rkruntime.errors import BodyError, BusyError, ServiceError
from rkruntime.schema import types_of
from rkruntime.serve.api.generate import EMULATED_HEADER, NOTES_HEADER
from rkruntime.serve.api.http import BodyReader, error_response, json_response, routes
from rkruntime.serve.api.native import SessionEndpoints
from rkruntime.serve.api.ollama import OllamaEndpoints
from rkruntime.serve.api.openai import OpenAIEndpoints
from rkruntime.serve.api.validate import Ignored, Validator
from rkruntime.serve.connections import CONNECTION, Connection, Requests
from rkruntime.serve.doors import Door, check_page, refused
from rkruntime.serve.metrics import temperatures
from rkruntime.serve.page.endpoints import PageEndpoints, is_page
from rkruntime.serve.service import Service
from rkruntime.serve.threads import read_in_thread

REQUEST_ID: Final = "x-request-id"
IGNORED: Final = "X-RKEdge-Ignored"
_HERE: Final = Path(__file__).parent
# Bytes of a response to send at a time.
_PART: Final = 1 << 16
_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
_YamlLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
# Paths open to anyone: whether the daemon is alive.
_OPEN: Final = frozenset({"/health", "/ready"})
_MODELS: Final = "This daemon serves one model, from `rkedge convert`: none is fetched, made or removed through it."
# Paths of Ollama's interface, also after a base address that ends in OpenAI's /v1.
_OLLAMA: Final = re.compile(r"(/v1)?/api/(?!v1/|chat/completions)")
# What to do about paths that clients ask for and the daemon does not have.
_INSTEAD: Final[Mapping[str, str]] = {
    "/v1/responses": "Let the client use chat completions (/v1/chat/completions).",
    **dict.fromkeys(("/api/pull", "/api/push", "/api/create", "/api/copy", "/api/delete", "/api/blobs"), _MODELS),
    **dict.fromkeys(
        ("/v1/audio", "/v1/images", "/v1/files", "/v1/moderations"), "This model reads and writes text only."
    ),
    "/v1/messages": "Let the client use OpenAI's interface (/v1/chat/completions) or Ollama's (/api/chat).",
    **dict.fromkeys(
        ("/v1/assistants", "/v1/threads", "/v1/batches", "/v1/fine_tuning", "/v1/vector_stores", "/v1/realtime"),
        "Of OpenAI's interface, this daemon has chat completions, completions, embeddings and models.",
    ),
    "/v1/chat/completions/": "The address of this interface ends with /v1: the client adds the rest.",
    "/api/chat/completions": "The address of OpenAI's interface ends with /v1, without /api.",
    "/chat/completions": "The address of this interface ends with /v1.",
    "/v1/api/": "The address of Ollama's interface does not end with /v1.",
    "/api/v1/": "The address of OpenAI's interface ends with /v1, without /api.",
}


def openapi() -> dict[str, Any]:
    """Return the document in openapi.yaml, with the sampling fields of generation.py."""
    document: dict[str, Any] = yaml.load((_HERE / "openapi.yaml").read_bytes(), _YamlLoader)  # noqa: S506
    schemas, kinds = document["components"]["schemas"], types_of(Sampling)
    for schema in schemas.values():
        if schema.pop("x-sampling", False):
            schema["properties"] |= {name: _number(kinds[name]) for name in PER_REQUEST}
    schemas["Tokens"] = {**_number(MaxNewTokens), "x-capped": True}
    limit = schemas["OllamaOptions"]["properties"]["num_predict"]
    limit["maximum"] = schemas["Tokens"]["maximum"]
    return document


def _number(kind: Any) -> dict[str, Any]:
    """Return the schema of a number with a range, or null."""
    number, bounds, *_ = get_args(kind)
    words = ["integer" if number is int else "number", "null"]
    return {"type": words, "minimum": bounds.least, "maximum": bounds.most}


class AccessMiddleware:
    """The application as seen by one listener: it rejects foreign web pages, identifies users and sets request ids."""

    def __init__(self, app: ASGIApp, door: Door, requests: Requests, origins: Collection[str] = ()) -> None:
        self._app = app
        self._door = door
        self._requests = requests
        self._origins = origins

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        scope, target = _origin_form(scope)
        headers = Headers(scope=scope)
        given = headers.get(REQUEST_ID, "")
        scope["rkedge.id"] = given if _ID.fullmatch(given) else uuid.uuid4().hex[:16]
        connection: Connection = scope["state"][CONNECTION]
        # A client that does not read its answers waits here, before any work on its next request.
        await connection.flow.drain()
        scope["rkedge.ignored"] = Ignored()
        send = _sending(scope["rkedge.id"], scope["rkedge.ignored"], send)
        try:
            check_page(headers, any_host=self._door.any_host, target=target, origins=self._origins)
            if scope["path"] in _OPEN or is_page(scope["path"]):
                return await self._app(scope, receive, send)
            user = await self._door.user(connection.peer, headers)
            with self._requests.one(user) as held, connection.kept():
                scope["rkedge.user"], scope["rkedge.held"] = user, held
                return await self._app(scope, receive, send)
        except (BodyError, BusyError) as error:
            return await error_response(error, _style(scope["path"]))(scope, receive, send)
        except asyncio.CancelledError:
            # uvicorn would log the cancellation as our error.
            connection.give_up()


def guarded(app: ASGIApp, door: Door, requests: Requests, origins: Collection[str]) -> ASGIApp:
    """Wrap the application for one listener; web pages of these origins may send requests and read answers."""
    access = AccessMiddleware(app, door, requests, origins)
    if not origins:
        return access
    shown = (REQUEST_ID, IGNORED, NOTES_HEADER, EMULATED_HEADER)
    return CORSMiddleware(access, origins, ("GET", "POST", "PUT", "DELETE"), ("*",), expose_headers=shown)


def _origin_form(scope: Scope) -> tuple[Scope, str | None]:
    """Return the scope with a path as its target, and the host if the target is a whole URL (RFC 9112)."""
    match = re.fullmatch(r"(?i:https?)://([^/?#]*)(/.*)?", scope["path"], re.DOTALL)
    if not match:
        return scope, None
    path = match[2] or "/"
    return {**scope, "path": path, "raw_path": path.encode("latin-1", "replace")}, match[1]


def _sending(request_id: str, ignored: Ignored, send: Send) -> Send:
    """Add the headers of all responses, and send large bodies in parts, each once the previous part was taken."""

    async def sending(message: Message) -> None:
        if message["type"] == "http.response.start":
            found = MutableHeaders(scope=message)
            found[REQUEST_ID] = request_id
            if ignored.names:
                found[IGNORED] = ", ".join(ignored.names)
            # No page of another origin may load an answer as a script, style or image.
            found["Cross-Origin-Resource-Policy"] = "same-origin"
            found["X-Content-Type-Options"] = "nosniff"
        body, at = message.get("body", b""), 0
        while len(body) - at > _PART:
            await send({"type": "http.response.body", "body": body[at : at + _PART], "more_body": True})
            at += _PART
        await send({**message, "body": body[at:]} if at else message)

    return sending


def _style(path: str) -> str:
    return "ollama" if _OLLAMA.match(path) else "openai"


async def _no_route(request: Request, error: Exception) -> Response:
    """Answer a wrong path or method with an error in the style of the interface that the path looks like."""
    status = error.status_code if isinstance(error, HTTPException) else 404
    path = request.url.path
    instead = next((hint for start, hint in _INSTEAD.items() if path.startswith(start)), "See docs/serve.md.")
    what = f"There is no {request.method[:16]} {path[:80]!r}."
    response = error_response(refused(status, "not_found", what, instead), _style(path))
    if isinstance(error, HTTPException) and error.headers:
        response.headers.update(error.headers)
    return response


class DaemonEndpoints:
    """The daemon's own endpoints: health, status, metrics."""

    def __init__(self, service: Service, document: Mapping[str, Any]) -> None:
        self._service = service
        self._document = json_response(document).body
        self._started = time.monotonic()

    def routes(self) -> list[Route]:
        """Return the routes for the application."""
        return routes(
            "openai",
            ("GET", "/health", self._health),
            ("GET", "/ready", self._ready),
            ("GET", "/status", self._status),
            ("GET", "/metrics", self._metrics),
            ("GET", "/openapi.json", self._openapi),
        )

    async def _health(self, _: Request) -> Response:
        return json_response({"status": "ok"})

    async def _ready(self, _: Request) -> Response:
        host = self._service.host
        if host.state == "failed" and host.error is not None:
            raise ServiceError(f"The model failed: {host.error.message}", hint=host.error.hint)
        if host.state == "loading":
            raise ServiceError(
                "The model is being loaded.", hint="Try again in a moment.", details={"retry_after_s": 1}
            )
        return json_response({"status": "ready", "loaded": host.current is not None})

    async def _status(self, request: Request) -> Response:
        service, model = self._service, self._service.host.current
        info = model.engine.info if model else None
        board = await read_in_thread(lambda: {"temperatures": temperatures(), "npu_load": npu_load()})
        return json_response(
            {
                "version": version("rkedge"),
                "user": request.scope["rkedge.user"].account,
                "model": service.name,
                "bundle": model.bundle.manifest.fingerprint if model else None,
                "state": service.host.state,
                "error": service.host.error.message if service.host.error else None,
                "emulated": info.emulated if info else None,
                "release": info.release if info else None,
                "max_context": info.max_context if info else None,
                "reloads": service.reloads,
                "reload_error": service.reload_error.message if service.reload_error else None,
                "queue": {"waiting": len(service.queue), "busy": service.queue.busy},
                **board,
                "uptime_s": time.monotonic() - self._started,
            }
        )

    async def _metrics(self, _: Request) -> Response:
        text = await read_in_thread(self._service.metrics.text)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    async def _openapi(self, _: Request) -> Response:
        return Response(self._document, media_type="application/json")


def make_app(service: Service) -> Starlette:
    """Make the application for a service, for any listener; an AccessMiddleware controls access."""
    document = openapi()
    limits = service.settings.limits
    bodies = BodyReader(Validator(document), int(limits.body_mb * 1e6), limits.header_s)
    interfaces = (
        OpenAIEndpoints(service, bodies),
        OllamaEndpoints(service, bodies),
        SessionEndpoints(service, bodies),
        PageEndpoints(bodies),
        DaemonEndpoints(service, document),
    )
    routes = [route for interface in interfaces for route in interface.routes()]
    app = Starlette(routes=routes, exception_handlers={HTTPException: _no_route})
    # A path has one spelling; a session without a name is not the list of sessions.
    app.router.redirect_slashes = False
    return app
