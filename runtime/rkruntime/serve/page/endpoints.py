"""The endpoints of the chat page."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from starlette.requests import Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from rkruntime.serve.api.http import BodyReader, json_response, routes
from rkruntime.serve.doors import refused
from rkruntime.serve.threads import page_in_thread

_STATIC: Final = Path(__file__).parent / "static"
_TYPES: Final = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
# The page loads only its own few files, talks only to the daemon, and may not be framed. No script can make markup from
# a text: browsers that know Trusted Types refuse every way to do so.
_POLICY: Final = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
_HEADERS: Final = {
    "Content-Security-Policy": _POLICY,
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
ROOT: Final = "/page/"


def is_page(path: str) -> bool:
    """Whether a path is the page itself, which is open to all: a browser can send a key only once it has the page."""
    return path == "/" or path.startswith(ROOT)


class PageEndpoints:
    """The page's files, and Markdown for it."""

    def __init__(self, bodies: BodyReader) -> None:
        self._bodies = bodies
        self._files = {path.name: (path.read_bytes(), _TYPES[path.suffix]) for path in _STATIC.iterdir()}

    def routes(self) -> list[Route]:
        """Return the routes for the application."""
        return routes(
            "openai",
            ("GET", "/", self._root),
            ("GET", f"{ROOT}{{name}}", self._file),
            ("POST", "/markdown", self._read),
        )

    async def _root(self, request: Request) -> Response:
        if "text/html" not in request.headers.get("accept", ""):
            # The text that Ollama's clients look for.
            return PlainTextResponse("Ollama is running")
        return self._response("index.html")

    async def _file(self, request: Request) -> Response:
        name = request.path_params["name"]
        if name not in self._files:
            raise refused(404, "not_found", f"The page has no {name[:80]!r}.")
        return self._response(name)

    def _response(self, name: str) -> Response:
        content, kind = self._files[name]
        return Response(content, media_type=kind, headers=_HEADERS)

    async def _read(self, request: Request) -> Response:
        body = await self._bodies.read(request, "MarkdownText")
        return await page_in_thread(_blocks, body["text"])


def _blocks(text: str) -> Response:
    # Imported here, so that a daemon whose page is not used saves the 6 MB that the parser takes.
    from rkruntime.serve.page.markdown import blocks

    return json_response({"blocks": blocks(text)})
