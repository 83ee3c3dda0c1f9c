"""`rkedge serve`: the daemon."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from rkruntime.cli.options import bundle_argument, runtime_options
from rkruntime.engine.open import RuntimeOptions, given

_FILE = click.Path(path_type=Path, dir_okay=False)


@click.command("serve")
@bundle_argument(required=False)
@click.option("--config", type=_FILE, help="Read settings from this file; docs/settings.md explains them.")
@click.option(
    "--socket",
    type=_FILE,
    show_default="$RKEDGE_SOCKET, else the service's or your own",
    help="Listen on this Unix socket.",
)
@click.option("--host", show_default="127.0.0.1", help="Set the TCP address; any but loopback requires --api-keys.")
@click.option("--port", type=click.IntRange(0, 65535), help="Listen on this TCP port as well; 0 takes any free one.")
@click.option("--api-keys", type=_FILE, help="Read API keys from this file: NAME KEY on each line, mode 600.")
@runtime_options
def run(bundle: Path | None, config: Path | None, runtime: RuntimeOptions, **listen: Any) -> None:
    """Serve the model of a BUNDLE, a folder or its name, on a Unix socket, and on loopback TCP with --port.

    Clients are `rkedge chat user@board` over SSH, programs that speak OpenAI's or Ollama's API, and the chat page in a
    browser. Command-line options override the settings file.
    """
    import asyncio

    from rkruntime.bundle.manifest import open_bundle
    from rkruntime.serve.server import Daemon
    from rkruntime.serve.settings import Settings, load_settings
    from rkruntime.serve.systemd import log_to_stderr

    def settings() -> Settings:
        base = load_settings(config) if config else Settings()
        top = {"bundle": bundle or base.bundle, **given(runtime)}
        there = {name: value for name, value in listen.items() if value is not None}
        return replace(base, **top, listen=replace(base.listen, **there))

    first = settings()
    if first.bundle is not None:
        open_bundle(first.bundle)  # a wrong name fails here, not in a daemon that waits for the folder to appear
    log_to_stderr(first.log_level)

    async def serve() -> None:
        await Daemon(first, settings).run()

    asyncio.run(serve())
