"""Run blocking calls outside the event loop: on large data, to the disk, and for the chat page."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

from rkruntime.threads import in_thread

T = TypeVar("T")
# Data of this many bytes would delay others noticeably if processed in the event loop.
LARGE: Final = 1 << 16
# Not asyncio's own pool, as calls to the engine must not wait until everyone's data is read.
_READERS: Final = ThreadPoolExecutor(2, "rkedge-data")
# One thread, so that a file has one writer, and changes happen one after the other.
_WRITER: Final = ThreadPoolExecutor(1, "rkedge-disk")
# One thread, because its work is Python's own, which takes turns with the event loop.
_PAGE: Final = ThreadPoolExecutor(1, "rkedge-page")


async def on_disk(work: Callable[..., T], *args: object) -> T:
    """Run `work`, which changes files: one at a time, in order, and never cut short by a cancel."""
    return await in_thread(work, *args, pool=_WRITER)


async def with_data(size: int, work: Callable[..., T], *args: object) -> T:
    """Run `work` on `size` bytes: in a thread if they are many, else directly."""
    if size < LARGE:
        return work(*args)
    return await read_in_thread(work, *args)


async def read_in_thread(work: Callable[..., T], *args: object) -> T:
    """Run `work`, which reads files or works on large data, in a thread; a cancel abandons it."""
    return await asyncio.get_running_loop().run_in_executor(_READERS, work, *args)


async def page_in_thread(work: Callable[..., T], *args: object) -> T:
    """Run `work` for the chat page in a thread, for one client at a time; a cancel abandons it."""
    return await asyncio.get_running_loop().run_in_executor(_PAGE, work, *args)
