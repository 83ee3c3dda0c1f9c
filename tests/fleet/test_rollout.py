"""First one, then the rest, and no further one once one has failed: with work that is only counted."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rkboard.fleet import rollout as rollouts
from rkboard.fleet.inventory import Entry
from rkboard.fleet.rollout import Rollout
from rkruntime.errors import RefusedError


def boards(count: int) -> list[Entry]:
    return [Entry(f"b{at}", "g", f"u@b{at}", Path("x"), None, True, "", 0, "") for at in range(count)]


class Work:
    """Fails on some boards; remembers on which ones it was begun, and on how many at once."""

    def __init__(self, failing: set[str]) -> None:
        self.failing, self.begun, self.now, self.most = failing, list[str](), 0, 0
        self.lock = threading.Lock()
        self.first_ended = False
        self.too_early = False

    def __call__(self, entry: Entry) -> Mapping[str, Any]:
        with self.lock:
            self.too_early |= bool(self.begun) and not self.first_ended
            self.begun.append(entry.name)
            self.now += 1
            self.most = max(self.most, self.now)
        with self.lock:
            self.now -= 1
            self.first_ended = True
        if entry.name in self.failing:
            raise RefusedError(f"not on {entry.name}")
        return {"on": entry.name}


@given(st.integers(1, 12), st.sets(st.integers(0, 11), max_size=3), st.integers(1, 4))
def test_a_careful_rollout(count: int, failing: set[int], at_once: int) -> None:
    work = Work({f"b{at}" for at in failing})
    found = Rollout(boards(count), work, at_once, careful=True).run()
    assert [one.entry.name for one in found] == [f"b{at}" for at in range(count)]
    assert not work.too_early
    assert work.most <= at_once
    assert {one.entry.name for one in found if one.state != "not touched"} == set(work.begun)
    assert {one.entry.name for one in found if one.state == "failed"} == set(work.begun) & work.failing
    assert all(one.facts == {"on": one.entry.name} for one in found if one.state == "done")
    if 0 in failing:
        assert work.begun == ["b0"]
    # Those that were on their way when one failed come to their end; no other is begun.
    failed_at = [at for at, name in enumerate(work.begun) if name in work.failing]
    if failed_at:
        assert len(work.begun) <= failed_at[0] + 1 + at_once
    else:
        assert len(work.begun) == count


@given(st.integers(1, 8), st.sets(st.integers(0, 7), max_size=3))
def test_looking_goes_on(count: int, failing: set[int]) -> None:
    work = Work({f"b{at}" for at in failing})
    found = Rollout(boards(count), work, 3, careful=False).run()
    assert sorted(work.begun) == sorted(one.entry.name for one in found)
    assert {one.state for one in found} <= {"done", "failed"}


def test_what_no_one_expects_is_told_of_the_board(capsys: pytest.CaptureFixture[str]) -> None:
    def work(entry: Entry) -> Mapping[str, Any]:
        raise {"b0": OSError(28, "No space left on device", "/x"), "b1": ValueError("y")}[entry.name]

    said = [one.error.message for one in Rollout(boards(2), work, 1, careful=False).run() if one.error]
    assert said == ["No space left on device: /x.", "This is a defect of rkedge: ValueError: y"]


def test_ctrl_c_lets_what_was_begun_come_to_its_end() -> None:
    begun: list[str] = []

    def work(entry: Entry) -> Mapping[str, Any]:
        begun.append(entry.name)
        if entry.name == "b0":
            raise KeyboardInterrupt
        return {}

    rollout = Rollout(boards(3), work, 2, careful=True)
    with pytest.raises(KeyboardInterrupt):
        rollout.run()
    assert begun == ["b0"]
    assert [one.state for one in rollout.outcomes] == ["failed", "not touched", "not touched"]


def test_nobody_waits_for_what_was_begun_and_it_is_not_called_untouched() -> None:
    """Ctrl-C while the rest is at work, and once more."""
    begun, over = threading.Semaphore(0), threading.Event()

    def work(entry: Entry) -> Mapping[str, Any]:
        if entry.name != "b0":
            begun.release()
            over.wait(30)
        return {}

    class Impatient(ThreadPoolExecutor):
        def map(self, *given: Any, **more: Any) -> Any:
            super().map(*given, **more)
            begun.acquire()
            begun.acquire()
            raise KeyboardInterrupt

        def __exit__(self, *_: object) -> None:
            self.shutdown(wait=False)

    rollout = Rollout(boards(4), work, 2, careful=True)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(rollouts, "ThreadPoolExecutor", Impatient)
        rollout.run()
    states = [one.state for one in rollout.outcomes]
    over.set()
    assert states == ["done", "failed", "failed", "not touched"]
