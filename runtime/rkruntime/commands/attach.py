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
    """Check what the client requested, if this is a forced command, which runs in place of the request.

    Raises:
        RefusedError: The client requested something other than `attach`.
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
            "This key may only be used to chat.",
            hint="Use it as: rkedge chat USER@BOARD",
            details={"asked": asked[:200]},
        )


@click.command("attach")
@click.option(
    "--socket",
    type=click.Path(path_type=Path, dir_okay=False),
    show_default="$RKEDGE_SOCKET, else the service's or your own",
    help="Connect to the daemon on this Unix socket.",
)
@click.option(
    "--user", metavar="NAME", show_default="the account", help="Act for this person, one of several behind the account."
)
def run(socket: Path | None, user: str | None) -> None:
    """Connect standard input and output to the daemon, for `rkedge chat user@board`.

    It can be the forced command of an SSH key; docs/serve.md has the line for authorized_keys.
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
        say("This command speaks JSON, for programs; to chat, use `rkedge chat`.", err=True)
    Bridge(socket or default_socket(), user, sys.stdin.buffer, sys.stdout.buffer).run()
