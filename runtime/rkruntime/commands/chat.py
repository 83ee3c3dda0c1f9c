"""`rkedge chat`: a conversation at the terminal."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from rkruntime.cli.options import open_engine, runtime_options, sampling_options
from rkruntime.engine.open import RuntimeOptions, SamplingOptions
from rkruntime.errors import UsageError

if TYPE_CHECKING:
    from rkruntime.chat.localchat import LocalChat
    from rkruntime.chat.remotechat import RemoteChat


def _is_board(model: str) -> bool:
    """Whether `model` is an ssh destination, not a folder."""
    return not Path(model).exists() and ("@" in model or model.startswith("ssh://"))


def _local(model: str, system: str, drop_oldest: bool, sampling: SamplingOptions, runtime: RuntimeOptions) -> LocalChat:
    from rkruntime.bundle.manifest import open_bundle
    from rkruntime.chat.localchat import LocalChat

    bundle = open_bundle(Path(model))
    return LocalChat(
        bundle,
        partial(open_engine, bundle, runtime, sampling),
        system=system,
        max_new_tokens=sampling.max_new_tokens or -1,
        drop_oldest=drop_oldest,
    )


def _remote(model: str, system: str, drop_oldest: bool, sampling: SamplingOptions, session: str | None) -> RemoteChat:
    from rkruntime.chat.remotechat import ATTACH_VARIABLE, RemoteChat

    wishes = {**vars(sampling), "max_tokens": sampling.max_new_tokens, "drop_oldest": drop_oldest or None}
    del wishes["max_new_tokens"]
    options = {name: value for name, value in wishes.items() if value is not None}
    remote = os.environ.get(ATTACH_VARIABLE, "")
    return RemoteChat(model, remote=remote, session=session, system=system, options=options)


@click.command("chat")
@click.argument("model", metavar="BUNDLE|USER@BOARD")
@click.option("--system", default="", metavar="TEXT", help="Set the system prompt.")
@click.option("--session", metavar="NAME", help="Continue or start this conversation (on a board only).")
@click.option("--drop-oldest", is_flag=True, help="Forget the oldest turns when the context is full.")
@sampling_options
@runtime_options
def run(
    model: str,
    system: str,
    session: str | None,
    drop_oldest: bool,
    sampling: SamplingOptions,
    runtime: RuntimeOptions,
) -> None:
    """Chat with the model in a folder, or over SSH with the one that `rkedge serve` runs on a board.

    Without a terminal, each line of standard input is a message as it is, also an empty one or one that looks like a
    command, and only the answers go to standard output.
    """
    from rkruntime.chat.repl import COMMANDS, Repl
    from rkruntime.terminal import Terminal, history_file

    terminal = Terminal(history_file(), list(COMMANDS))
    chat: LocalChat | RemoteChat
    if _is_board(model):
        if runtime != RuntimeOptions():
            raise UsageError("On a board, --library, --release, --max-context and --force are settings of the daemon.")
        chat = _remote(model, system, drop_oldest, sampling, session)
    else:
        if session is not None:
            raise UsageError(
                "--session names a conversation on a board.", hint="Use /save and /load to keep one in a file."
            )
        chat = _local(model, system, drop_oldest, sampling, runtime)
    try:
        Repl(chat, terminal).run()
    finally:
        terminal.close()
        chat.close()
