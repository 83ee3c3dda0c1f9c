"""`rkedge plan`: predict whether a model fits a board, and its speed, before any download or conversion."""

from __future__ import annotations

from pathlib import Path

import click

from rkconvert.commands.options import dtype_option, max_context_option, release_option, revision_option
from rkconvert.plan.boards import DEFAULT_BOARD
from rkconvert.plan.planner import PlanRequest, make_plan
from rkconvert.plan.sizing import Embedding
from rkruntime.abi import DEFAULT_RELEASE
from rkruntime.cli.flags import Number, RenamedOption, json_option
from rkruntime.errors import RefusedError
from rkruntime.terminal import console, say_json


@click.command("plan")
@click.argument("model")
@revision_option()
@click.option(
    "--board", default=DEFAULT_BOARD, show_default=True, help="Plan for this board: a profile's name or file."
)
@click.option(
    "--ram",
    type=Number(1, 1 << 20),
    metavar="GIB",
    show_default="every size it is sold with",
    help="Set the board's RAM.",
)
@dtype_option()
@max_context_option()
@release_option(cls=RenamedOption, former="--toolkit", default=DEFAULT_RELEASE, show_default=True)
@click.option(
    "--embedding",
    type=click.Choice(["flash", "ram"]),
    show_default="flash since release 1.2.0, RAM before",
    help="Keep the embedding table in flash or in RAM.",
)
@click.option("--why", is_flag=True, help="Show the reasons.")
@click.option("--html", type=click.Path(dir_okay=False, path_type=Path), help="Write an HTML page.")
@json_option()
@click.pass_context
def run(
    context: click.Context,
    model: str,
    revision: str | None,
    board: str,
    ram: float | None,
    dtype: str,
    max_context: int | None,
    release: str,
    embedding: Embedding | None,
    why: bool,
    html: Path | None,
    as_json: bool,
) -> None:
    """Say whether MODEL fits a board, and how fast it will be.

    MODEL is a folder, a config.json or a hub id such as google/gemma-2-2b-it. No weights are read or downloaded.

    The exit status is 4 if the verdict is `refuse`; `rkedge convert` refuses such a model with the same status.
    """
    from rkconvert.plan import page, report

    plan = make_plan(
        PlanRequest(
            model=model,
            revision=revision,
            board=board,
            ram_gib=ram,
            dtype=dtype,
            context=max_context,
            toolkit=release,
            embedding=embedding,
        )
    )
    if html is not None:
        page.write(plan, html)
    if as_json:
        say_json(report.as_dict(plan))
    else:
        report.show(plan, console(), why=why)
    if plan.verdict.status == "refuse":
        context.exit(RefusedError.exit_code)
