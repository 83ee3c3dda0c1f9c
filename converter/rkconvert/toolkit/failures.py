"""A conversion that failed, as the error that fits: from the worker's last event, its exit and the toolkit's log."""

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
    """What is known of a run that failed.

    Attributes:
        exit_code: negative for a signal.
        hung_after: seconds without a sign of life after which it was ended.
        out_of_memory_kills: processes that the kernel ended for want of memory meanwhile, on this machine.
        peak_memory, free_disk: in bytes.
        tail: the log's last lines; `text` is the log, `log` its file.
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
        """Ended by signal 9, which is not ours; 137 is how a shell script around the interpreter says it."""
        return self.hung_after is None and self.exit_code in (-signal.SIGKILL, 128 + signal.SIGKILL)


def explain(facts: Facts) -> RKEdgeError:
    """The error for a run that did not reach its end."""
    if facts.hung_after is not None:
        return _error(
            ToolkitError,
            facts,
            f"showed no activity for {facts.hung_after:,.0f} s while {_STAGES[facts.stage]}, and was killed",
            hint="Look whether the disk or the GPU works, then try again; --toolkit-patience sets another limit.",
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
        return _error(ToolkitError, facts, f"broke off with {how} while {_STAGES[facts.stage]}")
    if facts.failure.kind == "import":
        return _error(
            HostError,
            facts,
            f"cannot be imported: {facts.failure.message}",
            hint="Make the environment anew with the vendor's wheel: `rkedge toolkit setup --wheel FILE`.",
        )
    if facts.failure.kind == "argument":
        return _error(
            HostError,
            facts,
            f"does not take what its release should: {facts.failure.message}",
            hint="The package and its version do not belong together: `rkedge toolkit setup --wheel FILE` makes an"
            " environment from one wheel.",
        )
    return _error(ToolkitError, facts, f"failed while {_STAGES[facts.stage]}: {facts.failure.message}")


def no_file(facts: Facts) -> RKEdgeError:
    """The error for a run that returned 0 and wrote nothing."""
    return _error(ToolkitError, facts, "returned 0 for every step and wrote no .rkllm file")


def bad_file(facts: Facts, why: str) -> RKEdgeError:
    """The error for a file that is none."""
    return _error(ToolkitError, facts, f"returned 0 for every step, and its file is not whole: {why}")


def cannot_start(python: Path, error: OSError) -> HostError:
    """The error for an interpreter that does not start."""
    return HostError(f"{python} cannot be started: {error.strerror or error}.", hint="Run `rkedge toolkit info`.")


def _out_of_memory(facts: Facts) -> RKEdgeError:
    seen = "its out-of-memory killer struck" if facts.out_of_memory_kills else "which it does when memory runs out"
    held = f", with {facts.peak_memory / 1e9:.1f} GB in memory" if facts.peak_memory else ""
    needs = ""
    if facts.parameters:
        size = facts.parameters * LOADED_BYTES.get(facts.load_dtype, 4)
        needs = f" The weights alone are {size / 1e9:.1f} GB in {facts.load_dtype}."
    return _error(
        HostError,
        facts,
        f"was ended by the kernel ({seen}) while {_STAGES[facts.stage]}{held};"
        f" this machine has {read_memory()}.{needs}",
        hint="Add swap (4 bytes for each weight of the model, and some more), close other programs, raise the limit of"
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
        text += "\nKilled\n"  # as a shell says it, and as people report it
    return diagnose(text, context={"stage": "convert", "toolkit": facts.version})


def out_of_memory_kills() -> int:
    """How many processes the kernel has ended for want of memory since it started; 0 where it does not tell."""
    try:
        found = re.search(r"^oom_kill (\d+)$", Path("/proc/vmstat").read_text(), re.MULTILINE)
        return int(found[1]) if found else 0
    except OSError:
        return 0
