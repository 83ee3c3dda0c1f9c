"""The folders for the user's own files, by the XDG Base Directory Specification.

platformdirs also supports other systems, which rkedge does not run on; its import adds some 20 ms to each start
(median of 15 on a busy PC).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final, Literal

_DEFAULTS: Final = {"cache": ".cache", "config": ".config", "data": ".local/share", "state": ".local/state"}


def own_folder(kind: Literal["cache", "config", "data", "state"]) -> Path:
    """`$XDG_CACHE_HOME/rkedge` or `~/.cache/rkedge`, and so on; it may not exist yet."""
    named = Path(os.environ.get(f"XDG_{kind.upper()}_HOME", ""))
    # The specification says to ignore relative paths.
    return (named if named.is_absolute() else Path.home() / _DEFAULTS[kind]) / "rkedge"
