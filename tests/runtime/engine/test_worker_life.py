"""The worker's process: small, ended with its parent, forked, killed, or not startable at all."""

from __future__ import annotations

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
from tests.forced import wait_until
from tests.runtime.engine.misbehaviour import REQUEST, Misbehaving, works

from rkruntime.engine.engine import Engine
from rkruntime.errors import (
    HostError,
    LibraryError,
    RunError,
    WorkerCrashedError,
    WorkerError,
)


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
        try:
            assert [parent.stdout.readline() for _ in range(3)] == [b"100\n", b"101\n", b"102\n"]
            deadline = time.monotonic() + 20
            while len(running(f"RKMARK={tmp_path}")) != 6 and time.monotonic() < deadline:
                time.sleep(0.05)  # its daemons may have forked, and not be programs of their own yet
            assert len(running(f"RKMARK={tmp_path}")) == 6
        finally:
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


def test_a_worker_that_dies_between_runs_is_noticed_without_one(
    misbehaving: Misbehaving, worker_of: Callable[[Engine], int]
) -> None:
    with Engine.load(misbehaving("")) as engine:
        assert engine.alive
        assert not engine.lost
        engine.check()
        os.kill(worker_of(engine), signal.SIGKILL)
        wait_until(lambda: engine.lost)
        assert not engine.alive
        assert engine.lost
        for _ in range(2):
            with pytest.raises(WorkerCrashedError, match="SIGKILL"):
                engine.check()
    # While a run is read, what has arrived before the worker's end counts: only its reader ends the worker.
    with Engine.load(misbehaving("", us=100_000, tokens=1000)) as engine:
        events = engine.generate(REQUEST)
        next(events)
        os.kill(worker_of(engine), signal.SIGKILL)
        wait_until(lambda: engine._connection.worker.process.poll() is not None)
        assert engine.alive
        assert not engine.lost
        with pytest.raises(WorkerCrashedError, match="SIGKILL"):
            list(events)
        assert not engine.alive


@pytest.mark.parametrize(("kills", "word"), [((7, 7), "did not kill"), ((None, None), "dmesg"), ((7, 8), "memory")])
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


@pytest.mark.parametrize(("kills", "class_"), [(7, "unexplained"), (None, "host-ram-at-load")])
def test_a_kill_within_a_load(
    misbehaving: Misbehaving, monkeypatch: pytest.MonkeyPatch, kills: int | None, class_: str
) -> None:
    """By somebody, if the kernel counts its own kills; otherwise most likely for what a load takes."""
    monkeypatch.setattr("rkruntime.checks.machine.kills_for_memory", lambda: kills)
    with pytest.raises(WorkerCrashedError, match="SIGKILL") as caught:
        Engine.load(misbehaving("init-killed"))
    found = caught.value.details["diagnosis"]
    assert (found["class"], found["confidence"] in ("low", "none")) == (class_, True)


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


@pytest.mark.parametrize("victim", ["the worker", "the next run"])
def test_an_end_is_not_explained_by_what_an_earlier_run_said(
    victim: str,
    load: Callable[..., Engine],
    worker_of: Callable[[Engine], int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RKEMU_FAULT", "" if victim == "the worker" else "error-token=3")
    monkeypatch.setenv("RKEMU_TOKEN_US", "300000")
    engine = load(token_timeout=4.0)
    (tmp_path / "cache").write_bytes(b"of another model")
    with pytest.raises(RunError) as caught:
        engine.load_prompt_cache(tmp_path / "cache")
    assert caught.value.details["diagnosis"]["class"] == "prompt-or-kv-cache"
    if victim == "the worker":
        threading.Timer(0.1, os.kill, (worker_of(engine), signal.SIGKILL)).start()
    with pytest.raises((RunError, WorkerCrashedError)) as caught:
        list(engine.generate(replace(REQUEST, max_new_tokens=40)))
    found = caught.value.details["diagnosis"]
    assert found["class"] != "prompt-or-kv-cache"
    assert victim != "the worker" or "Diagnosis" not in caught.value.hint
