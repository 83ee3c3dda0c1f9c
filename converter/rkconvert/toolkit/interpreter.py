"""Find the vendor's toolkit: an interpreter that the user named, or an environment that `setup` created."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rkconvert.rules.releases import ToolkitRelease, release
from rkruntime.errors import HostError, UsageError
from rkruntime.folders import own_folder
from rkruntime.schema import build
from rkruntime.versions import Version, version
from rkruntime.yamltext import read_mapping

VARIABLE: Final = "RKEDGE_TOOLKIT_PYTHON"
WORKER: Final = Path(__file__).with_name("worker.py")
MARKER: Final = "rkedge-toolkit.json"
_PROBE_SECONDS: Final = 60
# Variables of the caller's environment that the toolkit may see: no keys and tokens, no PYTHON* settings.
_KEPT: Final = ("PATH", "HOME", "USER", "LOGNAME", "TMPDIR", "TZ", "LD_LIBRARY_PATH")
_KEPT_PREFIXES: Final = ("CUDA_", "NVIDIA_", "OMP_", "MKL_", "OPENBLAS_", "RKLLM_")
_SET: Final = {
    "LC_ALL": "C.UTF-8",
    # The model is a folder on this machine; nothing is looked up elsewhere.
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}


@dataclass(frozen=True)
class Toolkit:
    """An interpreter that has rkllm-toolkit.

    Attributes:
        python: Interpreter as named (a virtual environment's is a symbolic link, and is not resolved).
        origin: Where it was named.
        release: Capabilities of the installed version.
        parts: Versions of the packages that it depends on; empty for a missing one.
    """

    python: Path
    origin: str
    release: ToolkitRelease
    python_version: str
    parts: Mapping[str, str]

    @property
    def version(self) -> str:
        """The installed version."""
        return self.release.version

    def as_dict(self) -> dict[str, Any]:
        """Return what determines the toolkit's results, without its path on this machine."""
        return {"version": self.version, "python": self.python_version, "packages": dict(self.parts)}


def environments_folder() -> Path:
    """Return the folder in which `rkedge toolkit setup` creates environments."""
    return own_folder("data") / "toolkit"


def config_file() -> Path:
    """Return the path of the user's configuration file."""
    return own_folder("config") / "config.yaml"


def clean_environment(python: Path, extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return environment variables for a program that runs under the toolkit's interpreter."""
    kept = {name: value for name, value in os.environ.items() if name in _KEPT or name.startswith(_KEPT_PREFIXES)}
    kept["PATH"] = os.pathsep.join([str(python.parent), kept.get("PATH", os.defpath)])
    return {**kept, **_SET, **(extra or {})}


def find_toolkit(named: Path | None = None) -> Toolkit:
    """Return the toolkit to use, from the first of: `named`, RKEDGE_TOOLKIT_PYTHON, the config file, environments.

    Raises:
        HostError: There is none, or it cannot be used.
        UsageError: The configuration file is invalid.
    """
    for python, origin in _candidates(named):
        return inspect_toolkit(python, origin)
    raise HostError(
        "Conversion for a board needs the vendor's rkllm-toolkit, but none is set up on this machine.",
        hint="Download its wheel from the vendor's repository (airockchip/rknn-llm, folder rkllm-toolkit) and"
        " run `rkedge toolkit setup --wheel FILE`, or name an interpreter that has it with --toolkit-python or"
        f" {VARIABLE}.",
    )


def _candidates(named: Path | None) -> Iterator[tuple[Path, str]]:
    if named:
        yield named, "--toolkit-python"
    if os.environ.get(VARIABLE):
        yield Path(os.environ[VARIABLE]), VARIABLE
    configured = _configured()
    if configured:
        yield configured, str(config_file())
    markers = environments_folder().glob(f"*/{MARKER}")
    for marker in sorted(markers, key=_release_of, reverse=True):
        yield marker.parent / "bin" / "python", "rkedge toolkit setup"


def _release_of(marker: Path) -> Version:
    """Return the release in an environment's name; a renamed folder sorts as the oldest."""
    try:
        return version(marker.parent.name)
    except ValueError:
        return version("0")


@dataclass(frozen=True)
class _Settings:
    """The `toolkit` section of the configuration file."""

    python: Path | None = None


def _configured() -> Path | None:
    path = config_file()
    if not path.is_file():
        return None

    def fail(text: str) -> UsageError:
        return UsageError(f"{path}: {text}.", hint="Write it as docs/toolkit.md shows, or remove it.")

    # The other sections are read elsewhere.
    settings = read_mapping(path, fail).get("toolkit") or {}
    if not isinstance(settings, dict):
        raise fail(f"toolkit is {type(settings).__name__}; it must be a mapping")
    found = build(_Settings, settings, lambda text: fail(f"toolkit: {text}"))
    return found.python.expanduser() if found.python else None


def inspect_toolkit(python: Path, origin: str) -> Toolkit:
    """Inspect the toolkit of an interpreter, or of an environment's folder. Raises HostError."""
    found = probe(python, origin)
    python = Path(found["executable"])
    if not found["toolkit"]:
        raise HostError(
            f"{python}, named by {origin}, has no rkllm-toolkit.",
            hint="Install the vendor's wheel there (what `pip install --user` installed is not seen), or create an"
            " environment: `rkedge toolkit setup --wheel FILE`.",
        )
    return Toolkit(python, origin, release(found["toolkit"]), found["python"], found["parts"])


def probe(python: Path, origin: str) -> dict[str, Any]:
    """Ask the worker about an interpreter; nothing of the toolkit is imported. Raises HostError."""
    python = python.expanduser().absolute()
    if python.is_dir():
        python = python / "bin" / "python"
    if not python.is_file() or not os.access(python, os.X_OK):
        raise HostError(
            f"{origin} names {python}, which does not exist or is not executable.",
            hint="Name the interpreter of the environment with rkllm-toolkit, such as ENV/bin/python.",
        )
    try:
        done = subprocess.run(
            [str(python), "-I", str(WORKER), "-"],
            capture_output=True,
            check=True,
            env=clean_environment(python),
            timeout=_PROBE_SECONDS,
        )
        found: dict[str, Any] = json.loads(done.stdout)
        return {**found, "executable": str(python)}
    except (OSError, subprocess.SubprocessError, ValueError) as error:
        stderr = getattr(error, "stderr", None) or b""
        last = stderr.decode("utf-8", "replace").strip().splitlines()[-1:] or [str(error)]
        raise HostError(
            f"{python}, named by {origin}, does not work as Python 3.8 or later: {last[0]}.",
            hint="Name another interpreter, or create an environment: `rkedge toolkit setup --wheel FILE`.",
        ) from error
