"""`rkedge up`: a daemon in the background, and a chat with it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click

from rkruntime.cli.options import bundle_argument, progress_line, runtime_options, sampling_options
from rkruntime.engine.open import RuntimeOptions, SamplingOptions, given
from rkruntime.errors import RKEdgeError, ServiceError, UsageError
from rkruntime.terminal import say

if TYPE_CHECKING:
    from rkruntime.background import Background

# Number of attempts with a free port.
_PORTS: Final = 3


def _settings(bundle: Path, runtime: RuntimeOptions, sampling: SamplingOptions) -> dict[str, Any]:
    """Return the daemon's settings as its file has them."""
    wanted = {"bundle": bundle, **given(runtime), **given(sampling)}
    plain = {name: str(value.absolute()) if isinstance(value, Path) else value for name, value in wanted.items()}
    most = plain.pop("max_new_tokens", None)
    return plain if most is None else {**plain, "limits": {"max_new_tokens": most}}


def _check_same(background: Background, bundle: Path) -> None:
    """Raise UsageError if the running daemon was started with another bundle."""
    running = background.settings.bundle
    if running is None or not running.exists() or not running.samefile(bundle):
        name = running.name if running else "another model"
        raise UsageError(f"{name} is up already.", hint="End it first: rkedge down; or chat with it: rkedge chat")


def _load(background: Background) -> None:
    """Wait for the model, showing on the terminal what the daemon is doing."""
    with progress_line() as progress:
        for state in background.wait():
            progress(f"{state} ...")


def _announce(background: Background) -> None:
    listen = background.settings.listen
    address = f"http://{listen.host}:{listen.port}"
    for name, value in {
        "chat page": address,
        "OpenAI API": f"{address}/v1",
        "Ollama API": address,
        "log": str(background.log),
    }.items():
        say(f"{name:10}  {value}", err=True)
    say("It stays loaded: `rkedge chat` comes back to it, `rkedge down` ends it.", err=True)


def _undone(background: Background, work: Callable[[], None]) -> None:
    """Do a part of the start; if it fails, end the daemon, so that nothing stays in the background."""
    try:
        work()
    except BaseException:  # Ctrl-C, too, would leave it in the background.
        with suppress(RKEdgeError):
            background.stop()
        raise


def _start(background: Background, settings: dict[str, Any], port: int | None) -> bool:
    """Start the daemon and wait for its model; returns whether that was needed.

    A port that was free may be taken a moment later; another one is then tried.
    """
    for left in reversed(range(_PORTS)):
        if not background.start(settings, port):
            return False
        try:
            _undone(background, lambda: _load(background))
        except ServiceError as error:
            if port is not None or not left or not any("Cannot listen on" in line for line in error.log):
                raise
        else:
            break
    return True


def _rejoin(background: Background, settings: dict[str, Any], port: int | None) -> None:
    """Wait for the model of a running daemon; if the daemon was about to end, start another."""
    try:
        _load(background)
    except ServiceError:
        if background.runs or not _start(background, settings, port):
            raise
        say("It had been told to end; this is a new one.", err=True)


@click.command("up")
@bundle_argument()
@click.option(
    "--port", type=click.IntRange(1, 65535), show_default="8080, or any if that is taken", help="Set the port."
)
@click.option("--no-chat", is_flag=True, help="Return as soon as the model is loaded.")
@sampling_options
@runtime_options
def run(bundle: Path, port: int | None, no_chat: bool, sampling: SamplingOptions, runtime: RuntimeOptions) -> None:
    """Load a BUNDLE, a folder or its name, in the background, and chat with it.

    The daemon serves the chat page and the APIs of OpenAI and Ollama to all programs on this machine (loopback), and
    stays until `rkedge down`. If it is up already, this is a chat with it.
    """
    from rkruntime.background import Background
    from rkruntime.bundle.manifest import open_bundle
    from rkruntime.chat.remotechat import RemoteChat
    from rkruntime.chat.ways import on_this_machine
    from rkruntime.commands.chat import talk

    open_bundle(bundle)
    background = Background()
    settings = _settings(bundle, runtime, sampling)
    if not _start(background, settings, port):
        _check_same(background, bundle)
        say("It is up already, with the options that it was started with.", err=True)
        _rejoin(background, settings, port)
    _announce(background)
    if not no_chat:
        way = on_this_machine(background.settings.listen.socket or background.socket, str(background.log))
        talk(RemoteChat(way, session=None, system="", options={}))
