"""Conversations that the daemon keeps: one JSON file each, by user and name, with a limit for all together."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rkruntime.errors import BodyError, HostError, NoSuchSessionError
from rkruntime.files import atomic_file, write_error

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


def check_name(name: str, what: str) -> str:
    """`name` if it can name a file. Raises BodyError."""
    if not _NAME.fullmatch(name):
        raise BodyError(
            f"{name[:80]!r} cannot be the name of a {what}: letters, digits, dot, dash and underscore, at most 64.",
            details={"param": what},
        )
    return name


@dataclass(frozen=True)
class Summary:
    """One conversation in the list: size in bytes, time of the last change in seconds since 1970."""

    name: str
    size: int
    changed: float


class SessionStore:
    """The folder of conversations.

    Args:
        folder: made when the first one is kept; nobody else may read it.
        max_bytes: of all files together; the longest unused are deleted.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes

    def _file(self, user: str, name: str) -> Path:
        return self._folder / check_name(user, "user") / f"{check_name(name, 'session')}.json"

    def list(self, user: str) -> list[Summary]:
        """A user's conversations, the last used first."""
        files = (self._folder / check_name(user, "user")).glob("*.json")
        found = [Summary(path.stem, path.stat().st_size, path.stat().st_mtime) for path in files]
        return sorted(found, key=lambda item: item.changed, reverse=True)

    def read(self, user: str, name: str) -> dict[str, Any]:
        """What `write` kept. Raises NoSuchSessionError; a damaged file is as good as none."""
        try:
            data = json.loads(self._file(user, name).read_bytes())
        except FileNotFoundError as error:
            raise NoSuchSessionError(f"There is no session {name!r}.") from error
        except (OSError, ValueError, RecursionError) as error:
            raise NoSuchSessionError(
                f"The session {name!r} cannot be read: {error}.", hint="Delete it and begin a new one."
            ) from error
        if not isinstance(data, dict):
            raise NoSuchSessionError(f"The file of the session {name!r} holds no conversation.", hint="Delete it.")
        return data

    def write(self, user: str, name: str, data: Mapping[str, Any]) -> None:
        """Keep a conversation, whole or not at all.

        Raises:
            HostError: the disk is full, or it is larger than all may be together.
        """
        path = self._file(user, name)
        text = json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")
        if len(text) > self._max_bytes:
            raise HostError(
                f"The session {name!r} has {len(text):,} bytes; all together may have {self._max_bytes:,}.",
                hint="Begin a new one, or raise sessions.max_mb in the daemon's settings.",
            )
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise write_error(path, error) from error
        with atomic_file(path) as partial:
            partial.write_bytes(text)
        self._make_room(path)

    def delete(self, user: str, name: str) -> None:
        """Remove a conversation. Raises NoSuchSessionError."""
        try:
            self._file(user, name).unlink()
        except FileNotFoundError as error:
            raise NoSuchSessionError(f"There is no session {name!r}.") from error

    def _make_room(self, newest: Path) -> None:
        files = sorted(self._folder.glob("*/*.json"), key=lambda path: path.stat().st_mtime, reverse=True)
        total = 0
        for path in [newest, *(path for path in files if path != newest)]:
            total += path.stat().st_size
            if total > self._max_bytes:
                path.unlink(missing_ok=True)
