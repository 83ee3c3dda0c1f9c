"""Loading and unloading leaves nothing: descriptors, threads, processes, memory."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest

from rkruntime.engine.engine import Engine, LoadOptions
from rkruntime.engine.generation import Request
from rkruntime.engine.worker.process import _let_go_of
from rkruntime.errors import RKEdgeError

Misbehaving = Callable[..., LoadOptions]


def resident() -> int:
    """This process's memory in kB."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith("VmRSS")).split()[1])


class Held(NamedTuple):
    descriptors: int
    threads: int
    children: frozenset[str]


def held() -> Held:
    children = Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()
    return Held(len(os.listdir("/proc/self/fd")), threading.active_count(), frozenset(children))


def assert_nothing_more(before: Held) -> None:
    """What an earlier test had left may have ended since; anything new is a leak."""
    now = held()
    assert now.descriptors <= before.descriptors
    assert now.threads <= before.threads
    assert now.children <= before.children


def cycle(misbehaving: Misbehaving, number: int) -> None:
    """One load with a run, in turn whole, left open, cut short, failed, crashed and hung."""
    behaviour = ("", "", "", "init-fails", "token-segv", "token-hang", "init-exit")[number % 7]
    try:
        engine = Engine.load(misbehaving(behaviour, token_timeout=0.05 if "hang" in behaviour else 20.0))
        events = engine.generate(Request([1, 2, 3]))
        if number % 7 == 1:
            next(events)
        else:
            list(events)
        if number % 7 != 2:
            engine.close()
    except RKEdgeError:
        return


def forget() -> None:
    """Find the engines that nobody has closed, and wait for their processes, as the loads after that would."""
    gc.collect()
    for process in _let_go_of:
        process.wait(20)


def cycles(misbehaving: Misbehaving, count: int) -> None:
    for number in range(14):  # what is loaded once stays
        cycle(misbehaving, number)
    forget()
    before, memory = held(), resident()
    for number in range(count):
        cycle(misbehaving, number)
    forget()
    assert_nothing_more(before)
    # One load takes 80 kB of buffers at most: a leak of a tenth of that would be seen in 1,000 of them.
    assert resident() - memory < 8_000


def test_forty_loads(misbehaving: Misbehaving) -> None:
    cycles(misbehaving, 42)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_a_thousand_loads(misbehaving: Misbehaving) -> None:
    cycles(misbehaving, 1_001)


@pytest.mark.long
@pytest.mark.timeout(3600)
def test_a_thousand_loads_of_a_model(options: Callable[..., LoadOptions], release: str) -> None:
    for number in range(210):
        if number == 10:
            before, memory = held(), resident()
        with Engine.load(options(release)) as engine:
            list(engine.generate(Request([2, 106, 451], max_new_tokens=3)))
    gc.collect()
    assert_nothing_more(before)
    assert resident() - memory < 4_000


def test_many_runs_of_one_engine(load: Callable[..., Engine], worker_of: Callable[[Engine], int], release: str) -> None:
    """The worker's memory and descriptors, too, are the same after 200 runs, half of them cut short."""
    engine = load(release)
    worker = Path(f"/proc/{worker_of(engine)}")

    def run(number: int) -> None:
        events = engine.generate(Request([2, 106, 451], max_new_tokens=8))
        next(events)
        if number % 2:
            list(events)
        events.close()

    def worker_holds() -> tuple[int, int]:
        return len(os.listdir(worker / "fd")), len(os.listdir(worker / "task"))

    for number in range(20):
        run(number)
    gc.collect()
    before, there = held(), worker_holds()
    size = int((worker / "statm").read_text().split()[1]) * 4
    for number in range(200):
        run(number)
    gc.collect()
    assert_nothing_more(before)
    assert worker_holds() == there
    assert int((worker / "statm").read_text().split()[1]) * 4 - size < 2_000
