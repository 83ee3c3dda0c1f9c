"""Options that several commands share, and what they stand for: which library, which context, which sampling."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeAlias

import click

from rkruntime.bundle.manifest import GENERATION_CONFIG, Bundle
from rkruntime.cli.flags import Number
from rkruntime.engine.generation import GREEDY, Sampling
from rkruntime.errors import BundleError, HostError, LibraryError
from rkruntime.printable import one_line
from rkruntime.terminal import say

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

Command: TypeAlias = Callable[..., None]


@dataclass(frozen=True)
class RuntimeOptions:
    """--library, --abi, --max-context and --force as they were given."""

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


def _packed(
    name: str, kind: Any, *options: Callable[[Any], Any]
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """A decorator that gives a command these options as one argument `name`, a dataclass `kind`."""

    def decorate(command: Command) -> Command:
        @wraps(command)
        def packed(**given: Any) -> None:
            command(**{name: kind(**{item.name: given.pop(item.name) for item in fields(kind)})}, **given)

        result: Command = packed
        for option in reversed(options):
            result = option(result)
        return result

    return decorate


runtime_options = _packed(
    "runtime",
    RuntimeOptions,
    click.option(
        "--library",
        type=click.Path(path_type=Path, dir_okay=False),
        envvar=LIBRARY_VARIABLE,
        help=f"The {LIBRARY} to load.  [default: the emulator for its bundles, else searched]",
    ),
    click.option("--abi", metavar="RELEASE", help="Take the library for this RKLLM release, such as 1.2.3."),
    click.option(
        "--max-context", type=click.IntRange(min=32), metavar="TOKENS", help="Context length.  [default: the model's]"
    ),
    click.option("--force", is_flag=True, help="Load also what is known not to work on this board."),
)

sampling_options = _packed(
    "sampling",
    SamplingOptions,
    click.option("--temperature", type=Number(0, 10), help="0 takes the most likely token."),
    click.option("--top-k", type=click.IntRange(min=1), help="Choose among this many tokens."),
    click.option("--top-p", type=Number(0, 1, min_open=True), help="Choose among this share of probability."),
    click.option("--repeat-penalty", type=Number(0, 10, min_open=True), help="1 is none."),
    click.option(
        "--max-new-tokens",
        type=click.IntRange(min=1),
        metavar="TOKENS",
        help="Longest answer.  [default: what the context has room for]",
    ),
)


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


def find_library(bundle: Bundle, options: RuntimeOptions) -> Path:
    """The library for a bundle: --library or its variable, else its target's provider, else where boards have it.

    Raises:
        LibraryError: there is none.
        HostError: the emulator cannot be built here.
    """
    if options.library is not None:
        return options.library
    provider = PROVIDERS.get(bundle.manifest.target)
    if provider is not None:
        return _provide(provider, options.abi or bundle.manifest.toolkit_version)
    places = [*filter(None, os.environ.get("LD_LIBRARY_PATH", "").split(":")), *SEARCHED]
    found = next((path for place in places if (path := Path(place) / LIBRARY).is_file()), None)
    if found is None:
        raise LibraryError(
            f"There is no {LIBRARY} in {', '.join(places)}.",
            hint=f"Name it with --library or ${LIBRARY_VARIABLE}; on a PC use a bundle made with --target emulator.",
        )
    return found


def _provide(provider: str, release: str) -> Path:
    module, _, function = provider.partition(":")
    try:
        build: Callable[..., Path] = getattr(importlib.import_module(module), function)
    except ImportError as error:
        raise HostError(
            f"This bundle is for the emulator, and {module} is not installed here.", hint="Install rkedge as a whole."
        ) from error
    with progress_line() as progress:
        return build(release, progress=progress)


@contextmanager
def progress_line() -> Iterator[Callable[[str], None]]:
    """Shows one line after the other in the same place, and nothing where nobody looks."""
    watched = sys.stderr.isatty()

    def show(text: str) -> None:
        if watched:
            say(one_line(text), lead="\r\x1b[K", nl=False, err=True)

    try:
        yield show
    finally:
        show("")


def show_finding(finding: Finding) -> None:
    """A preflight finding on standard error, for a person."""
    color = "yellow" if finding.level == "warning" else "cyan"
    say(f"{finding.message} {finding.hint}", lead=click.style(f"{finding.level}: ", fg=color), err=True)


def load_engine(
    bundle: Bundle,
    options: RuntimeOptions,
    sampling: SamplingOptions,
    show: Callable[[Finding], None] = show_finding,
    **timeouts: Any,
) -> Engine:
    """Check the bundle's files, find the library, start the worker and load the model; say what is worth knowing.

    Args:
        show: gets each preflight finding.
        timeouts: of LoadOptions, in seconds.
    """
    from rkruntime.engine.engine import Engine, LoadOptions

    bundle.verify()
    engine = Engine.load(
        LoadOptions(
            library=find_library(bundle, options),
            model=bundle.model,
            abi=options.abi,
            known=bundle.known,
            force=options.force,
            max_context=options.max_context,
            sampling=sampling.over(default_sampling(bundle)),
            **timeouts,
        )
    )
    for finding in engine.info.findings:
        show(finding)
    return engine
