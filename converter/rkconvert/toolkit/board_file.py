"""Make model.rkllm from a model's weights with the vendor's toolkit: check, stage, run, and write its report."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rkconvert.adapters.merged_model import MergedModel
from rkconvert.adapters.reader import Adapter
from rkconvert.calibrate.dataset import TokenCounter, validate_dataset
from rkconvert.model.chat_template import ChatTemplate
from rkconvert.model.shapes import parse_shape
from rkconvert.model.sizes import file_bytes
from rkconvert.output.bundle_folder import LORA_NOTE, REPORT, ModelFile, read_report, write_report
from rkconvert.output.hf_folder import resumable
from rkconvert.output.host_memory import read_memory
from rkconvert.progress import Reporter
from rkconvert.rules.type_names import parse_type
from rkconvert.toolkit import Toolkit, ToolkitJob, ToolkitResult, checks, run_toolkit
from rkconvert.toolkit.events import Event, Progress, Stage
from rkconvert.toolkit.job import calls
from rkconvert.toolkit.options import ToolkitOptions
from rkconvert.toolkit.staging import is_linked, stage, stage_adapter
from rkruntime.bundle.manifest import LORA, TOKENIZER
from rkruntime.errors import AdapterError, CalibrationError
from rkruntime.files import readable, sha256_file

RKLLM_FILE: Final = "model.rkllm"
LORA_FILE: Final = f"{LORA}.rkllm"
_STAGED: Final = ".staged"
_STAGED_LORA: Final = "lora"
_DONE: Final = "toolkit"
# Complete once the report is written: the model file, an adapter file beside it, and the log.
_MADE: Final = (RKLLM_FILE, LORA_FILE, f"{REPORT}/{_DONE}.log")
_TITLES: Final = {
    "import": "starting the toolkit",
    "load": "loading the model",
    "build": "quantizing",
    "export": "writing model.rkllm",
}


@dataclass(frozen=True)
class BoardModel:
    """The target that makes a board's model file (a `rkconvert.conversion.target.Target`).

    Attributes:
        model: Weights; without adapters if one is converted to a separate file.
        lora: The separate adapter.
        tokens: Token ids of the tokenizer by text.
    """

    model: MergedModel
    lora: Adapter | None
    template: ChatTemplate
    tokens: Mapping[str, int]
    platform: str
    dtype: str
    max_context: int
    npu_cores: int
    toolkit: Toolkit
    options: ToolkitOptions

    @property
    def file_bytes(self) -> int:
        """Predicted size of the file, in bytes."""
        return int(file_bytes(parse_shape(self.model.hf_config()), parse_type(self.dtype)))

    @property
    def needed_bytes(self) -> int:
        """Disk space that the work needs, in bytes: the file, and the merged weights that the toolkit reads."""
        return self.file_bytes + (0 if is_linked(self.model) else self.model.nbytes)

    def job(self, model: Path, output: Path) -> ToolkitJob:
        """The conversion as a job for the toolkit."""
        return ToolkitJob(
            **self.options.asked_of_the_toolkit,
            model=model,
            output=output,
            platform=self.platform,
            dtype=self.dtype,
            npu_cores=self.npu_cores,
            max_context=self.max_context,
            lora=model / _STAGED_LORA if self.lora else None,
            parameters=self.model.weights.config.parameters,
        )

    def check(self) -> tuple[str, ...]:
        """Run every check that needs no work; returns notes for the user.

        Raises:
            RefusedError, UsageError: The installed release does not support this, or the model does not fit the type.
            CheckpointError, AdapterError, CalibrationError, HostError: See `checks` and `validate_dataset`.
        """
        options, anywhere = self.options, Path()
        if self.lora:
            _check_lora(self.lora)
        steps = calls(self.job(anywhere, anywhere), self.toolkit.release, anywhere)
        if options.qparams and not options.qparams.is_file():
            raise CalibrationError(
                f"{options.qparams} does not exist or is not a file.", hint="Name the *.qparams file of an earlier run."
            )
        if options.calibration:
            count = TokenCounter(self.model.tokenizer_folder / TOKENIZER)
            validate_dataset(options.calibration, self.template, count, self.max_context)
        case = checks.Conversion(
            folder=self.model.checkpoint.path,
            shape=parse_shape(self.model.hf_config()),
            dtype=self.dtype,
            load_dtype=options.toolkit_load_dtype,
            memory=read_memory(),
            tokens=self.tokens,
            bos_token_id=self.model.weights.config.bos_token_id,
            calibrated=options.calibration is not None,
        )
        return (*checks.require(case), *steps.notes)

    @property
    def resumable(self) -> Sequence[str]:
        """Files from which `write` resumes after a killed run; it verifies each by checksum."""
        staged = [] if is_linked(self.model) else [f"{_STAGED}/{name}" for name in resumable(self.model.weights)]
        return [*staged, *_MADE, f"{REPORT}/{_DONE}.json"]

    def write(self, folder: Path, reporter: Reporter) -> ModelFile:
        """Make model.rkllm, its report and its log in `folder`; whatever a killed run finished there is kept.

        Raises:
            ToolkitError, HostError, CheckpointError, CalibrationError, RefusedError: See `run_toolkit`.
        """
        report = _finished(folder)
        if not report:
            staged = folder / _STAGED
            staged.mkdir(exist_ok=True)
            with reporter.bar("writing the merged model", self.model.nbytes) as advance:
                stage(self.model, self.template, self.toolkit.release, staged, advance)
            if self.lora:
                stage_adapter(self.lora, staged / _STAGED_LORA)
            with reporter.steps() as show:
                job = self.job(staged, folder / RKLLM_FILE)
                result = run_toolkit(job, self.toolkit, _teller(reporter, show))
            shutil.rmtree(staged)
            report = _report(result, self, folder)
            write_report(folder, _DONE, report)
        for text in report["warnings"]:
            reporter.note(f"toolkit: {text}")
        return ModelFile(RKLLM_FILE, tuple(report["notes"]))


def _check_lora(lora: Adapter) -> None:
    """Refuse an adapter with pickles, which the toolkit would read itself, or one that RKLLM LoRA files cannot hold."""
    pickles = [file.name for file in lora.weight_files if file.suffix != ".safetensors"]
    if pickles:
        raise AdapterError(
            f"The adapter's weights are in {pickles[0]}; with --lora-mode runtime the toolkit would unpickle them.",
            hint="Save the adapter as safetensors, or merge it: --lora-mode merge.",
        )


def _finished(folder: Path) -> dict[str, Any]:
    """The report of an earlier run that got this far; empty if there is none.

    `folder` contains work of this exact conversion (see `resume_key`), but its disk may have lost a part, and files may
    have come from elsewhere.
    """
    report = read_report(folder, _DONE)
    if report and _sums(folder) == report.get("sha256"):
        return report
    for name in _MADE:
        (folder / name).unlink(missing_ok=True)
    return {}


def _sums(folder: Path) -> dict[str, str]:
    """SHA-256 of each file from the toolkit that is present."""
    return {name: sha256_file(folder / name) for name in _MADE if (folder / name).is_file()}


def _teller(reporter: Reporter, show: Callable[[str, int, int], None]) -> Callable[[Event], None]:
    def tell(event: Event) -> None:
        if isinstance(event, Stage):
            reporter.note(f"toolkit: {_TITLES[event.stage]}")
        elif isinstance(event, Progress):
            show(event.title, event.done, event.total)

    return tell


def _report(result: ToolkitResult, board: BoardModel, folder: Path) -> dict[str, Any]:
    """Write the report, without this machine's paths, and the log beside it."""
    (folder / REPORT).mkdir(exist_ok=True)
    log = result.log.read_bytes()
    for path in (str(folder.resolve()), str(folder), str(Path.home())):
        log = log.replace(os.fsencode(path), b"...")
    (folder / REPORT / f"{_DONE}.log").write_bytes(log)
    result.log.unlink()
    calibration = board.options.calibration
    return {
        "toolkit": result.toolkit.as_dict(),
        "calls": [_public(call) for call in result.calls],
        "calibration": {"sha256": sha256_file(calibration)} if calibration else None,
        "file": result.file.as_dict(),
        "sha256": _sums(folder),
        "lora": result.lora.name if result.lora else None,
        "seconds": dict(result.seconds),
        "peak_memory_bytes": result.peak_memory,
        "notes": [*result.notes, *_lora_notes(result, board)],
        "warnings": list(result.warnings),
    }


def _lora_notes(result: ToolkitResult, board: BoardModel) -> list[str]:
    if board.lora is None or result.lora is None:
        return []
    return [LORA_NOTE.format(name=board.lora.name, file=result.lora.name)]


def _public(call: Mapping[str, Any]) -> dict[str, Any]:
    """A call with names instead of paths, so that reports do not reveal directories."""
    arguments = {
        name: readable(Path(value).name) if isinstance(value, str) and value.startswith("/") else value
        for name, value in call["arguments"].items()
    }
    return {**call, "arguments": arguments}
