"""Run the probe on this machine, or on a board over ssh, where nothing is installed."""

from __future__ import annotations

import json
import sys
from collections.abc import Generator
from contextlib import closing
from pathlib import Path
from typing import Final

from rkboard.doctor.document import MARK, MOST_BYTES, Board, Document
from rkboard.doctor.probe import SECONDS, Probe
from rkruntime.checks.machine import ROOT
from rkruntime.errors import ServiceError
from rkruntime.remote import Remote, missing_tool, refused_by_sudo, ssh_command

PROBE: Final = Path(__file__).with_name("probe.py")
# The probe ends by itself after 20 seconds; the rest is time to enter a password at ssh's own prompt.
_PATIENCE_S: Final = 120.0
# Longest time between two documents, beyond the interval that was asked for.
_PAUSE_S: Final = SECONDS + 15.0


def look(destination: str | None, root: Path | None = None, *, sudo: bool = False) -> Document:
    """Return what a board says of itself.

    Args:
        destination: For ssh, such as `user@board`; None for this machine.
        root: Another file tree of this machine.
        sudo: Look as root, with a sudo that does not ask for a password.

    Raises:
        ServiceError: The board cannot be reached, has no Python, or sends something else.
        UsageError: The command for ssh cannot be read.
    """
    visit = _Visit(_command(destination, root, sudo))
    with closing(visit.lines(_PATIENCE_S)) as lines:
        line = next(lines, None)
    if line is None:
        raise _failed(visit, destination)
    return Document.parse(line)


def watch(
    destination: str | None, every: float, root: Path | None = None, *, sudo: bool = False
) -> Generator[Document]:
    """Yield what changes on a board from second to second, once per `every` seconds. Does not end by itself.

    Args and Raises: As for `look`.
    """
    visit = _Visit(_command(destination, root, sudo, "--every", str(every)), endless=True)
    document = None
    with closing(visit.lines(every + _PAUSE_S)) as lines:
        for line in lines:
            document = Document.parse(line)
            yield document
    if document is None:
        raise _failed(visit, destination)
    raise ServiceError(
        f"{destination or 'This machine'} says nothing any more. {' '.join(document.problems)}".strip(),
        hint="The connection broke, or a driver hangs. Start it again.",
        details={"lines": visit.notes, "exit": visit.status},
    )


def _command(destination: str | None, root: Path | None, sudo: bool, *options: str) -> list[str]:
    words = ["sudo", "-n"] if sudo else []
    if destination is not None:
        return ssh_command(destination, *words, "python3", "-I", "-", *options)
    return [*words, sys.executable, "-I", "-", *(["--root", str(root)] if root else []), *options]


def glance(root: Path = ROOT, *, clocks_only: bool = False) -> Board:
    """Return what this machine's own files say, read in this process, without nodes, processes or libraries.

    Args:
        root: Another file tree of this machine.
        clocks_only: Read only what may change while a model answers.
    """
    probe = Probe(str(root))
    probe.do(probe.me, probe.clocks if clocks_only else probe.files, probe.folders)
    return Board(Document.of({**json.loads(json.dumps(probe.found)), "seconds": 0.0}))


class _Visit:
    """A process that runs the probe, which it reads from standard input."""

    def __init__(self, command: list[str], *, endless: bool = False) -> None:
        self._remote = Remote(command, MARK, MOST_BYTES, endless=endless)
        self.notes: list[str] = []
        self.status: int | None = None

    @property
    def flooded(self) -> bool:
        return self._remote.flooded

    def lines(self, pause: float) -> Generator[bytes]:
        """Yield the probe's lines, until none comes within a pause. A probe that hangs there is not waited for."""
        found, patience = None, _PATIENCE_S
        try:
            self._remote.send(PROBE.read_bytes())
            self._remote.sent()
            while (found := self._remote.line(patience)) is not None:
                patience = pause
                yield found
        finally:
            self.status = self._remote.end(2 if found is None else 0.2)
            self.notes = self._remote.notes


def _failed(visit: _Visit, destination: str | None) -> ServiceError:
    where = destination or "this machine"
    details = {"lines": visit.notes, "exit": visit.status}
    if visit.flooded:
        hint = f"What does this print? ssh {destination} true" if destination else None
        return ServiceError(f"{where} sent megabytes of something other than the probe's document.", hint=hint)
    if tool := missing_tool(visit.notes):
        hint = "Leave out --sudo." if tool == "sudo" else "On the board: sudo apt install python3"
        return ServiceError(f"{where} has no {tool}.", hint=hint, details=details)
    if refused_by_sudo(visit.notes):
        return ServiceError(
            f"sudo on {where} asks for a password, or refuses.",
            hint="Leave out --sudo: the doctor says what could not be read.",
            details=details,
        )
    if visit.status == 255 and destination:
        hint = f"Try it by hand: ssh {destination} true"
        return ServiceError(f"{destination} cannot be reached with ssh.", hint=hint, details=details)
    ended = "did not end" if visit.status is None else f"ended with {visit.status}"
    return ServiceError(
        f"The probe {ended} on {where} before it had said anything.",
        hint="It needs Python 3.7 or later: python3 --version",
        details=details,
    )
