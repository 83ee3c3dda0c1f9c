"""The changes that a deployment makes on a board, step by step: check whether one is done, do it, undo it."""

from __future__ import annotations

import base64
import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rkboard.deploy.there.ground import Ground, Refused, clear, link, write
from rkboard.deploy.there.service import Service
from rkboard.deploy.there.store import Store

Say = Callable[[str], None]
# Commands that make the system read a changed file.
_AFTER = {
    "sysusers": (("systemd-sysusers",),),
    "udev": (("udevadm", "control", "--reload"), ("udevadm", "trigger")),
    "systemd": (("systemctl", "daemon-reload"),),
    "": (),
}


class Step(ABC):
    """One change to the board.

    Args:
        given: What the host says about it; its `key` names the step among all that were done.
    """

    def __init__(self, ground: Ground, given: Mapping[str, Any]) -> None:
        self.ground, self.given = ground, given
        self.store, self.service = Store(ground), Service(ground)

    @abstractmethod
    def check(self) -> bool:
        """Whether the change is done already."""

    @abstractmethod
    def change(self, say: Say) -> None:
        """Make the change. May be interrupted at any moment, and is then done again."""

    @abstractmethod
    def undo(self) -> str:
        """Undo the change; return what was left as it is and why, or nothing."""

    def remember(self, **more: Any) -> None:
        """Record that the step was begun, before anything is changed."""
        done = self.ground.state["steps"]
        kept = {name: value for name, value in self.given.items() if name not in ("content", "wheels", "files")}
        done[self.given["key"]] = {**kept, **more}
        self.ground.note(steps=done)

    def memo(self) -> dict[str, Any]:
        """Return what was recorded about the step."""
        found: dict[str, Any] = self.ground.state["steps"].get(self.given["key"], {})
        return found


class File(Step):
    """A file of the system: `path`, `content` in base64, `after`; `keep` leaves one that exists as it is."""

    @property
    def _path(self) -> Path:
        return self.ground.at(self.given["path"])

    @property
    def _content(self) -> bytes:
        return base64.b64decode(self.given["content"])

    @property
    def _kept(self) -> Path:
        name: str = self.given["path"]
        return self.ground.home / "kept" / name.strip("/").replace("/", "%")

    def check(self) -> bool:
        """See Step."""
        user = self.given.get("user") if self.ground.is_system else None
        if user and self.ground.account("passwd", user) is None:
            return False
        if self.given.get("keep"):
            return self._path.exists()
        return self._path.is_file() and self._path.read_bytes() == self._content and "told" in self.memo()

    def change(self, say: Say) -> None:
        """See Step."""
        memo, path = self.memo(), self._path
        ours = path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == memo.get("sha256")
        kept = self._kept.is_file()  # perhaps by an earlier run whose record is lost
        if path.is_file() and not ours and path.read_bytes() != self._content:
            write(self._kept, path.read_bytes(), 0o600)
            kept = True
        found = {"sha256": hashlib.sha256(self._content).hexdigest(), "kept": kept}
        self.remember(**found)
        write(path, self._content, 0o644)
        self._tell()
        self.remember(**found, told=True)

    def undo(self) -> str:
        """See Step."""
        path, memo = self._path, self.memo()
        if path.is_file():
            if hashlib.sha256(path.read_bytes()).hexdigest() != memo.get("sha256"):
                return f"{self.given['path']} was changed since, and stays"
            if memo.get("kept") and self._kept.is_file():
                write(path, self._kept.read_bytes(), 0o644)
                self._kept.unlink()
            else:
                path.unlink()
                _remove_empty(path.parent)
        if self.given.get("after") != "sysusers":
            self._tell()
        return ""

    def _tell(self) -> None:
        after = self.given.get("after", "")
        if after == "udev" and not self.ground.at("/run/udev/control").exists():
            return  # as in a container: whoever starts it reads the rules
        for words in _AFTER[after]:
            self.ground.run(*words)


class Link(Step):
    """A symbolic link of the system: `path` to `target`."""

    @property
    def _path(self) -> Path:
        return self.ground.at(self.given["path"])

    def check(self) -> bool:
        """See Step."""
        return self._is_so() and bool(self.memo())

    def _is_so(self) -> bool:
        return self._path.is_symlink() and os.readlink(self._path) == self.given["target"]

    def change(self, say: Say) -> None:
        """See Step."""
        if self._path.exists() and not self._path.is_symlink():
            raise Refused(f"{self.given['path']} is a file.", f"Move it away: sudo mv {self.given['path']}{{,.old}}")
        self.remember()
        link(self._path, self.given["target"])

    def undo(self) -> str:
        """See Step."""
        if not self._is_so():
            return "" if not self._path.exists() else f"{self.given['path']} was changed since, and stays"
        self._path.unlink()
        return ""


class Member(Step):
    """An account's membership in the daemon's group: whoever logs in to deploy may chat."""

    @property
    def _user(self) -> str:
        return self.given["account"] or os.environ.get("SUDO_USER") or "root"

    def check(self) -> bool:
        """See Step."""
        group = self.ground.account("group", "rkedge")
        return self._user == "root" or (group is not None and self._user in group[3].split(","))

    def change(self, say: Say) -> None:
        """See Step."""
        self.remember(account=self._user)
        self.ground.run("gpasswd", "--add", self._user, "rkedge")  # which also accepts accounts of a directory service

    def undo(self) -> str:
        """See Step."""
        if not Member(self.ground, self.memo()).check() or self.memo()["account"] == "root":
            return ""
        self.ground.run("gpasswd", "--delete", self.memo()["account"], "rkedge")
        return ""


class Part(Step):
    """A bundle or a library: `folder`, `name`, `files` and `info`. Its files are received before the step."""

    def check(self) -> bool:
        """See Step. The daemon has checked the hashes of what it serves; other parts are hashed, as a disk may fail."""
        folder, name = self.given["folder"], self.given["name"]
        current = self.service.named(self.service.current_link)
        used = (self.service.made_of(current) or {}).get(folder) == name and self.service.serves(current)
        return self.store.is_whole(folder, name, hashed=not used)

    def change(self, say: Say) -> None:
        """See Step."""
        self.remember()
        given = self.given
        self.store.put(given["folder"], given["name"], given["files"], given["info"])

    def undo(self) -> str:
        """See Step."""
        self.service.forget(self.given["folder"], self.given["name"])
        self.store.drop(self.given["folder"], self.given["name"])
        return ""


class Serve(Step):
    """The parts in use: `parts`, by kind. A kind that is not given, such as the library, stays as it is."""

    def _parts(self) -> dict[str, str]:
        used = self.service.made_of(self.service.named(self.service.current_link)) or {}
        return {**used, **self.given["parts"]}

    def check(self) -> bool:
        """See Step."""
        current = self.service.named(self.service.current_link)
        if self.ground.state["pending"] or self.service.made_of(current) != self._parts():
            return False
        return self.ground.run("systemctl", "--version") is None or self.service.serves(current)

    def change(self, say: Say) -> None:
        """See Step."""
        self.remember()
        self.service.switch(self.service.generation(self._parts()), say)
        self._tidy()

    def _tidy(self) -> None:
        """Remove programs that are neither in use nor needed for a rollback."""
        links = (self.service.current_link, self.service.previous_link)
        used = [self.service.made_of(self.service.named(link)) or {} for link in links]
        for name in set(self.store.parts()["programs"]) - {parts.get("programs") for parts in used}:
            self.service.forget("programs", name)
            self.store.drop("programs", name)

    def undo(self) -> str:
        """See Step. The daemon has been stopped before this."""
        for name in ("current", "previous", "bin", "lib", "pyvenv.cfg", "bundle", "library"):
            (self.ground.home / name).unlink(missing_ok=True)
        clear(self.ground.home / "generations")
        return ""


def _remove_empty(folder: Path) -> None:
    """Remove a folder that we may have made, such as that of a unit's drop-ins, if it is empty."""
    if folder.name in ("rkedge", "rkedge.service.d"):
        try:
            folder.rmdir()
        except OSError:
            pass
