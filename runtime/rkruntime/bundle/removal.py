"""Remove a bundle and nothing else: the files that its manifest lists, within its folder, without following links."""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path, PurePosixPath

from rkruntime.bundle.manifest import MANIFEST, Bundle
from rkruntime.errors import OutputError
from rkruntime.files import write_error

# Errors to ignore for a listed name: the file is gone, something else is in its place, or no file can have that name.
_NOT_THERE = (errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG)
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC


def remove_bundle(bundle: Bundle) -> list[str]:
    """Remove a bundle's files, and its folder if nothing else is in it. If the bundle is a link, remove only the link.

    The manifest goes last: after an interruption the rest is still a bundle, and can be removed.

    Returns:
        Names left in the folder because they are not the bundle's.

    Raises:
        OutputError: Something cannot be removed.
    """
    folder = Path(os.path.abspath(bundle.path))  # noqa: PTH100 - links stay links
    try:
        if folder.is_symlink():
            folder.unlink()
            return []
        handle = os.open(folder, _FOLDER)
        try:
            for name in [*bundle.manifest.files, MANIFEST]:
                _remove(handle, PurePosixPath(name))
        finally:
            os.close(handle)
        if left := sorted(os.listdir(folder)):  # noqa: PTH208
            return left
        folder.rmdir()
    except OSError as error:
        raise _failed(folder, error) from error
    return []


def _remove(folder: int, path: PurePosixPath) -> None:
    """Remove a file below `folder`, and the folders between them that are then empty. A path through a link stays."""
    first, *rest = path.parts
    try:
        if not rest:
            os.unlink(first, dir_fd=folder)
            return
        within = os.open(first, _FOLDER, dir_fd=folder)
    except OSError as error:
        if error.errno in _NOT_THERE:
            return
        raise
    try:
        _remove(within, PurePosixPath(*rest))
    finally:
        os.close(within)
    with suppress(OSError):  # not empty yet
        os.rmdir(first, dir_fd=folder)


def _failed(folder: Path, error: OSError) -> OutputError:
    reason = write_error(folder, error)
    return OutputError(f"{folder} cannot be removed: {error.strerror or error}.", hint=reason.hint)
