"""The conversion of a checkpoint, with or without adapters, into a bundle: everything is checked, then done."""

from __future__ import annotations

import hashlib
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

from rkconvert import bundle_folder, dtypes
from rkconvert.adapter import Adapter, open_adapter
from rkconvert.chat_template import ChatTemplate, read_template
from rkconvert.checkpoint import Checkpoint, open_checkpoint
from rkconvert.context import choose_context
from rkconvert.emulator_file import EmulatorModel, tensor_specs, write_emulator_file
from rkconvert.merge import MergedWeights
from rkconvert.progress import QUIET, Reporter
from rkconvert.tokenizer import Tokenizer, read_tokenizer
from rkruntime.bundle import TOKENIZER, Bundle, Manifest, Source
from rkruntime.errors import HostError, UsageError
from rkruntime.files import atomic_folder, refuse_existing, sha256_file
from rkruntime.template import END_OF_TURN

TARGETS: Final = ("emulator", "toolkit")
EMULATOR_FILE: Final = "model.rkemu"
# Room for tokenizer, reports and the file system's own needs.
_SPARE_BYTES: Final = 64 << 20


@dataclass(frozen=True)
class Options:
    """What a conversion is asked for; the defaults are those of the command.

    Attributes:
        max_context: None for the model's own limit, 4096 at most.
        release: the RKLLM release that the bundle is for.
        npu_cores: None for all that the SoC has.
    """

    checkpoint: Path
    output: Path
    loras: tuple[Path, ...] = ()
    target: str = "emulator"
    platform: str = "rk3588"
    dtype: str = "w8a8"
    force_dtype: bool = False
    max_context: int | None = None
    release: str = "1.2.3"
    npu_cores: int | None = None


@dataclass(frozen=True)
class Job:
    """A conversion that passed every check."""

    options: Options
    checkpoint: Checkpoint
    adapters: tuple[Adapter, ...]
    merged: MergedWeights
    tokenizer_folder: Path
    tokenizer: Tokenizer
    template: ChatTemplate
    max_context: int
    npu_cores: int
    notes: tuple[str, ...]

    @property
    def model_name(self) -> str:
        """The checkpoint's name, and the adapters'."""
        return "+".join([self.checkpoint.path.resolve().name, *(item.path.resolve().name for item in self.adapters)])


def convert(options: Options, reporter: Reporter = QUIET) -> Bundle:
    """Convert; the bundle is complete when this returns, and nothing is left when it raises.

    Raises:
        RefusedError: the type, the context or the size is known not to work.
        CheckpointError, AdapterError: what was given cannot be used.
        OutputError, HostError: no place to write to, or the toolkit is missing.
    """
    job = check(options, reporter)
    started = time.monotonic()
    with atomic_folder(options.output) as folder:
        _write_model(folder / EMULATOR_FILE, job, reporter)
        bundle_folder.write_side_files(folder, job.checkpoint, job.tokenizer_folder, job.template)
        with reporter.bar("hashing the sources", job.checkpoint.nbytes) as advance:
            source = _source(job.checkpoint.path, job.checkpoint.weight_files, advance)
        report = {"options": _plain(options), "notes": job.notes, "seconds": round(time.monotonic() - started, 3)}
        bundle_folder.write_report(folder, "convert", report)
        manifest = bundle_folder.write_manifest(folder, _manifest(job, source))
    return Bundle(options.output, manifest)


def check(options: Options, reporter: Reporter = QUIET) -> Job:
    """Every check that needs no work; see `convert` for what it raises."""
    if options.target not in TARGETS:
        raise UsageError(f"There is no target {options.target!r}.", hint=f"Targets are {' and '.join(TARGETS)}.")
    refuse_existing(options.output)
    checkpoint = open_checkpoint(options.checkpoint)
    notes = _check_type(options, checkpoint)
    max_context = choose_context(options.max_context, checkpoint.config.max_position_embeddings)
    npu_cores = _npu_cores(options)
    if options.target == "toolkit":
        raise HostError(
            "Conversion for a board needs the vendor's rkllm-toolkit, and none is set up: RKEDGE_TOOLKIT_PYTHON names"
            " no interpreter.",
            hint="Install the rkllm-toolkit wheel into an environment of its own (x86-64 Linux), set"
            " RKEDGE_TOOLKIT_PYTHON to its python, and run this again; or use --target emulator.",
        )
    adapters = tuple(open_adapter(path, checkpoint.config.tensors()) for path in options.loras)
    merged = MergedWeights(checkpoint.weights, checkpoint.config, adapters)
    folder = _tokenizer_folder(checkpoint, adapters)
    tokenizer = read_tokenizer(folder / TOKENIZER, merged.config.vocab_size)
    bos = tokenizer.texts[checkpoint.config.bos_token_id].decode("utf-8", "replace")
    template = read_template(folder, bos)
    job = Job(options, checkpoint, adapters, merged, folder, tokenizer, template, max_context, npu_cores, notes)
    _check_disk(job)
    for note in notes:
        reporter.note(f"note: {note}")
    return job


def _check_type(options: Options, checkpoint: Checkpoint) -> tuple[str, ...]:
    if options.target == "emulator" and options.dtype in dtypes.EMULATOR_ONLY:
        return ("float32 is an oracle for tests: no board runs it",)
    judgement = dtypes.judge(
        options.dtype,
        platform=options.platform,
        toolkit=options.release,
        name=checkpoint.path.resolve().name,
        parameters=checkpoint.config.parameters,
    )
    dtypes.require(judgement, force=options.force_dtype)
    if options.target == "emulator" and not options.dtype.startswith("w8a8"):
        raise UsageError(f"The emulator computes in w8a8 and its grouped kinds, not in {options.dtype}.")
    if judgement.verdict is dtypes.Verdict.OK:
        return ()
    return (f"{judgement.dtype} on {judgement.platform}: {judgement.reason} ({judgement.rule.evidence})",)


def _tokenizer_folder(checkpoint: Checkpoint, adapters: Sequence[Adapter]) -> Path:
    """Where the tokenizer is: an adapter that made the vocabulary grow was saved with its own."""
    own = [adapter.path for adapter in adapters if adapter.rows and (adapter.path / TOKENIZER).is_file()]
    return own[0] if own else checkpoint.path


def _npu_cores(options: Options) -> int:
    most = int(dtypes.platforms()[options.platform]["cores"])
    cores = most if options.npu_cores is None else options.npu_cores
    if not 1 <= cores <= most:
        raise UsageError(f"--npu-cores {cores}: the {options.platform} has {most}.", hint=f"Use 1 to {most}.")
    return cores


def _check_disk(job: Job) -> None:
    needed = sum(spec.nbytes for spec in tensor_specs(_emulator_model(job))) + _SPARE_BYTES
    free = shutil.disk_usage(job.options.output.parent).free
    if needed > free:
        raise HostError(
            f"The bundle needs {needed / 1e9:.2f} GB, and {job.options.output.parent.resolve()} has"
            f" {free / 1e9:.2f} GB free.",
            hint="Free space there, or name an output folder on another disk.",
        )


def _emulator_model(job: Job) -> EmulatorModel:
    return EmulatorModel(
        config=job.merged.config,
        tokenizer=job.tokenizer,
        template=job.template,
        eos_token_ids=job.checkpoint.eos_token_ids,
        name=job.model_name,
        platform=job.options.platform,
        dtype=job.options.dtype,
        toolkit_version=job.options.release,
        max_context=job.max_context,
        npu_cores=job.npu_cores,
    )


def _write_model(path: Path, job: Job, reporter: Reporter) -> None:
    verb = "merging and quantizing" if job.adapters else "quantizing"
    with reporter.bar(verb, job.checkpoint.nbytes) as advance:
        write_emulator_file(path, _emulator_model(job), job.merged, advance)


def _source(path: Path, files: Sequence[Path], advance: Any = None) -> Source:
    """Name of a folder, and one hash over the hashes of its weight files in the order of their names."""
    hashes = "".join(sha256_file(file, advance) for file in sorted(files))
    return Source(name=path.resolve().name, sha256=hashlib.sha256(hashes.encode()).hexdigest())


def _manifest(job: Job, source: Source) -> Manifest:
    config, options = job.merged.config, job.options
    return Manifest(
        name=options.output.resolve().name,
        family=config.family,
        size=config.size_name,
        parameters=config.parameters,
        source=source,
        adapters=tuple(_source(adapter.path, adapter.weight_files) for adapter in job.adapters),
        target=options.target,
        platform=options.platform,
        dtype=options.dtype,
        npu_cores=job.npu_cores,
        max_context=job.max_context,
        toolkit_version=options.release,
        model_file=EMULATOR_FILE,
        bos_token_id=config.bos_token_id,
        stop_token_ids=_stop_tokens(job),
        system_role=job.template.system_role,
        created_by=bundle_folder.created_by(),
        licence=bundle_folder.LICENCE,
        notes=job.notes,
        options=_plain(options),
        files={},
    )


def _stop_tokens(job: Job) -> tuple[int, ...]:
    """The checkpoint's own, and the end of a turn: generation_config.json of many fine-tunes knows `<eos>` only."""
    end_of_turn = job.tokenizer.find(END_OF_TURN)
    return tuple(dict.fromkeys([*job.checkpoint.eos_token_ids, *end_of_turn]))


def _plain(options: Options) -> dict[str, Any]:
    """Options as YAML and JSON hold them. Paths are the user's own business: names only."""
    plain = asdict(options)
    plain["checkpoint"], plain["output"] = options.checkpoint.name, options.output.name
    plain["loras"] = [path.name for path in options.loras]
    return plain
