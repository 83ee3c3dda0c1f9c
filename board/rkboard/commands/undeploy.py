"""`rkedge undeploy`: remove from a board what `rkedge deploy` has put there."""

from __future__ import annotations

import click

from rkboard.commands.deploy import Terminal, board_argument, confirmed, yes_option
from rkruntime.errors import ServiceError, UsageError
from rkruntime.printable import one_line
from rkruntime.terminal import say


@click.command("undeploy")
@board_argument()
@click.option("--bundle", "name", metavar="NAME", help="Remove this bundle only; it must not be in use.")
@click.option("--purge", is_flag=True, help="Also remove the conversations and the user rkedge.")
@yes_option()
def run(destination: str, name: str | None, purge: bool, yes: bool) -> None:
    """Take off a board what `rkedge deploy` has put there.

    Conversations stay unless --purge is given, and so do files that were changed since.
    """
    from rkboard.deploy.session import Session, list_of, names_of

    if name is not None and purge:
        raise UsageError("--purge removes everything, and --bundle one bundle.", hint="Give one of them.")
    what = f"bundle {one_line(name)}" if name else "RKEdge, its service and all its bundles"
    if not yes and not confirmed(f"Remove {what} from {one_line(destination)}?"):
        raise click.Abort
    with Session(destination, Terminal(yes).say) as session:
        if not name and session.call("look", places=[]).get("deployed") is False:
            say(f"Nothing was deployed on {one_line(destination)}.")
            return
        session.call("lock")
        if name:
            session.call("settle")
            session.call("drop", name=name)
            left = []
            bundles = names_of(session.call("look", places=[]), "parts").get("bundles")
            gone = isinstance(bundles, dict) and name not in bundles
        else:
            left = [str(item) for item in list_of(session.call("undo", purge=purge), "left")]
            look = session.call("look", places=[])
            gone = look.get("active") is not True and (look.get("deployed") is False or bool(left))
    for item in left:
        say(f"left: {one_line(item)}", err=True)
    if not gone:
        raise ServiceError(
            f"{one_line(destination)} says that {one_line(what)} was removed, but looking once more does not show it.",
            hint=f"rkedge status {one_line(destination)}",
        )
    say(f"Removed {what}.")
