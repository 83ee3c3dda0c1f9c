"""What to install if a package is missing, according to rkedge's own metadata."""

from __future__ import annotations

import shlex
import sys
from typing import Final

from rkruntime.errors import HostError

_OWN: Final = ("rkruntime", "rkconvert", "rkboard")
# Modules whose package has a different name.
_PACKAGES: Final = {"yaml": "PyYAML"}


def import_failed(error: ImportError) -> HostError:
    """The error for an import that failed: which package it is, and the command that installs it."""
    while isinstance(error.__cause__, ImportError):  # transformers wraps the error that names the package
        error = error.__cause__
    module = (error.name or "").partition(".")[0]
    if not module or module in _OWN:
        return HostError(
            f"rkedge is not completely installed: {error}.",
            hint=f"Reinstall it: {_pip('--force-reinstall', 'rkedge')}",
        )
    package = _PACKAGES.get(module, module.replace("_", "-"))
    if isinstance(error, ModuleNotFoundError):
        message = f"This needs the Python package {package}, which is not installed."
    else:
        message = f"The Python package {package} is installed but cannot be used: {error}."
    return HostError(message, hint=f"Install it: {_pip(_wanted(package))}")


def install(extra: str) -> str:
    """The command that installs one of rkedge's extras into this Python."""
    return f"Install it: {_pip(f'rkedge[{extra}]')}"


def _wanted(package: str) -> str:
    """What to install for a package: rkedge itself, its smallest extra with the package, or the package alone."""
    import importlib.metadata  # slow to import, and needed only for an error

    try:
        from packaging.requirements import Requirement
        from packaging.utils import canonicalize_name
    except ImportError:
        return "rkedge"  # which brings packaging
    try:
        requirements = [Requirement(text) for text in importlib.metadata.requires("rkedge") or ()]
        extras = importlib.metadata.metadata("rkedge").get_all("Provides-Extra") or []
    except importlib.metadata.PackageNotFoundError:
        return package

    def brought(extra: str) -> set[str]:
        of = {"extra": extra}
        return {canonicalize_name(item.name) for item in requirements if not item.marker or item.marker.evaluate(of)}

    fitting = [extra for extra in ("", *extras) if canonicalize_name(package) in brought(extra)]
    if not fitting:
        return package
    smallest = min(fitting, key=lambda extra: len(brought(extra)))
    return f"rkedge[{smallest}]" if smallest else "rkedge"


def _pip(*words: str) -> str:
    return shlex.join([sys.executable, "-m", "pip", "install", *words])
