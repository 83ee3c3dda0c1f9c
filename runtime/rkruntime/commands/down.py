"""`rkedge down`: end the daemon that `rkedge up` started."""

from __future__ import annotations

import click

from rkruntime.cli.options import progress_line
from rkruntime.terminal import say


@click.command("down")
def run() -> None:
    """End the daemon that `rkedge up` started; answers that are being given may finish."""
    from rkruntime.background import Background

    with progress_line() as progress:
        progress("ending the daemon ...")
        ended = Background().stop()
    say("The daemon has ended." if ended else "Nothing is up.")
