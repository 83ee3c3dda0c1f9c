"""Run the probe: on this machine, or on a board over ssh. Nothing is installed there."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import IO, Final

from rkboard.doctor.document import MARK, MOST_BYTES, Board, Document
from rkboard.doctor.notes import Notes
from rkboard.doctor.probe import Probe
from rkruntime.chat.ssh import SSH_VARIABLE, ssh_command
from rkruntime.checks.machine import ROOT
from rkruntime.errors import ServiceError

PROBE: Final = Path(__file__).with_name("probe.py")
# The probe ends by itself after 20 seconds; this is for a password at ssh's own prompt.
_PATIENCE_S: Final = 120.0
_MISSING: Final = {"ssh": "Install the OpenSSH client.", "sudo": "Leave out --sudo, or run rkedge doctor as root."}


def look(destination: str | None, root: Path | None = None, *, sudo: bool = False) -> Document:
    """What a board says of itself.

    Args:
        destination: For ssh, such as `user@board`; None for this machine.
        root: Another file tree of this machine.
        sudo: Look as root, by a sudo that asks for no password.

    Raises:
        ServiceError: The board cannot be reached, has no Python, or sends something else.
        UsageError: The command for ssh cannot be read.
    """
    words = ["sudo", "-n"] if sudo else []
    if destination is None:
        command = [*words, sys.executable, "-I", "-", *(["--root", str(root)] if root else [])]
    else:
        command = ssh_command(destination, *words, "python3", "-I", "-")
    visit = _Visit(command)
    line = visit.line()
    if line is None:
        raise _failed(visit, destination)
    return Document.parse(line)


def glance(root: Path = ROOT, *, clocks_only: bool = False) -> Board:
    """What this machine's own files say, read in this process: no nodes, processes or libraries.

    Args:
        root: Another file tree of this machine.
        clocks_only: Read only what may change while a model answers.
    """
    probe = Probe(str(root))
    probe.do(probe.me, probe.clocks if clocks_only else probe.files, probe.folders)
    return Board(Document.of({**json.loads(json.dumps(probe.found)), "seconds": 0.0}))


class _Visit:
    """A process that runs the probe, which is its standard input."""

    def __init__(self, command: list[str]) -> None:
        pipe = subprocess.PIPE
        try:
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe)
        except OSError as error:
            raise ServiceError(
                f"{command[0]} cannot be started: {error.strerror or error}.",
                hint=_MISSING.get(command[0], f"Install it, or change {SSH_VARIABLE}, which names it."),
            ) from error
        assert self._process.stderr is not None
        self._said = Notes(self._process.stderr)
        self.notes: list[str] = []
        self.status: int | None = None
        self.flooded = False
        self._found: bytes | None = None

    def line(self) -> bytes | None:
        """The probe's line; None if it did not come. What hangs on the board may never end: nobody waits for that."""
        process = self._process
        assert process.stdin is not None
        assert process.stdout is not None
        reader = threading.Thread(target=self._read, args=(process.stdout,), daemon=True)
        reader.start()
        try:
            with suppress(BrokenPipeError), process.stdin as stdin:
                stdin.write(PROBE.read_bytes())
            reader.join(_PATIENCE_S)
            with suppress(subprocess.TimeoutExpired):
                self.status = process.wait(2 if self._found is None else 0.2)
        finally:
            process.kill()
            process.wait()
            self.notes = self._said.lines()
            reader.join(1)  # a child of ssh may keep the pipe open
        return self._found

    def _read(self, stream: IO[bytes]) -> None:
        """Find the line among what a login script prints, in bounded memory."""
        left = MOST_BYTES
        with stream:
            while left > 0 and (line := stream.readline(left)):
                left -= len(line)
                if (at := line.find(MARK)) >= 0:  # behind what was printed without a line feed
                    self._found = line[at:]
                    return
        self.flooded = left <= 0


def _failed(visit: _Visit, destination: str | None) -> ServiceError:
    where = destination or "this machine"
    details = {"lines": visit.notes, "exit": visit.status}
    said = " ".join(visit.notes).lower()
    if visit.flooded:
        hint = f"What does this print? ssh {destination} true" if destination else None
        return ServiceError(f"{where} sent megabytes of something else than the probe's document.", hint=hint)
    if "sudo:" in said:
        return ServiceError(
            f"sudo on {where} asks for a password, or refuses.",
            hint="Leave out --sudo: the doctor says what could not be read.",
            details=details,
        )
    if visit.status == 255 and destination:
        hint = f"Try it by hand: ssh {destination} true"
        return ServiceError(f"{destination} cannot be reached with ssh.", hint=hint, details=details)
    if visit.status == 127 and destination:
        hint = "On the board: sudo apt install python3"
        return ServiceError(f"{destination} has no python3.", hint=hint, details=details)
    ended = "did not end" if visit.status is None else f"ended with {visit.status}"
    return ServiceError(
        f"The probe {ended} on {where} before it had said anything.",
        hint="It needs Python 3.7 or later: python3 --version",
        details=details,
    )
