"""What a run of the toolkit made: read back and moved to its place, or the error that fits what happened."""

from __future__ import annotations

import shutil
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rkconvert.toolkit import failures
from rkconvert.toolkit.events import Done
from rkconvert.toolkit.job import LOGITS, ToolkitJob
from rkconvert.toolkit.output import qparams_of
from rkconvert.toolkit.session import WorkerRun
from rkruntime.bundle.rkllm_file import RkllmFile, read_rkllm
from rkruntime.errors import ModelFileError
from rkruntime.files import read_regular, umask
from rkruntime.versions import version

# The only release known, from a description, to name the toolkit at the end of a file; older ones may not.
_SIGNED: Final = "1.3.1"
_LEAST_SHARE: Final = 0.97
_MOST_LOGITS: Final = 256 << 20


@dataclass(frozen=True)
class ToolkitResult:
    """A successful conversion.

    Attributes:
        file: The new file, and what it says about itself.
        lora: Separate adapter file, if any.
        qparams: Quantization parameters that grq and gdq leave for `--qparams`, if any.
        run: How it was made. Its log, `run.output`, is for report/; the caller takes it.
        doubts: Reasons to doubt that the files are whole, and from this release.
        logits: The toolkit's logits as bytes of float32, one row after the other; empty if it gave none.
    """

    file: RkllmFile
    lora: Path | None
    qparams: Path | None
    run: WorkerRun
    doubts: tuple[str, ...]
    logits: bytes = b""


def read_back(run: WorkerRun, job: ToolkitJob) -> ToolkitResult:
    """Check what a run wrote, and move it to `job.output`. Raises the error of `failures` that fits what happened."""
    if not run.exported:
        raise failures.explain(run, job)
    written = sorted(run.scratch.glob("*.rkllm*"))
    loras = [path for path in written if "_lora" in path.name]
    model, *more = _whole(run, [path for path in written if path not in loras], "model file (.rkllm)")
    if model.size < job.least_size:
        raise failures.bad_file(
            run, model.path.name, f"it has {model.size:,} bytes, but the weights alone take {job.least_size:,}"
        )
    lora = None
    if job.has_adapter_file:
        first, *others = _whole(run, loras, "file for the adapter (_lora.rkllm)")
        more += others
        lora = first.path.replace(job.output.with_name(f"{job.output.stem}_lora{job.output.suffix}"))
    elif loras:
        raise failures.bad_file(run, loras[0].name, "no adapter was to become a separate file")
    model.path.replace(job.output)
    doubts = (*_doubts(run, model, job), *map(_left_out, more))
    if qparams := _qparams(run):
        qparams = qparams.replace(job.output.with_suffix(".qparams"))
    return ToolkitResult(read_rkllm(job.output), lora, qparams, run, doubts, _logits(run))


def _logits(run: WorkerRun) -> bytes:
    if run.calls.logits is None or not isinstance(run.outcome, Done):
        return b""
    try:
        return read_regular(run.scratch / LOGITS, _MOST_LOGITS)
    except OSError:
        return b""


def keep_qparams(run: WorkerRun) -> None:
    """Keep a failed run's parameters beside its log: finding them took hours, and `--qparams` can reuse them."""
    if (found := _qparams(run)) and run.output.path:
        kept = qparams_of(run.output.path)
        try:
            shutil.move(found, kept)
        except OSError:  # The run's own error is the one to report.
            kept.unlink(missing_ok=True)


def _qparams(run: WorkerRun) -> Path | None:
    """Return the file that grq or gdq wrote, or None. Its name is not documented: of several, it is the largest."""
    files = [path for path in run.scratch.rglob("*.qparams") if stat.S_ISREG(path.lstat().st_mode)]
    return max(files, key=lambda path: path.stat().st_size, default=None)


def _whole(run: WorkerRun, files: list[Path], what: str) -> list[RkllmFile]:
    """Return the files, the largest first, each checked as a regular .rkllm file and made readable as any new file."""
    if not files:
        raise failures.no_file(run, what)
    for path in files:
        status = path.lstat()
        if not stat.S_ISREG(status.st_mode) or status.st_nlink != 1:
            raise failures.bad_file(run, path.name, "it is a link or a folder, not a file of its own")
        path.chmod(0o666 & ~umask())
    try:
        return sorted(map(read_rkllm, files), key=lambda file: -file.size)
    except ModelFileError as error:
        raise failures.bad_file(run, files[0].name, error.message.replace(f"{run.scratch}/", "")) from error


def _left_out(file: RkllmFile) -> str:
    return f"it also wrote {file.path.name} ({file.size:,} bytes), which is not in the bundle"


def _doubts(run: WorkerRun, file: RkllmFile, job: ToolkitJob) -> Iterator[str]:
    said = run.output.version
    if said and said != run.toolkit.version:
        yield f"the toolkit reports version {said}, but its package is {run.toolkit.version}"
    if file.toolkit_version and said and file.toolkit_version != said:
        yield f"the file says that rkllm-toolkit {file.toolkit_version} made it"
    # What is known of the layout comes from public descriptions, so a smaller file is not an error.
    if file.size < _LEAST_SHARE * job.file_size:
        yield f"the file has {file.size:,} bytes, but about {job.file_size:,} were expected: it may be truncated"
    if not file.toolkit_version and version(run.toolkit.version) >= version(_SIGNED):
        yield f"the file does not end with its version, as those of {_SIGNED} do: it may be truncated"
