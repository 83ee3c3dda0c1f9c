"""Which way the texts of an answer take to their client, however the two are timed: none is lost, none overtakes."""

from __future__ import annotations

import asyncio
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from rkruntime.serve.run import Run

# Texts that come together; or the client stops or begins to read, or whoever sends to it gets a turn of the loop.
STEPS = st.lists(st.one_of(st.integers(1, 3), st.sampled_from(["stop", "read", "turn"])), max_size=30)


class Client:
    """Reads, or does not: then what was sent before is all that it takes."""

    def __init__(self) -> None:
        self.behind = False
        self.events: list[str] = []
        self.pushed = 0

    def push(self, texts: list[str]) -> bool:
        if self.behind:
            return False
        self.events += texts
        self.pushed += len(texts)
        return True


async def streamed(steps: list[Any], *, direct: bool) -> tuple[list[str], Client]:
    """What was said, and the client that it was said to."""
    client, said = Client(), list[str]()

    async def work(run: Run) -> None:
        for step in steps:
            if isinstance(step, int):
                texts = [f"{len(said) + number}," for number in range(step)]
                said.extend(texts)
                run.put_texts(texts)
            elif step == "turn":
                await asyncio.sleep(0)
            else:
                client.behind = step == "stop"
        run.end(None)

    run = Run(work)
    run.outlet = client if direct else None
    while items := await run.take():
        client.events += [item for item in items if isinstance(item, str)]
        while client.behind and not run._task.done():  # a send that waits for the client
            await asyncio.sleep(0)
    return said, client


@given(STEPS, st.booleans())
def test_texts_arrive_in_order_and_whole(steps: list[Any], direct: bool) -> None:
    said, client = asyncio.run(streamed(steps, direct=direct))
    assert "".join(client.events) == "".join(said)
    if "stop" not in steps:
        assert client.events == said  # one event each


def test_who_waits_is_given_texts_at_once_and_who_is_behind_all_in_one() -> None:
    said, client = asyncio.run(
        streamed(["turn", 1, 2, "stop", 1, 2, "turn", 1, "turn", "read", "turn", 1], direct=True)
    )
    assert client.pushed >= 3
    assert client.events[:3] == said[:3]
    assert len(client.events) < len(said)
