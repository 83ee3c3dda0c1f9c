"""Exceptions that no code expected, as the errors that people are shown: few of them are defects of rkedge."""

from __future__ import annotations

import io
import os

from rkruntime.errors import HostError, RKEdgeError, UsageError
from rkruntime.files import files_hint, path_hint
from rkruntime.packages import import_failed


def typed(error: Exception) -> RKEdgeError:
    """Return the error to show for an exception. Most concern this machine or its installation."""
    if isinstance(error, RKEdgeError):
        return error
    if isinstance(error, ImportError):
        return import_failed(error)
    if isinstance(error, MemoryError):
        return HostError("There is not enough memory.", hint="Close other programs, or raise the limit (ulimit -v).")
    if isinstance(error, OSError) and str(error) and not isinstance(error, io.UnsupportedOperation):
        return _of_system(error)  # one without a number is a library's words, such as ctypes' of a missing file
    if isinstance(error, RuntimeError) and str(error).startswith("Symlink loop"):  # as Python 3.10 to 3.12 say it
        return UsageError(f"{error}.", hint="Name another path: this one leads to itself.")
    if isinstance(error, RuntimeError) and "home directory" in str(error):  # as Path.expanduser says it
        return UsageError("A path begins with the home folder of a user that this machine does not know.")
    if isinstance(error, ValueError) and "null byte" in str(error):  # as Python reports it for a path
        return UsageError("A file name contains the character NUL, which is not allowed.")
    return RKEdgeError(f"This is a defect of rkedge: {type(error).__name__}: {error}")


def is_defect(error: RKEdgeError) -> bool:
    """Whether `typed` knows no cause outside rkedge."""
    return type(error) is RKEdgeError


def _of_system(error: OSError) -> HostError:
    named = error.filename
    hint = path_hint(error, named) if isinstance(named, str | os.PathLike) else files_hint(error)
    return HostError(f"{error.strerror or error}{f': {named}' if named else ''}.", hint=hint)
