"""An environment with the vendor's toolkit, made from the wheel that the user downloaded: complete or absent.

The marker file is written last: an environment without it was interrupted, and is made again.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final, TypeVar

from rkconvert.toolkit.interpreter import MARKER, Toolkit, clean_environment, environments_folder, inspect_toolkit
from rkconvert.toolkit.session import end_session
from rkconvert.toolkit.wheel import Wheel, check_host
from rkruntime.checks.diagnosis import diagnose
from rkruntime.errors import HostError, OutputError
from rkruntime.files import sha256_file, write_error

# The toolkit imports pkg_resources, which setuptools dropped (seen on a user's machine; its own warning names 81).
_CONSTRAINTS: Final = "setuptools<81\n"
# README.md @ 1.2.0 and later asks for BUILD_CUDA_EXT on Python 3.12; on others it avoids the need for a CUDA compiler.
_SETTINGS: Final = {"BUILD_CUDA_EXT": "0", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}
# Prefixes of the variables that pip may see: the user decides where packages come from.
_PIP_KEPT: Final = (
    "PIP_",
    "HTTP_PROXY",
    "HTTPS_PROXY",
    "NO_PROXY",
    "http_proxy",
    "https_proxy",
    "no_proxy",
    "SSL_",
    "REQUESTS_CA_BUNDLE",
)
_IMPORT: Final = "from rkllm.api import RKLLM"
_IMPORT_SECONDS: Final = 300
# Gigabytes over a slow connection take hours, not days.
_PIP_SECONDS: Final = 6 * 3600
_LAST_LINES: Final = 40

T = TypeVar("T")
OnLine = Callable[[str], None]


@dataclass(frozen=True)
class Environment:
    """An environment to make, or to replace.

    Attributes:
        folder: Its folder, complete once it has a file called `marker`.
        name: Its content, for messages.
        python: Interpreter that creates it.
    """

    folder: Path
    marker: str
    name: str
    python: Path

    @property
    def inner(self) -> Path:
        """Its own interpreter."""
        return self.folder / "bin" / "python"

    @property
    def constraints(self) -> Path:
        """File of constraints that every package that pip installs must meet."""
        return self.folder / "constraints.txt"


class Steps:
    """Runs programs of an environment that is being made, to their end."""

    def __init__(self, environment: Environment, on_line: OnLine, lock: int) -> None:
        self.environment, self.tell = environment, on_line
        self._run = partial(_run, on_line=on_line, lock=lock)

    def create(self) -> None:
        """Create the empty environment. Raises HostError."""
        made = self.environment
        self.tell(f"creating {made.folder} with {made.python}")
        command: list[str | Path] = [made.python, "-I", "-m", "venv", made.folder]
        self._run(command, clean_environment(made.python), f"{made.python} cannot create environments")
        made.constraints.write_text(_CONSTRAINTS)

    def install(self, *wanted: str | Path, what: str) -> None:
        """Install packages with pip. Raises HostError, which says that `what` could not be installed."""
        made = self.environment
        variables = clean_environment(made.inner, _pip_environment(made.constraints))
        self._run([made.inner, "-I", "-m", "pip", "install", *wanted], variables, f"{what} could not be installed")

    def imports(self, code: str, what: str) -> None:
        """Try an import out. Raises HostError."""
        made, failed = self.environment, f"{what} was installed but cannot be imported"
        self.tell("trying to import it")
        self._run([made.inner, "-I", "-c", code], clean_environment(made.inner), failed, seconds=_IMPORT_SECONDS)


def setup(wheel: Wheel, named: Path | None, on_line: OnLine, *, replace: bool = False) -> Toolkit:
    """Create the environment for a wheel and try it out.

    Args:
        named: Python of the wheel's release; None to search for one.
        on_line: Called with every line that pip prints.
        replace: Recreate an existing environment of this wheel.

    Raises:
        HostError: This machine lacks something, or packages could not be installed. Nothing is left behind, and an
            environment that was to be replaced is there as before.
        OutputError: The environment exists already, or another setup is making it.
    """
    check_host(wheel)
    python = find_python(wheel.python, named)
    folder = environments_folder() / f"{wheel.release.version}-py{wheel.python}"

    def fill(steps: Steps) -> tuple[Toolkit, dict[str, object]]:
        steps.install("setuptools<81", wheel.path, what=wheel.path.name)
        toolkit = inspect_toolkit(steps.environment.inner, "rkedge toolkit setup")
        steps.imports(_IMPORT, wheel.path.name)
        return toolkit, {
            "wheel": wheel.path.name,
            "sha256": sha256_file(wheel.path),
            "toolkit": toolkit.version,
            "python": toolkit.python_version,
            "parts": dict(toolkit.parts),
        }

    return make(Environment(folder, MARKER, f"rkllm-toolkit {wheel.release.version}", python), fill, on_line, replace)


Fill = Callable[[Steps], tuple[T, dict[str, object]]]


def make(environment: Environment, fill: Fill[T], on_line: OnLine, replace: bool) -> T:
    """Make an environment: complete or absent. Returns the first value of `fill`; the second becomes the marker.

    Raises:
        HostError: See `setup`; OutputError likewise.
    """
    folder = environment.folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with _alone(folder.parent) as lock:
            _recover(environment)
            if (folder / environment.marker).is_file() and not replace:
                raise OutputError(
                    f"{folder} exists already, with {environment.name}.",
                    hint="Use it as it is (`rkedge toolkit info`), or recreate it with --replace.",
                )
            if folder.is_dir():
                # The new one is not made beside it and renamed: scripts in an environment name its path.
                folder.rename(_previous(folder))
            try:
                steps = Steps(environment, on_line, lock)
                steps.create()
                made, note = fill(steps)
                (folder / environment.marker).write_text(json.dumps(note, indent=2) + "\n")
                return made
            finally:
                _recover(environment)
    except OSError as error:
        raise write_error(folder, error) from error


@contextmanager
def _alone(environments: Path) -> Iterator[int]:
    """Keep other setups out of the folder of all environments. Raises OutputError if there is one.

    Yields the lock's file descriptor: a process that inherits it keeps the lock, also when this one was killed.
    """
    handle = os.open(environments, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield handle
    except BlockingIOError as error:
        raise OutputError(
            f"Another `rkedge toolkit setup`, or what a killed one had started, is running in {environments}.",
            hint="Wait until it has ended.",
        ) from error
    finally:
        os.close(handle)


def _previous(folder: Path) -> Path:
    """Return where an environment is kept while its successor is made; it works there, too."""
    return folder.with_name(f"{folder.name}.old")


def _recover(environment: Environment) -> None:
    """Remove an environment that is not complete, and put back the one that it was to replace."""
    folder = environment.folder
    if not (folder / environment.marker).is_file():
        shutil.rmtree(folder, ignore_errors=True)
        if _previous(folder).is_dir():
            _previous(folder).rename(folder)
    shutil.rmtree(_previous(folder), ignore_errors=True)


def _pip_environment(constraints: Path) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if name.startswith(_PIP_KEPT)}
    # pip accepts several files of constraints, and the user's own stay in force; builds of old packages obey them too.
    # Ours is given as a URL, which has no spaces: they separate the files.
    kept["PIP_CONSTRAINT"] = " ".join(filter(None, [kept.get("PIP_CONSTRAINT"), constraints.absolute().as_uri()]))
    return {**_SETTINGS, **kept}


def _run(
    command: Sequence[str | Path],
    environment: Mapping[str, str],
    what: str,
    *,
    on_line: OnLine,
    lock: int,
    seconds: float = _PIP_SECONDS,
) -> None:
    """Run a program to its end, or raise HostError with its last lines. Kills all that it started, also on Ctrl-C."""
    last: deque[str] = deque(maxlen=_LAST_LINES)
    process = subprocess.Popen(
        [str(part) for part in command],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        pass_fds=(lock,),
        env=dict(environment),
        text=True,
        errors="replace",
    )
    limit = threading.Timer(seconds, end_session, [process])
    limit.start()
    try:
        assert process.stdout is not None
        for line in process.stdout:
            last.append(line.rstrip())
            on_line(line.rstrip())
        if process.returncode is None:
            os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    finally:
        limit.cancel()
        end_session(process)
        if process.stdout is not None:
            process.stdout.close()
    if process.returncode == -signal.SIGKILL:
        last.append(f"killed after {seconds:,.0f} s, or by the kernel when memory ran out")
    if process.returncode != 0:
        raise _failed(what, list(last))


def _failed(what: str, lines: Sequence[str]) -> HostError:
    found = diagnose("\n".join(lines), context={"stage": "convert"})
    return HostError(
        f"{what}." + (f" {found.cause}" if found.explained else ""),
        hint=found.next_steps[0] if found.explained and found.next_steps else "Read the lines above; nothing was left.",
        details={"lines": list(lines), "diagnosis": found.as_dict()},
    )


def find_python(version: str, named: Path | None = None) -> Path:
    """Return an interpreter of a release such as `3.12` that can create environments. Raises HostError."""
    if named:
        found = _version_of(named)
        if found != version:
            raise HostError(
                f"{named} is Python {found}; the wheel is for {version}."
                if found
                else f"{named} does not run as a Python interpreter.",
                hint=f"Name a Python {version}, or use the vendor's wheel for another Python.",
            )
        return named.absolute()
    for candidate in _pythons(version):
        if _version_of(candidate) == version:
            return candidate
    raise HostError(
        f"The wheel is for Python {version}, but none was found on PATH or with pyenv, uv or conda.",
        hint=f"Install it (for example `uv python install {version}` or `pyenv install {version}`), name it with"
        " --python, or use the vendor's wheel for another Python.",
    )


def _pythons(version: str) -> Iterator[Path]:
    if found := shutil.which(f"python{version}"):
        yield Path(found)
    yield Path(sys.executable)
    home = Path.home()
    folders = (
        (Path(os.environ.get("PYENV_ROOT") or home / ".pyenv"), f"versions/{version}.*/bin/python{version}"),
        (home / ".local/share/uv/python", f"cpython-{version}*/bin/python{version}"),
        *((home / name, f"envs/*/bin/python{version}") for name in ("miniconda3", "anaconda3", "miniforge3")),
    )
    for folder, pattern in folders:
        yield from sorted(folder.glob(pattern), reverse=True)


def _version_of(python: Path) -> str:
    """Return a release such as `3.12`; empty if it does not run: pyenv has a shim for each release of any Python."""
    code = "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2])"
    try:
        done = subprocess.run(
            [str(python), "-I", "-c", code],
            capture_output=True,
            text=True,
            check=True,
            timeout=30,
            env=clean_environment(python),
        )
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError):
        return ""
    return done.stdout.strip()
