"""`rkedge clocks`: show the clocks of CPU, NPU and memory, or hold them while a command runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click

from rkboard.clocks import holding
from rkboard.clocks.keeper import keep
from rkboard.clocks.state import State, StateFile
from rkboard.clocks.wishes import AUTO, KEEP, Wish
from rkboard.doctor.document import Board
from rkboard.doctor.readings import Clock, clocks, mhz, temperatures
from rkboard.doctor.visit import glance
from rkruntime.checks.machine import ROOT
from rkruntime.cli.flags import Decorated, json_option
from rkruntime.errors import UsageError
from rkruntime.printable import one_line
from rkruntime.terminal import say, say_json

SCHEMA = "rkedge-clocks/1"


def _limits(clock: Clock) -> str:
    return "" if None in (clock.least, clock.most) else f"{(clock.least or 0) / 1e6:.0f} to {mhz(clock.most)}"


def _row(clock: Clock) -> str:
    listed = " ".join(f"{value / 1e6:.0f}" for value in clock.listed)
    return f"{clock.name:6} {clock.governor or 'unknown':16} {mhz(clock.now):>9}  {_limits(clock):18} {listed}"


def _holder(state: State | None) -> str:
    if state is None:
        return ""
    since = time.strftime("%H:%M:%S", time.localtime(state.since))
    if state.alive:
        return f"Held since {since} by process {state.pid}, for the user {state.uid}."
    return f"What process {state.pid} set at {since} was not restored: sudo rkedge clocks --restore"


def _show(board: Board, state: State | None) -> None:
    found = clocks(board)
    say(f"{'clock':6} {'governor':16} {'now':>9}  {'limits':18} listed, in MHz", bold=True)
    for clock in found:
        say(one_line(_row(clock)))
    if not any(clock.kind == "ddr" for clock in found):
        say("The kernel does not control the memory's clock.", dim=True)
    if not any(clock.kind == "npu" for clock in found):
        say("The kernel does not control the NPU's clock.", dim=True)
    elif not board.npu_clock_is_safe:
        say("This kernel is not the vendor's: the NPU's clock must not be written here.", dim=True)
    if zones := temperatures(board):
        hottest = max(zones, key=lambda name: zones[name])
        say(one_line(f"{hottest}: {zones[hottest]:.0f} degrees"), dim=True)
    if held := _holder(state):
        say(held)


def _as_dict(board: Board, state: State | None) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "clocks": [{**asdict(clock), "folder": f"/{clock.folder}"} for clock in clocks(board)],
        "npu_clock_is_safe": board.npu_clock_is_safe,
        "temperatures": temperatures(board),
        "held": None if state is None else asdict(state),
    }


def _hold(wish: Wish, root: Path, command: Sequence[str]) -> int:
    """Run the command with clocks held; return its exit status."""
    holding.check_command(command)
    with holding.held(wish, root) as said:
        listed = ", ".join(f"{row['name']} {mhz(row['to'])}" for row in said.clocks)
        for text in (f"held: {listed or 'nothing'}", *said.notes):
            say(one_line(text), err=True, dim=True)
        status = holding.run(command)
    for text in said.changed:
        say(one_line(text), lead=click.style("warning: ", fg="yellow"), err=True)
    return status


def _clock_option(kind: str, words: str) -> Callable[[Decorated], Decorated]:
    return click.option(
        f"--{kind}", metavar="MHZ", show_default="max, or kept if another one is named",
        help=f"Hold {words} at this many MHz that the chip lists, at `max`, or `keep` it.",
    )  # fmt: skip


@click.command("clocks", context_settings={"allow_interspersed_args": False})
@click.argument("command", metavar="[-- COMMAND...]", nargs=-1, type=click.UNPROCESSED)
@_clock_option("cpu", "the CPU's clocks")
@_clock_option("npu", "the NPU's clock")
@_clock_option("ddr", "the memory's clock")
@click.option("--restore", is_flag=True, help="Restore what was left by a run that was killed with its keeper.")
@click.option(
    "--keep", "keep_them", is_flag=True, hidden=True, help="Be the keeper of a connection on standard input and output."
)
@click.option(
    "--root",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    default=ROOT,
    show_default="/",
    help="Look at this file tree of a board instead.",
)
@json_option("Print the clocks as one JSON document.")
def run(
    command: tuple[str, ...], restore: bool, keep_them: bool, root: Path, as_json: bool, **values: str | None
) -> int:
    """Show the clocks of CPU, NPU and memory, or hold them at the maximum for the time of a COMMAND.

    They are set with the governor `userspace`, only to values that the chip lists, read back and compared, and restored
    when the command has ended, also if it or rkedge is killed. Root can do that; for others docs/clocks.md installs a
    unit. The exit status is the command's.
    """
    named = {kind: value for kind, value in values.items() if value is not None}
    if keep_them:
        return keep(root)
    if restore and (command or named):
        raise UsageError("--restore only restores: it cannot be combined with a command or a clock.")
    if restore:
        for text in holding.restore(root):
            say(one_line(text), err=True)
        return 0
    if not command and named:
        raise UsageError(
            "Clocks are held for the time of a command.", hint="Add it: rkedge clocks --cpu max -- COMMAND"
        )
    if command:
        if as_json:
            raise UsageError("--json only prints the clocks, without a command.", hint="Put it after the --.")
        others = KEEP if named else AUTO
        cpu, npu, ddr = (named.get(kind, others) for kind in ("cpu", "npu", "ddr"))
        return _hold(Wish(cpu=cpu, npu=npu, ddr=ddr), root, command)
    board, state = glance(root), StateFile(root).read()
    if as_json:
        say_json(_as_dict(board, state))
    else:
        _show(board, state)
    return 0
