"""Tell users what to install if a package is missing, according to rkedge's own metadata.

The commands name only other projects' packages: no index has rkedge itself, so whoever registered its name there could
have anything installed.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Iterator
from typing import Final

from rkruntime.errors import HostError

_OWN: Final = ("rkruntime", "rkconvert", "rkboard")
# Modules whose package has a different name.
_PACKAGES: Final = {"yaml": "PyYAML"}


def import_failed(error: ImportError) -> HostError:
    """Return the error for a failed import: it names the package and the command that installs it."""
    while isinstance(error.__cause__, ImportError):  # transformers wraps the error that names the package
        error = error.__cause__
    module = (error.name or "").partition(".")[0]
    if not module or module in _OWN:
        return HostError(
            f"rkedge is not completely installed: {error}.",
            hint=f"Install it again from its folder or its wheel: {_pip('--force-reinstall', 'FOLDER')}",
        )
    package = _PACKAGES.get(module, module)
    if isinstance(error, ModuleNotFoundError):
        message = f"This needs the Python package {package}, which is not installed."
    else:
        message = f"The Python package {package} is installed but cannot be used: {error}."
    return HostError(message, hint=install(package))


def install(*packages: str) -> str:
    """Return the command that installs packages into this Python, in the versions that rkedge needs.

    If a package is one of rkedge's base requirements, the command also names the other missing ones: a board's
    installation leaves several out.
    """
    base, extras = dict(_requirements(extra=False)), dict(_requirements(extra=True))
    wanted = [_canonical(package) for package in packages]
    more = [name for name in base if name not in wanted and not _is_installed(name)] if set(wanted) & set(base) else []
    return f"Install it: {_pip(*({**extras, **base}.get(name, name) for name in [*wanted, *more]))}"


def _requirements(*, extra: bool) -> Iterator[tuple[str, str]]:
    """Yield name and versions of each package in rkedge's metadata: those of the extras, or of the base."""
    import importlib.metadata  # slow to import, and needed only for an error

    try:
        lines = importlib.metadata.requires("rkedge") or []
    except importlib.metadata.PackageNotFoundError:
        return
    for line in lines:
        requirement, _, marker = (part.strip() for part in line.partition(";"))
        if ("extra ==" in marker) == extra and "[" not in requirement:
            yield _canonical(re.split(r"[^\w.-]", requirement)[0]), requirement


def _canonical(name: str) -> str:
    """Return a package's name in the normalized form by which indexes compare names."""
    return re.sub(r"[-_.]+", "-", name).lower()


def _is_installed(package: str) -> bool:
    import importlib.metadata

    try:
        importlib.metadata.distribution(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _pip(*words: str) -> str:
    return shlex.join([sys.executable, "-m", "pip", "install", *words])
