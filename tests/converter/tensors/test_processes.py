"""Work in forked processes: what they do, what they raise, and that none of them outlives its work."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import pytest

from rkconvert.tensors import processes
from rkconvert.tensors.processes import in_processes
from rkruntime.errors import AdapterError, HostError, InputError

MUCH = processes.LITTLE + 1


@pytest.fixture(autouse=True)
def several(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Three processes, whatever this machine has; none of them is left, nor a descriptor."""
    monkeypatch.setattr(processes, "PROCESSES", 3)
    processes_before, descriptors_before = children(), descriptors()
    yield
    # What an earlier test left may end meanwhile.
    assert children() <= processes_before
    assert descriptors() <= descriptors_before


def children() -> set[str]:
    return set(Path(f"/proc/self/task/{threading.main_thread().native_id}/children").read_text().split())


def descriptors() -> set[tuple[str, str]]:
    """Those that are open, each with what it is of: a number may come to be another's."""
    found = set()
    for one in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the one of this listing
            found.add((one.name, str(one.readlink())))
    return found


def all_of(work: Callable[[Any, Callable[[int], None]], Any], items: list[Any], **options: Any) -> list[Any]:
    told = options.pop("told", [])
    with closing(in_processes(work, items, told.append, options.pop("nbytes", MUCH))) as done:
        return list(done)


def test_each_item_is_done_once_with_its_result_and_all_steps_are_told() -> None:
    told: list[int] = []

    def work(item: int, step: Callable[[int], None]) -> tuple[int, int]:
        for _ in range(item):
            time.sleep(0.001)
            step(7)
        return item * item, os.getpid()

    items = list(range(40))
    found = all_of(work, items, told=told)
    assert sorted((item, result[0]) for item, result in found) == [(item, item * item) for item in items]
    assert len({process for _, (_, process) in found} - {os.getpid()}) == 3
    assert sum(told) == 7 * sum(items)


@pytest.mark.parametrize("nbytes", [0, processes.LITTLE])
def test_little_work_is_done_here(nbytes: int) -> None:
    assert all_of(lambda item, step: os.getpid(), [1, 2, 3], nbytes=nbytes) == [
        (item, os.getpid()) for item in (1, 2, 3)
    ]


def test_a_single_item_is_done_here_and_nothing_is_fine() -> None:
    assert all_of(lambda item, step: os.getpid(), ["one"]) == [("one", os.getpid())]
    assert all_of(lambda item, step: os.getpid(), []) == []


def test_a_machine_without_room_for_a_connection(monkeypatch: pytest.MonkeyPatch) -> None:
    def pipe() -> None:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    monkeypatch.setattr(processes, "Pipe", pipe)
    assert all_of(lambda item, step: os.getpid(), [1, 2]) == [(1, os.getpid()), (2, os.getpid())]


@pytest.mark.parametrize("room", [0, 1, 2])
def test_a_machine_without_room_for_all_processes(monkeypatch: pytest.MonkeyPatch, room: int) -> None:
    real, forks = os.fork, []

    def fork() -> int:
        if len(forks) == room:
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))
        forks.append(1)
        return real()

    monkeypatch.setattr(os, "fork", fork)
    found = all_of(lambda item, step: os.getpid(), list(range(9)))
    assert sorted(item for item, _ in found) == list(range(9))
    assert len({process for _, process in found}) <= max(room, 1)


class Odd(Exception):
    """An exception that pickle cannot make again."""

    def __init__(self, one: int, other: int) -> None:
        super().__init__("odd")


def failing(error: BaseException, cause: BaseException | None = None) -> Callable[[int, Callable[[int], None]], None]:
    def work(item: int, step: Callable[[int], None]) -> None:
        if item == 4:
            raise error from cause
        for _ in range(2000):
            time.sleep(0.005)
            step(1)

    return work


@pytest.mark.parametrize(
    "error",
    [
        AdapterError("NaN", hint="train it again", details={"rows": [1, 2]}),
        InputError("no hint"),
        OSError(errno.ENOSPC, "full", "/a/file"),
        KeyboardInterrupt(),
        MemoryError(),
        UnicodeDecodeError("utf-8", b"\xff", 0, 1, "bad"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_one_raises_is_raised_and_ends_the_others(error: BaseException) -> None:
    began = time.monotonic()
    with pytest.raises(type(error)) as caught:
        all_of(failing(error), [1, 2, 4])
    assert time.monotonic() - began < 8
    assert caught.value.args == error.args
    assert vars(caught.value) == vars(error)
    assert "in work" in str(caught.value.__cause__), "the traceback of the other process is lost"
    if isinstance(error, OSError):
        assert (error.errno, error.filename) == (errno.ENOSPC, "/a/file")


def test_a_cause_comes_with_its_error() -> None:
    with pytest.raises(InputError) as caught:
        all_of(failing(InputError("it cannot be read"), OSError(errno.EIO, "the disk")), [1, 4])
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.EIO


def test_an_exception_that_cannot_be_sent_is_told() -> None:
    with pytest.raises(RuntimeError, match=r"(?s)in work.*Odd: odd"):
        all_of(failing(Odd(1, 2)), [1, 4])


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_process_that_is_killed(number: signal.Signals) -> None:
    def work(item: int, step: Callable[[int], None]) -> None:
        if item == 4:
            os.kill(os.getpid(), number)
        for _ in range(2000):
            time.sleep(0.005)
            step(1)

    with pytest.raises(HostError, match=r"A process of the work was ended from outside \(\w+"):
        all_of(work, [1, 2, 4])


@pytest.mark.parametrize("failure", [KeyboardInterrupt(), OSError(28, "full")], ids=["interrupt", "disk"])
def test_a_failure_here_ends_them(failure: BaseException) -> None:
    def advance(_: int) -> None:
        raise failure

    with pytest.raises(type(failure)), closing(in_processes(failing(ValueError()), [1, 2, 3], advance, MUCH)) as done:
        list(done)


def test_closing_early_ends_them() -> None:
    def work(item: int, step: Callable[[int], None]) -> int:
        for _ in range(item * 2000):
            time.sleep(0.005)
            step(1)
        return item

    with closing(in_processes(work, [0, 1, 1, 1], lambda _: None, MUCH)) as done:
        assert next(done) == (0, 0)


def test_results_of_any_size() -> None:
    found = all_of(lambda item, step: bytes(item), [0, 1, 3_000_000, 1_000_000, 200_000, 9])
    assert sorted((item, len(result)) for item, result in found) == sorted(
        (item, item) for item in (0, 1, 3_000_000, 1_000_000, 200_000, 9)
    )


@pytest.mark.parametrize("ignored", [False, True], ids=["", "without children"])
@pytest.mark.parametrize("other", [False, True], ids=["", "beside a fork"])
def test_processes_that_nobody_listens_to_are_ended(
    monkeypatch: pytest.MonkeyPatch, ignored: bool, other: bool
) -> None:
    """All say more than a connection holds while this one is about something else, as if its terminal were stopped."""

    def work(item: int, step: Callable[[int], None]) -> bytes:
        return bytes(4_000_000 * item)

    others = held_by_another(monkeypatch) if other else []
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN) if ignored else None
    began = time.monotonic()
    try:
        with closing(in_processes(work, [0, 1, 1, 1, 1], lambda _: None, MUCH)) as done:
            assert next(done) == (0, b"")
            time.sleep(0.5)
        assert time.monotonic() - began < 20
    finally:
        if ignored:
            signal.signal(signal.SIGCHLD, before)
        ended(others)


def test_a_large_error_that_nobody_listens_to() -> None:
    def work(item: int, step: Callable[[int], None]) -> None:
        if item:
            time.sleep(0.5)
            raise InputError("x" * 1_000_000)

    with closing(in_processes(work, [0, 1, 1, 1], lambda _: None, MUCH)) as done:
        assert next(done) == (0, None)
        time.sleep(1)


def test_a_process_that_is_killed_while_it_says_something(monkeypatch: pytest.MonkeyPatch) -> None:
    def work(item: int, step: Callable[[int], None]) -> bytes:
        threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGKILL)).start()
        return bytes(4_000_000)

    pauses = iter([1])

    def late(connections: list[Connection], timeout: float) -> list[Any]:
        time.sleep(next(pauses, 0))
        return wait(connections, timeout)

    monkeypatch.setattr(processes, "wait", late)
    with pytest.raises(HostError, match=r"ended from outside \(Killed\)"):
        all_of(work, [1, 2])


@pytest.mark.parametrize("where", ["before", "here", "there"])
def test_ctrl_c_within_a_fork(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    """In hooks of the fork Python would print and forget it; the new process would go on as a second one of this."""
    real, here = os.fork, os.getpid()

    def fork() -> int:
        if where == "before":
            signal.raise_signal(signal.SIGINT)
        process = real()
        if (where == "there") == (os.getpid() != here):
            signal.raise_signal(signal.SIGINT)
        return process

    monkeypatch.setattr(os, "fork", fork)
    if where == "there":
        assert len(all_of(lambda item, step: item, list(range(9)))) == 9
        return
    with pytest.raises(KeyboardInterrupt):
        all_of(lambda item, step: item, list(range(9)))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_process_never_leaves_its_work(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever comes in the moment before it begins: it would finish what the other one is about."""
    here = os.getpid()

    def serve(*_: object) -> None:
        raise SystemExit

    monkeypatch.setattr(processes, "_serve", serve)
    try:
        with pytest.raises(HostError, match="ended from outside"):
            all_of(lambda item, step: item, [1, 2])
    finally:
        if os.getpid() != here:
            (tmp_path / "left").touch()
            os._exit(0)
    assert not (tmp_path / "left").exists()


def held_by_another(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Let each fork be one of two: the other process has copies of all descriptors, and stays."""
    real, others = os.fork, []

    def fork() -> int:
        if not (other := real()):
            time.sleep(60)
            os._exit(0)
        others.append(other)
        return real()

    monkeypatch.setattr(os, "fork", fork)
    return others


def ended(others: list[int]) -> None:
    for other in others:
        os.kill(other, signal.SIGKILL)
        with suppress(ChildProcessError):
            os.waitpid(other, 0)


@pytest.mark.parametrize("how", ["finished", "killed", "closed"])
def test_a_program_that_forks_something_else_meanwhile(monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    others, began = held_by_another(monkeypatch), time.monotonic()

    def work(item: int, step: Callable[[int], None]) -> int:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        for _ in range(2000 if how == "closed" and item else 1):
            time.sleep(0.005)
            step(1)
        return item

    try:
        if how == "killed":
            with pytest.raises(HostError, match=r"ended from outside \(Killed\)"):
                all_of(work, [1, 2])
        else:
            with closing(in_processes(work, [0, 1, 2], lambda _: None, MUCH)) as done:
                assert next(done) == (0, 0)
                if how == "finished":
                    assert sorted(done) == [(1, 1), (2, 2)]
        assert time.monotonic() - began < 20
    finally:
        ended(others)


def test_several_threads_of_a_program_at_once() -> None:
    found: list[int] = []

    def use() -> None:
        found.extend(len(all_of(lambda item, step: time.sleep(0.002), list(range(12)))) for _ in range(5))

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == [12] * 20


def test_other_threads_go_on() -> None:
    """A source is hashed, and a bar is drawn, by threads meanwhile."""
    stop, turns = threading.Event(), [0]

    def spin() -> None:
        while not stop.is_set():
            turns[0] += 1
            print("", end="", flush=True)

    thread = threading.Thread(target=spin)
    thread.start()
    try:
        for _ in range(20):
            assert len(all_of(lambda item, step: item, list(range(6)))) == 6
    finally:
        stop.set()
        thread.join()
    assert turns[0]


PARENT = r"""
import os, sys, time
from rkconvert.tensors import processes
processes.PROCESSES = 2
def work(item, step):
    os.write(1, b"%d\n" % os.getpid())
    while True:
        time.sleep(0.01)
        step(1)
try:
    list(processes.in_processes(work, [1, 2], lambda _: None, processes.LITTLE + 1))
except KeyboardInterrupt:
    print("interrupted", flush=True)
    sys.exit(130)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_they_end_with_the_one_that_forked_them(number: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", PARENT],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as parent:
        assert parent.stdout is not None
        pids = [int(parent.stdout.readline()) for _ in range(2)]
        if number == signal.SIGINT:  # Ctrl-C reaches them all
            os.killpg(parent.pid, number)
        else:
            parent.send_signal(number)
        out, err = parent.communicate(timeout=20)
        assert (out, err) == ("interrupted\n" if number == signal.SIGINT else "", "")
    until = time.monotonic() + 20
    while any(Path(f"/proc/{pid}").exists() for pid in pids):
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.mark.parametrize("other", [False, True], ids=["", "beside a fork"])
def test_a_process_that_ignores_the_end_of_its_children(monkeypatch: pytest.MonkeyPatch, other: bool) -> None:
    """As one does that was started by a program that ignores SIGCHLD."""
    others = held_by_another(monkeypatch) if other else []
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        assert len(all_of(lambda item, step: item, list(range(9)))) == 9
        with pytest.raises(HostError, match="ended from outside"):
            all_of(lambda item, step: os.kill(os.getpid(), signal.SIGKILL), [1, 2])
    finally:
        signal.signal(signal.SIGCHLD, before)
        ended(others)


def test_a_process_that_is_killed_before_it_is_told_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.fork

    def fork() -> int:
        if not (process := real()):
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(0.2)
        return process

    monkeypatch.setattr(os, "fork", fork)
    with pytest.raises(HostError, match=r"ended from outside \(Killed\)"):
        all_of(lambda item, step: item, [1, 2, 3])
