"""The toolkit's target: model.rkllm for a board, with an adapter's file beside it.

A conversion goes down this module: it is checked, its model is staged, the toolkit runs, and what it wrote is read back
and reported. Each stage is a module that knows none of the others above it.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from rkconvert.adapters.separate import separate_lora
from rkconvert.calibrate.dataset import MOST_BYTES, TokenCounter, validate_dataset
from rkconvert.model.shapes import parse_shape
from rkconvert.model.sizes import file_bytes
from rkconvert.output.bundle_folder import LORA_NOTE, ModelFile, report_path
from rkconvert.output.disk import room_for, spare
from rkconvert.output.hf_folder import STATE, resumable
from rkconvert.output.host_memory import read_memory
from rkconvert.output.work_folder import scratch_folder
from rkconvert.progress import Reporter
from rkconvert.rules.type_names import parse_type
from rkconvert.target import ModelSpec
from rkconvert.toolkit import checks, report
from rkconvert.toolkit.events import Event, Progress, Stage
from rkconvert.toolkit.interpreter import Toolkit, find_toolkit
from rkconvert.toolkit.job import ToolkitJob, calls
from rkconvert.toolkit.options import ToolkitOptions
from rkconvert.toolkit.output import Output, new_log
from rkconvert.toolkit.result import ToolkitResult, keep_qparams, read_back
from rkconvert.toolkit.session import OnEvent, WorkerRun
from rkconvert.toolkit.settings import settings
from rkconvert.toolkit.staging import is_linked, stage, stage_adapter
from rkconvert.toolkit.tokenizer_files import pieces_problem
from rkconvert.toolkit.verify import Verified, choose_prompts, needed_reads, verify
from rkruntime.abi import CALLABLE
from rkruntime.bundle.manifest import TOKENIZER
from rkruntime.errors import CalibrationError, RKEdgeError, UsageError
from rkruntime.files import read_error, read_regular, write_error
from rkruntime.versions import version

_STAGED: Final = ".staged"
# A report has some tens of kilobytes.
_REPORT_BYTES: Final = 1 << 20
_STAGED_LORA: Final = "lora"
_TITLES: Final = {
    "import": "starting the toolkit",
    "load": "loading the model",
    "build": "quantizing",
    "export": "writing model.rkllm",
    "verify": "computing its own logits",
}


@dataclass(frozen=True)
class ToolkitTarget:
    """Makes a board's model file with the vendor's toolkit (a `rkconvert.target.Target`)."""

    toolkit: Toolkit
    options: ToolkitOptions

    @classmethod
    def of(cls, options: ToolkitOptions, release: str | None) -> ToolkitTarget:
        """Return the target for the toolkit that these options name.

        Raises:
            HostError: There is no toolkit, or it cannot be used.
            UsageError: The toolkit is of another release than `release`.
        """
        toolkit = find_toolkit(options.toolkit_python)
        if release and not _same_release(release, toolkit.version):
            raise UsageError(
                f"--release {release}, but the toolkit is {toolkit.version} ({toolkit.python}).",
                hint="Leave --release out, or name the interpreter of that release with --toolkit-python.",
            )
        return cls(toolkit, options)

    @property
    def release(self) -> str:
        """The toolkit's version."""
        return self.toolkit.version

    @property
    def maker(self) -> Mapping[str, Any]:
        """The toolkit, its Python and its packages."""
        return self.toolkit.as_dict()

    def needed_bytes(self, spec: ModelSpec) -> int:
        """Return the disk space needed, in bytes: the file, and the weights that the toolkit reads, if not linked."""
        lora = separate_lora(spec.lora).nbytes if spec.lora else 0
        return _file_size(spec) + lora + (0 if is_linked(spec.model) else spec.model.nbytes)

    def resumable(self, spec: ModelSpec) -> Sequence[str]:
        """Return files from which `write` resumes after a killed run; it verifies each by checksum."""
        linked = is_linked(spec.model)
        staged = [] if linked else [f"{_STAGED}/{name}" for name in resumable(spec.model.weights)]
        return [*staged, *report.MADE, *self.done]

    @property
    def done(self) -> Sequence[str]:
        """The report, which is written when the toolkit has ended, and the list of shards that are merged for it."""
        return str(report_path(Path(), report.NAME)), f"{_STAGED}/{STATE}"

    def check(self, spec: ModelSpec) -> tuple[str, ...]:
        """Run every check that needs no work; returns notes for the user.

        Raises:
            RefusedError, UsageError: The installed release does not support this, or the model does not fit the type.
            CheckpointError, AdapterError, CalibrationError, HostError: See `checks` and `validate_dataset`.
        """
        options, installed, anywhere = self.options, self.toolkit.release, Path()
        loading = (options.toolkit_device, options.toolkit_load_dtype)
        steps = calls(self._job(spec, anywhere, anywhere), installed, anywhere)
        if options.qparams and not options.qparams.is_file():
            raise CalibrationError(
                f"{options.qparams} does not exist or is not a file.", hint="Name the *.qparams file of an earlier run."
            )
        if options.calibration:
            count = TokenCounter(spec.model.tokenizer_folder / TOKENIZER)
            validate_dataset(options.calibration, spec.template, count, spec.max_context)
        case = checks.Conversion(
            folder=spec.model.checkpoint.path,
            shape=parse_shape(spec.model.hf_config()),
            dtype=spec.dtype,
            load_dtype=installed.loaded_as(*loading),
            half_hint=installed.half_hint(*loading),
            memory=read_memory(),
            tokens=spec.tokenizer.added,
            pieces_problem=pieces_problem(spec.model.tokenizer_folder),
            bos_token_id=spec.config.bos_token_id,
            bos_token=spec.template.special_tokens["bos_token"],
            calibrated=options.calibration is not None,
        )
        return (*checks.require(case), *steps.notes)

    def write(self, spec: ModelSpec, folder: Path, reporter: Reporter) -> ModelFile:
        """Make model.rkllm, its report and its log in `folder`; whatever a killed run finished there is kept.

        Raises:
            ToolkitError, HostError, CheckpointError, CalibrationError, RefusedError: See `run_toolkit`.
        """
        done = report.finished(folder)
        if not done:
            job = self._stage(spec, folder, reporter)
            with room_for(report_path(folder, report.NAME), _REPORT_BYTES) as put:
                result = self._run(job, folder, reporter)
                found = settings(result.run.output.settings, spec, self.toolkit.release)
                done = report.write(result, _lora_notes(spec, result), self.options.calibration, folder, put, found)
            # The hours of work above are safe by now, should someone stop this.
            if self.options.verify:
                done = report.add_verified(done, self._verify(result, spec, job, reporter), folder)
        if self.options.verify and not done["verify"]:
            reporter.note("verify: there is nothing to compare, an earlier run was stopped before it did")
        for text in (*done["warnings"], *done["doubts"]):
            reporter.note(f"toolkit: {text}")
        return ModelFile(report.RKLLM_FILE, tuple(done["notes"]))

    def _run(self, job: ToolkitJob, folder: Path, reporter: Reporter) -> ToolkitResult:
        with spare(folder), reporter.steps() as show:
            result = run_toolkit(job, self.toolkit, _show_events(reporter, show))
        shutil.rmtree(job.model)
        return result

    def _verify(self, result: ToolkitResult, spec: ModelSpec, job: ToolkitJob, reporter: Reporter) -> Verified:
        """Compare the toolkit's logits with the float model's, and report how well they agree."""
        with reporter.bar("computing the float model's logits", needed_reads(spec)) as advance:
            verified = verify(result, spec, job.prompts, advance)
        for line in verified.lines():
            reporter.note(line)
        return verified

    def _stage(self, spec: ModelSpec, folder: Path, reporter: Reporter) -> ToolkitJob:
        """Write what the toolkit reads; returns its job."""
        staged = folder / _STAGED
        staged.mkdir(exist_ok=True)
        title = "checking the weights" if is_linked(spec.model) else "writing the merged model"
        with reporter.bar(title, spec.model.nbytes) as advance:
            stage(spec.model, spec.template, self.toolkit.release, staged, advance)
        if spec.lora:
            stage_adapter(separate_lora(spec.lora), staged / _STAGED_LORA)
        return self._job(spec, staged, folder / report.RKLLM_FILE)

    def _job(self, spec: ModelSpec, staged: Path, output: Path) -> ToolkitJob:
        return ToolkitJob(
            **self.options.by_name,
            model=staged,
            output=output,
            platform=spec.platform,
            dtype=spec.dtype,
            npu_cores=spec.npu_cores,
            max_context=spec.max_context,
            lora=staged / _STAGED_LORA if spec.lora else None,
            parameters=spec.config.parameters,
            file_size=_file_size(spec),
            prompts=choose_prompts(spec, self.options),
        )


def run_toolkit(job: ToolkitJob, toolkit: Toolkit, on_event: OnEvent = lambda _: None) -> ToolkitResult:
    """Convert a staged model. `job.output` is complete when this returns, and does not exist when it raises.

    Args:
        on_event: Called with every event, and a heartbeat each second; an exception in it kills the toolkit
            and is raised here.

    Raises:
        RefusedError, UsageError: The installed release does not support this; nothing was started.
        ToolkitError, HostError, CheckpointError, CalibrationError: It failed; `details` holds the diagnosis and lines.
    """
    with _scratch(job.output) as scratch, _plainly_named(job) as renamed:
        steps = calls(renamed, toolkit.release, scratch / "model.rkllm")
        with Output(new_log()) as output:
            run = WorkerRun(toolkit, steps, scratch, output, on_event, job.toolkit_patience)
            run.execute()
            try:
                return read_back(run, job)
            except RKEdgeError:
                keep_qparams(run)
                raise


@contextmanager
def _scratch(output: Path) -> Iterator[Path]:
    """Make a folder beside the result, on the same disk, deleted afterwards with all that the toolkit left in it."""
    try:
        folder = Path(tempfile.mkdtemp(prefix=".toolkit-", dir=output.parent.absolute()))
    except OSError as error:
        raise write_error(output, error) from error
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _plainly_named(job: ToolkitJob) -> Iterator[ToolkitJob]:
    """Yield the job with a copy of its calibration data: `datasets` takes brackets in a path for a pattern."""
    if job.calibration is None:
        yield job
        return
    try:
        data = read_regular(job.calibration, MOST_BYTES)
    except OSError as error:
        raise read_error(job.calibration, error, CalibrationError) from error
    with ExitStack() as stack:
        try:
            copy = stack.enter_context(scratch_folder("rkedge-calibration-")) / "calibration.json"
            copy.write_bytes(data)
        except OSError as error:
            raise write_error(Path(tempfile.gettempdir()) / "calibration.json", error) from error
        yield replace(job, calibration=copy)


def _lora_notes(spec: ModelSpec, result: ToolkitResult) -> list[str]:
    return [LORA_NOTE.format(name=spec.lora.name, file=result.lora.name)] if spec.lora and result.lora else []


def _file_size(spec: ModelSpec) -> int:
    """Return the size of model.rkllm in bytes, without tokenizer and NPU program."""
    return int(file_bytes(parse_shape(spec.model.hf_config()), parse_type(spec.dtype)))


def _same_release(named: str, installed: str) -> bool:
    """Whether the requested release is the installed one, which may have a local part such as `+cpu`."""
    return named == installed or (named in CALLABLE and version(named) == version(installed))


def _show_events(reporter: Reporter, show: Callable[[str, int, int], None]) -> OnEvent:
    def on_event(event: Event) -> None:
        if isinstance(event, Stage):
            reporter.note(f"toolkit: {_TITLES[event.stage]}")
        elif isinstance(event, Progress):
            show(event.title, event.done, event.total)

    return on_event
