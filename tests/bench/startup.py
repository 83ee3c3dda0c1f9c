"""How long a person waits: `rkedge --help`, and `rkedge chat` from its start to the prompt, with the demo bundle."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.bench._report import Report, at_most, turns

from rkconvert.demo import checkpoint
from rkruntime import cli
from rkruntime.chat.repl import PROMPT

TIMES = 15
LIMITS = """
The demo model is tiny, so loading a real one is not in it. The aims are for a machine with two cores that does nothing
else, with the files in memory.
"""
_PATIENCE_S = 60


def _help() -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-m", "rkruntime.cli", "--help"], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


def _prompt(bundle: Path) -> float:
    """Seconds until the prompt stands on a terminal."""
    near, far = pty.openpty()
    start = time.perf_counter()
    command = [sys.executable, "-m", "rkruntime.cli", "chat", str(bundle)]
    process = subprocess.Popen(command, stdin=far, stdout=far, stderr=far, start_new_session=True)
    os.close(far)
    seen = b""
    while PROMPT.strip().encode() not in seen:
        if not select.select([near], [], [], _PATIENCE_S)[0]:
            process.kill()
            raise SystemExit(f"no prompt within {_PATIENCE_S} s: {seen!r}")
        seen += os.read(near, 4096)
    seconds = time.perf_counter() - start
    os.write(near, b"\x04")
    process.wait(30)
    os.close(near)
    return seconds


def main() -> int:
    """Measure both in turns; the emulator is built before."""
    report = Report("startup", __doc__, limits=LIMITS)
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "demo"
        cli.main(["convert", str(checkpoint()), "-q", "-o", str(bundle)])
        found = turns({"rkedge --help": _help, "rkedge chat": lambda: _prompt(bundle)}, TIMES, warm_up=True)
    report.figure("until it ended", "rkedge --help", found["rkedge --help"], "s", at_most(0.15))
    report.figure("until its prompt", "rkedge chat", found["rkedge chat"], "s", at_most(1.5))
    return report.close()


if __name__ == "__main__":
    sys.exit(main())
