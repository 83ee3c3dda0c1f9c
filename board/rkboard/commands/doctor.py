"""`rkedge doctor`: what is wrong with a board, why it matters, and what repairs it."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import click

from rkboard.doctor import repair, report
from rkboard.doctor.checks import judge
from rkboard.doctor.document import Board
from rkboard.doctor.finding import Finding, Fix
from rkboard.doctor.visit import look
from rkruntime.cli.flags import json_option
from rkruntime.errors import UsageError
from rkruntime.terminal import say, say_json


class _Practice:
    """Looks at one board, and again after a repair."""

    def __init__(self, destination: str | None, root: Path | None, bundle: Path | None, sudo: bool) -> None:
        self.destination, self._root, self._sudo = destination, root, sudo
        self._model = None
        if bundle is not None:
            from rkruntime.bundle.manifest import open_bundle

            opened = open_bundle(bundle)
            if opened.manifest.target == "emulator":
                raise UsageError(
                    f"{opened.manifest.name} was converted for the emulator, which runs without a board.",
                    hint="For a board, convert it with --target toolkit.",
                )
            self._model = opened.known

    def look(self) -> tuple[Board, list[Finding]]:
        document = look(self.destination, self._root, sudo=self._sudo)
        board = Board(document, time.time() if self.destination else None, self._model)
        return board, judge(board)


def _wanted(fixes: list[Fix], yes: bool) -> list[Fix]:
    """Return the repairs that the user agrees to."""
    if yes:
        return fixes
    if not sys.stdin.isatty():
        raise UsageError("--fix asks before each change, but nobody is at the terminal.", hint="Add --yes to agree.")
    return [fix for fix in fixes if click.confirm(f"Run: {fix}", err=True)]


def _mend(practice: _Practice, board: Board, findings: list[Finding], yes: bool) -> tuple[Board, list[Finding]]:
    """Run the repairs that the user agrees to; return the board and its findings afterwards."""
    fixes = repair.fixes_of(findings)
    if not fixes:
        say("There is nothing that --fix could do.", err=True)
        return board, findings
    for fix in (wanted := _wanted(fixes, yes)):
        problem = repair.apply(fix, practice.destination, root=board.me.uid == 0)
        say(f"{fix}: {problem or 'done'}", err=True)
    if not wanted:
        return board, findings
    before = {finding.code for finding in findings if finding.status != "ok"}
    board, findings = practice.look()
    mended = before - {finding.code for finding in findings if finding.status != "ok"}
    say(f"Mended: {', '.join(sorted(mended)) or 'nothing yet (a new login or a reboot may be needed)'}.", err=True)
    return board, findings


@click.command("doctor")
@click.argument("destination", metavar="[USER@BOARD]", required=False)
@click.option(
    "--bundle", type=click.Path(path_type=Path, file_okay=False), help="Also judge whether this bundle would run there."
)
@click.option("--fix", is_flag=True, help="Offer the safe repairs, then run those that you agree to, with sudo.")
@click.option("--yes", is_flag=True, help="Agree to every repair that --fix offers.")
@click.option("--sudo", is_flag=True, help="Look as root, through a sudo that asks for no password.")
@click.option("-v", "--verbose", is_flag=True, help="Also show the findings that are ok.")
@click.option(
    "--root",
    type=click.Path(path_type=Path, file_okay=False, exists=True),
    help="Look at this file tree of a board instead.",
)
@json_option()
def run(
    destination: str | None,
    bundle: Path | None,
    fix: bool,
    yes: bool,
    sudo: bool,
    verbose: bool,
    root: Path | None,
    as_json: bool,
) -> None:
    """Say what is wrong with a board, why it matters, and what mends it.

    Without USER@BOARD, it looks at this machine. Over SSH nothing is installed there, and nothing is changed unless you
    agree (--fix); python3 is enough. docs/doctor.md lists the checks.

    The exit status is 0 if nothing is worse than a note, 9 if there are warnings, 4 if there are failures.
    """
    if root is not None and (destination or fix or sudo):
        raise UsageError("--root looks at a file tree of this machine: leave out the board, --fix and --sudo.")
    if yes and not fix:
        raise UsageError("--yes agrees to repairs, but without --fix there are none.", hint="Add --fix.")
    practice = _Practice(destination, root, bundle, sudo)
    board, findings = practice.look()
    if fix:
        if not as_json:
            report.show(board, findings, every=verbose)
        board, findings = _mend(practice, board, findings, yes)
    if as_json:
        say_json(report.as_dict(board, findings, destination))
    else:
        report.show(board, findings, every=verbose)
    raise click.exceptions.Exit(report.exit_status(findings))
