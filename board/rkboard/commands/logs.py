"""`rkedge logs`: the end of the log of a board's daemon, and the lines that follow."""

from __future__ import annotations

import click

from rkboard.commands.deploy import board_argument
from rkruntime.printable import printable
from rkruntime.terminal import say


@click.command("logs")
@board_argument()
@click.option(
    "-n", "--lines", type=click.IntRange(1, 10000), default=100, show_default=True, help="Show so many lines."
)
@click.option("-f", "--follow", is_flag=True, help="Go on with what comes after them, until Ctrl-C.")
def run(destination: str, lines: int, follow: bool) -> None:
    """Show the end of the log of a board's daemon."""
    from rkboard.deploy.session import Session

    with Session(destination, say if follow else lambda _: None, endless=follow) as session:
        if not follow:
            say(printable(str(session.call("log", lines=lines).get("log", ""))))
            return
        try:
            session.follow(lines)
        except KeyboardInterrupt:  # Ctrl-C is how --follow ends
            return
