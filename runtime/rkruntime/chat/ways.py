"""How a chat reaches a daemon: on this machine, or over the user's own ssh."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rkruntime.chat.ssh import SSH_VARIABLE, ssh_command, words_of
from rkruntime.program import own_command

ATTACH_VARIABLE: Final = "RKEDGE_ATTACH"
_ATTACH: Final = ("rkedge", "attach")
_HOST: Final = re.compile(r"[\w][\w.-]*")
# A host that no configuration names.
_NOBODY: Final = "host-that-nobody-named"
_PATIENCE_S: Final = 10


@dataclass(frozen=True)
class Way:
    """How to reach a daemon.

    Attributes:
        place: Where it is, for people.
        command: Starts what speaks as `rkedge attach` does.
        hint: What to try if that ends before a daemon has answered.
        log: How to read the daemon's log.
    """

    place: str
    command: Sequence[str]
    hint: str
    log: str


def on_this_machine(socket: Path, log: str) -> Way:
    """The way to the daemon at a Unix socket."""
    command = own_command("attach", "--socket", str(socket))
    return Way("this machine", command, "Try it by hand: rkedge attach < /dev/null", log)


def over_ssh(destination: str) -> Way:
    """The way to a board: `user@board`, `ssh://user@board:port`, or a host of ~/.ssh/config.

    Raises:
        UsageError: RKEDGE_SSH or RKEDGE_ATTACH cannot be read.
    """
    command = ssh_command(destination, *(words_of(ATTACH_VARIABLE) or _ATTACH))
    hint = f"Try it by hand: ssh {destination} true. rkedge must be installed on the board, and its daemon running."
    return Way(destination, command, hint, "journalctl -u rkedge, on the board")


def is_destination(text: str) -> bool:
    """Whether `text` can only be a destination of ssh, or is a host that ~/.ssh/config has something to say about."""
    if "@" in text or text.startswith("ssh://"):
        return True
    if not _HOST.fullmatch(text):
        return False
    usual, found = _config_of(_NOBODY), _config_of(text)
    # A host's name is also within other settings, such as ControlPath.
    return None not in (usual, found) and found != str(usual).replace(_NOBODY, text.lower())


def _config_of(host: str) -> str | None:
    """ssh's settings for a host, in lower case; None if ssh cannot be asked."""
    try:
        done = subprocess.run(
            [*(words_of(SSH_VARIABLE) or ["ssh"]), "-G", "--", host],
            stdin=subprocess.DEVNULL, capture_output=True, timeout=_PATIENCE_S, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="replace").lower()
