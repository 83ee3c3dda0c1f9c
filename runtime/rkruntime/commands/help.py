"""`rkedge help`: the same as --help."""

from __future__ import annotations

import click

from rkruntime.terminal import say


@click.command("help")
@click.argument("words", metavar="[COMMAND]", nargs=-1)
@click.pass_context
def run(context: click.Context, words: tuple[str, ...]) -> None:
    """Explain a COMMAND, or list all commands."""
    assert context.parent is not None
    found = context.parent
    for word in words:
        group = found.command
        if not isinstance(group, click.Group):
            break
        _, command, _ = group.resolve_command(found, [word])
        assert command is not None
        found = click.Context(command, info_name=word, parent=found)
    say(found.get_help())
