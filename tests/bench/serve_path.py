"""Where a token's CPU time goes in the daemon: one more step of its way with each row, in turns at two paces.

The library computes nothing and sleeps between tokens. Its own row is with a callback in C. Each further row has one
step more, and its cost is the difference. A token that comes alone after a pause finds cold caches, so a step costs
more at a board's pace of 20 ms than at 2 ms, and many times what it costs in a loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import multiprocessing
import os
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace as Made
from typing import Any, cast

from tests.bench._answers import ask
from tests.bench._report import Report, pairs, turns
from tests.bench._servers import Server, our_daemon, prepare, script

from rkconvert.demo import checkpoint
from rkruntime.abi import abi_of
from rkruntime.engine.engine import Engine
from rkruntime.engine.generation import Event, Request
from rkruntime.engine.loading import LoadOptions
from rkruntime.serve.api.generate import StartedRun
from rkruntime.serve.api.openai import _Chunks
from rkruntime.text.answer import AnswerReader
from rkruntime.text.tokenizer import Tokenizer

LIMITS = """
On a PC: a board's cores are slower. CPU time only, with what else the machine does meanwhile in its caches.
"""
PACES = {"20 ms": (100, 20_000), "2 ms": (400, 2_000)}
_RELEASE = "1.3.0"
_FEW = 2

Take = Callable[[list[Event]], bool]


@dataclass(frozen=True)
class Bench:
    """What the steps share."""

    folder: Path
    engine: Engine
    worker: Server
    daemon: Server
    tokenizer: Tokenizer
    chunks: Any
    client: socket.socket

    def ways(self, pace: tuple[int, int]) -> dict[str, Callable[[], float]]:
        """Microseconds of CPU time a token, by what is in them."""
        count = pace[0]

        def in_parent(take_of: Callable[[], Take]) -> float:
            return self._difference(pace, lambda: self._deliver(take_of()), time.process_time) / count * 1e6

        return {
            "the library": lambda: _library(self.folder, pace, None) / count * 1e6,
            "a callback in Python": lambda: _library(self.folder, pace, _nothing) / count * 1e6,
            "the worker": lambda: (
                self._difference(pace, lambda: self._deliver(lambda _: True), self.worker.cpu_s) / count * 1e6
            ),
            "wake-up, read, check": lambda: in_parent(lambda: lambda _: True),
            "text": lambda: in_parent(lambda: self._step(list)),
            "JSON": lambda: in_parent(lambda: self._step(lambda texts: list(map(self.chunks.event, texts)))),
            "send": lambda: in_parent(lambda: self._step(self._send)),
            "the daemon": lambda: self._difference(pace, lambda: ask(self.daemon), self.daemon.own_cpu_s) / count * 1e6,
            "a request": lambda: self._cost((_FEW, pace[1]), lambda: ask(self.daemon), self.daemon.cpu_s) * 1e6,
        }

    def _difference(self, pace: tuple[int, int], work: Callable[[], Any], clock: Callable[[], float]) -> float:
        """Seconds of the tokens beyond the first, without what a run costs."""
        few = self._cost((_FEW, pace[1]), work, clock)
        return self._cost((pace[0] + _FEW, pace[1]), work, clock) - few

    def _cost(self, pace: tuple[int, int], work: Callable[[], Any], clock: Callable[[], float]) -> float:
        script(self.folder, *pace)
        before = clock()
        work()
        time.sleep(0.05)
        return clock() - before

    def _deliver(self, take: Take) -> None:
        asyncio.run(self.engine.deliver(Request([2, 5]), take))

    def _step(self, step: Callable[[Iterator[str]], object]) -> Take:
        """Make texts of the events, and let `step` have them."""
        reader = AnswerReader(self.tokenizer, 2)

        def take(events: list[Event]) -> bool:
            step(map(reader.feed, events))
            return True

        return take

    def _send(self, texts: Iterator[str]) -> None:
        self.client.send(b"".join(map(self.chunks.event, texts)))


def _nothing(*_: object) -> int:
    return 0


def _library(folder: Path, pace: tuple[int, int], callback: Callable[..., int] | None) -> float:
    """CPU seconds of the library in this process, with a callback in Python, or else in C."""
    abi, library = abi_of(_RELEASE), ctypes.CDLL(str(folder / "librkllmrt.so"))
    kind = abi.callbacks["LLMResultCallback"]
    # getppid takes no arguments, and a caller may pass more than a function takes.
    given = kind(callback) if callback else ctypes.cast(ctypes.CDLL(None).getppid, kind)
    callbacks = abi.structs["RKLLMCallback"](result_callback=given)
    handle = ctypes.c_void_p()
    library.rkllm_init(ctypes.byref(handle), None, ctypes.byref(callbacks))
    script(folder, *pace)
    before = time.process_time()
    library.rkllm_run(handle, None, None, None)
    return time.process_time() - before


@contextlib.contextmanager
def _reading_client() -> Iterator[socket.socket]:
    """A connection over loopback to another process that reads."""
    with socket.create_server(("127.0.0.1", 0)) as listener, socket.create_connection(listener.getsockname()) as near:
        far, _ = listener.accept()
        near.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        process = multiprocessing.get_context("fork").Process(target=_read_all, args=(far, near), daemon=True)
        process.start()
        far.close()
        yield near
        near.shutdown(socket.SHUT_RDWR)
        process.join()


def _read_all(far: socket.socket, near: socket.socket) -> None:
    near.close()
    while far.recv(1 << 16):
        pass


def _started(name: str) -> StartedRun:
    """As much of one as the encoding of its events asks for."""
    model = Made(bundle=Made(manifest=Made(name=name)))
    return cast("StartedRun", Made(start=Made(model=model, notes=())))


def main() -> int:
    """Print the rows of both paces."""
    report = Report("serve_path", __doc__ or "", limits=LIMITS)
    with contextlib.ExitStack() as stack:
        client = stack.enter_context(_reading_client())
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        library, model = prepare(folder), folder / "model.rkllm"
        model.write_bytes(b"none")
        environment = {"RKCANNED": str(folder / "script")}
        os.environ.update(environment)  # for the library in this process
        options = LoadOptions(library=library, model=model, environment=environment)
        engine = stack.enter_context(Engine.load(options))
        worker = Server("the worker", "", "", engine._connection.worker.process.pid)
        daemon = stack.enter_context(our_daemon(folder))
        file = checkpoint() / "tokenizer.json"
        tokenizer = Tokenizer.parse(file.read_bytes(), file)
        chunks = _Chunks(_started("canned"), chat=True, usage=False)
        bench = Bench(folder, engine, worker, daemon, tokenizer, chunks, client)
        for name, pace in PACES.items():
            found = turns(bench.ways(pace), max(3, pairs() // 2), warm_up=False)
            for way, values in found.items():
                report.figure(f"{name}: {way}", "rkedge", values, "us")
            medians = {way: statistics.median(values) for way, values in found.items()}
            print(name, {way: round(value) for way, value in medians.items()}, flush=True)
    return report.close()


if __name__ == "__main__":
    sys.exit(main())
