"""Choose the error for a failed conversion from the worker's last event, its exit code and the toolkit's log."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from rkconvert.output.host_memory import read_memory
from rkconvert.rules.releases import LOADED_BYTES
from rkconvert.toolkit.job import ToolkitJob
from rkconvert.toolkit.session import WorkerRun
from rkruntime.checks.diagnosis import Diagnosis, diagnose
from rkruntime.errors import CalibrationError, CheckpointError, HostError, RefusedError, RKEdgeError, ToolkitError

_STAGES: Final = {
    "": "it started",
    "import": "it was imported",
    "load": "it loaded the model",
    "build": "it quantized the model",
    "export": "it wrote the file",
}
# Classes of the diagnosis that are not the toolkit's fault.
_KINDS: Final[Mapping[str, type[RKEdgeError]]] = {
    "convert-out-of-memory": HostError,
    "convert-environment": HostError,
    "convert-dtype-unsupported": RefusedError,
    "convert-architecture-unsupported": RefusedError,
    "convert-checkpoint-unusable": CheckpointError,
    "convert-gguf": CheckpointError,
    "convert-calibration-data": CalibrationError,
}
# Used unless the diagnosis is about conversions: its other hints, such as RKLLM_LOG_LEVEL, are for programs on a board.
_READ_THE_LOG: Final = (
    "Read that log from its end, and look for its last words among the vendor's issues"
    " (https://github.com/airockchip/rknn-llm/issues). Another release of the toolkit may do better."
)
_NO_SPACE: Final = re.compile(r"No space left on device|Errno 28")
_FULL_DISK: Final = 64 << 20
# Share of memory above which a kill is blamed on lack of it: quantizing takes as much again as the weights, and other
# programs need some.
_MUCH: Final = 0.4


def explain(run: WorkerRun, job: ToolkitJob) -> RKEdgeError:
    """Return the error for a run that did not finish."""
    if run.hung:
        return _error(
            ToolkitError,
            run,
            f"showed no activity for {run.patience:,.0f} s while {_STAGES[run.stage]}, and was killed",
            hint="Check that the disk and the GPU work, then try again; --toolkit-patience sets another limit.",
        )
    if run.killed:
        return _killed(run, job)
    if full := _full_disk(run):
        return full
    if run.failure is None:
        how = f"signal {-run.exit_code}" if run.exit_code < 0 else f"exit code {run.exit_code}"
        return _error(ToolkitError, run, f"exited with {how} while {_STAGES[run.stage]}")
    if run.failure.kind == "import":
        return _error(
            HostError,
            run,
            f"cannot be imported: {run.failure.message}",
            hint="Recreate the environment from the vendor's wheel: `rkedge toolkit setup --wheel FILE`.",
        )
    if run.failure.kind == "argument":
        return _error(
            HostError,
            run,
            f"does not accept what its release should: {run.failure.message}",
            hint="The package does not match its version: `rkedge toolkit setup --wheel FILE` creates an"
            " environment from one wheel.",
        )
    return _error(ToolkitError, run, f"failed while {_STAGES[run.stage]}: {run.failure.message}")


def no_file(run: WorkerRun, what: str) -> RKEdgeError:
    """Return the error for a run that returned 0 but did not write `what`."""
    return _error(ToolkitError, run, f"returned 0 for every step but wrote no {what}")


def bad_file(run: WorkerRun, name: str, why: str) -> RKEdgeError:
    """Return the error for a file that is not a whole .rkllm file, or should not be there."""
    return _error(ToolkitError, run, f"returned 0 for every step, but its file {name} cannot be used: {why}")


def _full_disk(run: WorkerRun) -> RKEdgeError | None:
    """Return the error for a full disk, which names it: temporary files may be on another disk than the output."""
    places = {"output folder": run.scratch, "temporary folder": Path(tempfile.gettempdir())}
    free = {place: shutil.disk_usage(path).free for place, path in places.items()}
    told = _NO_SPACE.search("\n".join(run.output.tail()))
    if not told and free["output folder"] >= _FULL_DISK:
        return None
    place = min(free, key=lambda name: free[name])
    if free[place] < _FULL_DISK:
        where, hint = f"the disk of the {place} is full", f"Free space on the disk of the {place}"
    else:  # What filled the disk was deleted when the toolkit ended, or is somewhere unexpected.
        where, hint = "it found a disk full", "Free space on the disks of the output folder and the temporary folder"
    sizes = ", ".join(f"{size / 1e9:.2f} GB in the {name}" for name, size in free.items())
    return _error(
        HostError,
        run,
        f"stopped while {_STAGES[run.stage]}: {where}; free are {sizes}",
        hint=f"{hint}, or name another one (--output, TMPDIR).",
    )


def _killed(run: WorkerRun, job: ToolkitJob) -> RKEdgeError:
    """Return the error for signal 9, sent by the kernel when memory runs out, but also by people and batch systems."""
    counted = run.out_of_memory_kills
    memory = read_memory()
    held = f", with {run.peak_memory / 1e9:.1f} GB in memory" if run.peak_memory else ""
    needs, loading, size = "", (job.toolkit_device, job.toolkit_load_dtype), 0
    if job.parameters:
        loaded = run.toolkit.release.loaded_as(*loading)
        size = job.parameters * LOADED_BYTES[loaded]
        needs = f" The weights alone take {size / 1e9:.1f} GB in {loaded}."
    if counted:
        how = "was killed by the kernel (its out-of-memory killer was active)"
    elif max(size, run.peak_memory) > memory.total * _MUCH:
        how = "was killed, probably by the kernel (which does so when memory runs out)"
    else:
        how = "was killed by signal 9, and the kernel counted no kill for lack of memory"
    return _error(
        HostError,
        run,
        f"{how} while {_STAGES[run.stage]}{held}; this machine has {memory}.{needs}",
        hint="Add swap (more than 4 bytes for each weight of the model), close other programs, or raise the limit of"
        f" the container or of WSL{run.toolkit.release.half_hint(*loading)}."
        + ("" if counted else " Or somebody, or a batch system, ended it: try again."),
    )


def _error(kind: type[RKEdgeError], run: WorkerRun, what: str, hint: str | None = None) -> RKEdgeError:
    found = _diagnose(run)
    if kind is ToolkitError:
        kind = _KINDS.get(found.class_, kind)
    meaning = ""
    if hint is None and found.class_.startswith("convert-"):
        meaning, hint = f" {found.cause}", found.next_steps[0]
    return kind(
        f"rkllm-toolkit {run.toolkit.version} {what.removesuffix('.')}.{meaning} {run.output.whereabouts}",
        hint=hint or _READ_THE_LOG,
        details={
            "stage": run.stage,
            "hung": run.hung,
            "exit_code": run.exit_code,
            "peak_memory": run.peak_memory,
            "log": str(run.output.path or ""),
            "lines": run.output.tail(),
            "trace": run.failure.trace if run.failure else "",
            "diagnosis": found.as_dict(),
        },
    )


def _diagnose(run: WorkerRun) -> Diagnosis:
    text = run.output.text()
    if run.failure:
        text += f"\n{run.failure.trace}\n{run.failure.message}\n"
    if run.killed and run.out_of_memory_kills:
        text += "\nKilled\n"  # as a shell prints it, and as people report it
    return diagnose(text, context={"stage": "convert", "toolkit": run.toolkit.version})
