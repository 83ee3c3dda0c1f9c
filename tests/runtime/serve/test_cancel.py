"""A block that is ended early says why, and no other cancel of its task is taken for that, whenever it comes."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.requests import ClientDisconnect

from rkruntime.serve.cancel import client_needed, time_limit


class Over(Exception):
    pass


def run(work: Callable[[], Awaitable[Any]]) -> Any:
    """Run `work` until nothing is left of it."""

    @asynccontextmanager
    async def nothing_left() -> AsyncIterator[None]:
        loop, told = asyncio.get_running_loop(), list[Any]()
        loop.set_exception_handler(lambda _, context: told.append(context))
        yield
        for _ in range(3):
            await asyncio.sleep(0)
        assert asyncio.all_tasks() == {asyncio.current_task()}
        assert not told

    async def main() -> Any:
        async with nothing_left():
            return await work()

    return asyncio.run(main())


class Client:
    """An ASGI client that sends these messages, the last one when it is told to."""

    def __init__(self, *messages: str) -> None:
        self.messages, self.leaves = list(messages), asyncio.Event()

    async def receive(self) -> dict[str, Any]:
        if len(self.messages) > 1:
            return {"type": self.messages.pop(0)}
        await self.leaves.wait()
        return {"type": "http.disconnect"}


def test_a_block_that_is_over_in_time() -> None:
    async def work() -> str:
        with time_limit(5, Over), client_needed(Client().receive):
            await asyncio.sleep(0.01)
            return "done"

    assert run(work) == "done"


def test_a_block_that_takes_too_long() -> None:
    async def work() -> None:
        with time_limit(0.01, Over):
            await asyncio.sleep(20)

    with pytest.raises(Over):
        run(work)


def test_a_client_that_leaves() -> None:
    async def work() -> None:
        client = Client("http.request", "http.request", "http.disconnect")
        asyncio.get_running_loop().call_later(0.01, client.leaves.set)
        with client_needed(client.receive):
            await asyncio.sleep(20)

    with pytest.raises(ClientDisconnect):
        run(work)


def test_a_server_that_fails_to_watch_its_client() -> None:
    async def receive() -> dict[str, Any]:
        raise OSError("no such client")

    async def work() -> None:
        with client_needed(receive):
            await asyncio.sleep(20)

    with pytest.raises(ClientDisconnect):
        run(work)


def test_what_must_be_done_first_is_done() -> None:
    done: list[str] = []

    async def work() -> None:
        with time_limit(0.01, Over):
            try:
                await asyncio.sleep(20)
            finally:
                await asyncio.sleep(0.01)
                done.append("saved")

    with pytest.raises(Over):
        run(work)
    assert done == ["saved"]


def test_one_block_in_another() -> None:
    async def work(inner: float, outer: float) -> str:
        try:
            with time_limit(outer, Over):
                try:
                    with time_limit(inner, ClientDisconnect):
                        await asyncio.sleep(20)
                except ClientDisconnect:
                    return "inner"
        except Over:
            return "outer"
        return ""

    assert run(lambda: work(0.01, 5)) == "inner"
    assert run(lambda: work(5, 0.01)) == "outer"


@pytest.mark.skipif(sys.version_info < (3, 11), reason="asyncio.TaskGroup came with Python 3.11")
def test_a_cancel_that_is_over_is_forgotten() -> None:
    """A group that counts its task's cancels would take it for one from outside."""

    async def fails() -> None:
        raise ValueError

    async def work() -> str:
        with suppress(Over), time_limit(0.01, Over):
            await asyncio.sleep(20)
        with pytest.raises(Exception, match="TaskGroup"):
            async with asyncio.TaskGroup() as group:
                group.create_task(fails())
        await asyncio.sleep(0)
        return "goes on"

    assert run(work) == "goes on"


@given(st.lists(st.tuples(st.integers(0, 4), st.sampled_from(["leave", "cancel", "end"])), max_size=4))
def test_whatever_comes_in_whatever_turn(events: list[tuple[int, str]]) -> None:
    """It ends as one of the events wants it, and what is cancelled from outside never goes on."""

    async def main() -> tuple[str, bool]:
        client, end, cancelled = Client(), asyncio.Event(), False

        async def block() -> str:
            with time_limit(60, Over), client_needed(client.receive):
                await end.wait()
            # As what follows a block does, it waits.
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(asyncio.Event().wait(), 0.001)
            return "done"

        task = asyncio.ensure_future(block())
        for turns, event in [*events, (0, "end")]:
            for _ in range(turns):
                await asyncio.sleep(0)
            if event == "leave":
                client.leaves.set()
            elif event == "cancel":
                cancelled = task.cancel() or cancelled
            elif event == "end":
                end.set()
        try:
            return await task, cancelled
        except asyncio.CancelledError:
            return "cancelled", cancelled
        except ClientDisconnect:
            return "gone", cancelled

    how, cancelled = run(main)
    kinds = {event for _, event in events}
    assert how != "gone" or "leave" in kinds
    assert how != "cancelled" or cancelled
    if cancelled:
        assert how == "cancelled" or (how == "gone" and sys.version_info < (3, 11))
