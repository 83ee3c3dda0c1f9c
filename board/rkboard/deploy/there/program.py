"""RKEdge itself, installed from received wheels: each version in a virtual environment of its own."""

from __future__ import annotations

import glob
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from rkboard.deploy.there.ground import Refused, others_may_change, sha256, write
from rkboard.deploy.there.steps import Part
from rkboard.deploy.there.store import RECORD

_WHEEL = re.compile(r"[A-Za-z0-9._+]+(-[A-Za-z0-9._+]+){4,5}\.whl")
_OLDEST = (3, 10)
_LIMIT_S = 900
_ASK = "import json, os, sys; print(json.dumps([sys.version_info[:2], os.uname().machine, sys.maxsize > 2**32]))"
_PLACES = ("/usr/bin", "/usr/local/bin", "/opt/uv/*/bin")


def interpreter() -> tuple[str, str]:
    """Return the path and version of the Python for RKEdge, outside home folders; empty if there is none.

    The system's own is preferred, then the newest. One that anybody but root may change is never started.
    """
    found = [path for place in _PLACES for path in glob.glob(f"{place}/python3") + glob.glob(f"{place}/python3.[0-9]*")]
    known: list[tuple[bool, tuple[int, int], str]] = []
    for path in found:
        if re.search(r"/python3(\.\d+)?$", path) and not others_may_change(Path(path)):
            version = _version(path)
            if version >= _OLDEST:
                known.append((path == "/usr/bin/python3", version, path))
    if not known:
        return "", ""
    _, version, path = max(known)
    return path, ".".join(map(str, version))


def _version(path: str) -> tuple[int, int]:
    try:
        done = subprocess.run(
            [path, "-I", "-c", _ASK], stdin=subprocess.DEVNULL, capture_output=True, timeout=20, check=True
        )
        (major, minor), _, wide = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError):
        return (0, 0)
    return (major, minor) if wide else (0, 0)


def _files(place: Path) -> dict[str, tuple[int, str]]:
    """Return size and hash of each file below a folder, without the bytecode caches that Python makes again."""
    found = sorted(path for path in place.rglob("*") if path.is_file() and not path.is_symlink())
    kept = (path for path in found if "__pycache__" not in path.parts)
    return {str(path.relative_to(place)): (path.stat().st_size, sha256(path)) for path in kept}


class Program(Part):
    """A virtual environment: `name`, `python`, and `wheels` by name with size and hash, received before the step."""

    def change(self, say: Callable[[str], None]) -> None:
        """See Step."""
        self.remember()
        place = self.store.place("programs", self.given["name"])
        shutil.rmtree(place, ignore_errors=True)  # it lacks the record of a complete installation
        wheels = self._wheels()
        try:
            self._install(place, wheels, say)
        except Refused:
            shutil.rmtree(place, ignore_errors=True)  # free its space: the disk may be full
            raise
        finally:
            shutil.rmtree(wheels)
        os.sync()
        info = {"python": self.given["python"], "version": self.given["version"]}
        write(place / RECORD, json.dumps({"files": _files(place), "info": info}).encode(), 0o644)
        for _, digest in self.given["wheels"].values():
            self.store.blob(digest).unlink(missing_ok=True)

    def _wheels(self) -> Path:
        folder = self.store.incoming / "wheels"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        for name, (size, digest) in self.given["wheels"].items():
            blob = self.store.blob(digest)
            if not _WHEEL.fullmatch(name):
                raise Refused(f"{name[:80]!r} is not the name of a wheel.")
            if not blob.is_file() or blob.stat().st_size != size:
                raise Refused(f"{name} has not come.", "Start the same command again.")
            os.link(blob, folder / name)
        return folder

    def _install(self, place: Path, wheels: Path, say: Callable[[str], None]) -> None:
        """Install with pip, run from its own wheel: Debian has neither pip nor ensurepip by default."""
        say("installing RKEdge")
        names = sorted(self.given["wheels"])
        pip = next(name for name in names if name.startswith("pip-"))
        python = str(place / "bin/python")
        self._call(self.given["python"], "-I", "-m", "venv", "--without-pip", str(place))
        options = ["--no-index", "--no-deps", "--no-cache-dir", "--disable-pip-version-check", "--no-input", "--quiet"]
        rest = [str(wheels / name) for name in names if name != pip]
        # Not -I, which would ignore the zip file that pip is started from.
        self._call(
            python, "-E", "-s", str(wheels / pip / "pip"), "install", "--root-user-action=ignore", *options, *rest
        )
        self._call(python, "-I", "-m", "rkruntime.cli", "--version")

    @property
    def _lock(self) -> tuple[int, ...]:
        """The lock, which an installer inherits: nobody else may begin before it ends, even if this process is gone."""
        return () if self.ground.lock is None else (self.ground.lock,)

    def _call(self, *words: str) -> None:
        environment = {
            "PATH": "/usr/bin:/bin",
            "LC_ALL": "C.UTF-8",
            "HOME": "/nonexistent",
            "PIP_CONFIG_FILE": os.devnull,
        }
        try:
            done = subprocess.run(
                list(words), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                env=environment, timeout=_LIMIT_S, check=False, cwd="/", pass_fds=self._lock,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise Refused(f"Installing RKEdge took more than {_LIMIT_S / 60:.0f} minutes.") from None
        if done.returncode:
            said = done.stdout.decode("utf-8", "replace").strip()[-2000:]
            hint = "On the board: sudo apt install python3-venv" if "venv" in words else ""
            raise Refused(f"RKEdge cannot be installed in {self.given['name']}: {said}", hint)
