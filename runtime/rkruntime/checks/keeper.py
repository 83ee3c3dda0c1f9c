"""Where the keeper of a board's clocks is asked for them, and in which words (docs/clocks.md)."""

from __future__ import annotations

from pathlib import Path
from typing import Final

SOCKET: Final = Path("/run/rkedge-clocks.sock")
SCHEMA: Final = "rkedge-clocks-request/1"
