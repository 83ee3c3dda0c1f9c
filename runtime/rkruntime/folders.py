"""The folders for the user's own files, by the XDG Base Directory Specification.

platformdirs also supports other systems, which rkedge does not run on; its import adds some 20 ms to each start
(median of 15 on a busy PC).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final, Literal

from rkruntime.errors import HostError

# Folders that ProtectHome= hides, as in the daemon's unit. INVOCATION_ID is set in a unit's processes, but also in a
# desktop's terminal.
_HIDDEN: Final = ("/home", "/root", "/run/user")
_DEFAULTS: Final = {"cache": ".cache", "config": ".config", "data": ".local/share", "state": ".local/state"}


def hint_if_hidden(path: Path) -> str | None:
    """Return what to do about a path if it is not found because systemd hides it from this process, else None."""
    folder = next(filter(path.absolute().is_relative_to, _HIDDEN), None)
    if "INVOCATION_ID" not in os.environ or folder is None or _shows_anything(folder):
        return None
    return "A unit with ProtectHome= sees nothing below /home and /root. Put it into /var/lib/rkedge or /opt instead."


def _shows_anything(folder: str) -> bool:
    try:
        with os.scandir(folder) as found:
            return any(found)
    except OSError:
        return False


def home() -> Path:
    """Return the user's home folder. Raises HostError if there is none."""
    try:
        return Path.home()
    except RuntimeError:  # no HOME, and an account that this machine does not know, as in a container
        raise HostError("This user has no home folder.", hint="Set HOME to a folder for rkedge's files.") from None


def own_folder(kind: Literal["cache", "config", "data", "state"]) -> Path:
    """Return `$XDG_CACHE_HOME/rkedge` or `~/.cache/rkedge`, and so on; it may not exist yet. Raises HostError."""
    named = Path(os.environ.get(f"XDG_{kind.upper()}_HOME", ""))
    # The specification says to ignore relative paths.
    return (named if named.is_absolute() else home() / _DEFAULTS[kind]) / "rkedge"
