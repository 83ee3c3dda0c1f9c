"""How long a person waits: `rkedge --help`, and `rkedge chat` from its start to the prompt, with the demo bundle.

Aims on a machine with two cores: 0.15 s and 1.5 s.
"""

from __future__ import annotations

import os
import pty
import select
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rkconvert.demo import checkpoint
from rkruntime import cli
from rkruntime.chat.repl import PROMPT

TIMES = 15
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


def main() -> None:
    """Print medians and the slowest."""
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "demo"
        cli.main(["convert", str(checkpoint()), "-q", "-o", str(bundle)])
        # The first start builds the emulator.
        _prompt(bundle)
        for name, work in (("rkedge --help", _help), ("rkedge chat to its prompt", lambda: _prompt(bundle))):
            seconds = [work() for _ in range(TIMES)]
            print(f"{name:28} median {statistics.median(seconds):.3f} s, slowest {max(seconds):.3f} s")


if __name__ == "__main__":
    main()
