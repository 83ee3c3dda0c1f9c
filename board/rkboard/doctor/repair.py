"""Run the safe repairs that findings offer: as root, one command at a time, without a shell and without a password."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence
from typing import Final

from rkboard.doctor.finding import Finding, Fix
from rkruntime.chat.ssh import ssh_command
from rkruntime.errors import ServiceError
from rkruntime.printable import one_line

_LIMIT_S: Final = 300.0


def fixes_of(findings: Sequence[Finding]) -> list[Fix]:
    """The repairs of findings that are not ok, each once."""
    offered = (fix for finding in findings if finding.status != "ok" for fix in finding.verdict.fixes)
    return list(dict.fromkeys(offered))


def apply(fix: Fix, destination: str | None, *, root: bool) -> str:
    """Run a repair; returns why it failed, or nothing.

    Args:
        root: The user there is root already.

    Raises:
        ServiceError: The command cannot be started.
        UsageError: The command for ssh cannot be read.
    """
    # The words of a Fix have no letter that a shell reads, so ssh may join them.
    words = [*([] if root else ["sudo", "-n"]), *fix.words]
    command = words if destination is None else ssh_command(destination, *words)
    given = f"{fix.text}\n".encode() if fix.text else b""
    try:
        done = subprocess.run(command, input=given, capture_output=True, timeout=_LIMIT_S, check=False)
    except subprocess.TimeoutExpired:
        return f"it did not end within {_LIMIT_S:.0f} seconds"
    except FileNotFoundError:
        return f"there is no {command[0]} here"
    except OSError as error:
        raise ServiceError(f"{command[0]} cannot be started: {error.strerror or error}.", hint="") from error
    if done.returncode == 0:
        return ""
    lines = done.stderr[-4096:].decode("utf-8", "replace").strip().splitlines()
    return one_line(lines[-1])[:300] if lines else f"it ended with {done.returncode}"
