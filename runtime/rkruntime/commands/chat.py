"""`rkedge chat`: a conversation at the terminal."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import click

from rkruntime.options import RuntimeOptions, SamplingOptions, load_engine, runtime_options, sampling_options


@click.command("chat")
@click.argument("bundle", metavar="BUNDLE", type=click.Path(path_type=Path))
@click.option("--system", default="", metavar="TEXT", help="System prompt.")
@click.option("--drop-oldest", is_flag=True, help="Forget the oldest turns when the context is full.")
@sampling_options
@runtime_options
def run(bundle: Path, system: str, drop_oldest: bool, sampling: SamplingOptions, runtime: RuntimeOptions) -> None:
    """Chat with the model in the folder BUNDLE.

    Without a terminal each line of standard input is a message, and standard output has the answers alone.
    """
    from rkruntime.bundle import open_bundle
    from rkruntime.localchat import LocalChat
    from rkruntime.repl import COMMANDS, Repl
    from rkruntime.terminal import Terminal, history_file

    opened = open_bundle(bundle)
    terminal = Terminal(history_file(), list(COMMANDS))
    chat = LocalChat(
        opened,
        partial(load_engine, opened, runtime, sampling),
        system=system,
        max_new_tokens=sampling.max_new_tokens or -1,
        drop_oldest=drop_oldest,
    )
    try:
        Repl(chat, terminal).run()
    finally:
        terminal.close()
        chat.close()
