"""The queue: one at a time, clients in turn, limits, and nobody lost when somebody goes away."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from rkruntime.errors import BusyError
from rkruntime.serve.queue import FairQueue


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 30))


def test_clients_take_turns() -> None:
    async def test() -> None:
        queue = FairQueue(100, 10)
        order: list[str] = []

        async def ask(client: str) -> None:
            async with queue.turn(client):
                order.append(client)

        async with queue.turn("x"):
            tasks = [asyncio.create_task(ask(client)) for client in "aaaabbc"]
            await asyncio.sleep(0)
            assert len(queue) == 7
        await asyncio.gather(*tasks)
        assert "".join(order) == "abcabaa"
        assert not queue.busy

    run(test)


def test_too_many_are_refused_with_a_time_to_try_again() -> None:
    async def test() -> None:
        queue = FairQueue(1, 10)
        async with queue.turn("x"):
            waiting = asyncio.create_task(queue.turn("a").__aenter__())
            await asyncio.sleep(0)
            with pytest.raises(BusyError) as caught:
                await queue.turn("b").__aenter__()
            assert caught.value.details["retry_after_s"] >= 1
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            assert len(queue) == 0
        assert not queue.busy

    run(test)


def test_waiting_has_an_end() -> None:
    async def test() -> None:
        queue = FairQueue(5, 0.01)
        async with queue.turn("x"):
            with pytest.raises(BusyError, match=r"0\.01 seconds"):
                await queue.turn("a").__aenter__()
        async with queue.turn("a"):
            assert len(queue) == 0

    run(test)


@pytest.mark.parametrize("seed", range(20))
def test_any_mix_of_answers_and_cancels_leaves_it_free(seed: int) -> None:
    chance = random.Random(seed)

    async def test() -> None:
        queue = FairQueue(30, 0.02)
        inside = 0
        done: list[str] = []

        async def ask(client: str) -> None:
            nonlocal inside
            try:
                async with queue.turn(client):
                    inside += 1
                    assert inside == 1
                    try:
                        await asyncio.sleep(chance.choice([0, 0, 0.001]))
                    finally:
                        inside -= 1
                    done.append(client)
            except BusyError:
                done.append("refused")

        tasks = []
        for _ in range(60):
            tasks.append(asyncio.create_task(ask(chance.choice("abc"))))
            if chance.random() < 0.5:
                await asyncio.sleep(chance.choice([0, 0.001]))
            if chance.random() < 0.3:
                chance.choice(tasks).cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        cancelled = sum(isinstance(result, asyncio.CancelledError) for result in results)
        assert len(done) + cancelled == 60
        assert not [result for result in results if isinstance(result, AssertionError)]
        assert not queue.busy
        assert len(queue) == 0

    run(test)
