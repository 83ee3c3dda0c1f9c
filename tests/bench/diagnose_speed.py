"""`rkedge diagnose` of long logs with a known failure in the middle: how fast the whole command is, and its memory.

`server` has lines that differ in their numbers; so has `rkllm`, and each of its lines comes from RKLLM. Of `distinct`
every line has other words, so that most of them are skipped, which the answer says.
"""

from __future__ import annotations

import json
import random
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from tests.bench._machine import Cost, run
from tests.bench._report import Report, at_least, at_most, pairs, turns

MEGABYTES = 1000
LIMITS = """
The command's own start, and the explanation of head and tail, are in it: some tenths of a second whatever the size.
The file is in the page cache.
"""
FAILURE = b"E rkllm: invalid rkllm model!\n"
CLASS = "model-file-invalid"
WORDS = ("request", "served", "token", "user", "model", "done", "session", "started", "queue", "prompt", "cache", "hit")


def server(number: int) -> str:
    """A line of a server."""
    said = " ".join(WORDS[(number + at) % len(WORDS)] for at in range(8))
    time = f"12:{number // 60 % 60:02}:{number % 60:02}.123"
    return f"2026-01-01 {time} INFO server[{number}]: {said} took {number % 997} ms\n"


def rkllm(number: int) -> str:
    """A line of RKLLM."""
    return f"I rkllm: step {number} of the run took {number % 997} ms, and nothing else is to be said about it\n"


def distinct(number: int) -> str:
    """A line like no other."""
    rng = random.Random(number)
    return f"12:{number // 60 % 60:02}:{number % 60:02} INFO {''.join(rng.choices('ghijklmnopqrstuvwxyz', k=80))}\n"


KINDS: dict[str, Callable[[int], str]] = {"server": server, "rkllm": rkllm, "distinct": distinct}


def pieces(name: str) -> Iterator[bytes]:
    """Ten megabytes again and again with other numbers, or other letters, and the failure after half of them."""
    line, turning = KINDS[name], b"ghijklmnopqrstuvwxyz" if name == "distinct" else b"123456789"
    text, number = bytearray(), 0
    while len(text) < 10_000_000:
        text += line(number).encode()
        number += 1
    for at in range(MEGABYTES // 10):
        if at == MEGABYTES // 20:
            yield FAILURE
        yield bytes(text).translate(bytes.maketrans(turning, _turned(turning, at)))


def _turned(text: bytes, by: int) -> bytes:
    return text[by % len(text) :] + text[: by % len(text)]


def main() -> int:
    """All kinds in turns."""
    report = Report("diagnose_speed", __doc__, limits=LIMITS)
    with tempfile.TemporaryDirectory() as folder:
        commands = {}
        for name in KINDS:
            path = Path(folder) / name
            with path.open("wb") as file:
                file.writelines(pieces(name))
            commands[name] = [sys.executable, "-m", "rkruntime.cli", "diagnose", str(path), "--json"]
        classes = {name: json.loads(subprocess.check_output(command))["class"] for name, command in commands.items()}
        ways: dict[str, Callable[[], Cost]] = {
            name: (lambda command=command: run(command))
            for name, command in commands.items()  # type: ignore[misc]
        }
        found = turns(ways, pairs())
    for name, costs in found.items():
        repeats = name != "distinct"
        rates = [MEGABYTES / cost.wall_s for cost in costs]
        report.figure("read", name, rates, "MB/s", at_least(300) if repeats else None)
        report.figure("processor time", name, [cost.cpu_s for cost in costs], "s")
        report.figure("peak memory", name, [cost.peak_mb for cost in costs], "MB", at_most(64))
        report.figure("the failure was found", name, float(classes[name] == CLASS), "", at_least(1))
    return report.close()


if __name__ == "__main__":
    sys.exit(main())
