"""A folder that is written under another name and survives a kill, so that a second run can go on in it.

Its names can be guessed, and the folder that it is in may be everybody's. So what stands there already is used only if
it is this user's own and what it should be: no link is followed, and nothing of another user is taken up.
"""

from __future__ import annotations

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

from rkruntime.errors import OutputError
from rkruntime.files import refuse_existing, umask, write_error

_OTHERS_WRITE: Final = 0o022
_NEW_SECONDS: Final = 10.0
_KINDS: Final = {
    stat.S_IFLNK: "a symbolic link",
    stat.S_IFDIR: "a folder",
    stat.S_IFREG: "a file",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
}


@contextmanager
def work_folder(final: Path, job: str, keep: Collection[str] = ()) -> Iterator[Path]:
    """`.NAME.partial` beside `final`, which takes that name when the block ends.

    Of what an earlier run with the same `job` (a text that says what is made of what) left there after it was killed,
    the files that `keep` names are still there; anything else is removed. All is removed when the block raises, but for
    Ctrl-C.

    Args:
        keep: what the block compares with a record before it is used, relative to the folder, with `/`.

    Raises:
        OutputError: `final` exists or cannot be written, another run is making it at this moment, or something lies
            where the work would be done.
        HostError: the disk is full.
    """
    refuse_made(final)
    partial = final.parent / f".{final.name}.partial"
    try:
        _refuse_planted(partial, stat.S_IFDIR)
        _refuse_planted(_note(final), stat.S_IFREG)
        with _hold(final) as note:
            refuse_existing(final)
            try:
                _prepare(partial, note, job, keep)
                yield partial
                # As any new folder here: what it inherited from its parent (setgid) stays.
                partial.chmod(stat.S_IMODE(partial.stat().st_mode) | 0o777 & ~umask())
                partial.rename(final)
            except Exception:  # Whatever it was, nothing half-made stays; Ctrl-C and a kill leave it for the next run.
                shutil.rmtree(partial, ignore_errors=True)
                raise
            finally:
                if not os.path.lexists(partial):
                    _note(final).unlink(missing_ok=True)
    except OSError as error:
        raise write_error(final, error) from error


@contextmanager
def scratch_folder(prefix: str) -> Iterator[Path]:
    """A new temporary folder that goes with the block; what killed runs left under this `prefix` goes first."""
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
    """Remove a scratch folder of this user that no process holds."""
    try:
        handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError:
        return
    try:
        found = os.fstat(handle)
        # A new one is not locked for a moment.
        if found.st_uid == os.geteuid() and time.time() - found.st_mtime > _NEW_SECONDS:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
    except BlockingIOError:
        pass
    finally:
        os.close(handle)


def _note(final: Path) -> Path:
    return final.parent / f".{final.name}.job"


def forget_kill(final: Path) -> None:
    """Remove what a kill behind the last step of a run left beside its finished folder."""
    with suppress(OSError):
        if final.is_dir():
            _note(final).unlink(missing_ok=True)


def refuse_made(final: Path) -> None:
    """Raise OutputError if there is something at `final` already, or no folder to put it into."""
    forget_kill(final)
    refuse_existing(final)


@contextmanager
def _hold(final: Path) -> Iterator[IO[str]]:
    """The note beside `final`, open and locked: one run at a time."""
    path = _note(final)
    while True:
        # A link that is put there in this moment is refused by the open, anything else by what was opened.
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, 0o600)
        with os.fdopen(handle, "r+", encoding="utf-8") as note:
            _refuse(path, os.fstat(handle), stat.S_IFREG)
            _lock(note, final)
            # The run that held it may have removed it meanwhile; a lock on a file without a name keeps nobody out.
            if os.path.lexists(path) and os.path.samestat(path.lstat(), os.fstat(handle)):
                yield note
                return


def _lock(file: IO[str], final: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise OutputError(
            f"Another run is writing {final} at this moment.", hint="Wait for it, or name another output folder."
        ) from error


def _prepare(partial: Path, note: IO[str], job: str, keep: Collection[str]) -> None:
    kept = os.path.lexists(partial) and not partial.lstat().st_mode & _OTHERS_WRITE
    if kept and _read(note) == job:
        _clear(partial, keep)
    else:
        # In this order: a kill between any two of these steps leaves nothing that counts as work on `job`.
        note.seek(0)
        note.truncate(0)
        if os.path.lexists(partial):
            shutil.rmtree(partial)
        partial.mkdir(0o700)
        note.write(job)
        note.flush()


def _clear(folder: Path, keep: Collection[str]) -> None:
    """Remove all but the regular files in `keep`."""
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
    """Raise OutputError if there is something at `path` that no run of this user has made."""
    with suppress(FileNotFoundError):
        _refuse(path, path.lstat(), kind)


def _refuse(path: Path, found: os.stat_result, kind: int) -> None:
    here = stat.S_IFMT(found.st_mode)
    what = _KINDS.get(here, "a device")
    if here == kind and found.st_uid != os.geteuid():
        what += f" of another user ({found.st_uid})"
    elif here == kind == stat.S_IFREG and found.st_nlink > 1:
        what += " with a second name (a hard link)"
    elif here == kind:
        return
    raise OutputError(
        f"{path}, where the work is done, is {what} that rkedge did not make. It was left as it is.",
        hint="Find out whose it is and remove it, or name an output in a folder that nobody else can write to.",
    )
