"""A folder that is written under another name and survives a kill, so that a second run can go on in it."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from rkruntime.errors import OutputError
from rkruntime.files import refuse_existing, write_error


@contextmanager
def work_folder(final: Path, job: str) -> Iterator[Path]:
    """`.NAME.partial` beside `final`, which takes that name when the block ends.

    What an earlier run with the same `job` (a text that says what is made of what) left there after it was killed is
    still there; anything else is removed. It is removed too when the block raises, but for Ctrl-C.

    Raises:
        OutputError: `final` exists or cannot be written, or another run is making it at this moment.
        HostError: the disk is full.
    """
    refuse_made(final)
    partial, note = final.parent / f".{final.name}.partial", _note(final)
    try:
        with note.open("a+", encoding="utf-8") as held:
            _lock(held, final)
            try:
                _prepare(partial, held, job)
                yield partial
                partial.rename(final)
            except Exception:  # Whatever it was, nothing half-made stays; Ctrl-C and a kill leave it for the next run.
                shutil.rmtree(partial, ignore_errors=True)
                raise
            finally:
                if not partial.exists():
                    note.unlink(missing_ok=True)
    except OSError as error:
        raise write_error(final, error) from error


def _note(final: Path) -> Path:
    return final.parent / f".{final.name}.job"


def forget_kill(final: Path) -> None:
    """Remove what a kill behind the last step of a run left beside its finished folder."""
    if final.is_dir():
        _note(final).unlink(missing_ok=True)


def refuse_made(final: Path) -> None:
    """Raise OutputError if there is something at `final` already, or no folder to put it into."""
    forget_kill(final)
    refuse_existing(final)


def _lock(file: IO[str], final: Path) -> None:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        raise OutputError(
            f"Another run is writing {final} at this moment.", hint="Wait for it, or name another output folder."
        ) from error


def _prepare(partial: Path, note: IO[str], job: str) -> None:
    note.seek(0)
    if note.read() != job:
        shutil.rmtree(partial, ignore_errors=True)
        note.truncate(0)
        note.write(job)
        note.flush()
    partial.mkdir(exist_ok=True)
