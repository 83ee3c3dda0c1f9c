"""The question that the engine's tests ask the demo model, and its answer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rkruntime.engine.engine import Engine
from rkruntime.engine.generation import Request, Token
from rkruntime.versions import version as order

Load = Callable[..., Engine]
QUESTION = "<bos><start_of_turn>user\nWhat is the RK3588?<end_of_turn>\n<start_of_turn>model\n"
ANSWER = "A Rockchip chip with eight Arm cores and an NPU of 6 TOPS."


def newer(release: str, than: str) -> bool:
    return order(release) >= order(than)


def text_of(events: list[Any]) -> str:
    return b"".join(event.text for event in events if isinstance(event, Token)).decode()


async def collect(engine: Engine, request: Request) -> list[Any]:
    return [event async for event in engine.agenerate(request)]
