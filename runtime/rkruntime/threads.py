"""Run a blocking call outside the event loop.

Not anyio's threads, which cannot be told to stop: a cancel waits for them or abandons them. anyio's scopes cancel a
task in each turn of the event loop until it leaves them, so that a task that waits for an engine to stop uses a core.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")


async def in_thread(
    work: Callable[..., T],
    *args: object,
    stop: Callable[[], None] | None = None,
    pool: ThreadPoolExecutor | None = None,
) -> T:
    """Run `work` in a thread and return its result. A cancel waits for it, as an engine takes one call at a time.

    Args:
        stop: Asks `work` to finish early.
        pool: Threads to use; None for asyncio's own.
    """
    future = asyncio.get_running_loop().run_in_executor(pool, work, *args)
    cancelled: asyncio.CancelledError | None = None
    while not future.done():
        try:
            await asyncio.wait({future})
        except asyncio.CancelledError as error:  # noqa: PERF203 - once for each cancel
            cancelled = error
            if stop is not None:
                stop()
    if cancelled is not None:
        # Retrieve the exception so that asyncio does not report it as unhandled.
        future.exception()
        raise cancelled
    return future.result()
