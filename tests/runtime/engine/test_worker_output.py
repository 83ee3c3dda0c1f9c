"""What a library prints: kept for the error, bounded, and never in the way of an answer."""

from __future__ import annotations

import asyncio
import contextlib
import time
from dataclasses import replace

import pytest
from tests.runtime.engine.misbehaviour import REQUEST, Misbehaving, collected, works

from rkruntime.engine.engine import Engine
from rkruntime.errors import (
    RunError,
    WorkerHungError,
    WorkerProtocolError,
)


def test_output_is_kept(misbehaving: Misbehaving, capfd: pytest.CaptureFixture[str]) -> None:
    lines: list[str] = []
    options = misbehaving("init-lines,init-unfinished-line,init-binary")
    with Engine.load(options, on_log=lines.append) as engine:
        assert any("a line on stdout" in line for line in engine.info.log)
    assert "a line on stdout" in lines
    assert any("no line feed at the end" in line for line in [*lines, *engine.log])
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("where", ["init", "token"])
def test_a_flood_of_output(misbehaving: Misbehaving, where: str) -> None:
    """60 MB of lines neither stop the library nor fill the memory."""
    with Engine.load(misbehaving(f"{where}-flood", load_timeout=60, token_timeout=60)) as engine:
        assert len(list(engine.generate(REQUEST))) == 11
        assert len(engine.log) <= 200


@pytest.mark.parametrize(
    ("where", "line"),
    [(where, "\n") for where in ("init", "token", "clear", "destroy")]
    + [("token", line) for line in ("failed to \n" * 7, "m" * 500, "x" * 100_000 + "\n")],
)
def test_a_flood_without_end(misbehaving: Misbehaving, where: str, line: str) -> None:
    """Neither time limit nor abort waits for the end of what is printed, whatever it costs to read."""
    limits = {"load_timeout": 1.0 if where == "init" else 20.0, "token_timeout": 1.0, "close_timeout": 1.0}
    options = misbehaving(f"{where}-flood-for-ever", **limits)
    options = replace(options, environment={**options.environment, "RKDOUBLE_LINE": line})
    with contextlib.ExitStack() as stack:
        if where != "destroy":
            stack.enter_context(pytest.raises(WorkerHungError, match=r"did not respond for 1 second"))
        with Engine.load(options) as engine:
            if where == "clear":
                engine.clear_cache()
            list(engine.generate(REQUEST))


def test_a_flood_beside_an_answer(misbehaving: Misbehaving) -> None:
    """A library that prints without end, and answers as well, is slow and right; an alarm in between is found."""
    for behaviour, line in (("init-flood-beside", "\n"), ("init-flood-beside", "I rkllm: all is well\n" * 100)):
        options = misbehaving(behaviour, us=1000)
        options = replace(options, environment={**options.environment, "RKDOUBLE_LINE": line})
        with Engine.load(options) as engine:
            for _ in range(3):
                assert [event.token_id for event in list(engine.generate(REQUEST))[:-1]] == list(range(100, 110))
            events = asyncio.run(collected(engine))
            assert [event.token_id for event in events[:-1]] == list(range(100, 110))
            assert len(engine.log) <= 200
    options = misbehaving("token-flood-beside", us=100_000)
    line = "\n" * 3000 + "E RKNN: failed to submit!, op id: 1\n" + "\n" * 3000
    options = replace(options, environment={**options.environment, "RKDOUBLE_LINE": line})
    with Engine.load(options) as engine, pytest.raises(RunError, match="the runtime logged: E RKNN: failed to submit"):
        list(engine.generate(REQUEST))


def test_a_flood_leaves_the_event_loop_its_time(misbehaving: Misbehaving) -> None:
    options = misbehaving("token-flood-for-ever", token_timeout=2.0)

    async def go(engine: Engine) -> int:
        ticks = 0

        async def tick() -> None:
            nonlocal ticks
            while True:
                await asyncio.sleep(0.01)
                ticks += 1

        ticking = asyncio.create_task(tick())
        with pytest.raises(WorkerHungError):
            await collected(engine)
        ticking.cancel()
        return ticks

    with Engine.load(options) as engine:
        assert asyncio.run(go(engine)) > 20  # of 200


def test_a_library_that_closes_its_output(misbehaving: Misbehaving) -> None:
    with Engine.load(misbehaving("init-close-output", us=100_000)) as engine:
        used = time.process_time()
        assert len(asyncio.run(collected(engine))) == 11
        assert time.process_time() - used < 0.5  # of 1 s: nobody looks for ever at a pipe that has ended


@pytest.mark.parametrize("loop", [False, True])
def test_a_library_that_writes_records(misbehaving: Misbehaving, loop: bool) -> None:
    """See test_lies.py for all that it may write."""
    with Engine.load(misbehaving("token-lie", us=1000)) as engine:
        for _ in range(2):
            with pytest.raises(WorkerProtocolError):
                asyncio.run(collected(engine)) if loop else list(engine.generate(REQUEST))
    works(misbehaving)
