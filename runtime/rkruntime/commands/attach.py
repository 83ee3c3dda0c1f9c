"""`rkedge attach`: what `rkedge chat user@board` starts on the board, over SSH."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path

import click

from rkruntime.errors import BodyError, RefusedError, UsageError
from rkruntime.terminal import say


def _check_forced() -> None:
    """As a forced command this stands for whatever was asked for: say so, if that was something else.

    Raises:
        RefusedError: it was.
    """
    asked = os.environ.get("SSH_ORIGINAL_COMMAND")
    if not asked:
        return
    try:
        words = shlex.split(asked)
    except ValueError:
        words = []
    if "attach" not in words:
        raise RefusedError(
            "This key may chat, and nothing else.",
            hint="Use it as: rkedge chat USER@BOARD",
            details={"asked": asked[:200]},
        )


@click.command("attach")
@click.option("--socket", type=click.Path(path_type=Path, dir_okay=False), help="Connect to this socket of the daemon.")
@click.option(
    "--user", metavar="NAME", help="Act for this one of several people behind the account.  [default: the account]"
)
def run(socket: Path | None, user: str | None) -> None:
    """Connect standard input and output to the daemon, for `rkedge chat user@board`.

    Fit for a forced command; docs/serve.md has the line.
    """
    from rkruntime.chat.attach import Bridge
    from rkruntime.serve.settings import default_socket
    from rkruntime.serve.users import check_name

    _check_forced()
    if user is not None:
        try:
            check_name(user, "user")
        except BodyError as error:
            raise UsageError(error.message) from error
    if sys.stdin.isatty():
        say("This speaks JSON, for programs; a person uses `rkedge chat`.", err=True)
    Bridge(socket or default_socket(), user, sys.stdin.buffer, sys.stdout.buffer).run()
