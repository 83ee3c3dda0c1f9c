"""From a bundle to a loaded model: which library, which sampling, which context."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rkruntime.bundle.manifest import GENERATION_CONFIG, Bundle
from rkruntime.engine.generation import GREEDY, Sampling
from rkruntime.errors import BundleError, LibraryError
from rkruntime.packages import import_failed
from rkruntime.stop import Stop

if TYPE_CHECKING:
    from rkruntime.checks.preflight import Finding
    from rkruntime.engine.engine import Engine

LIBRARY: Final = "librkllmrt.so"
LIBRARY_VARIABLE: Final = "RKEDGE_LIBRARY"
# What provides the library for a bundle's target: "module:function", called with the release. Named, not imported: the
# runtime does not depend on the board's tools.
PROVIDERS: Final = {"emulator": "rkboard.emulator.build:build"}
# No temperature and no vocabulary is as large.
_MOST_SAMPLING: Final = 1 << 24
SEARCHED: Final = ("/usr/lib", "/usr/local/lib", "/usr/lib/aarch64-linux-gnu")


@dataclass(frozen=True)
class RuntimeOptions:
    """--library, --release, --max-context and --force as they were given."""

    library: Path | None = None
    abi: str | None = None
    max_context: int | None = None
    force: bool = False


@dataclass(frozen=True)
class SamplingOptions:
    """--temperature and its kin as they were given; None is the bundle's own."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    repeat_penalty: float | None = None
    max_new_tokens: int | None = None

    def over(self, base: Sampling) -> Sampling:
        """`base` with what was asked for put over it."""
        names = ("temperature", "top_k", "top_p", "repeat_penalty")
        return base.changed({name: value for name in names if (value := getattr(self, name)) is not None})


def default_sampling(bundle: Bundle) -> Sampling:
    """What the bundle's generation_config.json asks for, on top of RKLLM's defaults. Raises BundleError."""
    config = bundle.read_generation_config()
    if config.get("do_sample") is False:
        return GREEDY
    wanted = {"temperature": float, "top_k": int, "top_p": float}
    given = {name: config[name] for name in wanted if isinstance(config.get(name), (int, float))}
    for name, value in given.items():
        if not 0 <= value <= _MOST_SAMPLING:
            raise BundleError(f"{bundle.path / GENERATION_CONFIG}: {name} is not between 0 and {_MOST_SAMPLING:,}.")
    return replace(Sampling(), **{name: wanted[name](value) for name, value in given.items()})


def find_library(bundle: Bundle, options: RuntimeOptions, progress: Callable[[str], None] | None = None) -> Path:
    """The library for a bundle: --library or its variable, else its target's provider, else where boards have it.

    Raises:
        LibraryError: there is none.
        HostError: the emulator cannot be built here.
    """
    if options.library is not None:
        return options.library
    provider = PROVIDERS.get(bundle.manifest.target)
    if provider is not None:
        return _provide(provider, options.abi or bundle.manifest.toolkit_version, progress)
    places = [*filter(None, os.environ.get("LD_LIBRARY_PATH", "").split(":")), *SEARCHED]
    found = next((path for place in places if (path := Path(place) / LIBRARY).is_file()), None)
    if found is None:
        raise LibraryError(
            f"There is no {LIBRARY} in {', '.join(places)}.",
            hint=f"Name it with --library or ${LIBRARY_VARIABLE}; on a PC use a bundle made with --target emulator.",
        )
    return found


def _provide(provider: str, release: str, progress: Callable[[str], None] | None) -> Path:
    module, _, function = provider.partition(":")
    try:
        build: Callable[..., Path] = getattr(importlib.import_module(module), function)
    except ImportError as error:
        raise import_failed(error) from error
    return build(release, progress=progress or (lambda _: None))


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
        show: gets each preflight finding.
        progress: gets lines while the emulator is built.
        stop: ends the load from another thread.
        timeouts: of LoadOptions, in seconds.

    Raises:
        RKEdgeError: whatever is wrong with bundle, library or model.
    """
    # A command shows its help, and a chat its prompt, before the engine is imported.
    from rkruntime.engine.engine import Engine
    from rkruntime.engine.loading import LoadOptions, Lora

    stop = stop or Stop()
    stop.check()
    bundle.verify(progress=stop.check)
    adapter = Lora(bundle.lora.stem, bundle.lora) if bundle.lora else None
    engine = Engine.load(
        LoadOptions(
            library=find_library(bundle, options, progress),
            model=bundle.model,
            abi=options.abi,
            known=bundle.known,
            force=options.force,
            max_context=options.max_context,
            sampling=sampling.over(default_sampling(bundle)),
            loras=[adapter] if adapter else [],
            lora=adapter.name if adapter else None,
            stop=stop,
            **timeouts,
        )
    )
    for finding in engine.info.findings:
        show(finding)
    return engine
