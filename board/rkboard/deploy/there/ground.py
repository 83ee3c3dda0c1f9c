"""Files and tools of a board, below a root: a file that is written is whole and on the disk, or not there at all."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import shutil
import stat
import subprocess
import threading
from pathlib import Path
from typing import IO, Any

_BLOCK = 1 << 20
# In the JSON of a tool or the daemon: digits of a number, and lists or objects.
_MOST_DIGITS = 40
_MOST_LISTS = 500
_TOOLS = ("usr/sbin", "usr/bin", "sbin", "bin")
_MOST_SAID = 2000
# Bytes kept from the end of a tool's output: a journal may hold a flood of lines from a library.
_MOST_PRINTED = 4 << 20
# The groups root and staff: on Debian, members of staff may change what is on root's PATH anyway.
_ROOTS_GROUPS = (0, 50)


class Refused(Exception):  # noqa: N818 - it is an answer
    """An operation is refused: the reason, and what to do about it."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message, self.hint = message, hint


class Ground:
    """A board's file tree.

    Args:
        root: `/`, or a tree in which its own tools, if it has any, stand for the system's.

    Attributes:
        lock: The descriptor of the file that is locked during a change.
    """

    def __init__(self, root: str) -> None:
        self.root = Path(root)
        self.is_system = root == "/"
        self.lock: int | None = None
        self.home = self.at("/opt/rkedge")
        self._state = self.home / "deploy.json"

    def at(self, path: str) -> Path:
        """Return where a path of the board is on this machine."""
        return self.root / path.lstrip("/")

    def check_own(self) -> None:
        """Raise Refused if anybody but root may change /opt/rkedge or made anything in it: root runs what is there."""
        inside = (each for pattern in ("*", "*/*") for each in self.home.glob(pattern))
        found = next((each for each in inside if not _is_roots(os.lstat(each))), None)
        if found is None and not others_may_change(self.home, self.root):
            return
        raise Refused(
            f"Somebody else than root may change {found or self.home}, from which root would run programs.",
            "Move it away, then deploy: sudo mv /opt/rkedge /opt/rkedge.old",
        )

    @property
    def state(self) -> dict[str, Any]:
        """The record of what was done here, and what it replaced; empty if its file is damaged."""
        return {"steps": {}, "pending": None, **(self._written() or {})}

    def _written(self) -> dict[str, Any] | None:
        """Read the record's file; None if it is damaged."""
        try:
            found = json.loads(self._state.read_bytes())
        except FileNotFoundError:
            return {}
        except (ValueError, RecursionError):
            return None
        return found if _is_state(found) else None

    def mend(self) -> bool:
        """Set a damaged record aside, as after a power loss on a cheap disk; return whether it was damaged."""
        if self._written() is not None:
            return False
        os.replace(self._state, self._state.with_name(f"{self._state.name}.damaged"))
        return True

    def note(self, **changed: Any) -> None:
        """Write changed fields into the record."""
        write(self._state, json.dumps({**self.state, **changed}, indent=1).encode(), 0o644)

    def run(self, *words: str, limit: float = 300, fine: tuple[int, ...] = (0,)) -> str | None:
        """Return what a tool prints; None where the tree lacks the tool. Raises Refused for a status not in `fine`."""
        path = os.pathsep.join(str(self.root / folder) for folder in _TOOLS)
        tool = shutil.which(words[0], path=path)
        if tool is None:
            return None
        environment = {"PATH": path, "LC_ALL": "C.UTF-8", "HOME": "/root"}
        process = subprocess.Popen(
            [tool, *words[1:]], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            env=environment, cwd="/",
        )  # fmt: skip
        printed, told = _End(process.stdout), _End(process.stderr)
        try:
            status = process.wait(limit)
        except subprocess.TimeoutExpired:
            raise Refused(f"{words[0]} did not end within {limit:.0f} seconds.") from None
        finally:
            process.kill()
            process.wait()
        said = printed.text()
        if status not in fine:
            raise Refused(f"`{' '.join(words)}` ended with {status}: {f'{said} {told.text()}'.strip()[-_MOST_SAID:]}")
        return said

    def account(self, file: str, name: str) -> list[str] | None:
        """Return the fields of a user or group in /etc/passwd or /etc/group."""
        try:
            lines = self.at(f"/etc/{file}").read_text(errors="replace").splitlines()
        except OSError:
            return None
        return next((fields for fields in (line.split(":") for line in lines) if fields[0] == name), None)

    def for_daemon(self, folder: Path) -> None:
        """Let the daemon's group read a folder, and nobody else: a model may be private."""
        group = self.account("group", "rkedge")
        for parent, _, names in os.walk(folder):
            for path, mode in ((parent, 0o750), *((os.path.join(parent, name), 0o640) for name in names)):
                os.chmod(path, mode)
                if group:
                    os.chown(path, -1, int(group[2]), follow_symlinks=False)


class _End:
    """The end of what a process prints, in bounded memory."""

    def __init__(self, stream: IO[bytes] | None) -> None:
        assert stream is not None
        self._data = b""
        self._reader = threading.Thread(target=self._read, args=(stream,), daemon=True)
        self._reader.start()

    def _read(self, stream: IO[bytes]) -> None:
        with stream:
            while block := os.read(stream.fileno(), _BLOCK):
                self._data = (self._data + block)[-_MOST_PRINTED:]

    def text(self) -> str:
        """Return it as text. Waits briefly, as a child of the ended process may keep the pipe open."""
        self._reader.join(1)
        return self._data.decode("utf-8", "replace").strip()


def from_json(text: bytes) -> Any:
    """What a tool or the daemon says: nothing that the other end of the connection could not read again.

    Raises:
        ValueError: It is not JSON, has NaN, an infinity or an endless number, or is nested deeply or endlessly.
    """
    if text.count(b"[") + text.count(b"{") > _MOST_LISTS:
        raise ValueError("too much is nested")
    return json.loads(text, parse_constant=_number, parse_float=_number, parse_int=_number)


def _number(text: str) -> float:
    whole = text.lstrip("-").isdigit()
    if len(text) > _MOST_DIGITS or not (whole or math.isfinite(float(text))):
        raise ValueError(f"{text[:_MOST_DIGITS]} is not a number")
    return int(text) if whole else float(text)


def _is_state(found: Any) -> bool:
    if not isinstance(found, dict):
        return False
    steps, pending = found.get("steps", {}), found.get("pending")
    known = isinstance(steps, dict) and all(isinstance(step, dict) and "kind" in step for step in steps.values())
    return known and (pending is None or (isinstance(pending, dict) and {"to", "from"} <= set(pending)))


def _is_roots(found: os.stat_result) -> bool:
    return found.st_uid in (0, os.geteuid())


def others_may_change(path: Path, root: Path = Path("/")) -> bool:
    """Whether anybody but root may change what is at a path: the file, a folder on the way to it, or a link there."""
    left, seen = [path], set[Path]()
    while left:
        each = left.pop()
        if each == root or each in seen:
            continue
        seen.add(each)
        left.append(each.parent)
        try:
            found = os.lstat(each)
        except OSError:  # it is not there
            continue
        if stat.S_ISLNK(found.st_mode):  # whose mode says nothing
            left.append(each.parent / os.readlink(each))
        elif found.st_mode & 0o002 or (found.st_mode & 0o020 and found.st_gid not in _ROOTS_GROUPS):
            return True
        if not _is_roots(found):
            return True
    return False


def write(path: Path, data: bytes, mode: int) -> None:
    """Write a file with this content, replacing an existing one."""
    make_folder(path.parent)
    partial = path.with_name(f".{path.name}.rkedge-new")
    handle = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, mode)
    with os.fdopen(handle, "wb") as file:
        file.write(data)
        file.flush()
        os.fchmod(handle, mode)
        os.fsync(handle)
    os.replace(partial, path)
    sync(path.parent)


def link(path: Path, target: str) -> None:
    """Make a symbolic link, replacing an existing one."""
    make_folder(path.parent)
    partial = path.with_name(f".{path.name}.rkedge-new")
    if partial.is_symlink():
        partial.unlink()
    partial.symlink_to(target)
    os.replace(partial, path)
    sync(path.parent)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    for each in reversed(missing):
        each.mkdir(exist_ok=True)
        sync(each.parent)


def sync(path: Path) -> None:
    """Make sure that a file's content, or the names in a folder, survive a power loss."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def clear(path: Path) -> None:
    """Remove a folder. It is renamed first, so that its name is never seen with only a part of its content.

    One that a disk is mounted on can only be emptied.
    """
    if path.is_symlink() or not path.exists():
        return
    doomed = path.with_name(f".{path.name}.rkedge-old")
    shutil.rmtree(doomed, ignore_errors=True)
    try:
        path.rename(doomed)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        doomed = path
    shutil.rmtree(doomed, ignore_errors=True)


def sha256(path: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
