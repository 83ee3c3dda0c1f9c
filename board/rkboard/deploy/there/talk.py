"""Requests come as lines of JSON, a file's bytes after the line that announces it; answers go as marked lines."""

from __future__ import annotations

import fcntl
import json
import os
import platform
import re
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rkboard.deploy.there import MARK
from rkboard.deploy.there.follow import follow
from rkboard.deploy.there.ground import Ground, Refused, clear, make_folder
from rkboard.deploy.there.program import Program, interpreter
from rkboard.deploy.there.service import Service
from rkboard.deploy.there.steps import File, Link, Member, Part, Serve, Step
from rkboard.deploy.there.store import Store

_STEPS: dict[str, type[Step]] = {
    "file": File,
    "link": Link,
    "member": Member,
    "part": Part,
    "program": Program,
    "serve": Serve,
}
_LOG = ("journalctl", "--unit=rkedge.service", "--no-pager", "--quiet")
# The Debian package's program, and what removes its settings and conversations once it is purged: also those of others.
_PACKAGED = ("/usr/lib/rkedge/pyvenv.cfg", "/var/lib/dpkg/info/rkedge.postrm")
# Conversations, and the home of the user that board/systemd/rkedge.sysusers makes: one with another is somebody's own.
_DAEMONS_HOME = "/var/lib/rkedge"
_MOST_LINE = 8 << 20
# Limit for the lock, which a switch may hold although the connection that asked for it is gone.
_PATIENCE_S = 600.0
_LIBC = re.compile(r"glibc (\d+)\.(\d+)")


def _tell(event: str, **more: Any) -> None:
    line = MARK + json.dumps({"event": event, **more}).encode() + b"\n"
    try:
        while line:
            line = line[os.write(1, line) :]
    except OSError:  # nobody listens any more, but what was begun is completed
        pass


def _say(text: str) -> None:
    _tell("says", text=text)


class Talk:
    """The operations, by their names."""

    def __init__(self, ground: Ground) -> None:
        self._ground, self._store, self._service = ground, Store(ground), Service(ground)

    def handle(self, request: dict[str, Any]) -> None:
        """Carry out a request and answer it. Raises EOFError if the input after it cannot be told from requests."""
        op = request.pop("op", "")
        if not self._answered(op, request) and op == "receive":
            raise EOFError  # the rest of a file is still coming, and must not be taken for a request

    def _answered(self, op: str, request: dict[str, Any]) -> bool:
        """Carry out an operation and answer; return whether it succeeded."""
        work: Callable[..., Any] | None = getattr(self, f"do_{op}", None)
        try:
            if work is None:
                raise Refused("There is no such operation.")
            _tell("done", **(work(**request) or {}))
            return True
        except Refused as error:
            _tell("error", message=error.message, hint=error.hint)
        except OSError as error:
            where = f": {error.filename}" if error.filename else ""
            _tell("error", message=f"{error.strerror or error}{where}.", hint="")
        except (_Told, EOFError):
            raise
        except Exception as error:  # nobody reads this side's standard error: the person must be told
            _tell("error", message=f"This is a defect of rkedge: {traceback.format_exc()}", hint=f"{error}")
        return False

    def do_look(self, places: list[str]) -> dict[str, Any]:
        """Describe this board and what is on it. `places`: folders that may have a library."""
        service, home = self._service, self._ground.home
        self._ground.check_own()
        libc = _LIBC.match(os.confstr("CS_GNU_LIBC_VERSION") or "") if hasattr(os, "confstr") else None
        python, version = interpreter()
        current, previous = service.named(service.current_link), service.named(service.previous_link)
        return {
            "machine": platform.machine(),
            "libc": [int(libc[1]), int(libc[2])] if libc else [0, 0],
            "python": python,
            "python_version": version,
            "own_python": platform.python_version(),
            "foreign": self._is_foreign,
            "deployed": home.exists() and not self._is_foreign,
            "packaged": any(self._ground.at(path).exists() for path in _PACKAGED),
            "systemd": self._ground.at("/run/systemd/system").is_dir(),
            "parts": {
                kind: {name: one["info"] for name, one in all_.items()} for kind, all_ in self._store.parts().items()
            },
            "libraries": [place for place in places if self._ground.at(f"{place}/librkllmrt.so").is_file()],
            "current": service.made_of(current),
            "previous": service.made_of(previous),
            "pending": bool(self._ground.state["pending"]),
            "active": service.is_active(),
            "status": service.status(),
            "free": shutil.disk_usage(home if home.exists() else self._ground.root).free,
        }

    def do_check(self, steps: list[dict[str, Any]]) -> dict[str, Any]:
        """Say which steps are done already."""
        return {"done": [_STEPS[step["kind"]](self._ground, step).check() for step in steps]}

    @property
    def _is_foreign(self) -> bool:
        """Whether /opt/rkedge was made by hand."""
        mark = self._ground.home / "pyvenv.cfg"
        return mark.exists() and not mark.is_symlink()

    def do_lock(self, make: bool = False) -> None:
        """Keep others from changing anything until this process ends. `make`: also make /opt/rkedge if it is missing.

        After waiting, everything is looked at again: the folder may be gone.
        """
        end, told = time.monotonic() + _PATIENCE_S, False
        while not self._locked(make):
            if not told:
                _say("another process is changing this board; waiting for it")
            told = True
            if time.monotonic() > end:
                raise Refused("Another process is still changing this board.", "Try again later.")
            time.sleep(0.2)
        if self._ground.mend():
            _say("deploy.json, which says what was changed, was damaged; it is deploy.json.damaged now")

    def _locked(self, make: bool) -> bool:
        """Try to lock; return whether the lock is ours. A locked file that was removed meanwhile locks nobody out."""
        home = self._ground.home
        self._ground.check_own()
        if self._is_foreign:
            raise Refused("The board's /opt/rkedge was made by hand, and is left alone.", "docs/deploy.md")
        if not home.exists() and not make:
            raise Refused("Nothing was deployed on this board.", "rkedge deploy BUNDLE USER@BOARD")
        make_folder(home)
        os.chmod(home, 0o755)  # noqa: S103 - for everybody to read
        path = home / ".lock"
        lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            ours = path.exists() and os.path.samestat(os.fstat(lock), os.stat(path))
        except BlockingIOError:
            ours = False
        if not ours:
            os.close(lock)
            return False
        self._ground.lock = lock
        return True

    def do_settle(self) -> None:
        """Complete a switch that an earlier process began."""
        self._detached(lambda: self._service.settle(_say))

    def do_held(self, files: dict[str, int]) -> dict[str, Any]:
        """Say how many bytes of each file are here."""
        return {"held": self._store.held(files)}

    def do_receive(self, digest: str, size: int, offset: int) -> dict[str, Any]:
        """Receive a file's bytes from `offset` on, which follow this request."""
        return {"right": self._store.receive(digest, size, offset, sys.stdin.buffer)}

    def do_change(self, step: dict[str, Any]) -> None:
        """Carry out a step."""
        made = _STEPS[step["kind"]](self._ground, step)
        if isinstance(made, Serve):
            self._detached(lambda: made.change(_say))
        else:
            made.change(_say)

    def do_undo(self, purge: bool) -> dict[str, Any]:
        """Undo all steps, the daemon's first, then the latest first. `purge`: remove conversations and the user."""
        steps = self._ground.state["steps"]
        if not steps and self._service.current_link.is_symlink():
            raise Refused(
                "It is not known any more what was changed on this board.",
                "Deploy a bundle once more, which finds it out, then undeploy.",
            )
        self._ground.note(pending=None)
        if "serve" in steps or self._service.current_link.is_symlink():
            self._service.stop()  # if this fails, nothing is removed
            steps["serve"] = {"kind": "serve"}
        left = []
        last_first = list(reversed(steps))
        for key in sorted(last_first, key=lambda key: key != "serve"):
            left += self._undone(key, steps[key])
            self._ground.note(steps={name: one for name, one in self._ground.state["steps"].items() if name != key})
        left += self._purged() if purge else []
        for name in ("incoming", "programs", "libraries", "bundles", "kept"):
            shutil.rmtree(self._ground.home / name, ignore_errors=True)
        for name in ("deploy.json", "deploy.json.damaged", ".lock"):
            (self._ground.home / name).unlink(missing_ok=True)
        try:
            self._ground.home.rmdir()
        except OSError:
            left.append(f"/opt/rkedge has {', '.join(sorted(os.listdir(self._ground.home))[:5])}, and stays")
        return {"left": left}

    def _undone(self, key: str, step: dict[str, Any]) -> list[str]:
        """Undo a step; return what was left. A failure is reported and does not keep the others from being undone."""
        try:
            says = _STEPS[step["kind"]](self._ground, {"key": key, **step}).undo()
        except (Refused, OSError, LookupError) as error:
            says = f"{key}: {error}"
        return [says] if says else []

    def _purged(self) -> list[str]:
        """Remove the conversations and the user; return what was left."""
        folders = [self._ground.at(path) for path in (_DAEMONS_HOME, "/var/cache/rkedge")]
        for folder in folders:
            clear(folder)
        doomed = [each for folder in folders for each in (folder, folder.with_name(f".{folder.name}.rkedge-old"))]
        left = [f"{each} could not be removed{_emptied(each)}" for each in doomed if each.exists()]
        account = self._ground.account("passwd", "rkedge")
        if account and account[5:6] != [_DAEMONS_HOME]:
            return [*left, "the user rkedge is not the daemon's own, and stays"]
        try:
            if account:
                self._ground.run("userdel", "rkedge")
        except Refused as error:
            left.append(error.message)
        return left

    def do_drop(self, name: str) -> None:
        """Remove a bundle that is not in use."""
        if self._store.record("bundles", name) is None:
            raise Refused(f"There is no bundle {name} on this board.", "rkedge status names those that are.")
        self._service.forget("bundles", name)
        self._store.drop("bundles", name)
        steps = self._ground.state["steps"]
        self._ground.note(steps={key: one for key, one in steps.items() if one.get("name") != name})

    def do_switch(self, parts: dict[str, str] | None) -> None:
        """Use other parts, or the previous ones if `parts` is None."""
        service = self._service
        to = service.named(service.previous_link)
        if parts is not None:
            used = service.made_of(service.named(service.current_link)) or {}
            to = service.generation({**used, **parts})
        if to is None or to == service.named(service.current_link):
            raise Refused("There is nothing to go back to.", "rkedge status names the bundles that are there.")
        goal = to
        self._detached(lambda: service.switch(goal, _say))

    def do_ask(self, path: str, body: Any, patience: float) -> dict[str, Any]:
        """Pass a request on to the daemon."""
        began = time.monotonic()
        answer = self._service.ask(path, body, patience)
        if answer is None:
            raise Refused("The daemon does not answer.", "See: rkedge logs USER@BOARD")
        return {"status": answer[0], "headers": answer[1], "answer": answer[2], "seconds": time.monotonic() - began}

    def do_selftest(self) -> dict[str, Any]:
        """Run `rkedge run --selftest` in place of the daemon, whose model is unloaded meanwhile."""
        return {"result": self._service.selftest()}

    def do_log(self, lines: int) -> None:
        """Say the last lines of the daemon's log."""
        status = follow(self._ground, _say, *_LOG, f"--lines={int(lines)}")
        if status:
            raise Refused(f"{_LOG[0]} ended with {status}.")

    def do_follow(self, lines: int) -> None:
        """Pass on the last lines of the daemon's log, and those that follow until the connection ends."""
        follow(self._ground, _say, *_LOG, f"--lines={int(lines)}", "--follow")

    def _detached(self, work: Callable[[], None]) -> None:
        """Run `work` in a process that survives the end of the connection and of this process."""
        child = os.fork()
        if child == 0:
            failed = 1
            try:
                os.setsid()
                signal.signal(signal.SIGHUP, signal.SIG_IGN)
                work()
                failed = 0
            except Refused as error:
                _tell("error", message=error.message, hint=error.hint)
            except BaseException as error:  # the child reports everything, and ends here
                _tell("error", message=f"{type(error).__name__}: {error}", hint="")
            finally:
                os._exit(failed)
        status = os.waitpid(child, 0)[1]
        if os.WIFSIGNALED(status):
            raise Refused("The process that switched was killed.", "Start the same command again: it completes.")
        if status:
            raise _Told


def _emptied(folder: Path) -> str:
    return ", but is empty now" if folder.is_dir() and not any(folder.iterdir()) else ""


class _Told(Exception):  # noqa: N818 - it is an answer
    """The detached process has failed and answered already."""


def main(root: str) -> None:
    """Answer requests until the input ends."""
    os.umask(0o022)
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    talk = Talk(Ground(root))
    while line := sys.stdin.buffer.readline(_MOST_LINE):
        try:
            request = json.loads(line)
        except (ValueError, RecursionError):
            request = None
        if not isinstance(request, dict):
            _tell("error", message="The board cannot read what it is asked.", hint="")
            break
        try:
            talk.handle(request)
        except _Told:
            pass
        except EOFError:
            break
