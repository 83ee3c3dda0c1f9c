"""A library that misbehaves, and that it still works when it does not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rkruntime.engine.engine import Engine, LoadOptions
from rkruntime.engine.generation import Request

Misbehaving = Callable[..., LoadOptions]
REQUEST = Request([1, 2, 3])


def works(options: Misbehaving, release: str = "1.2.3") -> None:
    """The same library loads and answers when it does not misbehave."""
    with Engine.load(options("", release)) as engine:
        events = list(engine.generate(REQUEST))
        assert [event.token_id for event in events[:-1]] == list(range(100, 110))


async def delivered(engine: Engine, request: Request = REQUEST) -> list[Any]:
    """All events of an answer, as the event loop hands them over."""
    events: list[Any] = []

    def take(more: list[Any]) -> bool:
        assert more
        events.extend(more)
        return True

    await engine.deliver(request, take)
    return events


async def collected(engine: Engine, request: Request = REQUEST) -> list[Any]:
    """All events of an answer, read by the event loop."""
    return [event async for event in engine.agenerate(request)]
