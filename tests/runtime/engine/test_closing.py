"""A model closed by whoever can: another thread, a signal's handler, an event loop, a fork."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import pytest

from rkruntime.bundle.manifest import Bundle
from rkruntime.engine.engine import Engine
from rkruntime.engine.generation import Event, Finished, Request
from rkruntime.engine.worker.events import AsyncRecords
from rkruntime.engine.worker.process import WorkerProcess
from rkruntime.errors import RKEdgeError, RunError
from rkruntime.model import Model, open_model
from rkruntime.text.template import Message

# "What is the RK3588?" for the demo model; its answer has 15 tokens.
REQUEST = Request([2, 106, 451, 364, 472, 474, 441, 477, 373, 375, 378, 378, 381, 107, 364, 106, 443, 364])


@pytest.fixture(autouse=True)
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RKEMU_TOKEN_US", "50000")


def gone(engine: Engine) -> bool:
    return not engine.alive and engine._connection.worker.process.returncode is not None


def outcome(work: Callable[[], Any]) -> str:
    try:
        return type(work()).__name__
    except RKEdgeError as error:
        return f"{type(error).__name__}: {error.message}"


def in_thread(work: Callable[[], Any]) -> tuple[threading.Thread, list[str]]:
    found: list[str] = []
    thread = threading.Thread(target=lambda: found.append(outcome(work)))
    thread.start()
    return thread, found


@pytest.mark.parametrize("after", [0.0, 0.01, 0.05, 0.2])
def test_another_thread_closes_what_this_one_reads(load: Callable[..., Engine], after: float) -> None:
    engine = load()
    begun = threading.Event()

    def read() -> list[Any]:
        begun.set()
        return list(engine.generate(REQUEST))

    thread, found = in_thread(read)
    begun.wait()
    time.sleep(after)
    engine.close()
    thread.join(20)
    assert gone(engine)
    assert found[0].startswith("RunError: The model ")
    assert outcome(lambda: list(engine.generate(REQUEST))).startswith("RunError: The model is closed")
    engine.close()


def test_many_threads_close_at_once(load: Callable[..., Engine]) -> None:
    engine = load()
    thread, found = in_thread(lambda: list(engine.generate(REQUEST)))
    closers = [in_thread(engine.close) for _ in range(4)]
    for one, _ in [(thread, found), *closers]:
        one.join(20)
    assert gone(engine)
    assert [said for _, said in closers] == [["NoneType"]] * 4
    assert found[0].startswith("RunError: The model ")


def test_a_stream_that_another_thread_has_put_aside(load: Callable[..., Engine]) -> None:
    engine = load(close_timeout=60)  # longer than the test may take
    stream = engine.generate(REQUEST)
    thread, _ = in_thread(lambda: next(stream))
    thread.join(20)
    engine.close()
    assert gone(engine)
    assert engine._connection.worker.process.returncode == 0
    assert outcome(lambda: list(stream)).startswith("RunError: The model ")


def test_a_stream_goes_on_while_another_thread_closes(load: Callable[..., Engine]) -> None:
    for number in range(20):
        engine = load(close_timeout=60)
        stream = engine.generate(REQUEST)
        next(stream)
        closer, _ = in_thread(engine.close)
        time.sleep(0.003 * number)
        found = outcome(lambda stream=stream: [*stream][-1])  # type: ignore[misc]
        closer.join(20)
        assert found.startswith("RunError: The model ") or found == "Finished"
        assert engine._connection.worker.process.returncode == 0


def test_commands_of_several_threads_and_a_close(load: Callable[..., Engine]) -> None:
    """Each is answered, told that another one is being answered, or told that the model is closed."""
    said: set[str] = set()
    for number in range(6):
        engine = load(close_timeout=60)

        def ask(engine: Engine = engine) -> None:
            with contextlib.suppress(RunError):
                while engine.alive:
                    said.add(outcome(engine.clear_cache))
                    said.add(outcome(engine.cache_sizes))

        threads = [in_thread(ask)[0] for _ in range(3)]
        time.sleep(0.02 * number)
        engine.close()
        for thread in threads:
            thread.join(20)
        assert engine._connection.worker.process.returncode == 0
    assert said - {"NoneType", "list"} <= {
        "RunError: Another run is in progress: one at a time.",
        "RunError: The model was closed before the answer's end.",
        "RunError: The model is closed.",
    }


def test_a_signals_handler_closes(load: Callable[..., Engine]) -> None:
    engine = load()
    before = signal.signal(signal.SIGALRM, lambda *_: engine.close())
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.15)
        assert outcome(lambda: list(engine.generate(REQUEST))).startswith("RunError: The model ")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert gone(engine)


def reading(engine: Engine) -> list[Event]:
    return list(engine.generate(REQUEST))


def handed_over(engine: Engine) -> list[Event]:
    events: list[Event] = []

    def take(more: list[Event]) -> bool:
        events.extend(more)
        return True

    asyncio.run(engine.deliver(REQUEST, take))
    return events


@pytest.mark.long
@pytest.mark.parametrize("read", [reading, handed_over])
def test_a_signals_handler_closes_before_any_line_of_the_reader(
    load: Callable[..., Engine], read: Callable[[Engine], list[Event]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Python runs a handler between any two lines, once a token has come; here it does for each of them in turn."""
    monkeypatch.setenv("RKEMU_TOKEN_US", "2000")
    files = {inspect.getfile(WorkerProcess), inspect.getfile(AsyncRecords)}

    def tried(wanted: tuple[str, int] | None) -> set[tuple[str, int]]:
        """Close the engine before this line; returns the lines that are reached from the third read on."""
        engine, seen, reads = load(), set[tuple[str, int]](), 0

        def trace(frame: FrameType, event: str, _: Any) -> Any:
            nonlocal reads
            code = frame.f_code
            if code.co_filename not in files:
                return None
            reads += code.co_name == "receive" and event == "call"
            if event == "line" and reads > 2:
                here = code.co_name, frame.f_lineno
                if here == wanted:
                    sys.settrace(None)
                    frame.f_trace = None
                    engine.close()
                    return None
                seen.add(here)
            return trace

        before = sys.gettrace()
        sys.settrace(trace)
        try:
            said = outcome(lambda: read(engine)[-1])
        finally:
            sys.settrace(before)
            engine.close()
        assert said == "Finished" or (wanted and said.startswith("RunError: The model ")), (wanted, said)
        return seen

    lines = tried(None)
    assert len(lines) > 20
    for line in sorted(lines):
        tried(line)


def test_a_thread_closes_what_an_event_loop_reads(load: Callable[..., Engine]) -> None:
    engine = load()

    async def main() -> None:
        closing: asyncio.Future[None] | None = None
        async with contextlib.aclosing(engine.agenerate(REQUEST)) as events:
            async for _ in events:
                closing = closing or asyncio.ensure_future(asyncio.to_thread(engine.close))
        assert closing is not None
        await closing

    assert outcome(lambda: asyncio.run(main())).startswith("RunError: The model ")
    assert gone(engine)


def test_a_thread_closes_what_an_event_loop_hands_over(load: Callable[..., Engine]) -> None:
    engine = load()

    async def main() -> None:
        closing: list[asyncio.Future[None]] = []

        def take(_: list[Event]) -> bool:
            closing.append(asyncio.ensure_future(asyncio.to_thread(engine.close)))
            return True

        try:
            await engine.deliver(REQUEST, take)
        finally:
            await asyncio.gather(*closing)

    assert outcome(lambda: asyncio.run(main())).startswith("RunError: The model ")
    assert gone(engine)


@pytest.fixture
def model(bundle: Bundle) -> Iterator[Model]:
    with open_model(bundle) as opened:
        yield opened


def forked(work: Callable[[], Any]) -> str:
    """What a fork makes of it; the fork leaves as programs do, with everything that Python runs at exit."""
    read, write = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(write, outcome(work).encode())
        finally:
            os.close(write)
            import atexit

            atexit._run_exitfuncs()
            os._exit(0)
    os.close(write)
    with open(read, "rb") as said:  # noqa: PTH123 - a descriptor
        words = said.read().decode()
    os.waitpid(child, 0)
    return words


def left(model: Model) -> None:
    with model:
        pass


FORKS: dict[str, Callable[[Model], Any]] = {
    "leaves": left,
    "closes": lambda model: model.engine.close(),
    "asks": lambda model: model.ask("What is the RK3588?"),
    "generates": lambda model: list(model.engine.generate(REQUEST)),
    "calls": lambda model: model.engine.clear_cache(),
    "prompts": lambda model: model.prompts.encode("x", 64),
    "nothing": lambda model: None,
}


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_fork_can_do_nothing_to_its_parents_model(model: Model) -> None:
    for name, work in FORKS.items():
        said = forked(lambda work=work: work(model))
        assert said == "NoneType" or ("RunError" in said and "forked" in said), (name, said)
        assert (said == "NoneType") is (name in ("leaves", "closes", "nothing")), (name, said)
    events = model.engine.generate(REQUEST)
    first = next(events)
    assert "forked" in forked(lambda: list(events))
    assert "forked" in forked(model.engine.kill)
    assert "NoneType" in forked(model.engine.abort)
    assert "NoneType" in forked(events.close)
    rest = list(events)
    assert isinstance(rest[-1], Finished)
    assert [first, *rest][:-1] == list(model.engine.generate(REQUEST))[:-1]
    assert model.ask("What is the RK3588?", max_new_tokens=2).text


def test_a_prompt_that_is_being_made_when_the_model_is_closed(model: Model) -> None:
    thread, found = in_thread(lambda: [model.prompts.encode("word " * 200_000, 10) for _ in range(50)])
    time.sleep(0.3)
    model.close()
    thread.join(20)
    assert found[0].startswith(("RunError: The model ", "ContextFullError")), found


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_a_fork_does_not_wait_for_a_thread_that_it_does_not_have(model: Model) -> None:
    held, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with model.engine._closing:
            held.set()
            leave.wait(60)

    thread = threading.Thread(target=hold)
    thread.start()
    assert held.wait(10)
    try:
        assert forked(model.close) == "NoneType"
    finally:
        leave.set()
        thread.join()


def test_a_signals_handler_closes_while_a_prompt_is_made(model: Model) -> None:
    before = signal.signal(signal.SIGALRM, lambda *_: model.close())
    signal.setitimer(signal.ITIMER_REAL, 0.01)
    try:
        with pytest.raises(RunError, match="The model"):
            for _ in range(1000):
                model.prompts.prompt([Message("user", "word " * 1500)], 4096, drop=True)
        assert not model.engine.alive
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
