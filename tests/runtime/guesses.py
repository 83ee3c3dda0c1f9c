"""The runtime's tests over an emulator that does what boards may do instead.

`python -m tests.runtime.guesses [NAME ...]`: each NAME is a guess of `rkedge emulator info --guesses`, or several with
commas between them. Without one: each of them alone that RKEdge can be right with, then all of these at once. A test
marked `usual("NAME")` is about the other alternative, and is skipped.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from rkboard.emulator.faults import guesses

HERE = Path(__file__).parent
ROOMS = [str(HERE / room) for room in ("engine", "serve", "chat", "test_api.py")]


def run(names: str) -> int:
    """Run pytest; its exit status."""
    print(f"== RKEMU_GUESS={names}", flush=True)
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", "--dist", "loadfile", *ROOMS]
    return subprocess.run(command, env=os.environ | {"RKEMU_GUESS": names}, check=False).returncode


def main() -> int:
    """All that were asked for; the worst exit status."""
    every = [guess.name for guess in guesses() if not guess.only_told]
    return max(run(names) for names in sys.argv[1:] or [*every, ",".join(every)])


if __name__ == "__main__":
    sys.exit(main())
