"""The queue: one at a time, clients in turn, limits, and nobody lost when somebody goes away."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Coroutine
from typing import Any

import pytest

from rkruntime.errors import BusyError
from rkruntime.serve.queue import DAEMON, Client, FairQueue


def run(test: Callable[[], Coroutine[Any, Any, None]]) -> None:
    asyncio.run(asyncio.wait_for(test(), 30))


def client_of(account: str, name: str = "", own: str = "") -> Client:
    return account, name, own


def test_clients_take_turns() -> None:
    async def test() -> None:
        queue = FairQueue(100, 10)
        order: list[str] = []

        async def ask(client: str) -> None:
            async with queue.turn(client_of(client)):
                order.append(client)

        async with queue.turn(client_of("x")):
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
        async with queue.turn(client_of("x")):
            waiting = asyncio.create_task(queue.turn(client_of("a")).__aenter__())
            await asyncio.sleep(0)
            with pytest.raises(BusyError) as caught:
                await queue.turn(client_of("b")).__aenter__()
            assert caught.value.details["retry_after_s"] >= 1
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            assert len(queue) == 0
        assert not queue.busy

    run(test)


def test_waiting_has_an_end() -> None:
    async def test() -> None:
        queue = FairQueue(5, 0.01)
        async with queue.turn(client_of("x")):
            with pytest.raises(BusyError, match=r"0\.01 seconds"):
                await queue.turn(client_of("a")).__aenter__()
        async with queue.turn(client_of("a")):
            assert len(queue) == 0

    run(test)


def test_the_daemon_itself_waits_for_any_answer() -> None:
    """One answer may take longer than anybody waits (600 and 120 seconds), and a reload is for those after it."""

    async def test() -> None:
        queue = FairQueue(5, 0.01)
        async with queue.turn(client_of("x")):
            waiting = asyncio.create_task(queue.turn(DAEMON).__aenter__())
            with pytest.raises(BusyError):
                await queue.turn(client_of("a")).__aenter__()
            await asyncio.sleep(0.1)
            assert not waiting.done()
        assert await waiting > 0.1

    run(test)


def test_what_a_client_names_apart_takes_turns_within_its_own() -> None:
    """Twenty names of one client's cost another client one turn, not twenty."""

    async def test() -> None:
        queue = FairQueue(1000, 10)
        order: list[str] = []

        async def ask(client: Client) -> None:
            async with queue.turn(client):
                order.append(client[0])

        many = [client_of("mallory", own=str(number)) for number in range(20)]
        names = [client_of("pi", f"ann{number}") for number in range(20)]
        async with queue.turn(client_of("x")):
            tasks = [asyncio.create_task(ask(client)) for client in (*many, *names, client_of("bob"))]
            await asyncio.sleep(0)
        await asyncio.gather(*tasks)
        assert order[:3] == ["mallory", "pi", "bob"]
        assert order[3:7] == ["mallory", "pi"] * 2

    run(test)


@pytest.mark.parametrize(
    ("greedy", "other"),
    [
        (lambda number: client_of("ann", own=str(number)), client_of("bob")),
        (lambda number: client_of("ann", f"name{number}"), client_of("bob")),
        (lambda number: client_of("pi", "ann"), client_of("pi", "bob")),
    ],
    ids=["fields", "names", "within an account"],
)
def test_one_user_fills_no_queue(greedy: Callable[[int], Client], other: Client) -> None:
    async def test() -> None:
        queue = FairQueue(64, 10)
        async with queue.turn(client_of("x")):
            tasks = [asyncio.create_task(queue.turn(greedy(number)).__aenter__()) for number in range(200)]
            await asyncio.sleep(0)
            refused = sum(task.done() and isinstance(task.exception(), BusyError) for task in tasks)
            assert refused >= 200 - 16
            waiting = asyncio.create_task(queue.turn(other).__aenter__())
            await asyncio.sleep(0)
            assert not waiting.done()
            assert len(queue) == 201 - refused
            for task in (*tasks, waiting):
                task.cancel()
            await asyncio.gather(*tasks, waiting, return_exceptions=True)
        assert len(queue) == 0

    run(test)


def test_the_daemon_itself_is_never_refused() -> None:
    async def test() -> None:
        queue = FairQueue(1, 10)
        async with queue.turn(client_of("x")):
            tasks = [asyncio.create_task(queue.turn(client).__aenter__()) for client in (client_of("a"), DAEMON)]
            await asyncio.sleep(0)
            assert len(queue) == 2
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    run(test)


@pytest.mark.parametrize("seed", range(20))
def test_any_mix_of_answers_and_cancels_leaves_it_free(seed: int) -> None:
    chance = random.Random(seed)

    async def test() -> None:
        queue = FairQueue(30, 0.02)
        inside = 0
        done: list[Client | str] = []

        async def ask(client: Client) -> None:
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
            tasks.append(asyncio.create_task(ask(client_of(*chance.choices(["a", "b", ""], k=3)))))
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


@pytest.mark.parametrize("turns", range(6))
def test_a_cancel_is_not_lost_as_the_turn_comes(turns: int) -> None:
    async def test() -> None:
        queue = FairQueue(10, 5)
        loop, worked = asyncio.get_running_loop(), []

        async def work() -> None:
            async with queue.turn(client_of("a")):
                await asyncio.sleep(0.05)
                worked.append(1)

        def cancel(left: int) -> None:
            if left:
                loop.call_soon(cancel, left - 1)
            else:
                task.cancel()

        async with queue.turn(client_of("x")):
            task = asyncio.create_task(work())
            await asyncio.sleep(0)
        cancel(turns)
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not worked
        assert not queue.busy

    run(test)
