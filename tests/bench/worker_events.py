"""From the library's callback to the event in the parent, per token; tokens per second when the library takes no time.

The library is a stand-in that computes nothing and puts the time of each callback into the token's text. The
last two rows are the least that any means could do here: waking a reader through a pipe, and calling a Python function.
"""

from __future__ import annotations

import asyncio
import ctypes
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from rkruntime.engine.engine import Engine, LoadOptions
from rkruntime.engine.generation import Finished, Request

# Microseconds between tokens, and how many. At 0 the worker is faster than the parent: records queue in the pipe, and
# the delay is that of the queue. A board gives a token every 50,000 us or so.
GAPS = {0: 20_000, 20: 20_000, 50: 10_000, 100: 10_000, 1_000: 2_000, 20_000: 150}


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


def _in_a_loop(engine: Engine, count: int) -> list[int]:
    clock = time.perf_counter_ns

    async def collect() -> list[int]:
        events = engine.agenerate(Request([count, 1]))
        return [clock() - int(event.text) async for event in events if not isinstance(event, Finished)]

    return asyncio.run(collect())


def _row(name: str, gap: int, delays: list[int], seconds: float) -> None:
    delays = sorted(delays)
    median, last = delays[len(delays) // 2] / 1000, delays[len(delays) * 99 // 100] / 1000
    rate = f"{len(delays) / seconds:12,.0f}"
    print(f"{name:28}{gap:10,} us{median:12.1f}{last:12.1f}{rate}")


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


def _measured(work: Callable[[], list[int]]) -> tuple[list[int], float]:
    began = time.perf_counter()
    return work(), time.perf_counter() - began


def main() -> None:
    print(f"{'':28}{'between':>13}{'median us':>12}{'p99 us':>12}{'tokens/s':>12}")
    with tempfile.TemporaryDirectory() as folder:
        for gap, engine in _engines(Path(folder)):
            for name, collect in (("generate", _blocking), ("agenerate (asyncio)", _in_a_loop)):
                collect(engine, 100)
                _row(name, gap, *_measured(partial(collect, engine, GAPS[gap])))
    _row("a pipe, the reader asleep", 100, *_measured(_wake_up))
    _row("an empty Python callback", 0, *_measured(_callback))


if __name__ == "__main__":
    main()
