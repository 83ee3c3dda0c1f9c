"""`rkedge compat`: what runs where, with the evidence."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import click
from click.core import ParameterSource

from rkconvert.commands.options import revision_option
from rkconvert.rules.quantized_types import PLATFORMS, known_types
from rkruntime.cli.flags import TOKENS, json_option, packed, quiet_option
from rkruntime.errors import ModelError, UsageError
from rkruntime.files import atomic_file
from rkruntime.printable import one_line
from rkruntime.probes import QUESTIONS
from rkruntime.remote import words_of_text
from rkruntime.terminal import console, say, say_json
from rkruntime.visit.steps import LOAD, SELFTEST, SPEED

if TYPE_CHECKING:
    from rkconvert.compat.case import Wanted
    from rkconvert.compat.results import Result
    from rkruntime.bundle.manifest import Bundle

_FILE = click.Path(dir_okay=False, path_type=Path)
_WRITTEN = click.Path(file_okay=False, path_type=Path)
_FOLDER = click.Path(exists=True, file_okay=False, path_type=Path)


@dataclass(frozen=True)
class OnBoard:
    """The options of --board.

    Attributes:
        output: Folder for results; `variants` is the folder for converted bundles, if that is to be elsewhere.
        probes: Names of questions; empty for all that are not risky.
    """

    board: str | None
    output: Path
    variants: Path | None
    target: str
    remote_command: str
    library: str | None
    probes: tuple[str, ...]
    risky: bool
    force: bool

    @property
    def steps(self) -> list[str]:
        """Names of the steps to do on the board."""
        named = self.probes or tuple(name for name, row in QUESTIONS.items() if self.risky or not row.risky)
        return [LOAD, SPEED, SELFTEST, *named]


board_options = packed(
    "on_board",
    OnBoard,
    click.option("--board", metavar="USER@HOST", help="Try it on this board, over ssh, where rkedge is installed."),
    click.option(
        "-o",
        "--output",
        type=_WRITTEN,
        default=Path(),
        show_default="this folder",
        help="Write the board's results to this folder.",
    ),
    click.option(
        "--variants",
        type=_WRITTEN,
        show_default="variants in --output",
        help="Keep the bundles that are converted for the board in this folder.",
    ),
    click.option(
        "--target",
        type=click.Choice(["toolkit", "emulator"]),
        default="toolkit",
        show_default=True,
        help="Convert with the vendor's toolkit, or for a stand-in of a board.",
    ),
    click.option(
        "--remote-command",
        default="rkedge",
        show_default=True,
        metavar="COMMAND",
        help="Start rkedge on the board with this command.",
    ),
    click.option(
        "--library", metavar="PATH", show_default="searched for", help="Load this librkllmrt.so of the board."
    ),
    click.option(
        "--probe",
        "probes",
        multiple=True,
        type=click.Choice(list(QUESTIONS)),
        show_default="all that are not risky",
        help="Ask only this question; may be repeated.",
    ),
    click.option("--risky", is_flag=True, help="Also ask what is reported to have crashed a board."),
    click.option("--force", is_flag=True, help="Load the model even if it is known not to work on this board."),
)


# Parameters that have no meaning with --board, and those that only --board uses.
_MATRIX_ONLY: Final = ("results", "emulator", "why", "html", "markdown")
_BOARD_ONLY: Final = tuple(item.name for item in fields(OnBoard) if item.name != "board")
# Fields of a cell, and the options that name their values.
_FIELDS: Final = {
    "type": "types",
    "soc": "socs",
    "cores": "cores",
    "release": "releases",
    "context": "contexts",
    "lora": "loras",
}
# Parameters that a bundle determines itself.
_OF_A_BUNDLE: Final = ("revision", *_FIELDS.values(), "variants", "target")


def _given(names: Iterable[str]) -> str:
    """Return which of the named parameters are on the command line, as options joined by commas."""
    context = click.get_current_context()
    found = [
        max(parameter.opts, key=len)
        for parameter in context.command.params
        if parameter.name in names and context.get_parameter_source(parameter.name) is ParameterSource.COMMANDLINE
    ]
    return ", ".join(found)


def _wanted(given: Mapping[str, Any]) -> Wanted:
    from rkconvert.compat.case import USUAL_CONTEXT, Wanted

    return Wanted(**{"contexts": (USUAL_CONTEXT,), **{name: values for name, values in given.items() if values}})


def _try(
    on_board: OnBoard, model: str, revision: str | None, given: Mapping[str, Any], *, as_json: bool, quiet: bool
) -> int:
    """Try bundles on a board; return the exit status: that of the first that could not be tried, or of a failure."""
    from rkconvert.compat.board import Visit, bundles_of
    from rkconvert.compat.cells import Status
    from rkconvert.compat.results import read_result
    from rkconvert.compat.tried import case_of, written
    from rkconvert.conversion.matrix import exit_code
    from rkconvert.conversion.variants import variants
    from rkconvert.progress import Reporter

    assert on_board.board is not None
    wanted, program = _wanted(given), words_of_text(on_board.remote_command, "--remote-command")
    options = [
        *(["--library", on_board.library] if on_board.library else []),
        *(["--force"] if on_board.force else []),
    ]
    found: list[Path] = []

    def tell(line: str) -> None:
        if not quiet:
            say(one_line(line), err=True, dim=True)

    def visit(bundle: Bundle) -> None:
        tell(f"{bundle.manifest.name} to {on_board.board}")
        case = case_of(bundle)
        journal = Visit(str(on_board.board), bundle, program, on_board.steps, options, tell).results()
        found.append(written(journal, bundle, case, on_board.output))
        if not as_json:
            say(f"{bundle.manifest.name}: {_summary(read_result(found[-1]))} {one_line(str(found[-1]))}")

    bundles = bundles_of(Path(model))
    if bundles and (named := _given(_OF_A_BUNDLE)):
        raise UsageError(f"{named}: a bundle is tried as it is.", hint="Leave it out, or name the checkpoint.")
    on_board.output.mkdir(parents=True, exist_ok=True)
    for bundle in bundles:
        visit(bundle)
    outcomes = []
    if not bundles:
        folder = on_board.variants or on_board.output / "variants"
        outcomes = variants(model, revision, wanted, on_board.target, folder, Reporter(quiet), visit)
        for item in outcomes:
            if item.message:
                say(f"{item.cell}: {item.status}: {one_line(item.message)}", err=True)
    results = [read_result(path) for path in found]
    if as_json:
        say_json([asdict(result) for result in results])
    works = all(Status(run.status) is Status.WORKS for result in results for run in result.runs)
    return exit_code(outcomes) or (0 if works else ModelError.exit_code)


def _summary(result: Result) -> str:
    (run,) = result.runs
    emulated = " (emulated)" if result.emulated else ""
    speed = f" {run.tokens_per_s:.2f} tokens/s." if run.tokens_per_s else ""
    probes = ", ".join(f"{probe.name} {probe.result}" for probe in run.probes if probe.result)
    return f"{run.status}{emulated}. {one_line(run.says)}{speed} Probes: {one_line(probes) or 'none answered'}."


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
@board_options
@json_option()
@quiet_option("Do not show progress.")
def run(
    model: str,
    revision: str | None,
    on_board: OnBoard,
    results: tuple[Path, ...],
    emulator: bool,
    why: bool,
    html: Path | None,
    markdown: Path | None,
    as_json: bool,
    quiet: bool,
    **wanted: Any,
) -> None:
    """Say what becomes of MODEL with each type, SoC and release: works, slower, refused, fails, and how that is known.

    MODEL is a folder, a config.json or a hub id such as google/gemma-2-2b-it. No weights are read or downloaded; for
    the emulator, files of the model's sizes are loaded.

    With --board, MODEL is also a bundle or a folder of bundles: each is copied there, loaded, asked and removed again,
    and its result becomes a file that --results reads. A checkpoint is converted to each --dtype first. The exit
    status is 7 if one of them is not loaded or answers wrongly.
    """
    if on_board.board is not None:
        if named := _given(_MATRIX_ONLY):
            raise UsageError(f"{named}: not with --board.", hint="Afterwards: rkedge compat MODEL --results FOLDER")
        raise click.exceptions.Exit(_try(on_board, model, revision, wanted, as_json=as_json, quiet=quiet))
    if named := _given(_BOARD_ONLY):
        raise UsageError(f"{named}: only --board does that.", hint="Add --board user@board.")
    from rkconvert.compat import page, report
    from rkconvert.compat.case import Case
    from rkconvert.compat.emulated import EmulatedLoads
    from rkconvert.compat.matrix import fill
    from rkconvert.compat.results import Results, shipped_folder
    from rkconvert.plan.source import read_source

    cells = _wanted(wanted).cells()
    shipped, given_results = Results([shipped_folder()]), Results(results)
    case = Case.of(read_source(model, revision))
    asked = {field: wanted[name] for field, name in _FIELDS.items() if wanted[name]}
    for note in given_results.left_out(case, cells, asked):
        say(f"note: {one_line(note)}", err=True, dim=True)
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
