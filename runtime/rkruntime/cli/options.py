"""Options that several commands share, and what the user sees while a model is loaded."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import click

from rkruntime.cli.flags import TOKENS, Number, Renamed
from rkruntime.engine.open import LIBRARY, LIBRARY_VARIABLE, RuntimeOptions, SamplingOptions, load_engine
from rkruntime.printable import one_line
from rkruntime.terminal import say

if TYPE_CHECKING:
    from rkruntime.bundle.manifest import Bundle
    from rkruntime.checks.preflight import Finding
    from rkruntime.engine.engine import Engine
    from rkruntime.model import Model

Command: TypeAlias = Callable[..., None]


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
        show_envvar=True,
        show_default="the emulator for its bundles, else searched for",
        help=f"Load this {LIBRARY}.",
    ),
    click.option(
        "--release",
        "abi",
        cls=Renamed,
        former="--abi",
        metavar="RELEASE",
        show_default="what the library says it is",
        help="Treat the library as this RKLLM release.",
    ),
    click.option(
        "--max-context",
        type=TOKENS,
        metavar="TOKENS",
        show_default="the model's limit",
        help="Set the context length.",
    ),
    click.option("--force", is_flag=True, help="Load the model even if it is known not to work on this board."),
    click.option(
        "--base-domain-id",
        type=click.IntRange(0, 15),
        metavar="NUMBER",
        show_default="0",
        help="Use this memory domain of the NPU, if other models use the first ones.",
    ),
)

sampling_options = _packed(
    "sampling",
    SamplingOptions,
    click.option(
        "--temperature", type=Number(0, 10), help="Set the sampling temperature; 0 takes the most likely token."
    ),
    click.option("--top-k", type=click.IntRange(1, 1 << 24), help="Sample from this many of the most likely tokens."),
    click.option(
        "--top-p",
        type=Number(0, 1, min_open=True),
        help="Sample from the most likely tokens that together have this probability.",
    ),
    click.option(
        "--repeat-penalty",
        type=Number(0, 10, min_open=True),
        help="Penalize tokens that have occurred already; 1 is no penalty.",
    ),
    click.option(
        "--max-new-tokens",
        type=click.IntRange(1, 1 << 20),
        metavar="TOKENS",
        show_default="what the context has room for",
        help="Limit the length of the answer.",
    ),
)


@contextmanager
def progress_line() -> Iterator[Callable[[str], None]]:
    """Show one line after the other in the same place; nothing without a terminal."""
    watched = sys.stderr.isatty()

    def show(text: str) -> None:
        if watched:
            say(one_line(text), lead="\r\x1b[K", nl=False, err=True)

    try:
        yield show
    finally:
        show("")


def show_finding(finding: Finding) -> None:
    """Show a preflight finding on standard error."""
    color = "yellow" if finding.level == "warning" else "cyan"
    say(f"{finding.message} {finding.hint}", lead=click.style(f"{finding.level}: ", fg=color), err=True)


def open_engine(bundle: Bundle, options: RuntimeOptions, sampling: SamplingOptions) -> Engine:
    """`load_engine` with findings and progress shown on standard error."""
    with progress_line() as progress:
        return load_engine(bundle, options, sampling, show_finding, progress)


def open_for_person(bundle: Bundle, options: RuntimeOptions, sampling: SamplingOptions) -> Model:
    """`open_model`, likewise."""
    from rkruntime.model import open_model

    with progress_line() as progress:
        model = open_model(bundle, options, sampling, finding=show_finding, progress=progress)
    if model.engine.info.emulated and sys.stderr.isatty():
        say(f"emulated runtime {model.engine.info.release}: no speed here is a board's", err=True, dim=True)
    return model
