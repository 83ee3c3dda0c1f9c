"""What a visit to a board has shown so far, so that it goes on after whatever cut it off."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from rkruntime.bundle.manifest import Bundle
from rkruntime.errors import InputError
from rkruntime.files import atomic_file, read_regular
from rkruntime.folders import own_folder
from rkruntime.schema import build

_SCHEMA: Final = "rkedge-visit/1"
_MOST_BYTES: Final = 1 << 22


@dataclass
class Journal:
    """Kept in the user's cache folder until the result is written.

    Attributes:
        id: Of the visit; the same for the same board, bundle and options, from the same machine and user.
        results: Of the steps that are done, by name.
        begun: The step that is being done.
        boot: The board's boot during it.
        breaks, reboots: How often the connection or the board was lost in a step, by name.
        removed: Whether nothing is left on the board.
    """

    id: str
    results: dict[str, Any] = field(default_factory=dict)
    begun: str = ""
    boot: str = ""
    breaks: dict[str, int] = field(default_factory=dict)
    reboots: dict[str, int] = field(default_factory=dict)
    removed: bool = False
    schema: str = _SCHEMA

    @classmethod
    def of(cls, destination: str, bundle: Bundle, *options: object) -> Journal:
        """That of an earlier start, or a new one."""
        parts = [destination, bundle.manifest.fingerprint, platform.node(), str(os.getuid()), *map(str, options)]
        found = cls(hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16])
        with suppress(OSError, ValueError, InputError, RecursionError):
            kept: Mapping[str, Any] = json.loads(read_regular(found._path, _MOST_BYTES))
            earlier = build(cls, kept, InputError)
            if (earlier.schema, earlier.id) == (_SCHEMA, found.id):
                return earlier
        return found

    @property
    def _path(self) -> Path:
        return own_folder("cache") / "compat" / "visits" / f"{self.id}.json"

    def save(self) -> None:
        """Raises OutputError or HostError if it cannot be written."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(self._path) as partial:
            partial.write_text(json.dumps(asdict(self)), encoding="utf-8")

    def forget(self) -> None:
        """Once the result is written."""
        self._path.unlink(missing_ok=True)
