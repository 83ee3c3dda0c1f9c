"""From the library's callback to the event in the parent, per token; tokens per second when the library takes no time.

The library is a stand-in that computes nothing and puts the time of each callback into the token's text. Between tokens
it sleeps: one that spins takes a core of a small machine from the reader, and what is measured then is the scheduler.
The last two rows are the least that any means could do here: waking a reader through a pipe, and calling a Python
function.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from tests.bench._report import Report, pairs, turns

from rkruntime.engine.engine import Engine, LoadOptions
from rkruntime.engine.generation import Event, Finished, Request

LIMITS = """
At 0 us the worker is faster than the parent: records queue in the pipe, and the delay is that of the queue. A board
gives a token every 50,000 us or so.
"""
# Microseconds between tokens, and how many.
GAPS = {0: 20_000, 1_000: 1_000, 20_000: 50}


def _stand_in(folder: Path) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise SystemExit("this benchmark needs a C compiler")
    library = folder / "librkllmrt.so"
    source = Path(__file__).with_name("_stamps.c")
    subprocess.run([compiler, "-O2", "-shared", "-fPIC", "-o", library, source], check=True)
    return library


def _blocking(engine: Engine, count: int) -> list[int]:
    clock = time.perf_counter_ns
    return [
        clock() - int(event.text) for event in engine.generate(Request([count, 1])) if not isinstance(event, Finished)
    ]


def _handed_over(engine: Engine, count: int) -> list[int]:
    clock = time.perf_counter_ns
    delays: list[int] = []

    def take(events: list[Event]) -> bool:
        now = clock()
        delays.extend(now - int(event.text) for event in events if not isinstance(event, Finished))
        return True

    asyncio.run(engine.deliver(Request([count, 1]), take))
    return delays


def _in_a_loop(engine: Engine, count: int) -> list[int]:
    clock = time.perf_counter_ns

    async def collect() -> list[int]:
        events = engine.agenerate(Request([count, 1]))
        return [clock() - int(event.text) async for event in events if not isinstance(event, Finished)]

    return asyncio.run(collect())


def _engines(folder: Path) -> Iterator[tuple[int, Engine]]:
    library, model = _stand_in(folder), folder / "model.rkllm"
    model.write_bytes(b"none")
    for gap in GAPS:
        options = LoadOptions(library=library, model=model, environment={"RKSTAMP_US": str(gap)})
        with Engine.load(options) as engine:
            yield gap, engine


def _wake_up() -> list[int]:
    """One timestamp at a time through a pipe to a process that sleeps: what waking it costs."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        for _ in range(2000):
            time.sleep(1e-4)
            os.write(write, time.perf_counter_ns().to_bytes(8, "little"))
        os._exit(0)
    delays = [-(int.from_bytes(os.read(read, 8), "little") - time.perf_counter_ns()) for _ in range(2000)]
    os.waitpid(child, 0)
    return delays


def _callback() -> list[int]:
    """A ctypes callback that reads two fields and returns."""

    class Result(ctypes.Structure):
        _fields_ = (("text", ctypes.c_char_p), ("token", ctypes.c_int32))

    kind = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(Result), ctypes.c_void_p, ctypes.c_uint32)
    call = kind(lambda result, _userdata, _state: len(result[0].text) + result[0].token)
    value = Result(b"text", 1)
    delays = []
    for _ in range(20_000):
        began = time.perf_counter_ns()
        call(ctypes.byref(value), None, 0)
        delays.append(time.perf_counter_ns() - began)
    return delays


def _measured(work: Callable[[], list[int]]) -> tuple[float, float, float]:
    """Median and 99th percentile of the delays in us, and events a second."""
    began = time.perf_counter()
    delays = work()
    seconds = time.perf_counter() - began
    return statistics.median(delays) / 1e3, statistics.quantiles(delays, n=100)[98] / 1e3, len(delays) / seconds


def main() -> int:
    """Measure the ways to read an answer, in turns."""
    report = Report("worker_events", __doc__ or "", limits=LIMITS)
    ways = {"deliver (asyncio)": _handed_over, "agenerate (asyncio)": _in_a_loop, "generate": _blocking}
    with tempfile.TemporaryDirectory() as folder:
        for gap, engine in _engines(Path(folder)):
            works = {name: partial(_measured, partial(collect, engine, GAPS[gap])) for name, collect in ways.items()}
            found = turns(works, pairs(), warm_up=True)
            for at, what, unit in ((0, "median delay", "us"), (1, "delay, 99 %", "us"), (2, "events", "/s")):
                if at < 2 or not gap:
                    values = {name: [one[at] for one in found[name]] for name in ways}
                    report.compare(f"{gap:,} us between tokens: {what}", unit, values)
    for name, work in (("a pipe, the reader asleep", _wake_up), ("an empty Python callback", _callback)):
        median, last, _ = _measured(work)
        report.figure("median delay", name, median, "us")
        report.figure("delay, 99 %", name, last, "us")
    return report.close()


if __name__ == "__main__":
    sys.exit(main())
