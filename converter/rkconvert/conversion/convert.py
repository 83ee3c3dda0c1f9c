"""Convert a checkpoint, with or without adapters, into a bundle: everything is checked before any work starts."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from rkconvert.adapters.merged_model import AdapterSource, MergedModel, resume_key
from rkconvert.adapters.reader import Adapter
from rkconvert.conversion.opened import Loaded
from rkconvert.conversion.target import Target
from rkconvert.emulated.lora_file import plain_pairs
from rkconvert.emulated.model_file import EmulatorModel
from rkconvert.emulated.target import EmulatedModel
from rkconvert.model.chat_template import ChatTemplate, read_template
from rkconvert.model.tokenizer import Tokenizer, read_tokenizer
from rkconvert.output import bundle_folder
from rkconvert.output.bundle_folder import ModelFile
from rkconvert.output.disk import require_space
from rkconvert.output.work_folder import refuse_made, work_folder
from rkconvert.plan import ModelSource, Plan, PlanRequest, plan_for, require
from rkconvert.plan.report import as_dict
from rkconvert.progress import QUIET, Reporter
from rkconvert.rules import quantized_types as dtypes
from rkconvert.rules.context import choose_context
from rkconvert.sources.checkpoint import Checkpoint
from rkconvert.sources.hub import is_hub_id
from rkconvert.tensors.inputs import Inputs, states_of
from rkconvert.toolkit import Toolkit, find_toolkit
from rkconvert.toolkit.board_file import BoardModel
from rkconvert.toolkit.options import ToolkitOptions
from rkruntime.abi import CALLABLE, DEFAULT_RELEASE, EMULATED, check_release
from rkruntime.bundle.manifest import TOKENIZER, Bundle, Manifest, Source
from rkruntime.errors import CalibrationError, UsageError
from rkruntime.files import readable
from rkruntime.text.template import END_OF_TURN, SPECIAL_TOKENS
from rkruntime.versions import version

TARGETS: Final = ("emulator", "toolkit")
LORA_MODES: Final = ("merge", "runtime")
# The emulator claims to be an RK3588, and a runtime refuses a model made for another SoC.
_EMULATED_PLATFORM: Final = "rk3588"
_LORA_NOT_PLANNED: Final = (
    "the plan's memory and speed are those of the model without its adapter: what an adapter in its own file adds"
    " to them on a board is not known"
)


@dataclass(frozen=True)
class Options(ToolkitOptions):
    """Options of a conversion, with the command's names and defaults.

    Attributes:
        checkpoint: Folder, .gguf file or hub id; `revision` is a hub model's branch, tag or commit.
        max_context: In tokens; None for the model's own limit, but no more than 4096.
        release: RKLLM release that the bundle is for; None for the toolkit's, or 1.2.3 for the emulator.
        npu_cores: None for all cores of the SoC.
        lora_mode: `merge`, or `runtime`: the adapter becomes a separate file, for rkllm_load_lora.
    """

    checkpoint: str
    output: Path
    revision: str | None = None
    loras: tuple[AdapterSource, ...] = ()
    target: str = "emulator"
    platform: str = "rk3588"
    dtype: str = "w8a8"
    force_dtype: bool = False
    max_context: int | None = None
    release: str | None = None
    npu_cores: int | None = None
    lora_mode: str = "merge"


@dataclass(frozen=True)
class Job:
    """A conversion that has passed every check.

    Attributes:
        lora: Adapter that becomes a separate file.
        toolkit: None for the emulator.
        inputs: State of every file to be read, taken before the work.
    """

    options: Options
    release: str
    toolkit: Toolkit | None
    model: MergedModel
    lora: Adapter | None
    inputs: tuple[Inputs, ...]
    tokenizer: Tokenizer
    template: ChatTemplate
    plan: Plan | None
    max_context: int
    npu_cores: int
    notes: tuple[str, ...]

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        """All adapters: the merged ones, and the one that stays separate."""
        return (*self.model.adapters, *([self.lora] if self.lora else []))


def convert(options: Options, reporter: Reporter = QUIET) -> Bundle:
    """Convert. The bundle is complete when this returns; nothing is left behind when it raises.

    Raises:
        RefusedError: The type, the context or the size is known not to work.
        CheckpointError, AdapterError: The input cannot be used.
        OutputError, HostError: The output cannot be written, or the toolkit is missing.
    """
    loaded = Loaded()
    return make(check(options, reporter, loaded), reporter, loaded)


def make(job: Job, reporter: Reporter, loaded: Loaded) -> Bundle:
    """Carry out a job from `check`; see `convert`."""
    started, options = time.monotonic(), job.options
    checkpoint, target = job.model.checkpoint, _target(job)
    key = resume_key(
        job.inputs,
        options=asdict(options),
        release=job.release,
        toolkit=job.toolkit.as_dict() if job.toolkit else None,
        limits=[job.max_context, job.npu_cores],
    )
    with work_folder(options.output, key, target.resumable) as folder:
        made = target.write(folder, reporter)
        bundle_folder.write_side_files(folder, checkpoint, job.model.tokenizer_folder, job.template)
        source = loaded.source(checkpoint, reporter)
        adapters = tuple(loaded.source(adapter, reporter) for adapter in job.adapters)
        seconds = round(time.monotonic() - started, 3)
        report = {
            "options": plain_options(options),
            "made_of": made_of(options, job.release, job.toolkit, job.inputs, (source, *adapters)),
            "notes": job.notes,
            "seconds": seconds,
        }
        bundle_folder.write_report(folder, "convert", report)
        if job.plan is not None:
            bundle_folder.write_report(folder, "plan", _of_the_board(as_dict(job.plan)))
        manifest = bundle_folder.write_manifest(folder, _manifest(job, source, adapters, made))
        # The hashes are those of the files that were read only if nothing has changed since.
        for files in job.inputs:
            files.check()
    return Bundle(options.output, manifest)


def check(options: Options, reporter: Reporter, loaded: Loaded) -> Job:
    """Run every check that needs no work; see `convert` for what it raises."""
    _check_target(options)
    toolkit = _toolkit(options)
    if toolkit:
        _refuse_bytes(options)
    release = _release(options, toolkit)
    refuse_made(options.output)
    checkpoint = loaded.checkpoint(str(options.checkpoint), options.revision)
    plan = _plan(options, checkpoint, release)
    notes = (*checkpoint.notes, *_notes(plan))
    max_context = (
        plan.context if plan else choose_context(options.max_context, checkpoint.config.max_position_embeddings)
    )
    model, lora = _model(options, checkpoint, loaded)
    inputs = inputs_of(options, checkpoint, loaded)
    tokenizer = read_tokenizer(model.tokenizer_folder / TOKENIZER, model.weights.config.vocab_size)
    bos = tokenizer.texts[model.weights.config.bos_token_id].decode("utf-8", "replace")
    template = read_template(model.tokenizer_folder, bos, checkpoint.path)
    cores = _npu_cores(options, release)
    job = Job(options, release, toolkit, model, lora, inputs, tokenizer, template, plan, max_context, cores, notes)
    of_adapters = loaded.model(checkpoint, options.loras).notes
    job = replace(job, notes=(*notes, *of_adapters, *template.notes, *_check_model_file(job)))
    if lora and plan:
        job = replace(job, notes=(*job.notes, _LORA_NOT_PLANNED))
    for note in job.notes:
        reporter.note(f"note: {note}")
    return job


def _check_target(options: Options) -> None:
    """Raise unless something can build and run what these options ask for."""
    if options.target not in TARGETS:
        raise UsageError(f"There is no target {options.target!r}.", hint=f"Targets are {' and '.join(TARGETS)}.")
    if options.target == "emulator" and options.platform != _EMULATED_PLATFORM:
        raise UsageError(
            f"The emulator acts as an {_EMULATED_PLATFORM} and would not load a model for {options.platform}.",
            hint=f"Use --platform {_EMULATED_PLATFORM}, or --target toolkit for a board.",
        )
    if options.target == "emulator" and (given := options.given()):
        raise UsageError(
            f"{' and '.join(given)}: only the vendor's toolkit can do that, but the target is the emulator.",
            hint="Leave it out, or use --target toolkit.",
        )
    if options.lora_mode not in LORA_MODES:
        raise UsageError(f"There is no LoRA mode {options.lora_mode!r}.", hint=f"Modes are {' and '.join(LORA_MODES)}.")
    if options.lora_mode == "runtime":
        _check_runtime_lora(options.loras)


def _release(options: Options, toolkit: Toolkit | None) -> str:
    if toolkit is None:
        return check_release(options.release or DEFAULT_RELEASE, EMULATED, "The emulator").version
    if options.release and not _same_release(options.release, toolkit.version):
        raise UsageError(
            f"--release {options.release}, but the toolkit is {toolkit.version} ({toolkit.python}).",
            hint="Leave --release out, or name the interpreter of that release with --toolkit-python.",
        )
    return toolkit.version


def inputs_of(options: Options, checkpoint: Checkpoint, loaded: Loaded) -> tuple[Inputs, ...]:
    """Files of the checkpoint, of each adapter and of other options, in this order."""
    others = [path for path in (options.calibration, options.qparams) if path]
    return (*loaded.model(checkpoint, options.loras).inputs, Inputs(CalibrationError, {}, states_of(others)))


def identify(options: Options, loaded: Loaded, reporter: Reporter) -> dict[str, Any]:
    """Return `made_of` for the bundle that these options would give now, hashing every source."""
    toolkit = _toolkit(options)
    checkpoint = loaded.checkpoint(str(options.checkpoint), options.revision)
    inputs = inputs_of(options, checkpoint, loaded)
    sources: list[Checkpoint | Adapter] = [checkpoint, *loaded.model(checkpoint, options.loras).adapters]
    hashed = [loaded.source(item, reporter) for item in sources]
    for files in inputs:
        files.check()
    return made_of(options, _release(options, toolkit), toolkit, inputs, hashed)


def made_of(
    options: Options, release: str, toolkit: Toolkit | None, inputs: Sequence[Inputs], sources: Sequence[Source]
) -> dict[str, Any]:
    """Everything that determines a bundle, without paths, as in its report: equal results mean equal bundles.

    Args:
        sources: Sources with the weight hashes, for the first of `inputs`.
    """
    plain = {key: value for key, value in plain_options(options).items() if key not in ("output", "release")}
    # The last of `inputs` has no weights.
    weights = [*(source.sha256 for source in sources), ""]
    return {
        "made_by": bundle_folder.created_by(),
        "options": plain,
        "release": release,
        "toolkit": toolkit.as_dict() if toolkit else None,
        "files": [
            {"weights": sha256, "small": [list(pair) for pair in item.digests]}
            for sha256, item in zip(weights, inputs, strict=True)
        ],
    }


def _refuse_bytes(options: Options) -> None:
    """Refuse paths that are not UTF-8: libraries of the toolkit (tokenizers is one) take paths as Unicode."""
    given = {"output": options.output, "calibration": options.calibration, "qparams": options.qparams}
    for name, path in given.items():
        if path and (text := readable(path.absolute())) != str(path.absolute()):
            raise UsageError(
                f"--{name}: the toolkit cannot use the path {text} because it is not UTF-8.",
                hint="Rename that folder or file.",
            )


def _toolkit(options: Options) -> Toolkit | None:
    return find_toolkit(options.toolkit_python) if options.target == "toolkit" else None


def _same_release(named: str, installed: str) -> bool:
    """Whether the requested release is the installed one, which may have a local part such as `+cpu`."""
    return named == installed or (named in CALLABLE and version(named) == version(installed))


def _model(options: Options, checkpoint: Checkpoint, loaded: Loaded) -> tuple[MergedModel, Adapter | None]:
    """Open the weights, and the adapter that stays separate."""
    if options.lora_mode == "merge":
        return loaded.model(checkpoint, options.loras), None
    return loaded.model(checkpoint, ()), loaded.model(checkpoint, options.loras).adapters[0]


def _check_runtime_lora(loras: Sequence[AdapterSource]) -> None:
    """Raise unless there is exactly one adapter, and it can be kept in a separate file unchanged."""
    if not loras:
        raise UsageError(
            "--lora-mode runtime keeps an adapter in a separate file, but no adapter is given.",
            hint="Name it with --lora FOLDER, or leave --lora-mode out.",
        )
    if len(loras) > 1:
        raise UsageError(
            f"--lora-mode runtime keeps one adapter in a separate file, but {len(loras)} are given.",
            hint="Make a bundle for each, or merge them into one model: --lora-mode merge.",
        )
    if loras[0].weight != 1:
        raise UsageError(
            f"--lora {loras[0].source}={_exact(loras[0].weight)}: rkedge loads a separate adapter file with weight 1.",
            hint="Leave the weight out, or merge the adapter with that weight: --lora-mode merge.",
        )


def _check_model_file(job: Job) -> tuple[str, ...]:
    """Check the file that will be made; returns notes for the user."""
    if job.lora:
        plain_pairs(job.lora)
    target = _target(job)
    notes = target.check()
    require_space(job.options.output, target.needed_bytes)
    return notes


def _plan(options: Options, checkpoint: Checkpoint, release: str) -> Plan | None:
    """Plan this conversion, and stop here if the plan refuses it; None for a type that no board runs."""
    if options.target == "emulator" and options.dtype in dtypes.EMULATOR_ONLY:
        return None
    source = ModelSource(checkpoint.short_name, checkpoint.raw_config, checkpoint.nbytes)
    request = PlanRequest(
        model=source.name,
        board=options.platform,
        dtype=options.dtype,
        context=options.max_context,
        toolkit=release,
    )
    plan = plan_for(source, request)
    require(plan, force=options.force_dtype)
    if options.target == "emulator" and not options.dtype.startswith("w8a8"):
        raise UsageError(f"The emulator computes in w8a8 and its grouped types, not in {options.dtype}.")
    return plan


def _notes(plan: Plan | None) -> tuple[str, ...]:
    if plan is None:
        return ("float32 is an oracle for tests: no board runs it",)
    judgement = plan.judgement
    if judgement.verdict is dtypes.Verdict.OK:
        return plan.notes
    return (f"{judgement.dtype} on {judgement.platform}: {judgement.reason} ({judgement.rule.evidence})", *plan.notes)


def _of_the_board(plan: dict[str, Any]) -> dict[str, Any]:
    """The plan without the part that describes the converting PC, which is left out of the bundle."""
    return {key: value for key, value in plan.items() if key != "host"}


def _npu_cores(options: Options, release: str) -> int:
    most = dtypes.cores(options.platform, release)
    cores = most if options.npu_cores is None else options.npu_cores
    if not 1 <= cores <= most:
        raise UsageError(f"--npu-cores {cores}: the {options.platform} has {most}.", hint=f"Use 1 to {most}.")
    return cores


def _target(job: Job) -> Target:
    """The target that makes the model file."""
    options = job.options
    if job.toolkit is None:
        described = EmulatorModel(
            config=job.model.weights.config,
            tokenizer=job.tokenizer,
            template=job.template,
            eos_token_ids=job.model.checkpoint.eos_token_ids,
            name=job.model.name,
            platform=options.platform,
            dtype=options.dtype,
            toolkit_version=job.release,
            max_context=job.max_context,
            npu_cores=job.npu_cores,
        )
        return EmulatedModel(described, job.model, job.lora)
    return BoardModel(
        model=job.model,
        lora=job.lora,
        template=job.template,
        tokens=job.tokenizer.added,
        platform=options.platform,
        dtype=options.dtype,
        max_context=job.max_context,
        npu_cores=job.npu_cores,
        toolkit=job.toolkit,
        options=options,
    )


def _manifest(job: Job, source: Source, adapters: tuple[Source, ...], made: ModelFile) -> Manifest:
    config, options = job.model.weights.config, job.options
    return Manifest(
        name=readable(options.output.resolve().name),
        family=config.family,
        size=config.size_name,
        parameters=config.parameters,
        source=source,
        adapters=adapters,
        target=options.target,
        platform=options.platform,
        dtype=options.dtype,
        npu_cores=job.npu_cores,
        max_context=job.max_context,
        toolkit_version=job.release,
        model_file=made.name,
        bos_token_id=config.bos_token_id,
        stop_token_ids=_stop_tokens(job),
        system_role=job.template.system_role,
        special_tokens=_special_tokens(job.template),
        created_by=bundle_folder.created_by(),
        licence=bundle_folder.LICENCE,
        notes=(*job.notes, *made.notes),
        options=plain_options(options),
        files={},
    )


def _stop_tokens(job: Job) -> tuple[int, ...]:
    """The checkpoint's end tokens and those that end a turn: many generation_config.json files list only `<eos>`."""
    added = job.tokenizer.added
    ends = [added[text] for text in (END_OF_TURN, job.template.special_tokens.get("eos_token")) if text in added]
    return tuple(dict.fromkeys([*job.model.checkpoint.eos_token_ids, *ends]))


def _special_tokens(template: ChatTemplate) -> dict[str, str]:
    """Those that are not Gemma's."""
    return {name: text for name, text in template.special_tokens.items() if SPECIAL_TOKENS.get(name) != text}


def plain_options(options: Options) -> dict[str, Any]:
    """Options as values that YAML and JSON can hold."""
    plain = asdict(options)
    plain["checkpoint"] = _public(str(options.checkpoint))
    plain["loras"] = [f"{_public(lora.source)}={_exact(lora.weight)}" for lora in options.loras]
    return {key: readable(value.name) if isinstance(value, Path) else value for key, value in plain.items()}


def _exact(number: float) -> str:
    """The shortest text that parses to exactly this number: 1, 0.5, 0.1234567."""
    return repr(number).removesuffix(".0")


def _public(source: str) -> str:
    """A hub id unchanged; for a local path only its name, so that bundles do not reveal directories."""
    return source if is_hub_id(source) and not Path(source).exists() else readable(Path(source).name)
