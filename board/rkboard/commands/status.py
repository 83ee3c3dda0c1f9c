"""`rkedge status`: what is on a board, and what it serves."""

from __future__ import annotations

from typing import Any

import click

from rkboard.commands.deploy import board_argument
from rkruntime.cli.flags import json_option
from rkruntime.errors import ServiceError
from rkruntime.printable import one_line
from rkruntime.terminal import say, say_json


@click.command("status")
@board_argument()
@json_option()
def run(destination: str, as_json: bool) -> None:
    """Say what `rkedge deploy` has put onto a board, and what its daemon serves.

    The exit status is 0 if a daemon answers there, else 8.
    """
    from rkboard.deploy.session import Session

    with Session(destination, lambda _: None) as session:
        look = session.call("look", places=[])
    if as_json:
        say_json({key: value for key, value in look.items() if key != "event"})
    else:
        _show(look)
    if not isinstance(look.get("status"), dict):
        raise click.exceptions.Exit(ServiceError.exit_code)


def _show(look: dict[str, Any]) -> None:
    from rkboard.deploy.plan import in_use
    from rkboard.deploy.session import names_of, text_of

    status = names_of(look, "status")
    if status:
        facts = [text_of(status, "model"), text_of(status, "state")]
        facts += [f"RKLLM {text_of(status, 'release')}"] if text_of(status, "release") else []
        facts += ["emulated"] if status.get("emulated") else []
        say(one_line(f"The daemon answers: {', '.join(facts)}"), bold=True)
    else:
        say("No daemon answers.", bold=True)
    if look.get("pending"):
        say("A switch was begun and did not end: the next deploy or rollback completes it.")
    before = names_of(look, "previous")
    for kind in ("bundles", "programs", "libraries"):
        for name, info in names_of(look, "parts", kind).items():
            use = "in use" if name == in_use(look, kind) else "before" if name == text_of(before, kind) else ""
            size = names_of({"info": info}, "info").get("size")
            shown = f"{size / 1e9:.2f} GB" if isinstance(size, int) and 0 <= size < 1 << 60 else ""
            say(one_line(f"  {kind:10} {name}  {shown}  {use}").rstrip())
    free = look.get("free")
    if isinstance(free, int) and 0 <= free < 1 << 60:
        say(f"{free / 1e9:.1f} GB free")
