"""End a block of the current task early, with an error that says why: its time is over, or its client is gone.

Not asyncio.wait_for or a task of the block's own: a request would take several more turns of the event loop, and a
cancel would lose such a task's result. For anyio.fail_after, see threads.py.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from starlette.requests import ClientDisconnect
from starlette.types import Receive


@contextmanager
def time_limit(seconds: float, error: Callable[[], Exception]) -> Iterator[None]:
    """Raise `error()` in the block after `seconds`."""
    with _cancelling(error) as cancel:
        timer = asyncio.get_running_loop().call_later(seconds, cancel)
        try:
            yield
        finally:
            timer.cancel()


@contextmanager
def client_needed(receive: Receive) -> Iterator[None]:
    """Raise ClientDisconnect in the block as soon as the client of `receive` (ASGI) is gone."""
    with _cancelling(ClientDisconnect) as cancel:
        watch = asyncio.ensure_future(_gone(receive))
        watch.add_done_callback(lambda done: done.cancelled() or (done.exception(), cancel()))
        try:
            yield
        finally:
            watch.cancel()


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


@contextmanager
def _cancelling(error: Callable[[], Exception]) -> Iterator[Callable[[], None]]:
    """Give the block a function that has `error()` raised in it."""
    task: Any = asyncio.current_task()
    counts = sys.version_info >= (3, 11)
    before = task.cancelling() if counts else 0
    asked = over = False

    def cancel() -> None:
        nonlocal asked
        if not (over or asked):
            asked = True
            task.cancel()

    try:
        yield cancel
    except asyncio.CancelledError:
        if not asked or (counts and task.uncancel() > before):  # somebody else has cancelled the task, too
            raise
        raise error() from None
    finally:
        over = True
