"""Load a bundle's model: choose the library, the sampling and the context."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

from rkruntime.bundle.manifest import GENERATION_CONFIG, Bundle
from rkruntime.checks.preflight import Context
from rkruntime.engine.generation import GREEDY, MaxNewTokens, RepeatPenalty, Sampling, Temperature, TopK, TopP
from rkruntime.errors import BundleError, LibraryError, UsageError
from rkruntime.files import AnyPath, as_path
from rkruntime.packages import import_failed
from rkruntime.schema import Between, check_fields, check_value, types_of
from rkruntime.stop import Stop

if TYPE_CHECKING:
    from rkruntime.checks.preflight import Finding
    from rkruntime.engine.engine import Engine

LIBRARY: Final = "librkllmrt.so"
LIBRARY_VARIABLE: Final = "RKEDGE_LIBRARY"
# Functions that provide the library for a target: "module:function", called with the release, `progress` and `stop`.
# Named, not imported: the runtime does not depend on the board's tools.
PROVIDERS: Final = {"emulator": "rkboard.emulator.build:build"}
# Settings in generation_config.json that RKLLM supports, under transformers' names.
_GIVEN: Final = {
    "temperature": "temperature",
    "top_k": "top_k",
    "top_p": "top_p",
    "repetition_penalty": "repeat_penalty",
}
# Other settings that change transformers' answers and are not supported, with the value that has no effect.
_NOT_SUPPORTED: Final[Mapping[str, Any]] = {
    "bad_words_ids": None,
    "begin_suppress_tokens": None,
    "dola_layers": None,
    "encoder_no_repeat_ngram_size": 0,
    "encoder_repetition_penalty": 1,
    "epsilon_cutoff": 0,
    "eta_cutoff": 0,
    "exponential_decay_length_penalty": None,
    "force_words_ids": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "guidance_scale": 1,
    "max_length": 20,
    "max_new_tokens": None,
    "max_time": None,
    "min_length": 0,
    "min_new_tokens": 0,
    "min_p": 0,
    "no_repeat_ngram_size": 0,
    "num_beams": 1,
    "penalty_alpha": 0,
    "sequence_bias": None,
    "stop_strings": None,
    "suppress_tokens": None,
    "top_h": None,
    "typical_p": 1,
    "watermarking_config": None,
}
SEARCHED: Final = ("/usr/lib", "/usr/local/lib", "/usr/lib/aarch64-linux-gnu")


@dataclass(frozen=True)
class RuntimeOptions:
    """The values of --library, --release, --max-context, --force and --base-domain-id.

    Raises:
        UsageError: A value has a wrong type or is out of range.
    """

    library: AnyPath | None = None
    release: str | None = None
    max_context: Context | None = None
    force: bool = False
    base_domain_id: Annotated[int, Between(0, 15)] | None = None

    def __post_init__(self) -> None:
        if self.library is not None:
            as_path("library", self.library)
        check_fields(self)


@dataclass(frozen=True)
class SamplingOptions:
    """The values of --temperature and the like; None means the bundle's. Raises UsageError if one is out of range."""

    temperature: Temperature | None = None
    top_k: TopK | None = None
    top_p: TopP | None = None
    repeat_penalty: RepeatPenalty | None = None
    max_new_tokens: MaxNewTokens | None = None

    def __post_init__(self) -> None:
        check_fields(self)

    def over(self, base: Sampling) -> Sampling:
        """Return `base` with the given options applied."""
        wanted = {name: getattr(self, name, None) for name in types_of(Sampling)}
        return base.changed({name: value for name, value in wanted.items() if value is not None})


def given(options: RuntimeOptions | SamplingOptions) -> dict[str, Any]:
    """Return the options that were given, by name: 0 counts as given, but a flag that is off does not."""
    usual = type(options)()
    return {name: value for name, value in vars(options).items() if value != getattr(usual, name)}


def default_sampling(bundle: Bundle) -> Sampling:
    """Return the sampling in the bundle's generation_config.json, on top of RKLLM's defaults.

    Raises:
        BundleError: A value in the file is invalid.
    """
    path, config = bundle.path / GENERATION_CONFIG, bundle.read_generation_config()
    sample = config.get("do_sample")
    if sample is not None and not isinstance(sample, bool):
        raise BundleError(f"{path}: do_sample is {str(sample)[:40]!r}, which is neither true nor false.")
    wanted: dict[str, Any] = {}
    for given, name in _GIVEN.items():
        value = config.get(given)
        if value is None or (name == "top_k" and _is_neutral(value, 0)):
            continue
        if name == "top_k" and isinstance(value, float) and value.is_integer():
            value = int(value)
        try:
            check_value(given, types_of(Sampling)[name], value)
        except UsageError as error:
            raise BundleError(f"{path}: {error}") from None
        wanted[name] = value
    if sample is False:
        return GREEDY.changed({name: value for name, value in wanted.items() if name == "repeat_penalty"})
    return Sampling().changed(wanted)


def ignored_settings(bundle: Bundle) -> list[str]:
    """List settings in generation_config.json that would change answers but have no effect here. Raises BundleError."""
    config = bundle.read_generation_config()
    found = [name for name, neutral in _NOT_SUPPORTED.items() if not _is_neutral(config.get(name), neutral)]
    ends = config.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if any(token not in bundle.manifest.stop_token_ids for token in ends):
        found.append("eos_token_id")
    # A top_k of 0 is transformers' "no limit", which no RKLLM manual mentions.
    return [*found, *(["top_k"] if "top_k" in config and _is_neutral(config["top_k"], 0, none=False) else [])]


def _is_neutral(value: Any, neutral: Any, *, none: bool = True) -> bool:
    return (none and value is None) or (not isinstance(value, bool) and value == neutral)


def find_library(
    bundle: Bundle,
    options: RuntimeOptions,
    progress: Callable[[str], None] | None = None,
    stop: Stop | None = None,
) -> Path:
    """Find the library for a bundle: --library or its variable, the target's provider, or the usual folders on boards.

    Args:
        progress: Called with lines while the emulator is built.
        stop: Lets another thread stop the build.

    Raises:
        LibraryError: No library was found.
        HostError: The emulator cannot be built here.
        ServiceError: The build was stopped.
    """
    if options.library is not None:
        return Path(options.library)
    target = bundle.manifest.target
    if target in PROVIDERS:
        return provided_library(target, options.release or bundle.manifest.toolkit_version, progress, stop)
    places = [*filter(None, os.environ.get("LD_LIBRARY_PATH", "").split(":")), *SEARCHED]
    found = next((path for place in places if (path := Path(place) / LIBRARY).is_file()), None)
    if found is None:
        raise LibraryError(
            f"There is no {LIBRARY} in {', '.join(places)}.",
            hint=f"Name it with --library or ${LIBRARY_VARIABLE}; on a PC, use a bundle made with --target emulator.",
        )
    return found


def provided_library(
    target: str, release: str, progress: Callable[[str], None] | None = None, stop: Stop | None = None
) -> Path:
    """Return the library of a target in PROVIDERS. Raises HostError if it cannot be built here; see `find_library`."""
    module, _, function = PROVIDERS[target].partition(":")
    try:
        build: Callable[..., Path] = getattr(importlib.import_module(module), function)
    except ImportError as error:
        raise import_failed(error) from error
    return build(release, progress=progress or (lambda _: None), stop=stop)


def _checking(bundle: Bundle, stop: Stop, progress: Callable[[str], None] | None) -> Callable[[int], None]:
    """Return the callback that `Bundle.verify` calls with the size of each block it has read."""
    size = sum(record.size for record in bundle.manifest.files.values())
    done = shown = 0

    def block(read: int) -> None:
        nonlocal done, shown
        stop.check()
        done += read
        percent = done * 100 // max(1, size)
        if progress is not None and percent > shown:
            shown = percent
            progress(f"checking {size / 1e9:.1f} GB, {percent} %")

    return block


def load_engine(
    bundle: Bundle,
    options: RuntimeOptions,
    sampling: SamplingOptions,
    show: Callable[[Finding], None],
    progress: Callable[[str], None] | None = None,
    stop: Stop | None = None,
    **timeouts: Any,
) -> Engine:
    """Check the bundle's files, find the library, start the worker and load the model.

    Args:
        show: Called with each preflight finding.
        progress: Called with lines while the files are checked, the emulator is built and the model is read.
        stop: Lets another thread stop the load.
        timeouts: Timeouts of LoadOptions, in seconds.

    Raises:
        RKEdgeError: Anything wrong with the bundle, the library or the model.
    """
    # Imported late, so that a command can show its help, and a chat its prompt, before the engine is imported.
    from rkruntime.checks import ignored
    from rkruntime.engine.engine import Engine
    from rkruntime.engine.loading import LoadOptions, Lora

    ending = stop or Stop()
    ending.check()
    bundle.verify(progress=_checking(bundle, ending, progress))
    adapter = Lora(bundle.lora.stem, bundle.lora) if bundle.lora else None
    engine = Engine.load(
        LoadOptions(
            library=find_library(bundle, options, progress, stop),
            model=bundle.model,
            release=options.release,
            known=bundle.known,
            force=options.force,
            base_domain_id=options.base_domain_id,
            max_context=options.max_context,
            sampling=sampling.over(default_sampling(bundle)),
            loras=[adapter] if adapter else [],
            lora=adapter.name if adapter else None,
            stop=ending,
            **timeouts,
        ),
        progress=progress,
    )
    for finding in engine.info.findings:
        show(finding)
    if settings := ignored_settings(bundle):
        show(ignored.ignored_settings(GENERATION_CONFIG, settings, _GIVEN))
    if unlisted := bundle.unlisted:
        show(ignored.unlisted_files(unlisted))
    return engine
