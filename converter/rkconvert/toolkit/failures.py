"""Choose the error for a failed conversion from the worker's last event, its exit code and the toolkit's log."""

from __future__ import annotations

import re
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rkconvert.output.host_memory import read_memory
from rkconvert.rules.releases import LOADED_BYTES
from rkconvert.toolkit.events import Failure
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
_NO_SPACE: Final = re.compile(r"No space left on device|Errno 28")
_FULL_DISK: Final = 64 << 20


@dataclass(frozen=True)
class Facts:
    """What is known about a failed run.

    Attributes:
        exit_code: Exit code; negative for a signal.
        hung_after: Seconds without a sign of life after which it was killed.
        out_of_memory_kills: Processes on this machine that the kernel killed for lack of memory meanwhile.
        peak_memory, free_disk: In bytes.
        tail: Last lines of the log; `text` is the log, `log` its file.
    """

    version: str
    stage: str
    failure: Failure | None
    exit_code: int
    hung_after: float | None
    out_of_memory_kills: int
    peak_memory: int
    free_disk: int
    tail: Sequence[str]
    text: str
    log: Path
    parameters: int
    load_dtype: str

    @property
    def killed(self) -> bool:
        """Whether signal 9 that is not ours killed it; a shell script around the interpreter reports 137."""
        return self.hung_after is None and self.exit_code in (-signal.SIGKILL, 128 + signal.SIGKILL)


def explain(facts: Facts) -> RKEdgeError:
    """The error for a run that did not finish."""
    if facts.hung_after is not None:
        return _error(
            ToolkitError,
            facts,
            f"showed no activity for {facts.hung_after:,.0f} s while {_STAGES[facts.stage]}, and was killed",
            hint="Check that the disk and the GPU work, then try again; --toolkit-patience sets another limit.",
        )
    if facts.killed:
        return _out_of_memory(facts)
    if facts.free_disk < _FULL_DISK or _NO_SPACE.search("\n".join(facts.tail)):
        return _error(
            HostError,
            facts,
            f"stopped while {_STAGES[facts.stage]}: the disk is full, with {facts.free_disk / 1e9:.2f} GB free",
            hint="Free space on the disk of the output folder, or name one on another disk.",
        )
    if facts.failure is None:
        how = f"signal {-facts.exit_code}" if facts.exit_code < 0 else f"exit code {facts.exit_code}"
        return _error(ToolkitError, facts, f"exited with {how} while {_STAGES[facts.stage]}")
    if facts.failure.kind == "import":
        return _error(
            HostError,
            facts,
            f"cannot be imported: {facts.failure.message}",
            hint="Recreate the environment from the vendor's wheel: `rkedge toolkit setup --wheel FILE`.",
        )
    if facts.failure.kind == "argument":
        return _error(
            HostError,
            facts,
            f"does not accept what its release should: {facts.failure.message}",
            hint="The package does not match its version: `rkedge toolkit setup --wheel FILE` creates an"
            " environment from one wheel.",
        )
    return _error(ToolkitError, facts, f"failed while {_STAGES[facts.stage]}: {facts.failure.message}")


def no_file(facts: Facts) -> RKEdgeError:
    """The error for a run that returned 0 but wrote nothing."""
    return _error(ToolkitError, facts, "returned 0 for every step but wrote no .rkllm file")


def bad_file(facts: Facts, why: str) -> RKEdgeError:
    """The error for a file that is not a whole .rkllm file."""
    return _error(ToolkitError, facts, f"returned 0 for every step, but its file is incomplete: {why}")


def cannot_start(python: Path, error: OSError) -> HostError:
    """The error for an interpreter that cannot be started."""
    return HostError(f"{python} cannot be started: {error.strerror or error}.", hint="Run `rkedge toolkit info`.")


def _out_of_memory(facts: Facts) -> RKEdgeError:
    seen = "its out-of-memory killer was active" if facts.out_of_memory_kills else "which it does when memory runs out"
    held = f", with {facts.peak_memory / 1e9:.1f} GB in memory" if facts.peak_memory else ""
    needs = ""
    if facts.parameters:
        size = facts.parameters * LOADED_BYTES.get(facts.load_dtype, 4)
        needs = f" The weights alone take {size / 1e9:.1f} GB in {facts.load_dtype}."
    return _error(
        HostError,
        facts,
        f"was killed by the kernel ({seen}) while {_STAGES[facts.stage]}{held};"
        f" this machine has {read_memory()}.{needs}",
        hint="Add swap (more than 4 bytes for each weight of the model), close other programs, raise the limit of"
        " the container or of WSL, or load the weights in 16 bits: --toolkit-load-dtype bfloat16.",
    )


def _error(kind: type[RKEdgeError], facts: Facts, what: str, hint: str | None = None) -> RKEdgeError:
    found = _diagnose(facts)
    if kind is ToolkitError:
        kind = _KINDS.get(found.class_, kind)
    meaning = f" {found.cause}" if found.explained and hint is None else ""
    if hint is None:
        hint = found.next_steps[0] if found.next_steps else None
    return kind(
        f"rkllm-toolkit {facts.version} {what.removesuffix('.')}.{meaning} Whole log: {facts.log}",
        hint=hint,
        details={
            "stage": facts.stage,
            "exit_code": facts.exit_code,
            "peak_memory": facts.peak_memory,
            "log": str(facts.log),
            "lines": list(facts.tail),
            "trace": facts.failure.trace if facts.failure else "",
            "diagnosis": found.as_dict(),
        },
    )


def _diagnose(facts: Facts) -> Diagnosis:
    text = facts.text
    if facts.failure:
        text += f"\n{facts.failure.trace}\n{facts.failure.message}\n"
    if facts.killed:
        text += "\nKilled\n"  # as a shell prints it, and as people report it
    return diagnose(text, context={"stage": "convert", "toolkit": facts.version})


def out_of_memory_kills() -> int:
    """Processes that the kernel has killed for lack of memory since boot; 0 if it does not report this."""
    try:
        found = re.search(r"^oom_kill (\d+)$", Path("/proc/vmstat").read_text(), re.MULTILINE)
        return int(found[1]) if found else 0
    except OSError:
        return 0
