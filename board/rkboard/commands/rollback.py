"""`rkedge rollback`: return to what a board served before, or to another of its bundles."""

from __future__ import annotations

from typing import Any

import click

from rkboard.commands.deploy import Terminal, board_argument, confirmed, yes_option
from rkruntime.errors import ServiceError
from rkruntime.printable import one_line
from rkruntime.terminal import say


def _goal(look: dict[str, Any], to: str | None) -> tuple[str, str]:
    """Return the bundle to be served and the one in use; empty for none."""
    from rkboard.deploy.plan import in_use
    from rkboard.deploy.session import names_of, text_of

    return to or text_of(names_of(look, "previous"), "bundles"), in_use(look, "bundles")


@click.command("rollback")
@board_argument()
@click.option("--to", metavar="NAME", help="Use this bundle of the board instead; `rkedge status` names them.")
@yes_option()
def run(destination: str, to: str | None, yes: bool) -> None:
    """Let a board serve what it served before: bundle, program and library together.

    Done twice, it returns to where it was.
    """
    from rkboard.deploy.plan import in_use
    from rkboard.deploy.session import Session

    with Session(destination, Terminal(yes).say) as session:
        goal, used = _goal(session.call("look", places=[]), to)
        if goal and not yes and not confirmed(f"Serve {one_line(goal)} instead of {one_line(used)}?"):
            raise click.Abort
        session.call("lock")
        session.call("settle")
        if not yes and _goal(session.call("look", places=[]), to) != (goal, used):
            raise ServiceError("The board has changed since you agreed.", hint="Look at it again: rkedge status")
        session.call("switch", parts={"bundles": to} if to else None)
        now = in_use(session.call("look", places=[]), "bundles")
    say(f"{destination} serves {one_line(now)}.")
