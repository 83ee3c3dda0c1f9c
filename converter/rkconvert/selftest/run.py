"""Carry the cases out, each as `rkedge convert` would: checked, staged, converted and read back."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from rkconvert.adapters.merged_model import AdapterSource
from rkconvert.conversion.convert import Options, convert
from rkconvert.output.bundle_folder import REPORT, read_report
from rkconvert.output.work_folder import scratch_folder
from rkconvert.selftest import tiny
from rkconvert.selftest.cases import NO_VOCABULARY_FILE, TRAINED_HEAD, Case
from rkconvert.toolkit.options import ToolkitOptions
from rkconvert.toolkit.report import NAME
from rkruntime.bundle.manifest import Bundle
from rkruntime.bundle.rkllm_file import read_rkllm
from rkruntime.errors import HostError, RKEdgeError
from rkruntime.files import write_error

PASSED: Final = "passed"
FAILED: Final = "failed"
TOLD: Final = "told"
NOT_RUN: Final = "not run"
_MOST_LOG: Final = 16_000
_MOST_CONTENT: Final = 64 << 20


@dataclass(frozen=True)
class CaseResult:
    """The outcome of a case.

    Attributes:
        status: `passed`, `failed`, `told` (the case is a question, and either outcome answers it) or `not run`.
        error: Why it failed, as `RKEdgeError.as_dict` gives it.
        made: The toolkit's part of the bundle's report, and the adapter's file as `lora_file`.
        log: End of the toolkit's log.
        content: The model file, for comparisons; empty if it is far too large for this model.
    """

    case: Case
    status: str
    seconds: float = 0.0
    error: Mapping[str, Any] = field(default_factory=dict)
    exit_code: int = 0
    made: Mapping[str, Any] = field(default_factory=dict)
    log: str = ""
    content: bytes = b""

    @property
    def worked(self) -> bool:
        """Whether a model file was made."""
        return bool(self.made)

    @property
    def verified(self) -> Mapping[str, Any]:
        """How the toolkit's logits compare with the float model's; empty if they were not asked for."""
        return self.made.get("verify") or {}

    @property
    def problem(self) -> str:
        """Why there are no logits, though they were asked for."""
        return str(self.verified.get("problem", ""))

    @property
    def stage(self) -> str:
        """Step of the toolkit that failed; empty if none did, or it had not started."""
        return str(self.error.get("details", {}).get("stage", ""))

    def as_dict(self) -> dict[str, Any]:
        """Return the outcome as JSON types, without the file."""
        names = ("status", "seconds", "error", "made", "log")
        return {"case": self.case.name, **{name: getattr(self, name) for name in names}}


@dataclass(frozen=True)
class Models:
    """The folders and files that the cases convert."""

    folder: Path

    @classmethod
    def write(cls, folder: Path) -> Models:
        """Write them into `folder`. Raises HostError or OutputError if they cannot be written."""
        models = cls(folder)
        try:
            tiny.write_model(models.checkpoint(""))
            tiny.write_model(models.checkpoint(TRAINED_HEAD), own_head=True)
            tiny.write_model(models.checkpoint(NO_VOCABULARY_FILE), vocabulary_file=False)
            tiny.write_adapter(models.adapter, models.checkpoint(""))
            tiny.write_calibration(models.calibration, models.checkpoint(""))
        except OSError as error:
            raise write_error(folder, error) from error
        return models

    def checkpoint(self, asks: str) -> Path:
        """Return the folder of the model for a question, or for none."""
        return self.folder / f"model-{asks.replace(' ', '-')}"

    @property
    def adapter(self) -> Path:
        """Folder of a LoRA."""
        return self.folder / "adapter"

    @property
    def calibration(self) -> Path:
        """File with calibration data."""
        return self.folder / "calibration.json"


@contextmanager
def models() -> Iterator[Models]:
    """Write the models into a scratch folder, deleted after the block."""
    try:
        with scratch_folder("rkedge-selftest-") as folder:
            yield Models.write(folder)
    except OSError as error:
        raise write_error(Path("a temporary folder"), error) from error


def run(todo: Sequence[Case], made: Models, platform: str, options: ToolkitOptions) -> Iterator[CaseResult]:
    """Yield the outcome of each case. A failure that every other case would share ends the tests."""
    stopped, options = False, replace(options, verify=True)
    for case in todo:
        if stopped:
            yield CaseResult(case, NOT_RUN)
            continue
        outcome, stopped = _carry_out(case, made, platform, options)
        # If computing logits hangs once, it would do so each time.
        options = replace(options, verify=options.verify and not outcome.problem)
        yield outcome


def _carry_out(case: Case, made: Models, platform: str, options: ToolkitOptions) -> tuple[CaseResult, bool]:
    """Return the outcome, and whether the other cases need not be tried."""
    started, output = time.monotonic(), made.folder / "bundle"
    outcome, stop = CaseResult(case, TOLD if case.asks else PASSED), False
    try:
        outcome = _read(outcome, convert(_options(case, made, output, platform, options)))
    except (RKEdgeError, OSError) as raised:
        error = raised if isinstance(raised, RKEdgeError) else write_error(output, raised)
        outcome = replace(
            outcome, status=TOLD if case.asks else FAILED, error=error.as_dict(), exit_code=error.exit_code
        )
        # Faults of the installation or of this machine, not of the case; a toolkit that hangs does so each time.
        stop = isinstance(error, HostError) or bool(error.details.get("hung"))
    finally:
        shutil.rmtree(output, ignore_errors=True)
    return replace(outcome, seconds=round(time.monotonic() - started, 1)), stop


def _options(case: Case, made: Models, output: Path, platform: str, options: ToolkitOptions) -> Options:
    given = options.by_name | {"calibration": made.calibration if case.calibrated else None}
    return Options(
        **given,
        checkpoint=str(made.checkpoint(case.asks)),
        output=output,
        target="toolkit",
        platform=platform,
        dtype=case.dtype,
        force_dtype=True,  # nothing is known about models this small
        max_context=tiny.CONTEXT,
        loras=(AdapterSource(str(made.adapter)),) if case.adapter else (),
        lora_mode="runtime" if case.adapter else "merge",
    )


def _read(outcome: CaseResult, bundle: Bundle) -> CaseResult:
    """Read the bundle back, and verify every checksum."""
    bundle.verify(trust_stamps=False)
    made = read_report(bundle.path, NAME)
    lora = read_rkllm(bundle.path / made["lora"]).as_dict() if made["lora"] else None
    log = (bundle.path / REPORT / f"{NAME}.log").read_text("utf-8", "replace")[-_MOST_LOG:]
    content = bundle.model.read_bytes() if made["file"]["size"] <= _MOST_CONTENT else b""
    return replace(outcome, made={**made, "lora_file": lora}, log=log, content=content)
