"""`rkedge top`: what a board does at the moment."""

from __future__ import annotations

import sys
from collections.abc import Generator, Iterator
from contextlib import closing
from pathlib import Path

import click

from rkboard.doctor.document import Board
from rkboard.doctor.visit import watch
from rkboard.top import screen
from rkboard.top.sample import Sample
from rkruntime.cli.flags import Number, json_option
from rkruntime.errors import UsageError
from rkruntime.terminal import console, say, say_json

_ONCE_S = 1.0


def _samples(destination: str | None, root: Path | None, sudo: bool, every: float) -> Generator[Sample]:
    """Yield a sample for each look, with the rates since the one before."""
    before = None
    with closing(watch(destination, every, root, sudo=sudo)) as documents:
        for document in documents:
            board = Board(document)
            yield Sample.of(board, before)
            before = board


def _once(samples: Iterator[Sample]) -> Sample:
    """Return the second sample, as rates need two looks."""
    next(samples)
    return next(samples)


def _show(samples: Iterator[Sample], destination: str | None) -> None:
    from rich.live import Live

    with Live(console=console(), screen=True, auto_refresh=False) as live:
        for sample in samples:
            live.update(screen.table(sample, destination), refresh=True)


@click.command("top")
@click.argument("destination", metavar="[USER@BOARD]", required=False)
@click.option(
    "--every",
    type=Number(0.5, 60),
    default=2.0,
    show_default=True,
    help="Look again after this many seconds.",
)
@click.option("--once", is_flag=True, help="Print one table, as is done where the output is not a terminal.")
@click.option("--sudo", is_flag=True, help="Look as root, through a sudo that asks for no password.")
@click.option(
    "--root",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="Look at this file tree of a board instead.",
)
@json_option()
def run(destination: str | None, every: float, once: bool, sudo: bool, root: Path | None, as_json: bool) -> None:
    """Show what a board does at the moment: load of its NPU, clocks, temperatures, memory, tokens/s and requests.

    Without USER@BOARD, it looks at this machine. Over SSH nothing is installed there; python3 is enough. A daemon says
    what it does, too. What cannot be read is unknown, with the reason. Ctrl-C ends it.
    """
    if root is not None and (destination or sudo):
        raise UsageError("--root is a file tree of this machine: no board or --sudo goes with it.")
    once = once or as_json or not sys.stdout.isatty()
    with closing(_samples(destination, root, sudo, _ONCE_S if once else every)) as samples:
        if not once:
            try:
                _show(samples, destination)
            except KeyboardInterrupt:  # Ctrl-C is how the screen ends
                return
        sample = _once(samples)
    if as_json:
        say_json({"destination": destination, **sample.as_dict()})
        return
    say(screen.title(sample, destination), bold=True)
    say("\n".join(screen.plain(sample)))
