"""Blocking calls beside the event loop: of the engine, and on large data."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Final, TypeVar

T = TypeVar("T")
# Bytes of which the work would be noticed by others if it were done in the event loop.
LARGE: Final = 1 << 16
# Not asyncio's own: calls of the engine shall not wait for a thread until everybody's data are read.
_READERS: Final = ThreadPoolExecutor(2, "rkedge-data")


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


async def with_data(size: int, work: Callable[..., T], *args: object) -> T:
    """The result of `work` on `size` bytes: in a thread where they are many, else at once."""
    if size < LARGE:
        return work(*args)
    return await asyncio.get_running_loop().run_in_executor(_READERS, work, *args)
