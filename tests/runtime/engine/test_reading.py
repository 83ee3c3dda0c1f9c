"""A load may take as long as it reads its file, and no longer."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from itertools import count
from typing import Any

import pytest

from rkruntime.engine import reading
from rkruntime.engine.engine import Engine
from rkruntime.engine.reading import Reading, load_limit
from rkruntime.errors import WorkerHungError


def test_the_limit_grows_with_the_file() -> None:
    assert load_limit(600, 3_000_000_000) == 600
    assert load_limit(600, 9_500_000_000) > 9_500_000_000 / 15_000_000 > 600  # 15 MB/s


@pytest.mark.parametrize(
    ("size", "reads", "goes_on"),
    [
        (100, [0, 0, 0], [False] * 3),
        (100, [10, 10, 20], [True, False, True]),
        (100, [10, 0, 5], [True, False, False]),
        (100, [100, 300, 400, 401], [True, True, True, False]),
        (100, [0.02, 0.3, 1], [False] * 3),  # pages of a program that come back are no model
        (100, [2, 4, 6, 8, 9], [False, True, False, True, False]),  # slow, and yet it reads
        (0, [10], [False]),
    ],
)
def test_what_reads_goes_on(
    monkeypatch: pytest.MonkeyPatch, size: int, reads: list[float], goes_on: list[bool]
) -> None:
    """The sizes are in MB."""
    left, lines = iter(reads), list[str]()
    monkeypatch.setattr(reading, "read_bytes", lambda keeper: int(next(left) * 1_000_000))
    load = Reading(1, size * 1_000_000, lines.append)
    assert [load.more_time() > time.monotonic() for _ in reads] == goes_on
    assert all(re.fullmatch(r"reading 0\.1 GB, \d{1,2} %", line) for line in lines)
    assert len(lines) == sum(goes_on)


@pytest.mark.parametrize("reads", [True, False])
def test_a_slow_load(reads: bool, options: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RKEMU_FAULT", "slow-init=3000")
    counter = count(4_000_000, 4_000_000)
    monkeypatch.setattr(reading, "_MOST_PASSES", 1000)  # the file is small
    monkeypatch.setattr(reading, "read_bytes", lambda keeper: next(counter) if reads else 16_384)
    lines: list[str] = []
    if reads:
        Engine.load(options(load_timeout=1.0), progress=lines.append).close()
        assert lines
    else:
        with pytest.raises(WorkerHungError):
            Engine.load(options(load_timeout=1.0))


def test_the_counter_is_the_workers(load: Callable[..., Engine]) -> None:
    keeper = load()._connection.worker.process.pid
    assert reading.read_bytes(keeper) >= 0
    assert reading.read_bytes(1 << 30) == 0
