"""A board on loopback: a real sshd, and this machine's rkedge with a cache folder of its own."""

from __future__ import annotations

import os
import shlex
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.runtime.serve import sshd

STANDIN = Path(__file__).with_name("standin.py")


class Nobody:
    """Stands for the daemon, which is not asked here."""

    socket = Path("/nowhere")

    @staticmethod
    def wait_until(condition: Callable[[], object], seconds: float = 20) -> None:
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline
            time.sleep(0.02)


@dataclass
class Loopback:
    """The board.

    Attributes:
        home: Its cache folder, where nothing of a visit may stay.
        environment: Of its rkedge, such as RKEMU_GUESS.
    """

    sshd: sshd.Board
    home: Path
    library: Path
    pause_ms: int = 0
    environment: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.boot.write_text("1")
        (self.home / "cache").mkdir()

    @property
    def boot(self) -> Path:
        return self.home / "boot"

    @property
    def program(self) -> list[str]:
        variables = {"XDG_CACHE_HOME": str(self.home / "cache"), **self.environment}
        words = [f"{name}={value}" for name, value in variables.items()]
        return ["env", *words, sys.executable, str(STANDIN), str(self.boot), str(self.pause_ms)]

    @property
    def words(self) -> list[str]:
        """Options of `rkedge compat`."""
        return ["--board", "open", "--remote-command", shlex.join(self.program), "--library", str(self.library)]

    def left(self) -> list[str]:
        """Files of a visit that are there."""
        return [str(path) for path in (self.home / "cache").rglob("*") if path.is_file()]

    def processes(self) -> list[int]:
        """All that run on the board, the library's workers too."""
        mark, found = str(self.home).encode(), []
        for folder in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if int(folder.name) != os.getpid() and (
                    mark in (folder / "cmdline").read_bytes() or mark in (folder / "environ").read_bytes()
                ):
                    found.append(int(folder.name))
        return [pid for pid in found if b"compat" not in _words(pid) and pid != self.sshd.sshd.pid]

    def kill(self, *, power: bool) -> int:
        """Kill the processes of the visit, or, as a loss of power does, connections and all; returns how many."""
        if power:
            self.boot.write_text(str(time.monotonic()))
        found = self.processes()
        for number in (signal.SIGSTOP, signal.SIGKILL):  # so that none sees another one die
            for pid in found:
                with suppress(ProcessLookupError):
                    os.kill(pid, number)
        if power:
            self.sshd.drop()
        return len(found)

    def quiet(self) -> bool:
        """Whether nothing runs there any more."""
        return not self.processes()


def _words(pid: int) -> list[bytes]:
    with suppress(OSError):
        return Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    return []


@contextmanager
def loopback(folder: Path, library: Path, monkeypatch: Any) -> Iterator[Loopback]:
    (folder / "ssh").mkdir(parents=True)
    (folder / "board").mkdir()
    with sshd.running_board(Nobody, folder / "ssh") as found:
        monkeypatch.setenv("RKEDGE_SSH", shlex.join([*found.ssh, "-T"]))
        yield Loopback(found, folder / "board", library)
