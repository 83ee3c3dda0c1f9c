"""Bounded reads, whatever is at the path, and writes under a temporary name that is then renamed."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import TypeAlias

from rkruntime.errors import HostError, InputError, OutputError, UsageError

_BLOCK = 1 << 20  # small enough to be hashed in a core's cache
_KEEP_SIZE = 1  # FALLOC_FL_KEEP_SIZE of fallocate(2): a file grows as it is written
# The types that callers may pass as a path; `as_path` checks the value.
AnyPath: TypeAlias = str | os.PathLike[str]


def as_path(name: str, value: AnyPath) -> Path:
    """Return the path that a caller passed as the argument `name`. Raises UsageError if no file can have it."""
    try:
        path = Path(value)
        path.lstat()
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            return path
    except (TypeError, ValueError):  # a null character, half a surrogate pair
        pass
    else:
        if value != "":  # it would mean the current folder
            return path
    raise UsageError(f"{name} is not a path that a file could have; it must be a str or an os.PathLike.")


def open_regular(path: Path) -> BufferedReader:
    """Open a regular file for reading.

    Raises:
        OSError: It cannot be read, or is not a regular file: a FIFO would block, and a device has no end.
    """
    # O_NONBLOCK: a FIFO opens without a writer. The check is on what was opened; the path may have changed since.
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC)
    kind = os.fstat(handle).st_mode
    if not stat.S_ISREG(kind):
        os.close(handle)
        if stat.S_ISDIR(kind):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        raise OSError(errno.EINVAL, "it is not a regular file", str(path))
    return os.fdopen(handle, "rb")


def read_regular(path: Path, limit: int) -> bytes:
    """Return all bytes of a regular file of at most `limit` bytes; never reads more, whatever its stated size.

    Raises:
        OSError: It cannot be read, is not a regular file, or is larger (EFBIG); `strerror` says which.
    """
    with open_regular(path) as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise OSError(errno.EFBIG, f"it has more than {limit:,} bytes", str(path))
    return data


def sha256_file(path: Path, progress: Callable[[int], None] | None = None) -> str:
    """Return the SHA-256 of a file as hex; `progress` is called with the size of each block read."""
    import hashlib  # Here, because OpenSSL takes 3.5 MB, also in the processes that hash nothing.

    digest, room = hashlib.sha256(), memoryview(bytearray(_BLOCK))
    with open_regular(path) as file:
        while count := file.readinto(room):
            digest.update(room[:count])
            if progress:
                progress(count)
    return digest.hexdigest()


def set_aside(descriptor: int, nbytes: int) -> None:
    """Have the file system find room for a new file's `nbytes` at once, not block by block: ext4 writes faster then.

    A file system that cannot is left alone, where os.posix_fallocate would write to each block. Nor is it an error here
    if there is no room: the writing will say so.
    """
    import ctypes  # here, as few programs write large files

    ctypes.CDLL(None).fallocate(descriptor, _KEEP_SIZE, ctypes.c_int64(0), ctypes.c_int64(nbytes))


def files_hint(error: OSError) -> str | None:
    """Return the next step if no more files can be opened, else None."""
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return "Raise the number of files that may be open: ulimit -n, or LimitNOFILE= in the service's unit."
    return None


def path_hint(error: OSError, path: AnyPath) -> str | None:
    """Return the next step if the path itself is at fault, or no more files can be opened, else None."""
    if error.errno in (errno.ENOENT, errno.ENOTDIR):
        return "Check the spelling of the path."
    if error.errno == errno.EISDIR:
        return "That is a folder: name a file in it."
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"Its permissions, or those of a folder above it, do not allow it: namei -l {readable(path)}"
    return files_hint(error)


def read_error(path: object, error: OSError, kind: type[InputError] = InputError) -> InputError:
    """Return the error to raise when `path` cannot be read: a `kind` whose hint is not about the content."""
    shown = readable(str(path))
    return kind(f"{shown} cannot be read: {error.strerror or error}.", hint=path_hint(error, shown))


def write_error(path: Path, error: OSError) -> HostError | OutputError:
    """Return the error to raise when writing below `path` failed: HostError for a full disk, else OutputError."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        free = shutil.disk_usage(path.parent if path.parent.is_dir() else "/").free
        return HostError(
            f"The disk is full: writing {path} stopped with {free / 1e9:.2f} GB free.",
            hint="Free space on that disk, or name an output folder on another one. Nothing half-written was left.",
        )
    hint = "Use a shorter name." if error.errno == errno.ENAMETOOLONG else path_hint(error, path.parent)
    return OutputError(f"Cannot write {path}: {error.strerror or error}.", hint=hint)


def readable(path: AnyPath) -> str:
    """Return a path as text for YAML, JSON and terminals: bytes that are not UTF-8 become escapes such as `\\xe9`."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _no_folder(folder: Path) -> OutputError:
    if folder.exists():
        return OutputError(f"{folder} is a file, not a folder to write into.", hint="Name a folder.")
    return OutputError(f"There is no folder {folder} to write into.", hint=f"Make it: mkdir -p {folder}")


def refuse_existing(final: Path) -> None:
    """Raise OutputError if `final` exists, or its parent folder does not."""
    try:
        final.lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass
    except OSError as error:
        raise write_error(final, error) from error
    else:
        raise OutputError(f"{final} exists already, and is not overwritten.")
    if not final.parent.is_dir():
        raise _no_folder(final.parent)


@contextmanager
def atomic_folder(final: Path) -> Iterator[Path]:
    """Yield a new folder next to `final`, renamed to `final` when the block ends and removed if the block raises.

    Raises:
        OutputError: `final` exists or cannot be written.
        HostError: The disk is full.
    """
    refuse_existing(final)
    try:
        partial = Path(tempfile.mkdtemp(prefix=_partial(final), dir=final.parent))
    except OSError as error:
        raise write_error(final, error) from error
    try:
        yield partial
        partial.chmod(0o777 & ~umask())
        partial.rename(final)
    except OSError as error:
        raise write_error(final, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def atomic_file(final: Path) -> Iterator[Path]:
    """Yield a new file next to `final` that replaces it when the block ends, and is removed if the block raises."""
    if not final.parent.is_dir():
        raise _no_folder(final.parent)
    try:
        handle, name = tempfile.mkstemp(prefix=_partial(final), dir=final.parent)
    except OSError as error:
        raise write_error(final, error) from error
    os.close(handle)
    partial = Path(name)
    try:
        yield partial
        partial.chmod(0o666 & ~umask())
        partial.replace(final)
    except OSError as error:
        raise write_error(final, error) from error
    finally:
        partial.unlink(missing_ok=True)


def _partial(final: Path) -> str:
    """Return the prefix of a temporary name, cut short so that it fits wherever `final`'s own name does."""
    return f".{os.fsencode(final.name)[:100].decode('utf-8', 'ignore')}.partial-"


def umask() -> int:
    """Return the umask; 0o077 if the kernel does not report it."""
    # os.umask can read it only by setting another, which would affect files that other threads create meanwhile.
    with suppress(OSError, ValueError), Path("/proc/self/status").open("rb") as file:
        for line in file:
            if line.startswith(b"Umask:"):
                return int(line.split()[1], 8)
    return 0o077
