"""Run the safe repairs that findings offer: as root, one command at a time, without a shell and without a password."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from contextlib import suppress
from typing import Final

from rkboard.doctor.finding import Finding, Fix
from rkruntime.errors import ServiceError
from rkruntime.remote import Notes, ssh_command

_LIMIT_S: Final = 300.0


def fixes_of(findings: Sequence[Finding]) -> list[Fix]:
    """Return the repairs of all findings that are not ok, without duplicates."""
    offered = (fix for finding in findings if finding.status != "ok" for fix in finding.verdict.fixes)
    return list(dict.fromkeys(offered))


def apply(fix: Fix, destination: str | None, *, root: bool) -> str:
    """Run a repair; return why it failed, or an empty text.

    Args:
        root: The user there is root already, and sudo is not needed.

    Raises:
        ServiceError: The command cannot be started.
        UsageError: The command for ssh cannot be read.
    """
    # The words of a Fix have no character that a shell interprets, so ssh may join them.
    words = [*([] if root else ["sudo", "-n"]), *fix.words]
    command = words if destination is None else ssh_command(destination, *words)
    pipe = subprocess.PIPE
    try:
        process = subprocess.Popen(command, stdin=pipe, stdout=subprocess.DEVNULL, stderr=pipe)
    except FileNotFoundError:
        return f"there is no {command[0]} here"
    except OSError as error:
        raise ServiceError(f"{command[0]} cannot be started: {error.strerror or error}.", hint="") from error
    assert process.stdin is not None
    assert process.stderr is not None
    notes = Notes(process.stderr)
    try:
        with suppress(BrokenPipeError), process.stdin as stdin:
            stdin.write(f"{fix.text}\n".encode() if fix.text else b"")
        process.wait(_LIMIT_S)
    except subprocess.TimeoutExpired:
        return f"it did not end within {_LIMIT_S:.0f} seconds"
    finally:
        process.kill()
        process.wait()
    if process.returncode == 0:
        return ""
    lines = [line for line in notes.lines() if line.strip()]
    return lines[-1].strip()[:300] if lines else f"it ended with {process.returncode}"
