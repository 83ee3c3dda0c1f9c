"""The emulator beside llama.cpp's Q8_0 and CTranslate2's int8: random weights in the shape of Gemma 2 2B, 2 threads.

All engines run in turns, for contexts of several lengths: the speed of a prompt of that length, and of the tokens that
follow it. What the machine itself reads from memory is measured in the same turns, because decoding reads each weight
once a token.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from tests.bench import _emulator_model as model
from tests.bench._machine import ROOT
from tests.bench._report import Report, at_least, pairs, turns

from rkboard.emulator import build as emulator

CONTEXTS = (64, 1024, 4000)
NEW = 24
_TOKENS = 512  # of a short prompt's runs together
OURS, LLAMA, CTRANSLATE2, MEMORY = "emulator", "llama.cpp", "CTranslate2", "memory"
PEER_VARIABLES = {LLAMA: "RKEDGE_LLAMA_PYTHON", CTRANSLATE2: "RKEDGE_CTRANSLATE2_PYTHON"}
PEERS = """
Each peer is an interpreter that has its package; both may be in one environment:

    python3 -m venv peers
    peers/bin/pip install ctranslate2 numpy
    CMAKE_ARGS=-DGGML_NATIVE=ON peers/bin/pip install --no-binary llama-cpp-python llama-cpp-python
    RKEDGE_LLAMA_PYTHON=peers/bin/python RKEDGE_CTRANSLATE2_PYTHON=peers/bin/python python -m tests.bench emulator_speed

llama.cpp must be compiled on the machine that is measured. Builds of ggml with AMX were seen to crash in `ldtilecfg`
when compiled with g++ 12; RKEDGE_LLAMA_NO_REPACK=1 measures it without its extra buffer types.
"""
LIMITS = """
4 layers instead of 26, and a vocabulary that is smaller in proportion, so that a long context takes seconds.
CTranslate2's Gemma 2 has neither soft caps nor windows, and llama.cpp's and CTranslate2's weights have other scales
(one for 32 weights; one a row). Speed on this machine says nothing about a board.
"""


class Engine:
    """A process that answers a line on stdin with its figures on stdout."""

    def __init__(self, name: str, command: list[str]) -> None:
        self.name = name
        self.errors = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True, cwd=ROOT
        )

    def measure(self, ids: list[int]) -> dict[str, float]:
        """Figures of one run; SystemExit, with the last that it said, if the process is gone."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(ids) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            status = self.process.wait()
            self.errors.seek(0)
            raise SystemExit(f"{self.name} ended with {status}:\n{self.errors.read()[-1000:]}")
        return dict(json.loads(line))

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        # The end of stdin is a process's end.
        with self.errors, suppress(BrokenPipeError), self.process:
            pass


def compiled(source: str, folder: Path) -> Path:
    """A program of this folder, for this machine."""
    program = folder / Path(source).stem
    compiler = emulator.find_compiler().command
    flags = ["-std=c++17", "-O3", "-march=native", "-pthread"]
    subprocess.run([*compiler, *flags, "-o", program, Path(__file__).with_name(source)], check=True)
    return program


def commands(folder: Path, peers: dict[str, str]) -> dict[str, list[str]]:
    """What to run for each engine; their models are written to `folder`."""
    here = Path(__file__).parent
    rkemu, gguf = folder / "model.rkemu", folder / "model.gguf"
    found = {
        OURS: [
            *[sys.executable, "-m", "tests.bench._engine_emulator"],
            *map(str, (emulator.build("1.2.3"), rkemu, model.MAX_CONTEXT, NEW)),
        ]
    }
    if python := peers.get(LLAMA):
        model.write_gguf(gguf)
        found[LLAMA] = [python, *map(str, (here / "_engine_llama.py", gguf, model.MAX_CONTEXT, NEW))]
    if python := peers.get(CTRANSLATE2):
        arguments = (here / "_engine_ctranslate2.py", json.dumps(model.shape()), folder / "ctranslate2", NEW)
        found[CTRANSLATE2] = [python, *map(str, arguments)]
    found[MEMORY] = [str(compiled("_engine_read.cc", folder)), str(rkemu)]
    return found


def judge(report: Report, context: int, found: dict[str, list[dict[str, float]]], weights: int) -> None:
    """Rows of one context."""

    def series(what: str, *engines: str) -> dict[str, list[float]]:
        return {name: [run[what] for run in found[name]] for name in engines if name in found}

    engines = (OURS, LLAMA, CTRANSLATE2)
    report.compare(f"prefill, {context}", "tok/s", series("prefill", *engines), aims={CTRANSLATE2: at_least(1)})
    report.compare(f"decode, {context}", "tok/s", series("decode", *engines), aims={LLAMA: at_least(1)})
    for name, values in series("cpu", *engines).items():
        report.figure(f"CPU time of both, {context}", name, values, "s")
    read = weights + model.KV_BYTES * (context + NEW // 2)
    rates = [run["decode"] * read for run in found[OURS]]
    memory = [run["rate"] for run in found[MEMORY]]
    report.figure(f"memory read, {context}", "this machine, 2 threads", [rate / 1e9 for rate in memory], "GB/s")
    report.ratio(f"memory read in decode, {context}", "emulator / this machine", rates, memory)


def _prefill(engine: Engine, ids: list[int]) -> float:
    """Tokens a second; the mean of several runs of a short prompt, whose time one interruption doubles."""
    return statistics.mean(engine.measure(ids)["prefill"] for _ in range(1 + _TOKENS // len(ids)))


def main() -> int:
    """Write the models, measure in turns, judge."""
    peers = {name: os.environ[variable] for name, variable in PEER_VARIABLES.items() if os.environ.get(variable)}
    for name in PEER_VARIABLES.keys() - peers:
        print(f"{name} is not set up: {PEER_VARIABLES[name]} names no interpreter. Nothing is compared with it.")
    if len(peers) < len(PEER_VARIABLES):
        print(PEERS, flush=True)
    report = Report("emulator_speed", __doc__, peers=PEERS, limits=LIMITS)
    rng = np.random.default_rng(1)
    prompts = {context: [int(i) for i in rng.integers(6, model.VOCAB, context)] for context in CONTEXTS}
    shortest, longest = CONTEXTS[0], CONTEXTS[-1]
    found: dict[int, dict[str, list[dict[str, float]]]] = {}
    with tempfile.TemporaryDirectory(prefix="rkemu-bench-") as name, ExitStack() as running:
        weights = model.write_rkemu(Path(name) / "model.rkemu")
        engines = [running.enter_context(Engine(*each)) for each in commands(Path(name), peers).items()]
        for context, ids in prompts.items():

            def way(engine: Engine, ids: list[int] = ids) -> Callable[[], dict[str, Any]]:
                return lambda: engine.measure(ids)

            ways = {engine.name: way(engine) for engine in engines}
            found[context] = turns(ways, pairs(), warm_up=context == shortest)
        # Neighbours, as the speed of a shared machine wanders from one context's turns to the next one's.
        [ours] = [engine for engine in engines if engine.name == OURS]
        both = {str(context): partial(_prefill, ours, prompts[context]) for context in (longest, shortest)}
        grown = turns(both, pairs())
    for context, runs in found.items():
        judge(report, context, runs, weights)
    who = f"emulator, {longest} / {shortest}"
    report.ratio("prefill, in turns", who, grown[str(longest)], grown[str(shortest)], at_least(0.75))
    for engine, runs in found[longest].items():
        if engine != MEMORY:
            report.figure("memory at its peak", engine, max(run["peak"] for run in runs), "MB")
    return report.close()


if __name__ == "__main__":
    sys.exit(main())
