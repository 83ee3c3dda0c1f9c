"""Pass on what a tool prints, as it comes, for as long as somebody is connected."""

from __future__ import annotations

import ctypes
import os
import select
import shutil
import signal
import subprocess
from collections.abc import Callable

from rkboard.deploy.there.ground import Ground

_BLOCK = 2000
_QUIET_S = 60.0
_PR_SET_PDEATHSIG = 1


def follow(ground: Ground, say: Callable[[str], None], *words: str) -> None:
    """Say what a tool prints until the tool or the input ends; in a silence, say an empty text to test the connection.

    The tool ends with this process, however that ends.
    """
    path = os.pathsep.join(str(ground.at(folder)) for folder in ("usr/bin", "bin"))
    tool = shutil.which(words[0], path=path)
    if tool is None:
        return
    process = subprocess.Popen(
        [tool, *words[1:]], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        env={"PATH": path, "LC_ALL": "C.UTF-8", "HOME": "/root"}, cwd="/", preexec_fn=_end_with_parent,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        _pass_on(process.stdout.fileno(), say)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


def _pass_on(output: int, say: Callable[[str], None]) -> None:
    """Say whole lines; a line that is too long goes in pieces."""
    text, ended = b"", False
    while not ended:
        ready, _, _ = select.select([0, output], [], [], _QUIET_S)
        if 0 in ready:  # whoever follows sends nothing, so this is the end of the input
            return
        block = os.read(output, _BLOCK) if ready else b""
        text += block
        ended = bool(ready) and not block
        lines = text.rfind(b"\n") + 1
        end = len(text) if ended or (not lines and len(text) > _BLOCK) else lines
        say(text[:end].decode("utf-8", "replace").rstrip("\n"))
        text = text[end:]


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
