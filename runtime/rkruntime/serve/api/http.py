"""HTTP for the interfaces: limited bodies, errors in OpenAI's and Ollama's formats, streams that notice disconnects."""

from __future__ import annotations

import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing, suppress
from typing import Any, Final, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from rkruntime.errors import (
    BodyError,
    BusyError,
    ContextFullError,
    HostError,
    ModelError,
    NoSuchSessionError,
    OutputError,
    RefusedError,
    RKEdgeError,
    ServiceError,
    TimeLimitError,
    UnsupportedCallError,
    UsageError,
)
from rkruntime.serve.api.validate import Ignored, Validator, kind_of, parse_json
from rkruntime.serve.cancel import client_needed, time_limit
from rkruntime.serve.connections import Held
from rkruntime.serve.threads import with_data
from rkruntime.words import counted

log = logging.getLogger("rkedge")
T = TypeVar("T")

# Error class, HTTP status, OpenAI's type and code; the first row that fits applies.
_ERRORS: Final[tuple[tuple[type[RKEdgeError], int, str, str | None], ...]] = (
    (ContextFullError, 400, "invalid_request_error", "context_length_exceeded"),
    (UnsupportedCallError, 501, "invalid_request_error", "unsupported_by_runtime"),
    (UsageError, 400, "invalid_request_error", None),
    (NoSuchSessionError, 404, "invalid_request_error", "session_not_found"),
    (BusyError, 429, "rate_limit_error", "queue_full"),
    (TimeLimitError, 504, "server_error", "time_limit"),
    (ServiceError, 503, "server_error", "unavailable"),
    (HostError, 503, "server_error", "host"),
    (OutputError, 503, "server_error", "host"),
    (ModelError, 502, "server_error", "model"),
    (RefusedError, 400, "invalid_request_error", None),
    (RKEdgeError, 503, "server_error", "model_unavailable"),
)
_INTERNAL: Final = (500, "server_error", "internal")


def status_of(error: BaseException) -> tuple[int, str, str | None]:
    """Return the HTTP status, OpenAI's error type and code of an error."""
    if isinstance(error, BodyError) and "status" in error.details:
        return int(error.details["status"]), "invalid_request_error", error.details.get("code")
    return next((row[1:] for row in _ERRORS if isinstance(error, row[0])), _INTERNAL)


def error_body(error: BaseException, style: str) -> dict[str, Any]:
    """Return an error as the clients of an interface expect it, with the next step in the message.

    Args:
        style: `openai` or `ollama`.
    """
    _, kind, code = status_of(error)
    message = (
        f"{error.message} {error.hint}".rstrip()
        if isinstance(error, RKEdgeError)
        else "The daemon has a bug; see its log."
    )
    if style == "ollama":
        return {"error": message}
    param = error.details.get("param") if isinstance(error, RKEdgeError) else None
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_response(error: BaseException, style: str) -> Response:
    """Return the response to a request that failed before anything was sent."""
    status = status_of(error)[0]
    headers = {}
    if isinstance(error, RKEdgeError) and "retry_after_s" in error.details:
        headers["Retry-After"] = str(error.details["retry_after_s"])
    if status in (408, 413):
        # The rest of the body is not read.
        headers["Connection"] = "close"
    return json_response(error_body(error, style), status, headers)


def json_response(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """Return a JSON response in UTF-8; lone surrogates, which UTF-8 cannot encode, are escaped."""
    try:
        body = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
    except UnicodeEncodeError:
        body = json.dumps(content, separators=(",", ":")).encode()
    return Response(body, status, headers, "application/json")


class BodyReader:
    """Read and check request bodies.

    Args:
        max_bytes: Largest body; a larger one is refused with 413.
        seconds: Time for a client to send the whole body; a slower one is refused with 408.
    """

    def __init__(self, validator: Validator, max_bytes: int, seconds: float) -> None:
        self._validator = validator
        self.max_bytes = max_bytes
        self.seconds = seconds

    async def read(
        self, request: Request, schema: str, made: Callable[[dict[str, Any]], dict[str, Any]] | None = None
    ) -> dict[str, Any]:
        """Read the body as a JSON object that matches the schema, as returned by `Validator.read`.

        Args:
            made: Applied to the object at once, so that nothing but the result stays in memory.

        Raises:
            BodyError: The body is too large, too slow, not JSON, or does not match the schema.
            BusyError: The user's other requests hold too much memory.
        """
        with time_limit(self.seconds, self._too_slow):
            body = await self._read(request)
        ignored: Ignored = request.scope["rkedge.ignored"]
        return await with_data(len(body), self._checked, body, schema, made, ignored)

    def _checked(
        self, body: bytes, schema: str, made: Callable[[dict[str, Any]], dict[str, Any]] | None, ignored: Ignored
    ) -> dict[str, Any]:
        data = parse_json(body)
        if not isinstance(data, dict):
            raise BodyError(f"The body must be a JSON object, not {kind_of(data)}.")
        read: dict[str, Any] = self._validator.read(schema, data, ignored)
        return made(read) if made else read

    def check(self, schema: str, data: Any) -> Any:
        """Check `data` from elsewhere than a request against the schema. Raises BodyError."""
        return self._validator.read(schema, data, Ignored())

    async def _read(self, request: Request) -> bytes:
        held: Held = request.scope["rkedge.held"]
        declared = request.headers.get("content-length", "")
        self._hold(held, int(declared) if declared.isdecimal() else 0)
        body = bytearray()
        async for part in request.stream():
            self._hold(held, len(body) + len(part))
            body += part
        return bytes(body)

    def _too_slow(self) -> BodyError:
        return BodyError(
            f"The body did not arrive within {counted(self.seconds, 'second')}.",
            details={"status": 408, "code": "too_slow"},
        )

    def _hold(self, held: Held, size: int) -> None:
        if size > self.max_bytes:
            raise BodyError(
                f"The body is larger than {self.max_bytes:,} bytes.", details={"status": 413, "code": "too_large"}
            )
        held.at_least(size)


async def while_connected(request: Request, work: Awaitable[T]) -> T:
    """Return the result of `work`, or cancel it and raise ClientDisconnect if the client disconnects."""
    with client_needed(request.receive):
        return await work


class Stream(Response):
    """Send chunks as they arrive, and close their source as soon as the client is gone.

    Args:
        chunks: Whole events.
        failed: Makes the event that ends the stream after an exception.
        close: Called at the end, however the stream ends, even if nothing was taken from `chunks`.
    """

    def __init__(
        self,
        chunks: AsyncGenerator[bytes, None],
        media_type: str,
        headers: Mapping[str, str] | None = None,
        *,
        failed: Callable[[Exception], bytes],
        close: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        super().__init__(
            None, 200, {"Cache-Control": "no-store", "X-Accel-Buffering": "no", **(headers or {})}, media_type
        )
        del self.headers["content-length"]
        self._chunks = chunks
        self._failed = failed
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        try:
            with suppress(ClientDisconnect), client_needed(receive):
                await self._send(scope["rkedge.id"], send)
        finally:
            if self._close:
                await self._close()

    async def _events(self, request_id: str) -> AsyncGenerator[bytes, None]:
        try:
            async with aclosing(self._chunks) as chunks:
                async for chunk in chunks:
                    yield chunk
        except RKEdgeError as error:
            yield self._failed(error)
        except Exception as error:  # The client that reads the stream must be told that it ends early.
            log.exception("request %s", request_id)
            yield self._failed(error)

    async def _send(self, request_id: str, send: Send) -> None:
        async with aclosing(self._events(request_id)) as chunks:
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for chunk in chunks:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


Endpoint = Callable[[Request], Awaitable[Response]]


def answering(style: str) -> Callable[[Endpoint], Endpoint]:
    """Decorate an endpoint: its errors become responses in the format of `style`."""

    def decorate(endpoint: Endpoint) -> Endpoint:
        async def answered(request: Request) -> Response:
            try:
                return await endpoint(request)
            except ClientDisconnect:
                return Response(status_code=499)
            except RKEdgeError as error:
                return error_response(error, style)
            except Exception as error:
                log.exception("request %s", request.scope.get("rkedge.id"))
                return error_response(error, style)

        return answered

    return decorate


def routes(style: str, *endpoints: tuple[str, str, Endpoint]) -> list[Route]:
    """Make an interface's routes of methods, paths and endpoints. Errors become responses in the format of `style`."""
    wrap = answering(style)
    return [Route(path, wrap(endpoint), methods=[method]) for method, path, endpoint in endpoints]


def refuse_together(body: Mapping[str, Any], name: str, *others: str) -> None:
    """Raise BodyError if a body has `name` together with one of the others, which would have no effect."""
    if body.get(name) and (found := [other for other in others if body.get(other)]):
        raise BodyError(f"{name} and {' and '.join(found)} exclude each other.", details={"param": found[0]})
