"""The folders for the user's own files, by the XDG Base Directory Specification.

platformdirs also supports other systems, which rkedge does not run on; its import adds some 20 ms to each start
(median of 15 on a busy PC).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final, Literal

# By ProtectHome=, which the daemon's unit has. INVOCATION_ID tells a unit's process.
_HIDDEN: Final = ("/home", "/root", "/run/user")
_DEFAULTS: Final = {"cache": ".cache", "config": ".config", "data": ".local/share", "state": ".local/state"}


def hint_if_hidden(path: Path) -> str | None:
    """What to do about a path that is not found because systemd hides it from this process; None if it does not."""
    if "INVOCATION_ID" not in os.environ or not any(map(path.absolute().is_relative_to, _HIDDEN)):
        return None
    return "A unit with ProtectHome= sees nothing below /home and /root. Put it into /var/lib/rkedge or /opt instead."


def own_folder(kind: Literal["cache", "config", "data", "state"]) -> Path:
    """`$XDG_CACHE_HOME/rkedge` or `~/.cache/rkedge`, and so on; it may not exist yet."""
    named = Path(os.environ.get(f"XDG_{kind.upper()}_HOME", ""))
    # The specification says to ignore relative paths.
    return (named if named.is_absolute() else Path.home() / _DEFAULTS[kind]) / "rkedge"
