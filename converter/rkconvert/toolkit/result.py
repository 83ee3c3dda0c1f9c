"""What a run of the toolkit made: read back and moved to its place, or the error that fits what happened."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rkconvert.toolkit import failures
from rkconvert.toolkit.events import Done
from rkconvert.toolkit.job import ToolkitJob
from rkconvert.toolkit.session import WorkerRun
from rkruntime.bundle.rkllm_file import RkllmFile, read_rkllm
from rkruntime.errors import ModelFileError


@dataclass(frozen=True)
class ToolkitResult:
    """A successful conversion.

    Attributes:
        file: The new file, and what it says about itself.
        lora: Separate adapter file, if any.
        run: How it was made. Its log, `run.output.path`, is for report/; the caller moves it.
        notes: Notes on what the release could not do exactly as asked, and on what disagrees with the file.
    """

    file: RkllmFile
    lora: Path | None
    run: WorkerRun
    notes: tuple[str, ...]


def read_back(run: WorkerRun, job: ToolkitJob) -> ToolkitResult:
    """Check what a run wrote, and move it to `job.output`. Raises the error of `failures` that fits what happened."""
    if not isinstance(run.outcome, Done):
        raise failures.explain(run, job)
    written = sorted(path for path in run.scratch.glob("*.rkllm*") if path.is_file())
    loras = [path for path in written if "_lora" in path.name]
    file = _complete(run, job, [path for path in written if path not in loras])
    lora = loras[0].replace(job.output.with_name(f"{job.output.stem}_lora{job.output.suffix}")) if loras else None
    file.path.replace(job.output)
    return ToolkitResult(read_rkllm(job.output), lora, run, (*run.calls.notes, *_disagreements(run, file)))


def _complete(run: WorkerRun, job: ToolkitJob, files: list[Path]) -> RkllmFile:
    """The largest of the files, if it is a whole .rkllm file."""
    if not files:
        raise failures.no_file(run)
    try:
        file = read_rkllm(max(files, key=lambda path: path.stat().st_size))
    except ModelFileError as error:
        raise failures.bad_file(run, error.message.replace(f"{run.scratch}/", "")) from error
    if file.size < job.least_size:
        raise failures.bad_file(run, f"it has {file.size:,} bytes, but the weights alone take {job.least_size:,}")
    return file


def _disagreements(run: WorkerRun, file: RkllmFile) -> Iterator[str]:
    said = run.output.version
    if said and said != run.toolkit.version:
        yield f"the toolkit reports version {said}, but its package is {run.toolkit.version}"
    if file.toolkit_version and said and file.toolkit_version != said:
        yield f"the file says that rkllm-toolkit {file.toolkit_version} made it"
