"""A conversion from job to file: check it, run it in its own session, and read the new file back.

The toolkit writes to a scratch folder beside the result; everything there but the result is deleted.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rkconvert.toolkit import failures
from rkconvert.toolkit.events import Done, Event, Failure
from rkconvert.toolkit.interpreter import Toolkit
from rkconvert.toolkit.job import ToolkitJob, calls
from rkconvert.toolkit.output import Output
from rkconvert.toolkit.session import OnEvent, Session
from rkruntime.bundle.rkllm_file import RkllmFile, read_rkllm
from rkruntime.errors import ModelFileError
from rkruntime.files import write_error
from rkruntime.folders import own_folder

_LOGS_KEPT: Final = 10


@dataclass(frozen=True)
class ToolkitResult:
    """A successful conversion.

    Attributes:
        file: What the new file says about itself.
        lora: Separate adapter file, if any.
        calls: Calls made to the toolkit.
        notes: Notes on what the release could not do exactly as asked, and on what disagrees with the file.
        warnings: The toolkit's own warnings.
        seconds: Seconds by stage.
        peak_memory: Peak memory of the worker, in bytes.
        log: The toolkit's raw output, for report/; the caller moves it.
    """

    path: Path
    file: RkllmFile
    lora: Path | None
    toolkit: Toolkit
    calls: tuple[Mapping[str, Any], ...]
    notes: tuple[str, ...]
    warnings: tuple[str, ...]
    seconds: Mapping[str, float]
    peak_memory: int
    log: Path


def _ignore(_: Event) -> None:
    """Default for callers that ignore events."""


def run_toolkit(job: ToolkitJob, toolkit: Toolkit, on_event: OnEvent = _ignore) -> ToolkitResult:
    """Convert. `job.output` is complete when this returns, and does not exist when it raises.

    Args:
        on_event: Called with every event, and a heartbeat each second; an exception in it kills the toolkit
            and is raised here.

    Raises:
        RefusedError, UsageError: The installed release does not support this; nothing was started.
        ToolkitError, HostError, CheckpointError, CalibrationError: It failed; `details` holds the diagnosis and lines.
    """
    with _scratch(job.output) as scratch:
        export = scratch / "model.rkllm"
        steps = calls(job, toolkit.release, export)
        with Output(_log_file()) as output:
            run = Session(toolkit, scratch, output, on_event, job.toolkit_patience)
            run.talk(steps)
            file = _check(run, job, scratch)
            lora = _take_lora(scratch, file, job.output)
            file.path.replace(job.output)
        return ToolkitResult(
            path=job.output,
            file=read_rkllm(job.output),
            lora=lora,
            toolkit=toolkit,
            calls=steps.steps,
            notes=(*steps.notes, *_disagreements(run, file)),
            warnings=tuple(dict.fromkeys(run.warnings)),
            seconds=run.seconds,
            peak_memory=run.peak_memory,
            log=output.path,
        )


@contextmanager
def _scratch(output: Path) -> Iterator[Path]:
    """A folder beside the result, on the same disk, deleted afterwards with everything the toolkit left in it."""
    try:
        folder = Path(tempfile.mkdtemp(prefix=".toolkit-", dir=output.parent.absolute()))
    except OSError as error:
        raise write_error(output, error) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _log_file() -> Path:
    """A new log in the user's cache, kept there if the conversion fails; deletes the oldest."""
    cache = own_folder("cache") / "logs"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        for old in sorted(cache.glob("toolkit-*.log"))[: -_LOGS_KEPT + 1]:
            old.unlink(missing_ok=True)
        handle, name = tempfile.mkstemp(prefix=time.strftime("toolkit-%Y%m%d-%H%M%S-"), suffix=".log", dir=cache)
    except OSError:
        handle, name = tempfile.mkstemp(prefix="rkedge-toolkit-", suffix=".log")
    os.close(handle)
    return Path(name)


def _check(run: Session, job: ToolkitJob, scratch: Path) -> RkllmFile:
    """Read the new file back; raises the error that fits what happened."""
    if not isinstance(run.outcome, Done):
        raise failures.explain(_facts(run, job))
    files = sorted(path for path in scratch.glob("*.rkllm*") if path.is_file() and not _is_lora(path))
    if not files:
        raise failures.no_file(_facts(run, job))
    try:
        file = read_rkllm(max(files, key=lambda path: path.stat().st_size))
    except ModelFileError as error:
        raise failures.bad_file(_facts(run, job), error.message.replace(f"{scratch}/", "")) from error
    if file.size < job.least_size:
        raise failures.bad_file(
            _facts(run, job), f"it has {file.size:,} bytes, but the weights alone take {job.least_size:,}"
        )
    return file


def _is_lora(path: Path) -> bool:
    return "_lora" in path.name


def _take_lora(scratch: Path, file: RkllmFile, output: Path) -> Path | None:
    for path in scratch.glob("*_lora*.rkllm*"):
        if path != file.path:
            final = output.with_name(f"{output.stem}_lora{output.suffix}")
            path.replace(final)
            return final
    return None


def _facts(run: Session, job: ToolkitJob) -> failures.Facts:
    return failures.Facts(
        version=run.toolkit.version,
        stage=run.stage,
        failure=run.outcome if isinstance(run.outcome, Failure) else None,
        exit_code=run.exit_code,
        hung_after=run.patience if run.hung else None,
        out_of_memory_kills=run.out_of_memory_kills,
        peak_memory=run.peak_memory,
        free_disk=shutil.disk_usage(run.scratch).free,
        tail=run.output.tail(),
        text=run.output.text(),
        log=run.output.path,
        parameters=job.parameters,
        load_dtype=job.toolkit_load_dtype,
    )


def _disagreements(run: Session, file: RkllmFile) -> Iterator[str]:
    said = run.output.version
    if said and said != run.toolkit.version:
        yield f"the toolkit reports version {said}, but its package is {run.toolkit.version}"
    if file.toolkit_version and said and file.toolkit_version != said:
        yield f"the file says that rkllm-toolkit {file.toolkit_version} made it"
