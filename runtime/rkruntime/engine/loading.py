"""The options that a model is loaded with, and the facts about a loaded model."""

from __future__ import annotations

import errno
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Final, TypeAlias

from rkruntime.abi import since, within
from rkruntime.checks.preflight import Context, Finding, ModelFacts, cores_for, preflight
from rkruntime.engine.generation import DEFAULT_SAMPLING, Sampling, check_limit
from rkruntime.errors import AdapterError, LoadError, ModelFileError, RefusedError, RunError
from rkruntime.files import AnyPath, as_path, open_regular
from rkruntime.folders import hint_if_hidden
from rkruntime.library.identify import Identity
from rkruntime.schema import Between, check_fields
from rkruntime.stop import Stop

# A time limit in seconds, up to more than anything takes; a limit of 0 would end everything at once.
Time: TypeAlias = Annotated[float, Between(0.001, 1_000_000_000)]
# Context in tokens unless given: RKLLM's own default in every release, passed explicitly.
_DEFAULT_CONTEXT: Final = 512
# NPU cores of the RK3588, assumed for a model of which nothing is known.
_MOST_NPU_CORES: Final = 3
Position: TypeAlias = Annotated[int, Between(0, (1 << 31) - 1)]  # a position in the KV cache


@dataclass(frozen=True)
class Lora:
    """An adapter file for the runtime; runs refer to it by name. Raises UsageError for a field of a wrong type."""

    name: str
    path: AnyPath
    scale: Annotated[float, Between(-1_000_000, 1_000_000)] = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "path", as_path("path", self.path))
        check_fields(self)

    def as_dict(self) -> dict[str, Any]:
        """Return the arguments of LoadedModel.load_lora, in order. Raises AdapterError if there is no such file."""
        path = Path(self.path)
        if not path.is_file():
            raise AdapterError(f"There is no adapter file {path}.")
        return {"name": self.name, "path": str(path.resolve()), "scale": self.scale}


@dataclass(frozen=True)
class LoadOptions:
    """How to load a model. None keeps the library's default.

    Attributes:
        library: Path of librkllmrt.so.
        model: Path of the .rkllm or .rkemu file.
        max_context: Context in tokens, at most the limit built into the model file; default: that limit if `known` has
            it, else 512, RKLLM's own default.
        release: Release whose layout to use for a library of an unknown release.
        sampling: Sampling of all runs; since 1.3.0, a run can have its own.
        max_new_tokens: Limit of all runs; -1 for as many as the context has room for.
        known: The manifest's facts about the model, which preflight needs.
        force: Load even if preflight knows that it will not work.
        cpus: CPU cores for the runtime's own work (since 1.2.0), at least as many as the model's NPU cores; default:
            the big cores.
        n_batch: Prompts per run (since 1.2.1; the vendor advises at most 8).
        n_keep: KV cache positions kept at the front when the window shifts (since 1.2.0).
        base_domain_id: NPU memory domain, 0 to 15; one for each large model on the NPU.
        embed_flash: Read embeddings from flash instead of keeping them in memory (since 1.2.0); default: True if
            `known` is given.
        ignore_eos: Continue after an EOS (since 1.3.0).
        use_cross_attention: Enable cross attention, for encoder-decoder models (since 1.2.1).
        image_markers: Texts for start, end and content of an image (before 1.3.0; see ImagePrompt).
        loras: Adapters to load with the model.
        lora: Name of the adapter for runs that name none.
        asynchronous: Use rkllm_run_async. Reported to hang or return no text on 1.1.4, 1.2.1 and 1.2.2 (rknn-llm issues
            208, 320, 396), so it is off by default.
        tokenizer: Text to ids, for a model file without a tokenizer (since 1.3.0).
        embed: Ids to float32 [ids, hidden size], for a model file without an embedding table (since 1.3.0).
        load_timeout: Seconds before a load counts as hung; longer for a large file (8 MB/s), and while it is read.
        token_timeout: Seconds without an event before a run counts as hung, prefill included.
        abort_timeout: Seconds for a run to end after it was aborted. They count from when its prompt must have been
            read, as a library may notice an abort only then.
        close_timeout: Seconds for the library to exit by itself.
        interpreter: Command line of the Python that runs the worker.
        environment: Variables for the worker on top of the parent's, such as RKLLM_LOG_LEVEL.
        stop: Lets another thread kill the worker while it loads.

    Raises:
        UsageError: A field has a wrong type or is out of range.
    """

    library: AnyPath
    model: AnyPath
    max_context: Context | None = None
    release: str | None = None
    sampling: Sampling = DEFAULT_SAMPLING
    max_new_tokens: int = -1
    known: ModelFacts | None = None
    force: bool = False
    cpus: Sequence[Annotated[int, Between(0, 31)]] | None = None
    n_batch: Annotated[int, Between(1, 255)] = 1
    n_keep: Position | None = None
    base_domain_id: Annotated[int, Between(0, 15)] | None = None
    embed_flash: bool | None = None
    ignore_eos: bool = False
    use_cross_attention: bool = False
    image_markers: tuple[str, str, str] | None = None
    loras: Sequence[Lora] = ()
    lora: str | None = None
    asynchronous: bool = False
    tokenizer: Callable[[str], Sequence[int]] | None = None
    embed: Callable[[Sequence[int]], Any] | None = None
    load_timeout: Time = 600.0
    token_timeout: Time = 300.0
    abort_timeout: Time = 10.0
    close_timeout: Time = 10.0
    interpreter: Sequence[str] = (sys.executable, "-I", "-S", "-B")
    environment: Mapping[str, str] = field(default_factory=dict)
    stop: Stop = field(default_factory=Stop)

    def __post_init__(self) -> None:
        for name in ("library", "model"):
            object.__setattr__(self, name, as_path(name, getattr(self, name)))
        check_limit(self.max_new_tokens)
        check_fields(self)

    def params(self, release: str) -> dict[str, Any]:
        """Return the fields of RKLLMParam in a release, by the header's names; None keeps the library's default."""
        has_batches = within(release, since("RKLLMExtendParam.n_batch"), "")
        markers = self.image_markers or (None, None, None)
        return {
            "model_path": str(self.model),
            "max_context_len": self.max_context,
            "max_new_tokens": self.max_new_tokens,
            **asdict(self.sampling),
            "n_keep": self.n_keep,
            "ignore_eos_token": self.ignore_eos or None,
            # Text is made from ids here, and the library may not report tokens that it skips, such as a stop token.
            "skip_special_token": False,
            "is_async": self.asynchronous,
            "img_start": markers[0],
            "img_end": markers[1],
            "img_content": markers[2],
            "extend_param": {
                "base_domain_id": self.base_domain_id,
                "embed_flash": None if self.embed_flash is None else int(self.embed_flash),
                "enabled_cpus_num": None if self.cpus is None else len(self.cpus),
                "enabled_cpus_mask": None if self.cpus is None else sum(1 << cpu for cpu in set(self.cpus)),
                # The library's default may be 0, which some boards refuse.
                "n_batch": self.n_batch if has_batches or self.n_batch != 1 else None,
                "use_cross_attn": int(self.use_cross_attention) or None,
            },
        }


@dataclass(frozen=True)
class ModelInfo:
    """A loaded model. Strings are empty if the runtime did not report them.

    Attributes:
        release: Release of the library, or the one given in LoadOptions.
        layout: `L3` to `L8`.
        runtime_version, driver_version, platform: As reported in the load log.
        toolkit_version: Toolkit that made the model file; `unknown` for some.
        max_context: Context in tokens, as loaded.
        max_context_limit: Limit built into the model file, in tokens.
        npu_cores: NPU cores that the model file was made for.
        dtype: Quantized type, such as `W8A8`.
        emulated: Whether the library is RKEdge's emulator.
        load_seconds: Seconds from the start of the worker to the loaded model.
        findings: What preflight found, worst first.
        log: Lines that the library printed during the load.
    """

    release: str
    layout: str
    runtime_version: str
    driver_version: str
    toolkit_version: str
    platform: str
    dtype: str
    max_context: int
    max_context_limit: int | None
    npu_cores: int | None
    emulated: bool
    load_seconds: float
    findings: tuple[Finding, ...]
    log: tuple[str, ...]


# `rkllm-runtime version: 1.2.3, rknpu driver version: 0.9.8, platform: RK3588` and
# `rkllm-toolkit version: 1.2.3, max_context_limit: 4096, npu_core_num: 3, target_platform: RK3588, model_dtype: W8A8`.
_FACTS: Final = {
    "runtime_version": r"rkllm-runtime version: ([^,\s]+)",
    "driver_version": r"rknpu driver version: ([^,\s]+)",
    "toolkit_version": r"rkllm-toolkit version: ([^,\s]+)",
    "platform": r"(?:platform|target_platform): ([^,\s]+)",
    "dtype": r"model_dtype: ([^,\s]+)",
    "max_context_limit": r"max_context_limit: (\d+)",
    "npu_cores": r"npu_core_num: (\d+)",
}
_ERROR_LINE: Final = re.compile(r"^\s*(?:E (?:rkllm|RKNN)\b|rknn_init fail|error: failed to load model)")


def facts_of(log: Iterable[str]) -> dict[str, str]:
    """Return the facts in the lines of a load, by the field names of ModelInfo."""
    text = "\n".join(log)
    found = {name: re.search(pattern, text) for name, pattern in _FACTS.items()}
    return {name: match.group(1) if match else "" for name, match in found.items()}


def first_error(log: Iterable[str]) -> str:
    """Return the first line that reports a failed load, for which 1.1.x returns 0 (rknn-llm issues 129, 156)."""
    return next((line.strip() for line in log if _ERROR_LINE.match(line)), "")


def info_of(
    identity: Identity, max_context: int, seconds: float, findings: Sequence[Finding], log: Sequence[str]
) -> ModelInfo:
    """Return the facts about a model just loaded. Raises LoadError if the log says that the load failed."""
    assert identity.release is not None
    if line := first_error(log):
        raise LoadError(f"The library reported success, but its log says: {line}")
    facts = facts_of(log)
    limit, cores = facts.pop("max_context_limit"), facts.pop("npu_cores")
    return ModelInfo(
        release=identity.release.version,
        layout=identity.release.layout,
        max_context=max_context,
        max_context_limit=int(limit) if limit else None,
        npu_cores=int(cores) if cores else None,
        emulated=identity.emulated,
        load_seconds=seconds,
        findings=tuple(findings),
        log=tuple(log),
        **facts,
    )


def checked(options: LoadOptions, identity: Identity) -> tuple[LoadOptions, tuple[Finding, ...]]:
    """Return the options as preflight adjusts them, and its findings. Raises RefusedError for what cannot work."""
    assert identity.release is not None
    version = identity.release.version
    has_mask = within(version, since("RKLLMExtendParam.enabled_cpus_mask"), "")
    if options.known is None:
        cores = cores_for(_MOST_NPU_CORES, emulated=identity.emulated)
        cpus = options.cpus or (cores.cpus if has_mask else None)
        return replace(options, max_context=options.max_context or _DEFAULT_CONTEXT, cpus=cpus), _odd(identity)
    result = preflight(options.known, runtime=version, context=options.max_context, emulated=identity.emulated)
    if result.errors and not options.force:
        first = result.errors[0]
        raise RefusedError(
            first.message, hint=first.hint, details={"findings": [item.as_dict() for item in result.findings]}
        )
    cpus = result.cores.cpus if has_mask else None
    flash = options.embed_flash
    if flash is None and within(version, since("RKLLMExtendParam.embed_flash"), ""):
        # All the vendor's programs ask for it, and `rkedge plan` relies on it: a table in RAM takes gigabytes.
        flash = True
    context, findings = result.context or _DEFAULT_CONTEXT, (*result.findings, *_odd(identity))
    return replace(options, max_context=context, cpus=options.cpus or cpus, embed_flash=flash), findings


def _odd(identity: Identity) -> tuple[Finding, ...]:
    """Return a notice if there is something odd about the library."""
    if not identity.notice:
        return ()
    message = f"About {identity.path}: {identity.notice}."
    hint = "If runs crash or answers are wrong, use the vendor's original file of a release in docs/abi.md."
    return (Finding("notice", "library-odd", message, hint, "the file itself"),)


def environment_of(options: LoadOptions) -> dict[str, str]:
    """Return the worker's environment: librkllmrt.so needs libraries that may be next to it (libgomp.so.1)."""
    paths = (str(Path(options.library).resolve().parent), os.environ.get("LD_LIBRARY_PATH", ""))
    return {**os.environ, "LD_LIBRARY_PATH": ":".join(filter(None, paths)), **options.environment}


def check_prompt_cache(path: Path, *, saved: bool) -> None:
    """Raise RunError if the library could not read this file or, if it is not `saved` yet, write it."""
    try:
        if saved or path.exists():
            open_regular(path).close()
        elif not os.access(path.parent, os.W_OK | os.X_OK):
            raise OSError(errno.EACCES, f"nothing can be written in {path.parent}")
    except OSError as error:
        raise RunError(
            f"{path} cannot be a prompt cache: {error.strerror or error}.",
            hint="Name a file that a run has saved, or one to be saved in a folder that exists.",
        ) from error


def check_readable(path: Path) -> None:
    """Raise ModelFileError if the file does not exist or cannot be read."""
    try:
        if not path.is_file():
            raise ModelFileError(f"There is no model file {path}.", hint=hint_if_hidden(path))
        with open_regular(path):
            return
    except OSError as error:
        raise ModelFileError(f"{path} cannot be read: {error.strerror or error}.", hint=hint_if_hidden(path)) from error
