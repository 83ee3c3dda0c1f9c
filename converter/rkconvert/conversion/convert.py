"""Convert a checkpoint, with or without adapters, into a bundle: everything is checked before any work starts."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

from rkconvert.adapters.chat import read_chat, stop_tokens
from rkconvert.adapters.merged_model import AdapterSource, bare_model, resume_key
from rkconvert.adapters.reader import Adapter
from rkconvert.adapters.separate import separate_lora
from rkconvert.compat.case import CONFIG_REPORT, Case, plain_config
from rkconvert.compat.cells import Cell, LoraMode
from rkconvert.compat.matrix import known
from rkconvert.conversion import references as reference
from rkconvert.conversion.expected import expected, is_quick, needed_reads
from rkconvert.conversion.opened import OpenedModels
from rkconvert.emulated.target import EmulatorTarget
from rkconvert.model.chat_template import ChatTemplate
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
from rkconvert.target import ModelSpec, Target
from rkconvert.tensors.hashes_ahead import HashesAhead
from rkconvert.tensors.inputs import Inputs, states_of
from rkconvert.toolkit.options import ToolkitOptions
from rkconvert.toolkit.target import ToolkitTarget
from rkruntime.bundle.manifest import Bundle, Manifest, Source
from rkruntime.bundle.references import REFERENCES
from rkruntime.bundle.selftest import SELFTEST
from rkruntime.errors import CalibrationError, UsageError
from rkruntime.files import readable
from rkruntime.text.template import SPECIAL_TOKENS

TARGETS: Final = ("emulator", "toolkit")
LORA_MODES: Final = ("merge", "runtime")
# Options that do not determine the bundle; its release is the target's, whether or not the option names one.
_NOT_OF_THE_BUNDLE: Final = ("output", "release", "force_dtype", "toolkit_patience")
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
        selftest: Compute what `rkedge run --selftest` expects; None to do so for a board, or if it is quick.
        references: Compute what probes of window and soft-caps compare with; None to do so if it is quick.
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
    selftest: bool | None = None
    references: bool | None = None


@dataclass(frozen=True)
class Job:
    """A conversion that has passed every check.

    Attributes:
        spec: The model file to be made.
        inputs: State of every file to be read, taken before the work.
        plan: None for a type that no board runs.
    """

    options: Options
    target: Target
    spec: ModelSpec
    inputs: tuple[Inputs, ...]
    plan: Plan | None
    notes: tuple[str, ...]


def convert(options: Options, reporter: Reporter = QUIET) -> Bundle:
    """Make a bundle. It is complete when this returns; nothing is left behind when it raises.

    Raises:
        RefusedError: The type, the context or the size is known not to work.
        CheckpointError, AdapterError: The input cannot be used.
        OutputError, HostError: The output cannot be written, or the toolkit is missing.
    """
    opened = OpenedModels()
    return make(check(options, reporter, opened), reporter, opened)


def make(job: Job, reporter: Reporter, opened: OpenedModels) -> Bundle:
    """Carry out a job from `check`; see `convert`."""
    started, options, target, spec = time.monotonic(), job.options, job.target, job.spec
    checkpoint = spec.model.checkpoint
    key = resume_key(
        job.inputs,
        options=asdict(options),
        release=spec.release,
        toolkit=target.maker,
        limits=[spec.max_context, spec.npu_cores],
    )
    with ExitStack() as work:
        folder = work.enter_context(work_folder(options.output, key, target.resumable(spec), target.done))
        work.enter_context(opened.hashing((checkpoint, *spec.adapters)))
        made = target.write(spec, folder, reporter)
        ahead = work.enter_context(closing(HashesAhead([folder / made.name])))
        bundle_folder.write_side_files(folder, checkpoint, spec.model.tokenizer_folder, spec.template)
        if options.selftest or (options.selftest is None and (options.target == "toolkit" or is_quick(spec))):
            made = _add_selftest(spec, made, folder, reporter)
        if options.references or (options.references is None and is_quick(spec)):
            made = _add_references(spec, made, folder, reporter)
        source = opened.source(checkpoint, reporter)
        adapters = tuple(opened.source(adapter, reporter) for adapter in spec.adapters)
        seconds = round(time.monotonic() - started, 3)
        report = {
            "options": plain_options(options),
            "made_of": made_of(options, target, checkpoint, job.inputs, (source, *adapters)),
            "notes": job.notes,
            "seconds": seconds,
        }
        bundle_folder.write_report(folder, "convert", report)
        bundle_folder.write_report(folder, CONFIG_REPORT, plain_config(checkpoint.raw_config))
        if job.plan is not None:
            bundle_folder.write_report(folder, "plan", _of_the_board(as_dict(job.plan)))
        manifest = bundle_folder.write_manifest(folder, _manifest(job, source, adapters, made), ahead)
        (folder / bundle_folder.DONE).unlink(missing_ok=True)
        # The hashes are those of the files that were read only if nothing has changed since.
        for files in job.inputs:
            files.check()
    return Bundle(options.output, manifest)


def _add_selftest(spec: ModelSpec, made: ModelFile, folder: Path, reporter: Reporter) -> ModelFile:
    """Write what the bundle's self-test expects; returns the model file with a note if there is none."""
    stops = stop_tokens(spec.model, spec.tokenizer, spec.template)
    with reporter.bar("computing the self-test's answers", needed_reads(spec)) as advance:
        test, says = expected(spec, stops, advance)
    if test is None:
        note = f"there is no self-test: {says}"
        reporter.note(f"note: {note}")
        return replace(made, notes=(*made.notes, note))
    bundle_folder.write_report(folder, Path(SELFTEST).stem, test.as_dict())
    reporter.note(f"self-test: {says}")
    return made


def _add_references(spec: ModelSpec, made: ModelFile, folder: Path, reporter: Reporter) -> ModelFile:
    """Write what probes of the library compare with; returns the model file with a note if there is nothing."""
    with reporter.bar("computing what probes compare with", reference.needed_reads(spec)) as advance:
        found, says = reference.references(spec, advance)
    if found is None:
        note = f"there are no references for probes: {says}"
        reporter.note(f"note: {note}")
        return replace(made, notes=(*made.notes, note))
    bundle_folder.write_report(folder, Path(REFERENCES).stem, found.as_dict())
    reporter.note(f"references for probes: {says}")
    return made


def check(options: Options, reporter: Reporter, opened: OpenedModels) -> Job:
    """Run every check that needs no work; see `convert` for what it raises."""
    _check_options(options)
    target = target_of(options)
    refuse_made(options.output)
    checkpoint = opened.checkpoint(str(options.checkpoint), options.revision)
    plan = _plan(options, checkpoint, target.release)
    inputs = inputs_of(options, checkpoint, opened)
    spec = _spec(options, target.release, checkpoint, plan, opened)
    if spec.lora:
        separate_lora(spec.lora)
    of_adapters = opened.model(checkpoint, options.loras).notes
    notes = (*checkpoint.notes, *_notes(plan), *of_adapters, *spec.template.notes, *target.check(spec))
    if spec.lora and plan:
        notes = (*notes, _LORA_NOT_PLANNED)
    if plan and options.target == "toolkit" and (said := _known(plan, spec.npu_cores, options.lora_mode)):
        notes = (*notes, said)
    require_space(options.output, target.needed_bytes(spec))
    for note in notes:
        reporter.note(f"note: {note}")
    return Job(options, target, spec, inputs, plan, notes)


def _spec(options: Options, release: str, checkpoint: Checkpoint, plan: Plan | None, opened: OpenedModels) -> ModelSpec:
    """Open the weights, and the adapter that stays separate, with their tokenizer and template."""
    merged = opened.model(checkpoint, options.loras)
    separate = options.lora_mode == "runtime"
    model = bare_model(checkpoint) if separate else merged
    tokenizer, template = read_chat(model)
    most = checkpoint.config.max_position_embeddings
    return ModelSpec(
        model=model,
        lora=merged.adapters[0] if separate else None,
        tokenizer=tokenizer,
        template=template,
        platform=options.platform,
        dtype=options.dtype,
        release=release,
        max_context=plan.context if plan else choose_context(options.max_context, most),
        npu_cores=_npu_cores(options, release),
    )


def target_of(options: Options) -> Target:
    """Return what makes the model file. Raises HostError or UsageError if it is missing, or of another release."""
    if options.target == "toolkit":
        return ToolkitTarget.of(options, options.release)
    return EmulatorTarget.of(options.release)


def _check_options(options: Options) -> None:
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
    if options.target == "toolkit":
        _refuse_bytes({"--output": options.output, **options.files})


def inputs_of(options: Options, checkpoint: Checkpoint, opened: OpenedModels) -> tuple[Inputs, ...]:
    """Return the state of the files of the checkpoint, of each adapter and of other options, in this order."""
    others = Inputs(CalibrationError, {}, states_of(options.files.values()))
    return (*opened.model(checkpoint, options.loras).inputs, others)


def identify(options: Options, opened: OpenedModels, reporter: Reporter) -> dict[str, Any]:
    """Return `made_of` for the bundle that these options would give now, hashing every source."""
    target = target_of(options)
    checkpoint = opened.checkpoint(str(options.checkpoint), options.revision)
    inputs = inputs_of(options, checkpoint, opened)
    sources: list[Checkpoint | Adapter] = [checkpoint, *opened.model(checkpoint, options.loras).adapters]
    hashed = [opened.source(item, reporter) for item in sources]
    for files in inputs:
        files.check()
    return made_of(options, target, checkpoint, inputs, hashed)


def made_of(
    options: Options, target: Target, checkpoint: Checkpoint, inputs: Sequence[Inputs], sources: Sequence[Source]
) -> dict[str, Any]:
    """Return all that determines a bundle, without paths, as in its report: equal results mean equal bundles.

    Args:
        sources: Sources with the weight hashes, for the first of `inputs`.
    """
    plain = {key: value for key, value in plain_options(options).items() if key not in _NOT_OF_THE_BUNDLE}
    # The last of `inputs` has no weights.
    weights = [*(source.sha256 for source in sources), ""]
    return {
        "made_by": bundle_folder.created_by(),
        **({"libraries": dict(checkpoint.libraries)} if checkpoint.libraries else {}),
        "options": plain,
        "release": target.release,
        "toolkit": target.maker,
        "files": [
            {"weights": sha256, "small": [list(pair) for pair in item.digests]}
            for sha256, item in zip(weights, inputs, strict=True)
        ],
    }


def _refuse_bytes(paths: Mapping[str, Path]) -> None:
    """Refuse paths that are not UTF-8: libraries of the toolkit (tokenizers is one) take paths as Unicode."""
    for option, path in paths.items():
        if (text := readable(path.absolute())) != str(path.absolute()):
            raise UsageError(
                f"{option}: the toolkit cannot use the path {text} because it is not UTF-8.",
                hint="Rename that folder or file.",
            )


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


def _known(plan: Plan, cores: int, lora_mode: str) -> str:
    """Return what `rkedge compat` knows about a board's bundle, in a sentence."""
    lora: LoraMode = "runtime" if lora_mode == "runtime" else "merged"
    cell = Cell(plan.board.soc, plan.request.toolkit, plan.kind.name, cores, plan.context, lora)
    return known(Case(plan.source, plan.shape), cell)


def _of_the_board(plan: dict[str, Any]) -> dict[str, Any]:
    """Return the plan without its description of the converting PC, which does not belong in a bundle."""
    return {key: value for key, value in plan.items() if key != "host"}


def _npu_cores(options: Options, release: str) -> int:
    most = dtypes.cores(options.platform, release)
    cores = most if options.npu_cores is None else options.npu_cores
    if not 1 <= cores <= most:
        raise UsageError(f"--npu-cores {cores}: the {options.platform} has {most}.", hint=f"Use 1 to {most}.")
    return cores


def _manifest(job: Job, source: Source, adapters: tuple[Source, ...], made: ModelFile) -> Manifest:
    options, spec = job.options, job.spec
    config = spec.config
    return Manifest(
        name=readable(options.output.resolve().name),
        family=config.family,
        size=config.size_name,
        parameters=config.parameters,
        source=source,
        adapters=adapters,
        target=options.target,
        platform=spec.platform,
        dtype=spec.dtype,
        npu_cores=spec.npu_cores,
        max_context=spec.max_context,
        toolkit_version=spec.release,
        model_file=made.name,
        bos_token_id=config.bos_token_id,
        stop_token_ids=stop_tokens(spec.model, spec.tokenizer, spec.template),
        system_role=spec.template.system_role,
        special_tokens=_special_tokens(spec.template),
        vocab_size=config.vocab_size if spec.tokenizer.padded else 0,
        created_by=bundle_folder.created_by(),
        licence=bundle_folder.LICENCE,
        notes=(*job.notes, *made.notes),
        options=plain_options(options),
        files={},
    )


def _special_tokens(template: ChatTemplate) -> dict[str, str]:
    """Return the special tokens that differ from Gemma's."""
    return {name: text for name, text in template.special_tokens.items() if SPECIAL_TOKENS.get(name) != text}


def plain_options(options: Options) -> dict[str, Any]:
    """Return options as values that YAML and JSON can hold."""
    plain = asdict(options)
    plain["checkpoint"] = _public(str(options.checkpoint))
    plain["loras"] = [f"{_public(lora.source)}={_exact(lora.weight)}" for lora in options.loras]
    return {key: readable(value.name) if isinstance(value, Path) else value for key, value in plain.items()}


def _exact(number: float) -> str:
    """Return the shortest text that parses to exactly this number: 1, 0.5, 0.1234567."""
    return repr(number).removesuffix(".0")


def _public(source: str) -> str:
    """Return a hub id unchanged; for a local path only its name, so that bundles do not reveal directories."""
    return source if is_hub_id(source) and not Path(source).exists() else readable(Path(source).name)
