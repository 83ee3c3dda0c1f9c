"""`rkedge deploy`: put a bundle, and what it needs, onto a board."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rkruntime.cli.flags import Decorated, json_option
from rkruntime.cli.options import bundle_argument
from rkruntime.errors import ModelError, RKEdgeError, UsageError
from rkruntime.printable import one_line
from rkruntime.terminal import say, say_json

if TYPE_CHECKING:
    from rkboard.deploy.plan import Planned
    from rkboard.deploy.trial import Trial

_PERCENT = 100


class Terminal:
    """The person at the terminal."""

    def __init__(self, yes: bool, plan_only: bool = False) -> None:
        self._yes, self._plan_only = yes, plan_only
        self._shown = -1

    def say(self, text: str) -> None:
        """See Person."""
        say(one_line(text), err=True)

    def agrees(self, missing: list[Planned]) -> bool:
        """See Person."""
        say("On the board, this would change:", err=True, bold=True)
        for planned in missing:
            say(f"  {planned.title:9} {one_line(planned.change)}", err=True)
        if self._plan_only:
            return False
        return self._yes or confirmed("Do it?")

    def progress(self, done: int, total: int) -> None:
        """See Person."""
        percent = done * _PERCENT // max(total, 1)
        if sys.stderr.isatty() and percent != self._shown:
            self._shown = percent
            say(f"{percent:3} % of {total / 1e6:,.1f} MB", lead="\r  ", err=True, nl=percent == _PERCENT)


def confirmed(question: str) -> bool:
    """Ask the person at the terminal. Raises UsageError if there is nobody."""
    if not sys.stdin.isatty():
        raise UsageError("This asks before it changes a board, but nobody is at the terminal.", hint="Add --yes.")
    return click.confirm(question, err=True)


def yes_option() -> Callable[[Decorated], Decorated]:
    """The option --yes."""
    return click.option("-y", "--yes", is_flag=True, help="Change the board without asking.")


def board_argument() -> Callable[[Decorated], Decorated]:
    """The argument USER@BOARD, as the parameter `destination`."""
    return click.argument("destination", metavar="USER@BOARD")


@click.command("deploy")
@bundle_argument()
@board_argument()
@click.option(
    "--library", type=click.Path(path_type=Path, dir_okay=False), help="Bring this librkllmrt.so, kept by its version."
)
@click.option("--plan", "plan_only", is_flag=True, help="Show what would be changed, and change nothing.")
@click.option(
    "--no-test", is_flag=True, help="Leave out the self-test, for which the daemon's model is unloaded for a moment."
)
@yes_option()
@json_option()
def run(
    bundle: Path, destination: str, library: Path | None, plan_only: bool, no_test: bool, yes: bool, as_json: bool
) -> None:
    """Put a BUNDLE, and what it needs, onto a board, and serve it there.

    USER@BOARD is reached with your own ssh; the account there is root, or may use sudo without a password. What is
    there already stays, and what was broken off goes on where it was. docs/deploy.md says what is put where.

    The exit status is that of the self-test there: 7 if the answers are wrong or could not be had, 9 if nothing could
    be decided.
    """
    from rkboard.deploy.plan import bundle_name
    from rkboard.deploy.session import Session, names_of
    from rkboard.deploy.trial import try_out
    from rkboard.deploy.work import deploy
    from rkruntime.bundle.manifest import open_bundle

    opened, person = open_bundle(bundle), Terminal(yes, plan_only)
    with Session(destination, person.say) as session:
        done = deploy(session, opened, library, person)
        changed = [planned.title for planned in done.changed]
        trial = None
        if done.agreed and not no_test:
            person.say("running the self-test, then asking the daemon")
            trial = try_out(session, opened)
    if not done.agreed and not plan_only:
        raise click.Abort
    emulated = bool(names_of(done.look, "status").get("emulated"))
    status = _status(trial) if trial else 0
    word = "" if plan_only or no_test else _word(destination)
    if as_json:
        say_json(
            {
                "destination": destination,
                "bundle": bundle_name(opened),
                "changed": changed,
                "planned_only": plan_only,
                "emulated": emulated,
                "trial": asdict(trial) if trial else None,
                "doctor": word or None,
            }
        )
        raise click.exceptions.Exit(status)
    if plan_only:
        return
    say("There was nothing to do." if not changed else f"{destination} serves {bundle_name(opened)}.")
    if trial:
        _show(trial, emulated)
    if word:
        say(f"doctor: {one_line(word)}")
    if status:
        say(f"It is served all the same. What was before comes back with: rkedge rollback {destination}", err=True)
        raise click.exceptions.Exit(status)
    say(f"Chat with it: rkedge chat {destination}")


def _status(trial: Trial) -> int:
    """Return the exit status that `rkedge run --selftest` has for this result."""
    from rkboard.doctor.report import WARNINGS

    if trial.verdict == "undecided":
        return WARNINGS
    return ModelError.exit_code if trial.problems else 0


def _show(trial: Trial, emulated: bool) -> None:
    mark = "emulated: " if emulated else ""
    if trial.verdict or trial.problems:
        say(f"{mark}self-test: {one_line(trial.verdict or 'it failed')}")
    for problem in trial.problems:
        say(f"  {one_line(problem)}")
    if trial.tokens_per_s:
        say(f"{mark}{trial.tokens_per_s:.2f} tokens/s, in an answer of {trial.tokens} tokens")


def _word(destination: str) -> str:
    """Return the doctor's verdict on the board, in a line."""
    from rkboard.doctor.checks import judge
    from rkboard.doctor.document import Board
    from rkboard.doctor.report import verdict
    from rkboard.doctor.visit import look

    try:
        return verdict(judge(Board(look(destination))))
    except RKEdgeError as error:
        return error.message
