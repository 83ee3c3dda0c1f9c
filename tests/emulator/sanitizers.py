"""The emulator's tests with it built by sanitizers: `python -m tests.emulator.sanitizers [NAMES] [ARGUMENT ...]`.

NAMES is `address,undefined` or `thread`; both, one after the other, if none is given. The interpreter is not built with
them, so their libraries are preloaded and leaks, which would be the interpreter's, are not looked for.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.emulator.client import LAYOUTS

from rkboard.emulator import build as emulator

PRELOADED = {"address,undefined": ("libasan.so", "libubsan.so", "libstdc++.so"), "thread": ("libtsan.so",)}
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:handle_segv=0:handle_sigbus=0:handle_sigill=0:handle_abort=0",
    "UBSAN_OPTIONS": "halt_on_error=1:print_stacktrace=1",
    # Reports of other people's libraries, which are not instrumented, would be false.
    "TSAN_OPTIONS": "halt_on_error=1:exitcode=66:ignore_noninstrumented_modules=1:handle_segv=0:handle_sigbus=0",
}


def library(name: str) -> str:
    """The file of a compiler's own library."""
    return subprocess.run(
        ["g++", f"-print-file-name={name}"], check=True, capture_output=True, text=True
    ).stdout.strip()


def run(names: str, arguments: list[str]) -> int:
    """Run pytest; its exit status."""
    for release in LAYOUTS:  # Here, because with a sanitizer preloaded the compiler takes several times as long.
        emulator.build(release, warnings_are_errors=True, sanitize=names, progress=print)
    preload = " ".join(library(name) for name in PRELOADED[names])
    environment = os.environ | OPTIONS | {"RKEMU_TEST_SANITIZE": names, "LD_PRELOAD": preload}
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-n",
        "2",
        "--dist",
        "loadfile",
        "--timeout=1200",
        str(Path(__file__).parent),
        *arguments,
    ]
    print(f"== {names}", flush=True)
    return subprocess.run(command, env=environment, check=False).returncode


def main() -> int:
    """All that were asked for; the worst exit status."""
    arguments = sys.argv[1:]
    wanted = [arguments.pop(0)] if arguments and arguments[0] in PRELOADED else list(PRELOADED)
    return max(run(names, arguments) for names in wanted)


if __name__ == "__main__":
    sys.exit(main())
