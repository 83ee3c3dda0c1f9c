"""`rkedge logs`: the end of the log of a board's daemon."""

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
def run(destination: str, lines: int) -> None:
    """Show the end of the log of a board's daemon."""
    from rkboard.deploy.session import Session

    with Session(destination, lambda _: None) as session:
        say(printable(str(session.call("log", lines=lines).get("log", ""))))
