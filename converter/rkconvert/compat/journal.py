"""What a visit to a board has shown so far, so that it can be resumed after an interruption."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

from rkruntime.bundle.manifest import Bundle
from rkruntime.errors import InputError, ServiceError
from rkruntime.files import atomic_file, read_regular, write_error
from rkruntime.folders import own_folder
from rkruntime.schema import build

_SCHEMA: Final = "rkedge-visit/1"
_MOST_BYTES: Final = 1 << 22


@dataclass
class Journal:
    """The state of a visit, kept in the user's cache folder until the result is written.

    Attributes:
        id: Id of the visit; the same for the same board, bundle and options, from the same machine and user.
        results: Results of the finished steps, by name.
        begun: The step in progress; empty between steps.
        boot: Id of the board's boot at the last connection.
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
    @contextmanager
    def held(cls, destination: str, bundle: Bundle, *options: object) -> Iterator[Journal]:
        """Open the journal as `of` does, and hold a lock on it during the block.

        Raises:
            ServiceError: Another process holds the lock: one visit would remove what the other has copied.
            OutputError, HostError: The file cannot be locked.
        """
        id, path = cls.of(destination, bundle, *options).id, _folder() / "lock"
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        except OSError as error:
            raise write_error(path, error) from error
        try:
            if not _locked(handle, int(id, 16) >> 1):
                raise ServiceError(
                    f"Another process is trying {bundle.manifest.name} on {destination} now.",
                    hint="Wait until it has ended: pgrep -af 'rkedge compat'",
                )
            yield cls.of(destination, bundle, *options)
        finally:
            os.close(handle)

    @classmethod
    def of(cls, destination: str, bundle: Bundle, *options: object) -> Journal:
        """Return the journal of an earlier start, or a new one."""
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
        return _folder() / f"{self.id}.json"

    def save(self) -> None:
        """Write the journal to its file. Raises OutputError or HostError if it cannot be written."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(self._path) as partial:
            partial.write_text(json.dumps(asdict(self)), encoding="utf-8")

    def forget(self) -> None:
        """Delete the file, once the result is written."""
        self._path.unlink(missing_ok=True)


def _locked(handle: int, at: int) -> bool:
    """Lock a byte of a file; False if another process holds it. Raises OutputError or HostError for other failures."""
    try:
        fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, at)
    except (BlockingIOError, PermissionError):  # fcntl(2): one or the other
        return False
    except OSError as error:
        raise write_error(_folder(), error) from error
    return True


def _folder() -> Path:
    return own_folder("cache") / "compat" / "visits"
