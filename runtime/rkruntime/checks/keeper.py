"""Address and messages of the keeper, which holds a board's clocks (docs/clocks.md)."""

from __future__ import annotations

from pathlib import Path
from typing import Final

SOCKET: Final = Path("/run/rkedge-clocks.sock")
SCHEMA: Final = "rkedge-clocks-request/1"
