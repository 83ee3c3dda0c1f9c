"""`rkedge fleet`: work on the many boards that a file names."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, NoReturn

import click

from rkboard.commands.deploy import confirmed, yes_option
from rkruntime.cli.flags import json_option
from rkruntime.files import atomic_file
from rkruntime.printable import one_line
from rkruntime.terminal import say, say_json

if TYPE_CHECKING:
    from rkboard.fleet.boards import Boards
    from rkboard.fleet.inventory import Entry
    from rkboard.fleet.rollout import Outcome, Work

SCHEMA: Final = "rkedge-fleet/1"
_COLOURS: Final = {"done": "green", "failed": "red", "not touched": "yellow", "nothing to do": None}


def _inventory(command: Callable[..., None]) -> Callable[..., None]:
    """Add the argument INVENTORY and the options that choose boards from it."""
    for option in (
        click.option("--board", "names", metavar="NAME", multiple=True, help="Only this board; may be repeated."),
        click.option("--group", "groups", metavar="NAME", multiple=True, help="Only this group; may be repeated."),
        click.argument("inventory", type=click.Path(path_type=Path, dir_okay=False)),
    ):
        command = option(command)
    return command


_AT_ONCE = click.option(
    "--at-once", type=click.IntRange(1, 64), default=8, show_default=True, help="Work on this many boards at once."
)


def _chosen(inventory: Path, groups: Sequence[str], names: Sequence[str]) -> list[Entry]:
    from rkboard.fleet.inventory import chosen, read_inventory

    return chosen(read_inventory(inventory), groups, names)


def _boards() -> Boards:
    from rkboard.fleet.boards import Boards

    return Boards(lambda text: say(one_line(text), err=True, dim=True))


@click.group("fleet")
def run() -> None:
    """Do on many boards, which a file names, what the commands for one board do on one.

    docs/fleet.md says what is in the file.
    """


@run.command("deploy")
@_inventory
@_AT_ONCE
@click.option("--plan", "plan_only", is_flag=True, help="Show what would be changed, and change nothing.")
@yes_option()
@json_option()
def deploy(
    inventory: Path, groups: Sequence[str], names: Sequence[str], at_once: int, plan_only: bool, yes: bool,
    as_json: bool,
) -> None:  # fmt: skip
    """Put onto each board the bundle that the inventory names for it, and serve it there.

    All of them are looked at first. Then it begins with one board. Once its bundle has passed the self-test there, the
    rest follows, several at once; when one fails, no further one is begun. A board that has everything is left alone.
    """
    boards = _boards()
    _careful(boards.plan, boards.deploy, _chosen(inventory, groups, names), at_once, plan_only, yes, as_json)


@run.command("rollback")
@_inventory
@_AT_ONCE
@yes_option()
@json_option()
def rollback(
    inventory: Path, groups: Sequence[str], names: Sequence[str], at_once: int, yes: bool, as_json: bool
) -> None:
    """Let each board serve what it served before: first one of them, then the rest, until one fails."""
    boards = _boards()
    _careful(boards.before, boards.roll_back, _chosen(inventory, groups, names), at_once, False, yes, as_json)


@run.command("status")
@_inventory
@_AT_ONCE
@json_option()
def status(inventory: Path, groups: Sequence[str], names: Sequence[str], at_once: int, as_json: bool) -> None:
    """Say what each board serves. The exit status is 0 if a daemon answers on every one."""
    from rkboard.fleet.rollout import Rollout

    outcomes = Rollout(_chosen(inventory, groups, names), _boards().status, at_once, careful=False).run()
    _finish(outcomes, as_json)


@run.command("proxy")
@_inventory
@click.option("--for", "program", type=click.Choice(["litellm", "nginx"]), required=True, help="Write it for this one.")
@click.option("-o", "--output", type=click.Path(path_type=Path, dir_okay=False), help="Write it to this file.")
@click.option(
    "--listen", metavar="ADDRESS:PORT", default="127.0.0.1:8090", show_default=True, help="Let nginx listen here."
)
def proxy(
    inventory: Path, groups: Sequence[str], names: Sequence[str], program: str, output: Path | None, listen: str
) -> None:
    """Print the configuration of a proxy that answers for all boards: the least busy first, retries, health checks.

    The boards need a `url` in the inventory. docs/fleet.md says how to start the proxy, and what was tried.
    """
    from rkboard.fleet import proxy as configurations

    entries = _chosen(inventory, groups, names)
    made = configurations.litellm(entries) if program == "litellm" else configurations.nginx(entries, listen)
    if output is None:
        say(made, nl=False)
        return
    with atomic_file(output) as partial:
        partial.write_text(made, encoding="utf-8")


def _careful(
    look: Work, work: Work, entries: Sequence[Entry], at_once: int, plan_only: bool, yes: bool, as_json: bool
) -> None:
    """Look at all boards, ask, and do the work: first on one of the boards that it changes, then on the rest."""
    from rkboard.fleet.rollout import Rollout

    looks = [one.as_looked_at for one in Rollout(entries, look, at_once, careful=False).run()]
    todo = [one.entry for one in looks if one.state == "not touched"]
    unreachable = any(one.error for one in looks)
    for one in looks if not as_json and not unreachable else ():
        _show_changes(one)
    if unreachable:
        say("Nothing was changed on any board.", err=True)
    if unreachable or plan_only or not todo:
        _finish(looks, as_json)
    if not yes and not confirmed(f"Do it, first on {todo[0].name}?"):
        raise click.Abort
    rollout = Rollout(todo, work, at_once, careful=True)
    try:
        rollout.run()
    except KeyboardInterrupt:
        _report(_merged(looks, rollout.outcomes), as_json)
        raise
    _finish(_merged(looks, rollout.outcomes), as_json)


def _merged(looks: Sequence[Outcome], outcomes: Sequence[Outcome]) -> list[Outcome]:
    """Return the outcome of each board: of the work, or of the look if there was nothing to do."""
    came = {one.entry.name: one for one in outcomes}
    return [came.get(one.entry.name, one) for one in looks]


def _show_changes(one: Outcome) -> None:
    say(one_line(f"{one.entry.name} ({one.entry.destination}):"), err=True, bold=True)
    for change in one.facts.get("changes") or ["nothing to do"]:
        say(f"  {one_line(change)}", err=True)


def _finish(outcomes: Sequence[Outcome], as_json: bool) -> NoReturn:
    """Print the outcomes, and exit with the status of the first board that failed."""
    _report(outcomes, as_json)
    failed = next((one.error for one in outcomes if one.error), None)
    raise click.exceptions.Exit(failed.exit_code if failed else 0)


def _report(outcomes: Sequence[Outcome], as_json: bool) -> None:
    if as_json:
        say_json({"schema": SCHEMA, "boards": [one.as_dict() for one in outcomes]})
    else:
        _show(outcomes)


def _show(outcomes: Sequence[Outcome]) -> None:
    names, groups = (
        max(len(text) for text in texts)
        for texts in zip(*((one.entry.name, one.entry.group) for one in outcomes), strict=True)
    )
    for one in outcomes:
        said = one_line(one.error.message if one.error else _said(one.facts))
        state = click.style(f"{one.state:13}", fg=_COLOURS[one.state])
        say(f"  {said}", lead=f"{one.entry.name:{names}}  {one.entry.group:{groups}}  {state}")
        if one.error and one.error.hint:
            say(one_line(one.error.hint), lead="  hint: ", dim=True)
    changed = [one.entry.name for one in outcomes if one.state == "done" and one.facts.get("changed")]
    if changed and any(one.error for one in outcomes):
        say(f"Changed were {', '.join(changed)}. They go back with: rkedge fleet rollback INVENTORY "
            f"{' '.join(f'--board {name}' for name in changed)}", err=True)  # fmt: skip


def _said(facts: Mapping[str, Any]) -> str:
    """Return the facts about a board that did not fail, in a line."""
    emulated = "emulated: " if facts.get("emulated") else ""
    parts = [str(facts.get("bundle", ""))]
    parts += [f"{facts['model']}, {facts['daemon']}"] if "daemon" in facts else []
    parts += [f"{emulated}{facts['tokens_per_s']} tokens/s"] if facts.get("tokens_per_s") else []
    return "; ".join(filter(None, parts))
