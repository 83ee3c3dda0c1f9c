"""Files and tools of a board, below a root: what is written is there whole and on the disk, or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

_BLOCK = 1 << 20
_TOOLS = ("usr/sbin", "usr/bin", "sbin", "bin")
_MOST_SAID = 2000


class Refused(Exception):  # noqa: N818 - it is an answer
    """Why an operation is not done, and what to do about it."""

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message, self.hint = message, hint


class Ground:
    """A board's file tree.

    Args:
        root: `/`, or a tree in which its own tools, if it has any, stand for the system's.

    Attributes:
        lock: An open file that is locked while something is changed.
    """

    def __init__(self, root: str) -> None:
        self.root = Path(root)
        self.is_system = root == "/"
        self.lock: int | None = None
        self.home = self.at("/opt/rkedge")
        self._state = self.home / "deploy.json"

    def at(self, path: str) -> Path:
        """Where a path of the board is."""
        return self.root / path.lstrip("/")

    @property
    def state(self) -> dict[str, Any]:
        """What was done here, and what it replaced."""
        try:
            found = json.loads(self._state.read_text())
        except FileNotFoundError:
            found = {}
        return {"steps": {}, "pending": None, **found}

    def note(self, **changed: Any) -> None:
        """Write some of it down."""
        write(self._state, json.dumps({**self.state, **changed}, indent=1).encode(), 0o644)

    def run(self, *words: str, limit: float = 300, fine: tuple[int, ...] = (0,)) -> str | None:
        """What a tool prints; None where the tree has no such tool. Raises Refused if its status is not `fine`."""
        path = os.pathsep.join(str(self.root / folder) for folder in _TOOLS)
        tool = shutil.which(words[0], path=path)
        if tool is None:
            return None
        environment = {"PATH": path, "LC_ALL": "C.UTF-8", "HOME": "/root"}
        try:
            done = subprocess.run(
                [tool, *words[1:]], stdin=subprocess.DEVNULL, capture_output=True,
                env=environment, timeout=limit, check=False, cwd="/",
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise Refused(f"{words[0]} did not end within {limit:.0f} seconds.") from None
        said = done.stdout.decode("utf-8", "replace").strip()
        if done.returncode not in fine:
            said = f"{said} {done.stderr.decode('utf-8', 'replace').strip()}".strip()
            raise Refused(f"`{' '.join(words)}` ended with {done.returncode}: {said[-_MOST_SAID:]}")
        return said

    def account(self, file: str, name: str) -> list[str] | None:
        """The line of a user or group in /etc/passwd or /etc/group."""
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


def write(path: Path, data: bytes, mode: int) -> None:
    """A file with this content, in place of another one."""
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
    """A symbolic link, in place of another one."""
    make_folder(path.parent)
    partial = path.with_name(f".{path.name}.rkedge-new")
    if partial.is_symlink():
        partial.unlink()
    partial.symlink_to(target)
    os.replace(partial, path)
    sync(path.parent)


def make_folder(folder: Path) -> None:
    """A folder and those above it."""
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    for each in reversed(missing):
        each.mkdir(exist_ok=True)
        sync(each.parent)


def sync(path: Path) -> None:
    """See to it that a file's content, or the names in a folder, survive a loss of power."""
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def clear(path: Path) -> None:
    """Remove a folder, first by its name."""
    if path.is_symlink() or not path.exists():
        return
    doomed = path.with_name(f".{path.name}.rkedge-old")
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def sha256(path: Path) -> str:
    """Of a file, as hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
