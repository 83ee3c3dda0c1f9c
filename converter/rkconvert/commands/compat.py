"""`rkedge compat`: what runs where, with the evidence."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from rkconvert.commands.options import revision_option
from rkconvert.rules.quantized_types import PLATFORMS, known_types
from rkruntime.cli.flags import TOKENS, json_option
from rkruntime.files import atomic_file
from rkruntime.terminal import console, say, say_json

_FILE = click.Path(dir_okay=False, path_type=Path)
_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


@click.command("compat")
@click.argument("model")
@revision_option()
@click.option(
    "--dtype",
    "types",
    type=click.Choice(known_types()),
    multiple=True,
    show_default="every type",
    help="Only this type; may be repeated.",
)
@click.option(
    "--platform",
    "socs",
    type=click.Choice(PLATFORMS),
    multiple=True,
    show_default="each that RKEdge knows",
    help="Only this SoC; may be repeated.",
)
@click.option("--release", "releases", multiple=True, show_default="every release", help="Only this; may be repeated.")
@click.option(
    "--cores",
    type=click.IntRange(1, 3),
    multiple=True,
    show_default="all of the SoC",
    help="Only with this number of NPU cores; may be repeated.",
)
@click.option(
    "--max-context", "contexts", type=TOKENS, multiple=True, show_default="4096", help="Set the context length."
)
@click.option(
    "--adapter",
    "loras",
    type=click.Choice(["merged", "runtime"]),
    multiple=True,
    show_default="merged",
    help="Plan for an adapter merged into the model, or beside it; may be repeated.",
)
@click.option(
    "--results",
    type=_FOLDER,
    multiple=True,
    help="Read the boards' results in this folder, besides those that come with RKEdge; may be repeated.",
)
@click.option("--emulator/--no-emulator", default=True, show_default=True, help="Load each w8a8 type in the emulator.")
@click.option("--why", is_flag=True, help="Show the reasons.")
@click.option("--html", type=_FILE, help="Write an HTML page.")
@click.option("--markdown", type=_FILE, help="Write a Markdown file.")
@json_option()
def run(
    model: str,
    revision: str | None,
    results: tuple[Path, ...],
    emulator: bool,
    why: bool,
    html: Path | None,
    markdown: Path | None,
    as_json: bool,
    **wanted: Any,
) -> None:
    """Say what becomes of MODEL with each type, SoC and release: works, slower, refused, fails, and how that is known.

    MODEL is a folder, a config.json or a hub id such as google/gemma-2-2b-it. No weights are read or downloaded; for
    the emulator, files of the model's sizes are loaded.
    """
    from rkconvert.compat import page, report
    from rkconvert.compat.case import USUAL_CONTEXT, Case, Wanted
    from rkconvert.compat.emulated import EmulatedLoads
    from rkconvert.compat.matrix import fill
    from rkconvert.compat.results import Results, shipped_folder
    from rkconvert.plan.source import read_source

    given = {name: values for name, values in wanted.items() if values}
    cells = Wanted(**{"contexts": (USUAL_CONTEXT,), **given}).cells()
    shipped, given_results = Results([shipped_folder()]), Results(results)
    case = Case.of(read_source(model, revision))
    for note in given_results.left_out(case):
        say(f"note: {note}", err=True, dim=True)
    loads = [EmulatedLoads(case, lambda line: say(line, err=True, dim=True))] if emulator else []
    matrix = fill(case, cells, [shipped, given_results, *loads])
    if html is not None:
        page.write(matrix, html)
    if markdown is not None:
        with atomic_file(markdown) as partial:
            partial.write_text(report.markdown(matrix), encoding="utf-8")
    if as_json:
        say_json(report.as_dict(matrix))
    else:
        report.show(matrix, console(), why=why)
