"""`rkedge chat`: a conversation at the terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rkruntime.cli.flags import TEXT
from rkruntime.cli.options import BundleName, open_engine, runtime_options, sampling_options
from rkruntime.engine.open import RuntimeOptions, SamplingOptions
from rkruntime.errors import BundleError, UsageError
from rkruntime.printable import one_line
from rkruntime.terminal import say

if TYPE_CHECKING:
    from rkruntime.chat.localchat import LocalChat
    from rkruntime.chat.remotechat import RemoteChat
    from rkruntime.chat.ways import Way


class BundleOrHost(BundleName):
    """A bundle as a Path, or the result of `host` for a destination of ssh. A bundle's name is never a host.

    Args:
        is_host: Whether a text that no bundle has is one; by default, what only ssh could take.
    """

    def __init__(self, host: Callable[[str], Any], is_host: Callable[[str], bool] | None = None) -> None:
        super().__init__("bundle or host", "For a board that ~/.ssh/config does not name, write user@board.")
        self._host, self._is_host = host, is_host

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """See click."""
        from rkruntime.bundle.manifest import is_bundle
        from rkruntime.chat.ways import is_destination

        if not isinstance(value, str):
            return value
        with suppress(BundleError):
            if is_bundle(found := super().convert(value, param, ctx)):
                return found
        if (self._is_host or is_destination)(value):
            return self._host(value)
        path = super().convert(value, param, ctx)
        if path.is_dir() and value == path.name:  # such as `board`, in the folder of this project
            raise BundleError(
                f"{path} is a folder here but not a bundle, and no host of ~/.ssh/config.", hint=self.hint
            )
        return path


def _over_ssh(destination: str) -> Way:
    from rkruntime.chat.ways import over_ssh

    return over_ssh(destination)


def daemon_here() -> Way:
    """Return the way to the daemon on this machine. Raises ServiceError if none answers."""
    from rkruntime.background import local_daemon
    from rkruntime.chat.attach import UnixConnection
    from rkruntime.chat.ways import on_this_machine

    socket, log = local_daemon()
    connection = UnixConnection(socket)
    connection.connect()
    connection.close()
    return on_this_machine(socket, log)


def options_of_questions(sampling: SamplingOptions, drop_oldest: bool) -> Mapping[str, Any]:
    """Return the fields that each question to a daemon has."""
    wishes = {**vars(sampling), "max_tokens": sampling.max_new_tokens, "drop_oldest": drop_oldest or None}
    del wishes["max_new_tokens"]
    return {name: value for name, value in wishes.items() if value is not None}


def talk(chat: LocalChat | RemoteChat) -> None:
    """Hold a conversation at the terminal until its end, then close the chat."""
    from rkruntime.chat.repl import COMMANDS, Repl
    from rkruntime.terminal import Terminal, history_file

    terminal = Terminal(history_file(), list(COMMANDS))
    try:
        Repl(chat, terminal).run()
    finally:
        terminal.close()
        chat.close()


def _local(path: Path, system: str, drop_oldest: bool, sampling: SamplingOptions, runtime: RuntimeOptions) -> LocalChat:
    from rkruntime.bundle.manifest import open_bundle
    from rkruntime.chat.localchat import LocalChat

    bundle = open_bundle(path)
    return LocalChat(
        bundle,
        partial(open_engine, bundle, runtime, sampling),
        system=system,
        max_new_tokens=sampling.max_new_tokens or -1,
        drop_oldest=drop_oldest,
    )


def _show_sessions(chat: RemoteChat) -> None:
    names = chat.sessions()
    for name, size in names.items():
        say(f"{one_line(name)}  {size}")
    if not names:
        say("There are no conversations there.", err=True)


@click.command("chat")
@click.argument("model", metavar="[BUNDLE|HOST]", type=BundleOrHost(_over_ssh), required=False)
@click.option("--system", type=TEXT, default="", metavar="TEXT", help="Set the system prompt.")
@click.option("--session", metavar="NAME", help="Continue or start this conversation (with a daemon only).")
@click.option("--sessions", is_flag=True, help="List your conversations with a daemon.")
@click.option("--drop-oldest", is_flag=True, help="Forget the oldest turns when the context is full.")
@sampling_options
@runtime_options
def run(
    model: Path | Way | None,
    system: str,
    session: str | None,
    sessions: bool,
    drop_oldest: bool,
    sampling: SamplingOptions,
    runtime: RuntimeOptions,
) -> None:
    """Chat with a bundle here, with the daemon on this machine, or over SSH with the one on a board.

    BUNDLE is a folder or a name (`rkedge list`), HOST is user@board, ssh://user@board:port or a host of ~/.ssh/config.
    A name that a bundle has is that bundle, whatever ~/.ssh/config says. With neither, the chat is with the daemon on
    this machine, which `rkedge up`, `rkedge serve` or systemd has started.

    Without a terminal, each line of standard input is a message as it is, also an empty one or one that looks like a
    command, and only the answers go to standard output.
    """
    if isinstance(model, Path):
        if session is not None or sessions:
            raise UsageError(
                "Conversations have names with a daemon only.", hint="Use /save and /load to keep one in a file."
            )
        talk(_local(model, system, drop_oldest, sampling, runtime))
        return
    from rkruntime.chat.remotechat import RemoteChat

    if runtime != RuntimeOptions():
        raise UsageError("With a daemon, --library, --release, --max-context and --force are among its own settings.")
    options = options_of_questions(sampling, drop_oldest)
    chat = RemoteChat(model or daemon_here(), session=session, system=system, options=options)
    if sessions:
        _show_sessions(chat)
        chat.close()
    else:
        talk(chat)
