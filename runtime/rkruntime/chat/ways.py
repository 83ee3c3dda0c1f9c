"""How a chat reaches a daemon: on this machine, or over the user's own ssh."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from rkruntime.errors import ServiceError
from rkruntime.program import own_command
from rkruntime.remote import SSH_VARIABLE, ssh_command, words_of

ATTACH_VARIABLE: Final = "RKEDGE_ATTACH"
_ATTACH: Final = ("rkedge", "attach")
_HOST: Final = re.compile(r"[\w][\w.-]*")
# Name of a host that no ssh configuration names, to see ssh's defaults.
_NOBODY: Final = "host-that-nobody-named"
_PATIENCE_S: Final = 10
# Message and hint by ssh's exit code, if no daemon has answered. 255 is ssh's own, the others are the board's shell's.
_SSH_CODES: Final[Mapping[int, tuple[str, str]]] = {
    255: (
        "ssh could not connect or log in to {place}; what it says about that is above.",
        "`ssh {place} true` has to work first.",
    ),
    127: (
        "The shell on {place} cannot find rkedge: ssh gives it a PATH without /opt/rkedge/bin.",
        "On the board, once: sudo ln -s /opt/rkedge/bin/rkedge /usr/local/bin/"
        " -- or here, each time: export RKEDGE_ATTACH='/opt/rkedge/bin/rkedge attach'."
        " For a key that may only chat, correct the path in its line of ~/.ssh/authorized_keys.",
    ),
    126: (
        "This account may not run the rkedge of {place}.",
        "On the board, if it is in /opt/rkedge: sudo chmod -R a+rX /opt/rkedge",
    ),
}


@dataclass(frozen=True)
class Way:
    """How to reach a daemon.

    Attributes:
        place: Where the daemon is, in words.
        command: Command that starts `rkedge attach` or an equivalent.
        log: How to read the daemon's log.
        codes: Message and hint for some exit codes of `command`.
    """

    place: str
    command: Sequence[str]
    log: str
    codes: Mapping[int, tuple[str, str]] = field(default_factory=dict)

    def ended(self, code: int) -> ServiceError:
        """Return the error for a command that exited with `code` before a daemon had answered."""
        if code in self.codes:
            message, hint = (text.format(place=self.place) for text in self.codes[code])
            return ServiceError(message, hint=hint)
        return ServiceError(
            f"`rkedge attach` exited with code {code} before a daemon answered.",
            hint=f"Try it by hand: {shlex.join(self.command)} < /dev/null",
        )


def on_this_machine(socket: Path, log: str) -> Way:
    """Return the way to the daemon at a Unix socket."""
    command = own_command("attach", "--socket", str(socket))
    return Way("this machine", command, log)


def over_ssh(destination: str) -> Way:
    """Return the way to a board: `user@board`, `ssh://user@board:port`, or a host of ~/.ssh/config.

    Raises:
        UsageError: The command in RKEDGE_SSH or RKEDGE_ATTACH cannot be parsed.
    """
    attach = words_of(ATTACH_VARIABLE) or _ATTACH
    if Path(attach[-1]).name == _ATTACH[0]:  # only the program is given
        attach = [*attach, _ATTACH[1]]
    command = ssh_command(destination, *attach)
    return Way(destination, command, "journalctl -u rkedge, on the board", _SSH_CODES)


def is_destination(text: str) -> bool:
    """Whether `text` can only be a destination of ssh, or is a host that ~/.ssh/config has settings for."""
    if "@" in text or text.startswith("ssh://"):
        return True
    if not _HOST.fullmatch(text):
        return False
    usual, found = _config_of(_NOBODY), _config_of(text)
    # Settings such as ControlPath contain the host's name, so replace it before comparing.
    return None not in (usual, found) and found != str(usual).replace(_NOBODY, text.lower())


def _config_of(host: str) -> str | None:
    """Return ssh's settings for a host in lower case; None if ssh cannot be asked."""
    try:
        done = subprocess.run(
            [*(words_of(SSH_VARIABLE) or ["ssh"]), "-G", "--", host],
            stdin=subprocess.DEVNULL, capture_output=True, timeout=_PATIENCE_S, check=True,
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.decode(errors="replace").lower()
