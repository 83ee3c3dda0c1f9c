"""`rkedge serve` with a model that repeats what it is asked: a test decides what the chat page gets to show.

ECHO_BYTE_S is the time that it takes for each byte, in seconds.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncGenerator
from functools import partial
from typing import Any

from rkruntime import cli
from rkruntime.engine.generation import Event, Finished, FinishReason, Request, Token
from rkruntime.model import Model
from rkruntime.serve import service
from rkruntime.serve.host import Host
from rkruntime.testing import FakeEngine, fake_model

_AT_ONCE = 4


class Echo(FakeEngine):
    async def agenerate(self, request: Request) -> AsyncGenerator[Event, None]:
        *_, question, _, begun = bytes(min(token, 255) for token in request.tokens).split(b"\xff")
        said = question.removeprefix(b"user\n")
        rest = said[len(begun.removeprefix(b"model\n")) :]
        for at, byte in enumerate(rest):
            if at % _AT_ONCE == 0:
                await asyncio.sleep(_AT_ONCE * float(os.environ.get("ECHO_BYTE_S", "0")))
            yield Token(byte)
        yield Finished(FinishReason.STOP, len(request.tokens), len(rest))


def load(settings: Any, *_: Any) -> Model:
    model = fake_model(max_context=settings.max_context or 1 << 17)
    engine: Any = Echo([], max_context=settings.max_context or 1 << 17)
    model.engine = engine
    return model


if __name__ == "__main__":
    service.Host = partial(Host, load=load, check=lambda *_: None)  # type: ignore[misc, assignment]
    raise SystemExit(cli.main(sys.argv[1:]))
