"""The toolkit's part of a bundle's report: how the file was made, and the log, without this machine's paths."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from rkconvert.output.bundle_folder import REPORT, json_bytes, read_report, write_report
from rkconvert.output.paths import bytes_without_paths, without_paths
from rkconvert.toolkit.result import ToolkitResult
from rkconvert.toolkit.session import WorkerRun
from rkconvert.toolkit.settings import Setting
from rkconvert.toolkit.verify import Verified
from rkruntime.bundle.manifest import LORA
from rkruntime.files import readable, sha256_file

RKLLM_FILE: Final = "model.rkllm"
NAME: Final = "toolkit"
_LOG: Final = f"{REPORT}/{NAME}.log"
_QPARAMS: Final = f"{REPORT}/{NAME}.qparams"
MADE: Final = (RKLLM_FILE, f"{LORA}.rkllm", _LOG, _QPARAMS)
"""The model, an adapter's file, the log and quantization parameters: complete once the report is written."""


def finished(folder: Path) -> dict[str, Any]:
    """Return the report of an earlier run that got this far; empty if there is none.

    `folder` contains work of this exact conversion (see `resume_key`), but its disk may have lost a part, and files may
    have come from elsewhere.
    """
    report = read_report(folder, NAME)
    if report and _sums(folder) == report.get("sha256"):
        return report
    for name in MADE:
        (folder / name).unlink(missing_ok=True)
    return {}


def write(
    result: ToolkitResult,
    notes: Sequence[str],
    calibration: Path | None,
    folder: Path,
    put: Callable[[bytes], None],
    found: Sequence[Setting] = (),
) -> dict[str, Any]:
    """Move the log into `folder`, write the report beside it, and return the report.

    Args:
        notes: Added to the result's.
        put: Writes the report, also on a full disk: the hours of work are lost without it.
        found: Settings of the file; each that differs is a reason to doubt it.
    """
    run = result.run
    (folder / REPORT).mkdir(exist_ok=True)
    private = _private(run, folder)
    lost = run.output.lost
    try:
        (folder / _LOG).write_bytes(bytes_without_paths(run.output.take(), private))
    except OSError as error:  # the model is worth more, and its report needs less room
        (folder / _LOG).unlink(missing_ok=True)
        lost = error.strerror or str(error)
    if result.qparams:
        result.qparams.replace(folder / _QPARAMS)
    doubts = [*result.doubts, *(str(setting) for setting in found if setting.differs)]
    warnings = [*run.warnings, *([f"its log is not whole: {lost}"] if lost else [])]
    said: dict[str, Any] = {
        "settings": [setting.as_dict() for setting in found],
        "verify": None,
        "notes": [*run.calls.notes, *doubts, *notes],
        "doubts": doubts,
        "warnings": warnings,
    }
    report = {
        "toolkit": run.toolkit.as_dict(),
        "calls": [_public(call) for call in run.calls.steps],
        "calibration": {"sha256": sha256_file(calibration)} if calibration else None,
        "file": result.file.as_dict(),
        "sha256": _sums(folder),
        "lora": result.lora.name if result.lora else None,
        "seconds": run.seconds,
        "peak_memory_bytes": run.peak_memory,
        **without_paths(said, private),
    }
    put(json_bytes(report))
    return report


def add_verified(report: Mapping[str, Any], verified: Verified, folder: Path) -> dict[str, Any]:
    """Add the comparison of the toolkit's logits to the report in `folder`, and return the report."""
    doubts = [verified.doubt] if verified.doubt else []
    more = {"notes": [*report["notes"], *doubts], "doubts": [*report["doubts"], *doubts]}
    complete = {**report, **more, "verify": verified.as_dict()}
    write_report(folder, NAME, complete)
    return complete


def _private(run: WorkerRun, folder: Path) -> list[Path]:
    """Return the folders of this conversion that the toolkit may name."""
    return [run.scratch, folder, run.toolkit.python.parent.parent]


def _sums(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file from the toolkit that is present."""
    return {name: sha256_file(folder / name) for name in MADE if (folder / name).is_file()}


def _public(call: Mapping[str, Any]) -> dict[str, Any]:
    """Return a call with names instead of paths, so that reports do not reveal directories."""
    arguments = {
        name: readable(Path(value).name) if isinstance(value, str) and value.startswith("/") else value
        for name, value in call["arguments"].items()
    }
    return {**call, "arguments": arguments}
