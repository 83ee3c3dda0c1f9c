"""Blocking calls of the engine beside the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from typing import TypeVar

T = TypeVar("T")


async def in_thread(work: Callable[..., T], *args: object, stop: Callable[[], None] | None = None) -> T:
    """`asyncio.to_thread`, but a cancel waits for the thread: an engine takes one call at a time.

    Args:
        stop: asks `work` to come to its end.
    """
    task = asyncio.ensure_future(asyncio.to_thread(work, *args))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        if stop is not None:
            stop()
        with suppress(Exception):
            await task
        raise
