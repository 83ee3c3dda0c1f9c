"""Conversations that the daemon keeps: one JSON file each, by user and name, with limits for each user and for all."""

from __future__ import annotations

import json
import os
import stat
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from rkruntime.errors import BodyError, HostError, NoSuchSessionError
from rkruntime.files import atomic_file, open_regular, write_error
from rkruntime.serve.users import User, check_name, shares
from rkruntime.words import NAME

# Bytes that even a small file takes on the disk.
_BLOCK: Final = 4096
# Most characters of a title.
_TITLE: Final = 80


@dataclass(frozen=True)
class Summary:
    """One conversation in the list.

    Attributes:
        size: Size on disk, in bytes.
        changed: Time of the last change, in seconds since 1970.
        title: Beginning of the first question; None if the file has not been read yet.
    """

    name: str
    size: int
    changed: float
    title: str | None = None


def _title(data: Mapping[str, Any]) -> str:
    """Return the beginning of the first question, on one line. The file may have been changed by anyone."""
    turns, broken = data.get("messages"), data.get("broken")
    first = turns[0].get("content") if isinstance(turns, list) and turns and isinstance(turns[0], dict) else None
    if first is None and isinstance(broken, dict):
        first = broken.get("question")
    return " ".join(first[: 4 * _TITLE].split())[:_TITLE] if isinstance(first, str) else ""


def _conversations(folder: Path) -> Iterator[tuple[os.stat_result, Path]]:
    """Yield the files that a store may have written; other files in the folder are left alone."""
    for path in folder.glob("*/*.json"):
        with suppress(OSError):
            found = path.stat()
            if stat.S_ISREG(found.st_mode) and NAME.fullmatch(path.stem):
                yield found, path


def _on_disk(size: int) -> int:
    return -(-size // _BLOCK) * _BLOCK


def _as_text(data: Mapping[str, Any]) -> bytes:
    """Return a conversation as written to its file."""
    return json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "surrogatepass")


def damaged(name: str, reason: str) -> HostError:
    """Return the error for a session whose file is not what was written."""
    return HostError(
        f"The file of the session {name!r} is damaged: {reason}.", hint="Delete the session to use its name."
    )


class SessionStore:
    """The folder of conversations.

    The folder is scanned once; afterwards the sizes are kept in memory, and no one else may write there. Methods that
    change files must be called from one thread at a time; other methods may be called from any thread meanwhile.

    Args:
        folder: Folder, created with the first conversation; no one else may read it.
        max_bytes: Limit of the size of all files on disk. Each user may have a share of it.
        max_number: Limit of the number of files, of which each user may have a share too.
    """

    def __init__(self, folder: Path, max_bytes: int, max_number: int) -> None:
        self._folder = folder
        self._max_bytes = max_bytes
        self._max_number = max_number
        # By user folder; least recently used first.
        self._kept: dict[str, OrderedDict[str, Summary]] = {}
        # Totals by prefix of User.path; () counts everything.
        self._bytes: Counter[tuple[str, ...]] = Counter()
        self._number: Counter[tuple[str, ...]] = Counter()
        # Held while the index in memory changes, never during reads or writes of files.
        self._lock = threading.Lock()
        for path in folder.glob("*/.*.partial-*"):
            # Left by a daemon that was killed while it wrote the file. It stays if the folder is read-only.
            with suppress(OSError):
                path.unlink()
        for found, path in sorted(_conversations(folder), key=lambda item: item[0].st_mtime):
            account, _, name = path.parent.name.partition("+")
            self._note(User(account, name), Summary(path.stem, _on_disk(found.st_size), found.st_mtime))

    def limit(self, max_bytes: int, max_number: int) -> None:
        """Set other limits, for the next writes."""
        self._max_bytes, self._max_number = max_bytes, max_number

    def _file(self, user: User, name: str) -> Path:
        return self._folder / user.folder / f"{check_name(name, 'session')}.json"

    def list(self, user: User) -> list[Summary]:
        """List a user's conversations, most recently used first."""
        with self._lock:
            return list(reversed(self._of(user).values()))

    def titled(self, user: User) -> Sequence[Summary]:
        """List with titles, for which the files that an earlier daemon has written are read once."""
        return [item if item.title is not None else self._with_title(user, item) for item in self.list(user)]

    def _with_title(self, user: User, item: Summary) -> Summary:
        try:
            titled = replace(item, title=_title(self.read(user, item.name)))
        except (NoSuchSessionError, HostError):
            titled = replace(item, title="")
        with self._lock:
            kept = self._of(user)
            if kept.get(item.name) == item:  # nobody has changed it meanwhile
                kept[item.name] = titled
        return titled

    def size(self, user: User, name: str) -> int:
        """Return the size of a conversation on disk in bytes; 0 if there is none."""
        with self._lock:
            kept = self._of(user).get(name)
        return kept.size if kept else 0

    def read(self, user: User, name: str) -> dict[str, Any]:
        """Read a conversation that `write` has written.

        Raises:
            NoSuchSessionError: There is none.
            HostError: The file cannot be read or is damaged. The caller must not take it for missing and replace it.
        """
        path = self._file(user, name)
        try:
            with open_regular(path) as file:
                data = json.loads(file.read())
        except FileNotFoundError as error:
            raise NoSuchSessionError(f"There is no session {name!r}.") from error
        except OSError as error:
            raise HostError(
                f"The session {name!r} cannot be read: {error.strerror or error}.",
                hint=f"It is in {path.parent} on the board; other sessions can be used meanwhile.",
            ) from error
        except (ValueError, RecursionError) as error:
            raise damaged(name, str(error)) from error
        if not isinstance(data, dict):
            raise damaged(name, "it has no conversation")
        return data

    def write(self, user: User, name: str, data: Mapping[str, Any]) -> None:
        """Write a conversation, completely or not at all. The user's least recently used ones make room for it.

        Raises:
            BodyError: There would be no room even without the others (507).
            HostError: The disk is full.
        """
        path, text = self._file(user, name), _as_text(data)
        leaving = self._leaving(user, name, _on_disk(len(text)))
        try:
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise write_error(path, error) from error
        with atomic_file(path) as partial:
            partial.write_bytes(text)
        with self._lock:
            self._note(user, Summary(name, _on_disk(len(text)), time.time(), _title(data)))
        for other in leaving:
            # The write is done; an old file that cannot be deleted is tried again with the next write.
            with suppress(NoSuchSessionError, HostError):
                self.delete(user, other)

    def delete(self, user: User, name: str) -> None:
        """Delete a conversation. It stays in the list until the file is gone.

        Raises:
            NoSuchSessionError: There is none.
            HostError: The file cannot be deleted.
        """
        path = self._file(user, name)
        try:
            path.unlink()
        except (FileNotFoundError, NotADirectoryError) as error:
            with self._lock:
                self._forget(user, name)
            raise NoSuchSessionError(f"There is no session {name!r}.") from error
        except OSError as error:
            raise HostError(
                f"The session {name!r} cannot be deleted: {error.strerror or error}.",
                hint="Make the sessions folder writable for the daemon's user.",
            ) from error
        with self._lock:
            self._forget(user, name)
        with suppress(OSError):
            # Fails unless that was the user's last conversation. So unused names do not leave folders.
            path.parent.rmdir()

    def _of(self, user: User) -> OrderedDict[str, Summary]:
        return self._kept.get(user.folder, OrderedDict())

    def _note(self, user: User, item: Summary) -> None:
        """Put an entry behind all others, replacing one of the same name."""
        self._forget(user, item.name)
        self._kept.setdefault(user.folder, OrderedDict())[item.name] = item
        self._count(user, item.size, 1)

    def _forget(self, user: User, name: str) -> None:
        kept = self._of(user)
        item = kept.pop(name, None)
        if item:
            self._count(user, -item.size, -1)
        if not kept:
            self._kept.pop(user.folder, None)

    def _count(self, user: User, size: int, number: int) -> None:
        for path in ((), user.path[:1], user.path):
            self._bytes[path] += size
            self._number[path] += number
            if not self._number[path]:
                del self._bytes[path], self._number[path]

    def _leaving(self, user: User, name: str, size: int) -> Sequence[str]:
        """Return the user's conversations that must go so that a file of `size` fits all limits. Raises BodyError."""
        own = [item for item in self._of(user).values() if item.name != name]
        old = self._of(user).get(name)
        more, one = (size - old.size, 0) if old else (size, 1)
        # A limit that was lowered meanwhile is not a reason to refuse a conversation that shrinks.
        too_large = more + self._excess(user, self._bytes, self._max_bytes) if more > 0 else 0
        too_many = one + self._excess(user, self._number, self._max_number)
        leaving = []
        while own and (too_large > 0 or too_many > 0):
            item = own.pop(0)
            leaving.append(item.name)
            too_large, too_many = too_large - item.size, too_many - 1
        if too_large > 0 or too_many > 0:
            raise BodyError(
                f"There is no room for the session {name!r}, which needs {size:,} bytes.",
                hint="Clear it or start a new one; sessions.max_mb in the daemon's settings is the limit, of which a "
                "user has a share.",
                details={"status": 507, "code": "insufficient_storage"},
            )
        return leaving

    def _excess(self, user: User, used: Counter[tuple[str, ...]], whole: int) -> int:
        """Return by how much the tightest limit is exceeded; below 0 while there is room."""
        return max(used[path] - most for path, most in [((), whole), *shares(user.path, whole)])
