"""A library that crashes, hangs, exits, lies or prints: each ends as its typed error, and the next load works."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.runtime.conftest import Interrupt

from rkruntime.engine.engine import Engine, LoadOptions, Lora
from rkruntime.engine.generation import FinishReason, Request
from rkruntime.errors import (
    HostError,
    LibraryError,
    LoadError,
    RunError,
    WorkerCrashedError,
    WorkerError,
    WorkerHungError,
    WorkerProtocolError,
)
from rkruntime.stop import Stop

Misbehaving = Callable[..., LoadOptions]
REQUEST = Request([1, 2, 3])

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


def works(options: Misbehaving, release: str = "1.2.3") -> None:
    """The same library loads and answers when it does not misbehave."""
    with Engine.load(options("", release)) as engine:
        events = list(engine.generate(REQUEST))
        assert [event.token_id for event in events[:-1]] == list(range(100, 110))


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


async def collected(engine: Engine) -> list[Any]:
    return [event async for event in engine.agenerate(REQUEST)]


@pytest.mark.parametrize("loop", [False, True])
def test_a_library_that_writes_records(misbehaving: Misbehaving, loop: bool) -> None:
    """See test_lies.py for all that it may write."""
    with Engine.load(misbehaving("token-lie", us=1000)) as engine:
        for _ in range(2):
            with pytest.raises(WorkerProtocolError):
                asyncio.run(collected(engine)) if loop else list(engine.generate(REQUEST))
    works(misbehaving)


# --- around the process ------------------------------------------------------------------------------------------


def test_the_worker_is_small_and_knows_nothing_of_ours(
    misbehaving: Misbehaving, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, worker_of: Callable[[Engine], int]
) -> None:
    """Neither PYTHONPATH nor the working folder have a say in it, and it loads no array package."""
    for name in ("json", "numpy", "sitecustomize"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('the wrong module')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    options = misbehaving("")
    options.library.resolve()
    monkeypatch.chdir(tmp_path)
    with Engine.load(options) as engine:
        pid = worker_of(engine)
        maps = Path(f"/proc/{pid}/maps").read_text()
        assert not any(name in maps for name in ("numpy", "torch", "tokenizers"))
        status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
        assert int(status["VmRSS"].split()[0]) < 40_000  # kB
        assert Path(f"/proc/{pid}/limits").read_text()
        soft, hard = next(
            line.split()[3:5]
            for line in Path(f"/proc/{pid}/limits").read_text().splitlines()
            if line.startswith("Max open files")
        )
        assert soft == hard
        opened = {str(fd.readlink()) for fd in Path(f"/proc/{pid}/fd").iterdir()}
        assert sum(name.startswith("pipe:") for name in opened) == 3


def test_ctrl_c_is_the_parents(misbehaving: Misbehaving, worker_of: Callable[[Engine], int]) -> None:
    with Engine.load(misbehaving("", us=2000, tokens=30)) as engine:
        events = engine.generate(REQUEST)
        next(events)
        os.kill(worker_of(engine), signal.SIGINT)
        assert os.getpgid(worker_of(engine)) != os.getpgid(0)
        assert len(list(events)) == 30


def test_the_worker_ends_with_its_parent(misbehaving: Misbehaving) -> None:
    """Closing its command pipe is all that a dead parent does."""
    engine = Engine.load(misbehaving("", us=100_000, tokens=1000))
    events = engine.generate(REQUEST)
    next(events)
    os.close(engine._connection.worker._commands._fd)
    engine._connection.worker._commands._fd = -1
    assert engine._connection.worker.process.wait(10) == 0
    with pytest.raises(WorkerCrashedError):
        list(events)
    engine.close()


def running(marker: str) -> list[int]:
    """The processes with this word in their environment."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if marker.encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
    return found


@pytest.mark.parametrize("end", ["close", "crash", "hang", "kill", "abandon"])
def test_what_the_library_starts_does_not_outlive_it(
    misbehaving: Misbehaving, worker_of: Callable[[Engine], int], tmp_path: Path, end: str
) -> None:
    """Processes in sessions of their own, and theirs, however the worker ends."""
    behaviour = {"crash": "init-daemon,token-segv", "hang": "init-daemon,token-hang"}.get(end, "init-daemon")
    options = misbehaving(behaviour, token_timeout=0.5)
    marker = f"RKMARK={tmp_path}"
    options = replace(options, environment={**options.environment, "RKMARK": str(tmp_path)})
    engine = Engine.load(options)
    assert len(running(marker)) == 5  # keeper, worker, three daemons
    if end == "kill":
        os.kill(worker_of(engine), signal.SIGKILL)
    if end in ("crash", "hang", "kill"):
        with pytest.raises(WorkerError):
            list(engine.generate(REQUEST))
    elif end == "close":
        engine.close()
    del engine
    gc.collect()
    # Nobody waits where somebody forgot: a daemon's event loop may be what collects it.
    deadline = time.monotonic() + (20 if end == "abandon" else 0)
    while running(marker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert running(marker) == []
    works(misbehaving)  # and reaps what nobody waited for


def test_a_fork_leaves_its_parents_worker_alone(misbehaving: Misbehaving) -> None:
    options = misbehaving("")
    program = (
        "import os, sys\nfrom pathlib import Path\n"
        "from rkruntime.engine.engine import Engine, LoadOptions\nfrom rkruntime.engine.generation import Request\n"
        "engine = Engine.load(LoadOptions(library=Path(sys.argv[1]), model=Path(sys.argv[2])))\n"
        "child = os.fork()\n"
        "if not child:\n"
        "    sys.exit()\n"
        "os.waitpid(child, 0)\n"
        "print(len(list(engine.generate(Request([1, 2, 3])))))\n"
    )
    command = [sys.executable, "-c", program, str(options.library), str(options.model)]
    environment = {**os.environ, **options.environment}
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert (ended.returncode, ended.stdout) == (0, "11\n"), ended.stderr


def test_a_killed_parent_takes_all_along(misbehaving: Misbehaving, tmp_path: Path) -> None:
    options = misbehaving("init-daemon,token-hang")
    program = (
        "import sys, threading\nfrom pathlib import Path\n"
        "from rkruntime.engine.engine import Engine, LoadOptions\nfrom rkruntime.engine.generation import Request\n"
        "def load():\n"
        "    global engine\n"
        "    engine = Engine.load(LoadOptions(library=Path(sys.argv[1]), model=Path(sys.argv[2])))\n"
        # The thread that loaded the model is gone, which is not the parent's end.
        "thread = threading.Thread(target=load)\nthread.start()\nthread.join()\n"
        "for event in engine.generate(Request([1])):\n"
        "    print(event.token_id, flush=True)\n"
    )
    environment = {**os.environ, **options.environment, "RKMARK": str(tmp_path)}
    command = [sys.executable, "-c", program, str(options.library), str(options.model)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        assert [parent.stdout.readline() for _ in range(3)] == [b"100\n", b"101\n", b"102\n"]
        assert len(running(f"RKMARK={tmp_path}")) == 6
        parent.kill()
    deadline = time.monotonic() + 20
    while running(f"RKMARK={tmp_path}") and time.monotonic() < deadline:
        time.sleep(0.05)
    assert running(f"RKMARK={tmp_path}") == []


@pytest.mark.parametrize("who", ["worker", "keeper"])
def test_a_killed_worker(misbehaving: Misbehaving, worker_of: Callable[[Engine], int], who: str) -> None:
    engine = Engine.load(misbehaving("", us=100_000, tokens=1000))
    events = engine.generate(REQUEST)
    next(events)
    victim = worker_of(engine) if who == "worker" else engine._connection.worker.process.pid
    threading.Timer(0.05, os.kill, (victim, signal.SIGKILL)).start()
    with pytest.raises(WorkerCrashedError, match="SIGKILL"):
        list(events)
    engine.close()
    # Killed between runs: the next call says so.
    with Engine.load(misbehaving("")) as engine:
        os.kill(worker_of(engine), signal.SIGKILL)
        with pytest.raises(WorkerCrashedError, match="SIGKILL"):
            engine.cache_sizes()


@pytest.mark.parametrize(("kills", "word"), [((7, 7), "Something else"), ((None, None), "dmesg"), ((7, 8), "memory")])
def test_a_kill_is_for_lack_of_memory_only_if_the_kernel_says_so(
    misbehaving: Misbehaving,
    worker_of: Callable[[Engine], int],
    monkeypatch: pytest.MonkeyPatch,
    kills: tuple[int | None, int | None],
    word: str,
) -> None:
    with Engine.load(misbehaving("", tokens=1000, us=10_000)) as engine:
        monkeypatch.setattr("rkruntime.checks.machine.kills_for_memory", lambda: kills[0])
        events = engine.generate(REQUEST)
        next(events)
        monkeypatch.setattr("rkruntime.checks.machine.kills_for_memory", lambda: kills[1])
        os.kill(worker_of(engine), signal.SIGKILL)
        with pytest.raises(WorkerCrashedError, match="SIGKILL") as caught:
            list(events)
    found = caught.value.details["diagnosis"]
    assert word in caught.value.hint
    assert (found["class"] == "host-ram-at-load") is (kills == (7, 8))
    assert ("GB of memory are available" in caught.value.hint) is (kills != (7, 8))


def test_no_interpreter(misbehaving: Misbehaving, tmp_path: Path) -> None:
    with pytest.raises(HostError, match="python: No such file"):
        Engine.load(misbehaving("", interpreter=(str(tmp_path / "python"),)))
    with pytest.raises(WorkerCrashedError) as gone:
        Engine.load(misbehaving("", interpreter=("/bin/sh", "-c", "echo broken; exit 3")))
    assert "exit code 3" in str(gone.value)
    assert "broken" in gone.value.details["log"]


def test_a_library_that_needs_another(misbehaving: Misbehaving, tmp_path: Path) -> None:
    source, other, library = tmp_path / "x.cc", tmp_path / "libother.so", tmp_path / "librkllmrt.so"
    options = misbehaving("")
    source.write_text('extern "C" int other() { return 1; }')
    subprocess.run(["g++", "-shared", "-fPIC", "-Wl,-soname,libother.so", "-o", other, source], check=True)
    base = ["g++", "-shared", "-fPIC", "-o", library, f"-I{options.library.parent}"]
    subprocess.run([*base, str(Path(__file__).with_name("double.cc")), "-Wl,--no-as-needed", other], check=True)
    # Beside the library it is found, as with libomp.so.
    Engine.load(replace(options, library=library)).close()
    other.unlink()
    with pytest.raises(LibraryError, match=r"cannot be loaded: libother\.so"):
        Engine.load(replace(options, library=library))


def test_the_kernel_kills_the_worker_first(misbehaving: Any, worker_of: Any) -> None:
    with Engine.load(misbehaving("fine")) as engine:
        assert int(Path(f"/proc/{worker_of(engine)}/oom_score_adj").read_text()) >= 500
    assert int(Path("/proc/self/oom_score_adj").read_text()) < 500
