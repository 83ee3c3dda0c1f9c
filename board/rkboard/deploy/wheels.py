"""RKEdge and its dependencies as wheels for the board's Python, so that the board does not need the internet."""

from __future__ import annotations

import base64
import hashlib
import io
import subprocess
import sys
import threading
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.metadata import Distribution, distribution
from pathlib import Path
from typing import Final

from packaging.requirements import Requirement

import rkboard
import rkruntime
from rkruntime.errors import HostError
from rkruntime.files import atomic_file, atomic_folder, sha256_file
from rkruntime.folders import own_folder
from rkruntime.resources import resource

REQUIREMENTS: Final = "requirements.txt"
_DATE: Final = (2020, 1, 1, 0, 0, 0)
_RESOURCES: Final = ("emulator", "configs", "board")
# Minor version of glibc 2.17, the oldest that wheels for aarch64 are built for: PEP 599.
_OLDEST_LIBC: Final = 17
_LIMIT_S: Final = 900
_DOWNLOADING: Final = threading.Lock()


@dataclass(frozen=True)
class Target:
    """The Python of a board.

    Attributes:
        python: Its version, such as `3.11`.
        machine: As `uname -m` prints it.
        libc: glibc's minor version.
    """

    python: str
    machine: str
    libc: int

    def tags(self) -> list[str]:
        """Return pip's names of the platforms whose wheels run there, newest first."""
        return [f"manylinux_2_{minor}_{self.machine}" for minor in range(self.libc, _OLDEST_LIBC - 1, -1)] + [
            f"manylinux2014_{self.machine}"
        ]


def requirements(python: str) -> list[str]:
    """Return the requirements of a board with this Python, and pip to install them.

    pip would evaluate the markers for the Python that it runs on itself.
    """
    lines = (resource("board") / REQUIREMENTS).read_text().splitlines()
    wanted = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    environment = {"python_version": python, "python_full_version": f"{python}.0"}
    needed = [item for item in wanted if item.marker is None or item.marker.evaluate(environment)]
    return [f"{item.name}{item.specifier}" for item in needed] + ["pip"]


@cache
def own_wheel() -> tuple[str, bytes]:
    """Pack this RKEdge as a wheel; return its name and content, which depend only on its files.

    A build backend cannot do this: an installed RKEdge does not have the sources to build from.
    """
    made = distribution("rkedge")
    name = f"rkedge-{made.version}-py3-none-any.whl"
    info = f"rkedge-{made.version}.dist-info"
    files = dict(sorted(_files(made, info)))
    record = "".join(
        f"{path},sha256={base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b'=').decode()},{len(data)}\n"
        for path, data in files.items()
    )
    files[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for path, data in files.items():
            entry = zipfile.ZipInfo(path, _DATE)
            entry.external_attr = 0o644 << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, data)
    return name, packed.getvalue()


def _files(made: Distribution, info: str) -> Iterator[tuple[str, bytes]]:
    roots = [Path(package.__file__).parent for package in (rkruntime, rkboard) if package.__file__]
    roots += [root for root in (Path(path) / "rkconvert" for path in sys.path) if root.is_dir()][:1]
    for root in roots:
        for path in _within(root):
            yield f"{root.name}/{path.relative_to(root).as_posix()}", path.read_bytes()
    for name in _RESOURCES:
        folder = resource(name)
        wanted = _within(folder) if name != "board" else board_files(folder)
        for path in wanted:
            yield f"rkruntime/resources/{name}/{path.relative_to(folder).as_posix()}", path.read_bytes()
    for name in ("METADATA", "WHEEL", "entry_points.txt"):
        text = made.read_text(name)
        if text is None:
            raise HostError(f"The installation of rkedge lacks its {name}.", hint="Install it again with pip.")
        yield f"{info}/{name}", text.encode()


def board_files(folder: Path) -> list[Path]:
    """Return the files of the resource folder `board` that go onto a board beside the packages."""
    return [folder / REQUIREMENTS, *_within(folder / "systemd"), *_within(folder / "udev")]


def _within(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and "__pycache__" not in path.parts)


def program_name(target: Target, wheel: bytes) -> str:
    """Return the name that the installation of this wheel has on a board."""
    key = hashlib.sha256(b"\0".join([wheel, repr(target).encode(), repr(requirements(target.python)).encode()]))
    return f"{distribution('rkedge').version}-py{target.python}-{key.hexdigest()[:12]}"


def wheels_for(target: Target, say: Callable[[str], None]) -> dict[str, Path]:
    """Return the paths of all wheels to install on a board, by name; they are kept in the cache folder.

    Raises:
        HostError: A wheel cannot be downloaded.
    """
    found = downloaded(target, requirements(target.python), say)
    name, data = own_wheel()
    own = own_folder("cache") / "wheels" / hashlib.sha256(data).hexdigest()[:16] / name
    own.parent.mkdir(exist_ok=True)
    with atomic_file(own) as partial:
        partial.write_bytes(data)
    return {path.name: path for path in [*found, own]}


def downloaded(target: Target, wanted: list[str], say: Callable[[str], None]) -> list[Path]:
    """Return the wheels of these requirements without their dependencies, from the cache folder. Raises HostError."""
    key = hashlib.sha256(repr([target, wanted]).encode()).hexdigest()[:16]
    folder = own_folder("cache") / "wheels" / key
    with _DOWNLOADING:  # several boards may need them at the same time
        if not folder.exists():
            say(f"downloading wheels for Python {target.python} on {target.machine}")
            folder.parent.mkdir(parents=True, exist_ok=True)
            with atomic_folder(folder) as partial:
                _download(target, wanted, partial)
    return sorted(folder.iterdir())


def _download(target: Target, wanted: list[str], folder: Path) -> None:
    platforms = [word for tag in target.tags() for word in ("--platform", tag)]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-input"]
    command += ["--no-deps", "--only-binary=:all:", "--implementation", "cp", "--python-version", target.python]
    try:
        done = subprocess.run(
            [*command, *platforms, "--dest", str(folder), *wanted],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=_LIMIT_S, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise HostError(f"pip did not end within {_LIMIT_S // 60} minutes.", hint="Try again.") from None
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines()
        raise HostError(
            f"pip cannot download the wheels for Python {target.python} on {target.machine}.",
            hint="This machine needs pip (python -m ensurepip) and a package index; the board needs neither.",
            details={"lines": lines[-8:]},
        )


def hashed(paths: dict[str, Path]) -> dict[str, tuple[int, str]]:
    """Return size and SHA-256 of files, by name."""
    return {name: (path.stat().st_size, sha256_file(path)) for name, path in paths.items()}
