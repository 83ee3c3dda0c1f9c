"""`rkedge rollback`: what a board served before, or another of its bundles."""

from __future__ import annotations

import click

from rkboard.commands.deploy import Terminal, board_argument, confirmed, yes_option
from rkruntime.printable import one_line
from rkruntime.terminal import say


@click.command("rollback")
@board_argument()
@click.option("--to", metavar="NAME", help="Use this bundle of the board instead; `rkedge status` names them.")
@yes_option()
def run(destination: str, to: str | None, yes: bool) -> None:
    """Let a board serve what it served before: bundle, program and library together.

    Done twice, it returns to where it was.
    """
    from rkboard.deploy.plan import in_use
    from rkboard.deploy.session import Session, names_of, text_of

    with Session(destination, Terminal(yes).say) as session:
        look = session.call("look", places=[])
        goal = to or text_of(names_of(look, "previous"), "bundles")
        if (
            goal
            and not yes
            and not confirmed(f"Serve {one_line(goal)} instead of {one_line(in_use(look, 'bundles'))}?")
        ):
            raise click.Abort
        session.call("lock")
        session.call("settle")
        session.call("switch", parts={"bundles": to} if to else None)
        now = in_use(session.call("look", places=[]), "bundles")
    say(f"{destination} serves {one_line(now)}.")
