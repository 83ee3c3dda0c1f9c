"""A library that crashes, hangs, exits, lies or prints: each ends as its typed error, and the next load works."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from tests.runtime.conftest import Interrupt
from tests.runtime.engine.misbehaviour import REQUEST, Misbehaving, collected, works

from rkruntime.engine.engine import Engine, Lora
from rkruntime.engine.generation import FinishReason, Request
from rkruntime.errors import (
    LoadError,
    RunError,
    WorkerCrashedError,
    WorkerHungError,
)
from rkruntime.stop import Stop

CRASHES = {
    "segv": "SIGSEGV",
    "ill": "SIGILL",
    "abort": "SIGABRT",
    "exit": "exit code 1",
    "exit0": "exit code 0",
    "grandchild": "SIGABRT",
}


@pytest.fixture(params=["1.1.4", "1.2.3", "1.3.0"])
def release(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.mark.parametrize("how", CRASHES)
def test_a_crash_while_loading(misbehaving: Misbehaving, release: str, how: str) -> None:
    with pytest.raises(WorkerCrashedError, match=CRASHES[how]) as caught:
        Engine.load(misbehaving(f"init-{how}", release))
    assert any("rkllm-runtime version" in line for line in caught.value.details["log"])
    assert "diagnosis" in caught.value.details
    works(misbehaving, release)


@pytest.mark.parametrize("how", CRASHES)
def test_a_crash_at_a_token(misbehaving: Misbehaving, release: str, how: str) -> None:
    engine = Engine.load(misbehaving(f"token-{how}", release))
    events = engine.generate(REQUEST)
    assert [next(events).token_id for _ in range(3)] == [100, 101, 102]  # what came before it arrives
    with pytest.raises(WorkerCrashedError, match=CRASHES[how]):
        next(events)
    with pytest.raises(WorkerCrashedError, match="The worker is gone"):
        list(engine.generate(REQUEST))
    engine.abort()
    engine.close()
    works(misbehaving, release)


@pytest.mark.parametrize("how", ["segv", "exit"])
def test_a_crash_in_other_calls(misbehaving: Misbehaving, how: str) -> None:
    with Engine.load(misbehaving(f"clear-{how}")) as engine, pytest.raises(WorkerCrashedError, match=CRASHES[how]):
        engine.clear_cache()
    with Engine.load(misbehaving(f"destroy-{how}")) as engine:  # nothing is lost by it any more
        list(engine.generate(REQUEST))


@pytest.mark.parametrize("how", ["hang", "spin"])
def test_a_load_that_never_returns(misbehaving: Misbehaving, release: str, how: str) -> None:
    with pytest.raises(WorkerHungError, match=r"did not respond for 0\.3 seconds"):
        Engine.load(misbehaving(f"init-{how}", release, load_timeout=0.3))
    works(misbehaving, release)


@pytest.mark.parametrize("how", ["hang", "spin"])
def test_a_run_that_hangs(misbehaving: Misbehaving, release: str, how: str) -> None:
    engine = Engine.load(misbehaving(f"token-{how}", release, token_timeout=0.3))
    events = engine.generate(REQUEST)
    for _ in range(3):
        next(events)
    with pytest.raises(WorkerHungError):
        next(events)
    engine.close()
    works(misbehaving, release)


def test_other_calls_that_hang(misbehaving: Misbehaving) -> None:
    with Engine.load(misbehaving("clear-hang", token_timeout=0.3)) as engine, pytest.raises(WorkerHungError):
        engine.clear_cache()
    engine = Engine.load(misbehaving("destroy-hang", close_timeout=0.3))
    engine.close()
    # A hang that nobody waits for: the iterator is closed, and the library does not listen to the abort.
    engine = Engine.load(misbehaving("token-hang", token_timeout=0.3))
    events = engine.generate(REQUEST)
    next(events)
    time.sleep(0.05)
    events.close()
    assert not engine.alive
    for _ in range(2):
        with pytest.raises(
            WorkerHungError, match=r"^The worker is gone: The runtime library did not respond for 0.3 seconds"
        ):
            engine.cache_sizes()
    engine.close()
    works(misbehaving)


def test_an_abort_that_does_not_help(misbehaving: Misbehaving) -> None:
    """The worker is killed long before a token counts as late, whoever waits for the end of the run."""

    def aborted(engine: Engine) -> None:
        threading.Timer(0.2, engine.abort).start()
        list(engine.generate(REQUEST))

    async def cancelled(engine: Engine) -> None:
        with contextlib.suppress(TimeoutError, asyncio.TimeoutError):
            await asyncio.wait_for(collected(engine), 0.2)

    for way in (aborted, cancelled):
        # at=0: also before the first token
        options = misbehaving("token-hang", at=0, token_timeout=300.0, close_timeout=300.0, abort_timeout=0.3)
        with Engine.load(options) as engine:
            with pytest.raises(WorkerHungError, match=r"did not respond for 0\.3 seconds"):
                asyncio.run(way(engine)) if way is cancelled else way(engine)
            assert not engine.alive


def test_a_run_that_is_left_for_good(misbehaving: Misbehaving) -> None:
    """A second interrupt, while the end of the run is waited for: to close the model takes no longer."""
    presses: list[int] = []

    def press(*_: object) -> None:
        presses.append(len(presses))
        if len(presses) < 3:
            raise Interrupt

    limits = {"token_timeout": 300.0, "close_timeout": 300.0, "abort_timeout": 300.0}
    before = signal.signal(signal.SIGALRM, press)
    try:
        with Engine.load(misbehaving("token-hang", **limits)) as engine, pytest.raises(Interrupt):
            signal.setitimer(signal.ITIMER_REAL, 0.4, 0.4)
            list(engine.generate(REQUEST))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert not engine.alive
    assert len(presses) > 1


def test_a_stop_is_not_forgotten(misbehaving: Misbehaving) -> None:
    """One that comes before the run begins."""
    stop = Stop()
    stop.ask()
    with Engine.load(misbehaving("", tokens=100_000, us=1000)) as engine:
        *_, finished = engine.generate(REQUEST, stop)
        assert finished.reason is FinishReason.ABORT
        assert list(engine.generate(Request([1], max_new_tokens=3)))[-1].reason is FinishReason.LENGTH


@pytest.mark.parametrize("reading", [0.0, 60.0])
def test_a_long_prompt_is_not_taken_for_a_hang(
    misbehaving: Misbehaving, monkeypatch: pytest.MonkeyPatch, reading: float
) -> None:
    """A library that notices an abort late gets the time that its prompt may take."""
    monkeypatch.setattr("rkruntime.engine.runs._READING", reading)
    with Engine.load(misbehaving("abort-deaf", tokens=150, us=20_000, abort_timeout=0.5)) as engine:
        events = engine.generate(REQUEST)
        next(events)
        events.close()
        assert engine.alive is (reading > 0)


@pytest.mark.parametrize("end", ["close", "collect"])
def test_an_iterator_that_nobody_wants_does_not_raise(misbehaving: Misbehaving, end: str) -> None:
    """Also where the worker is killed in the middle: an exception within __del__ would only be printed."""
    with Engine.load(misbehaving("", us=10_000, tokens=1000)) as engine:
        events = engine.generate(REQUEST)
        next(events)
        engine._connection.worker.process.kill()
        if end == "close":
            events.close()
        else:
            del events  # warnings are errors in these tests, and so is an exception that nobody catches
            gc.collect()
        with pytest.raises(WorkerCrashedError, match="SIGKILL"):
            list(engine.generate(REQUEST))


def test_crashes_and_hangs_in_asyncio(misbehaving: Misbehaving) -> None:
    for behaviour, error in (
        ("token-segv", WorkerCrashedError),
        ("token-exit", WorkerCrashedError),
        ("token-hang", WorkerHungError),
    ):
        with Engine.load(misbehaving(behaviour, token_timeout=0.3)) as engine, pytest.raises(error) as caught:
            asyncio.run(collected(engine))
        assert caught.value.details["log"]
    with Engine.load(misbehaving("token-grandchild")) as engine, pytest.raises(WorkerCrashedError, match="SIGABRT"):
        asyncio.run(collected(engine))
    with Engine.load(misbehaving("token-error")) as engine, pytest.raises(RunError):
        asyncio.run(collected(engine))


@pytest.mark.parametrize(
    ("behaviour", "message", "diagnosis"),
    [
        ("init-fails", "rkllm_init returned -1", None),
        ("init-npu-memory", "rkllm_init returned -1", "npu-address-space-exhausted"),
        ("init-logs-and-succeeds", "its log says: E RKNN: .*errno: 14", "npu-address-space-exhausted"),
        ("init-no-handle", "returned 0 and no handle", None),
    ],
)
def test_failed_loads(
    misbehaving: Misbehaving, release: str, behaviour: str, message: str, diagnosis: str | None
) -> None:
    with pytest.raises(LoadError, match=message) as caught:
        Engine.load(misbehaving(behaviour, release))
    if diagnosis:
        assert caught.value.details["diagnosis"]["class"] == diagnosis
    works(misbehaving, release)


def test_an_adapter_that_fails_ends_the_load(misbehaving: Misbehaving, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter.rkllm"
    adapter.touch()
    with pytest.raises(RunError, match="rkllm_load_lora returned -1"):
        Engine.load(misbehaving("lora-fails", loras=(Lora("a", adapter),)))


def test_runs_that_fail_leave_the_model_loaded(misbehaving: Misbehaving, release: str) -> None:
    for behaviour, match in (
        ("token-error", "the runtime logged: E rkllm: matmul"),
        ("run-refuses", "rkllm_run returned -1"),
    ):
        with Engine.load(misbehaving(behaviour, release)) as engine:
            for _ in range(2):
                with pytest.raises(RunError, match=match) as caught:
                    list(engine.generate(REQUEST))
                assert isinstance(caught.value, RunError)
    assert "diagnosis" in caught.value.details


def test_a_failed_run_is_diagnosed(misbehaving: Misbehaving) -> None:
    with Engine.load(misbehaving("token-error")) as engine, pytest.raises(RunError) as caught:
        list(engine.generate(REQUEST))
    # The double's driver is 0.9.8, so it is not too old.
    assert caught.value.details["diagnosis"]["class"] == "output-wrong-other"


def test_a_lost_finish_and_missing_texts(misbehaving: Misbehaving, release: str) -> None:
    with Engine.load(misbehaving("lost-finish,null-text,waiting", release)) as engine:
        for _ in range(2):
            *tokens, finished = engine.generate(REQUEST)
            assert [(token.token_id, token.text) for token in tokens] == [(100 + i, b"") for i in range(10)]
            assert (finished.reason, finished.generated_tokens, finished.perf) == (FinishReason.STOP, 10, None)


def test_an_empty_answer_is_one(misbehaving: Misbehaving, release: str) -> None:
    with Engine.load(misbehaving("", release, tokens=0)) as engine:
        (finished,) = engine.generate(REQUEST)
        assert (finished.reason, finished.generated_tokens) == (FinishReason.STOP, 0)


@pytest.mark.parametrize("state", [-1, 5, 77, 2**31 - 1])
def test_a_state_that_there_is_not(misbehaving: Misbehaving, release: str, state: int) -> None:
    faulty = misbehaving("unknown-state", release)
    faulty = replace(faulty, environment={**faulty.environment, "RKDOUBLE_STATE": str(state)})
    with Engine.load(faulty) as engine:
        for _ in range(2):
            with pytest.raises(RunError, match=r"reported the state \d"):
                list(engine.generate(REQUEST))
    works(misbehaving, release)


@pytest.mark.parametrize("behaviour", ["no-callback", "lost-finish"])
def test_a_run_of_which_nothing_is_heard(misbehaving: Misbehaving, release: str, behaviour: str) -> None:
    with Engine.load(misbehaving(behaviour, release, tokens=0)) as engine:
        for _ in range(2):
            with pytest.raises(RunError, match="neither a token nor an end"):
                list(engine.generate(REQUEST))


def test_tokens_behind_the_end(misbehaving: Misbehaving, release: str) -> None:
    with Engine.load(misbehaving("early-finish", release)) as engine:
        for _ in range(2):
            with pytest.raises(RunError, match="end of the run, then more tokens"):
                list(engine.generate(REQUEST))
            # What comes behind an end of our own making is dropped.
            *tokens, finished = engine.generate(Request([1], stop_tokens=frozenset({102})))
            assert ([token.token_id for token in tokens], finished.reason) == ([100, 101], FinishReason.STOP)


# --- abort in every way that a library may have it ---------------------------------------------------------------


@pytest.mark.parametrize("behaviour", ["", "abort-waits", "abort-late"])
def test_stops_and_limits(misbehaving: Misbehaving, release: str, behaviour: str) -> None:
    """Also if rkllm_abort returns only when the run has ended: called in the callback, it would never return."""
    with Engine.load(misbehaving(behaviour, release, tokens=100000)) as engine:
        for _ in range(20):
            *tokens, finished = engine.generate(Request([1], stop_tokens=frozenset({105})))
            if behaviour == "abort-late" and not tokens:
                continue  # the flag of the last run ended this one: the double's own fault
            assert [token.token_id for token in tokens] == list(range(100, 105))
            assert finished.reason is FinishReason.STOP
        *tokens, finished = engine.generate(Request([1], max_new_tokens=4))
        assert finished.reason in (FinishReason.LENGTH, FinishReason.ABORT, FinishReason.STOP)
        assert len(tokens) <= 4


def test_a_library_that_does_not_listen(misbehaving: Misbehaving) -> None:
    """A stop that the library ignores: what it says behind it is dropped, until it ends by itself."""
    with Engine.load(misbehaving("abort-deaf", tokens=2000)) as engine:
        *tokens, finished = engine.generate(Request([1], stop_tokens=frozenset({105})))
        assert len(tokens) == 5
        assert finished.reason is FinishReason.STOP
        events = engine.generate(REQUEST)
        next(events)
        events.close()
        assert len(list(engine.generate(Request([1], max_new_tokens=3)))) == 4


# --- output ------------------------------------------------------------------------------------------------------


# --- around the process ------------------------------------------------------------------------------------------
