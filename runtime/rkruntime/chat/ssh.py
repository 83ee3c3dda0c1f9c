"""How ssh is called: the user's own OpenSSH with its configuration, so host keys are checked as everywhere else."""

from __future__ import annotations

import os
import shlex
from typing import Final

from rkruntime.errors import UsageError

SSH_VARIABLE: Final = "RKEDGE_SSH"
# A dead connection is noticed after 15 seconds, not after TCP's quarter of an hour; so is one that cannot be made.
_SSH: Final = ("ssh", "-T", "-o", "ConnectTimeout=15", "-o", "ServerAliveInterval=5", "-o", "ServerAliveCountMax=3")


def ssh_command(destination: str, *remote: str) -> list[str]:
    """The command that runs `remote` there. ssh joins its words with spaces, and the shell there reads them.

    Raises:
        UsageError: The variable with the user's ssh command cannot be read.
    """
    return [*(words_of(SSH_VARIABLE) or _SSH), "--", destination, *remote]


def words_of(variable: str) -> list[str]:
    """The command in an environment variable, word by word; empty if it is not set. Raises UsageError."""
    try:
        return shlex.split(os.environ.get(variable, ""))
    except ValueError as error:
        raise UsageError(
            f"The command in {variable} cannot be read: {error}.", hint="Quote it as for a shell, or unset it."
        ) from error
