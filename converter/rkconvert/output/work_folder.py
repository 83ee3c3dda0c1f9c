"""A folder that is written under another name and survives a kill, so that a second run can resume in it.

Its names can be guessed, and its parent may be writable by everyone. So whatever exists there is used only if it
belongs to this user and is what it should be: no link is followed, and nothing of another user is used.
"""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Final

from rkruntime.errors import OutputError, RKEdgeError
from rkruntime.files import refuse_existing, umask, write_error

_PARTIAL: Final = ".{}.partial"
_OTHERS_WRITE: Final = 0o022
_NEW_SECONDS: Final = 10.0
_MOMENT_S: Final = 2.0
_KINDS: Final = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFDIR: "a folder",
    stat.S_IFREG: "a file",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
}


@contextmanager
def work_folder(final: Path, job: str, keep: Collection[str] = (), done: Collection[str] = ()) -> Iterator[Path]:
    """Make the folder `.NAME.partial` beside `final`, and rename it to `final` when the block ends.

    Of what an earlier, killed run with the same `job` (a text that says what is made from what) left there, the files
    in `keep` remain; everything else is removed. If the block raises, everything is removed, except after Ctrl-C, and
    after a failure of a disk, or of a process that somebody kills, when hours of work are done.

    Args:
        keep: Files that the block verifies before using them, relative to the folder, with `/`.
        done: The files in `keep` that the block writes only after such work.

    Raises:
        OutputError: `final` exists or cannot be written, another run is making it right now, or something else is in
            the way of the work.
        HostError: The disk is full.
    """
    refuse_made(final)
    partial = _unfinished(final)
    try:
        _refuse_planted(partial, stat.S_IFDIR)
        _refuse_planted(_note(final), stat.S_IFREG)
        with _hold(final) as note:
            refuse_existing(final)
            try:
                _prepare(partial, note, job, keep)
                yield partial
                # Permissions as for any new folder here: what it inherited from its parent (setgid) is kept.
                partial.chmod(stat.S_IMODE(partial.stat().st_mode) | 0o777 & ~umask())
                partial.rename(final)
            except Exception as error:  # Nothing half-made stays; Ctrl-C and a kill leave it for the next run.
                from_outside = isinstance(error, OSError) or isinstance(error.__cause__, OSError)
                if from_outside and any((partial / name).is_file() for name in done):
                    raise _kept(final, partial, error) from error
                shutil.rmtree(partial, ignore_errors=True)
                raise
            finally:
                if not os.path.lexists(partial):
                    _note(final).unlink(missing_ok=True)
    except OSError as error:
        raise write_error(final, error) from error


def _kept(final: Path, partial: Path, error: Exception) -> Exception:
    """Return the error for a disk that failed, or a process that was killed, after the long part of the work."""
    found = write_error(final, error) if isinstance(error, OSError) else error
    if not isinstance(found, RKEdgeError):
        return found
    of_disk = error if isinstance(error, OSError) else error.__cause__
    full = isinstance(of_disk, OSError) and of_disk.errno in (errno.ENOSPC, errno.EDQUOT)
    hint = "Free space, then run the same command:" if full else f"{found.hint} Then run the same command:"
    return type(found)(found.message, hint=f"{hint} what took long is kept in {partial}.", details=found.details)


@contextmanager
def scratch_folder(prefix: str) -> Iterator[Path]:
    """Make a temporary folder for the block; folders that killed runs left with this `prefix` are deleted first."""
    for left in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        _remove_dead(left)
    with tempfile.TemporaryDirectory(prefix=prefix) as name:
        handle = os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield Path(name)
        finally:
            os.close(handle)


def _remove_dead(folder: Path) -> None:
    """Remove a scratch folder of this user that no process has locked."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return
    try:
        found = os.fstat(handle)
        # A new folder is not yet locked for a moment.
        if found.st_uid == os.geteuid() and time.time() - found.st_mtime > _NEW_SECONDS:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
    except BlockingIOError:
        pass
    finally:
        os.close(handle)


def _unfinished(final: Path) -> Path:
    return final.parent / _PARTIAL.format(final.name)


def kept_bytes(final: Path) -> int:
    """Return the bytes taken by what an unfinished run left, which the next one uses or removes."""
    folder = _unfinished(final)
    if folder.is_symlink():
        return 0
    with suppress(OSError):  # another run is at work there
        return sum(path.lstat().st_blocks * 512 for path in folder.rglob("*"))
    return 0


def _note(final: Path) -> Path:
    return final.parent / f".{final.name}.job"


def forget_kill(final: Path) -> None:
    """Remove what a kill after the last step of a run left beside its finished folder."""
    with suppress(OSError):
        if final.is_dir():
            _note(final).unlink(missing_ok=True)


def refuse_made(final: Path) -> None:
    """Raise OutputError if `final` already exists, its parent does not, or its name leaves no room for the work's."""
    forget_kill(final)
    refuse_existing(final)
    limit = os.pathconf(final.parent, "PC_NAME_MAX")  # not above 0 if the file system does not say
    most, size = limit - len(_PARTIAL.format("")), len(os.fsencode(final.name))
    if size > most and limit > 0:
        raise OutputError(
            f"Cannot write {final}: its name has {size} bytes, too many for the folder in which it is made.",
            hint=f"Use a name of at most {most} bytes.",
        )


@contextmanager
def _hold(final: Path) -> Iterator[IO[str]]:
    """Open and lock the note beside `final`: one run at a time."""
    path = _note(final)
    while True:
        # A link put there at this moment makes the open fail; anything else is refused by checking the open file.
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
        with os.fdopen(handle, "r+", encoding="utf-8") as note:
            _refuse(path, os.fstat(handle), stat.S_IFREG)
            _lock(note, final)
            # The run that held it may have removed it meanwhile; a lock on an unlinked file keeps nobody out.
            if os.path.lexists(path) and os.path.samestat(path.lstat(), os.fstat(handle)):
                yield note
                return


def _lock(file: IO[str], final: Path) -> None:
    # The processes that a killed run had started hold it for another moment.
    until = time.monotonic() + _MOMENT_S
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if time.monotonic() > until:
                raise OutputError(
                    f"Another run is writing {final} right now.", hint="Wait for it, or name another output folder."
                ) from error
        time.sleep(_MOMENT_S / 20)


def _prepare(partial: Path, note: IO[str], job: str, keep: Collection[str]) -> None:
    kept = os.path.lexists(partial) and not partial.lstat().st_mode & _OTHERS_WRITE
    if kept and _read(note) == job:
        _clear(partial, keep)
    else:
        # In this order: a kill between any two of these steps leaves nothing that could pass for work on `job`.
        note.seek(0)
        note.truncate(0)
        if os.path.lexists(partial):
            shutil.rmtree(partial)
        partial.mkdir(0o700)
        note.write(job)
        note.flush()


def _clear(folder: Path, keep: Collection[str]) -> None:
    """Remove everything but the regular files in `keep`."""
    for path in folder.iterdir():
        found = path.lstat()
        below = [name.partition("/")[2] for name in keep if name.startswith(f"{path.name}/")]
        if stat.S_ISDIR(found.st_mode):
            if below:
                _clear(path, below)
            else:
                shutil.rmtree(path)
        elif path.name not in keep or not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
            path.unlink()


def _read(note: IO[str]) -> str:
    try:
        return note.read()
    except UnicodeDecodeError:
        return ""


def _refuse_planted(path: Path, kind: int) -> None:
    """Raise OutputError if something at `path` was not made by a run of this user."""
    with suppress(FileNotFoundError):
        _refuse(path, path.lstat(), kind)


def _refuse(path: Path, found: os.stat_result, kind: int) -> None:
    here = stat.S_IFMT(found.st_mode)
    what = _KINDS.get(here, "a device")
    if here == kind and found.st_uid != os.geteuid():
        what += f" owned by another user ({found.st_uid})"
    elif here == kind == stat.S_IFREG and found.st_nlink > 1:
        what += " with a second name (a hard link)"
    elif here == kind:
        return
    raise OutputError(
        f"{path}, needed for the work, is {what} that rkedge did not create. It was left unchanged.",
        hint="Find out who owns it and remove it, or name an output in a folder that nobody else can write to.",
    )
