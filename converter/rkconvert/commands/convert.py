"""`rkedge convert`: turn a checkpoint, with or without a LoRA, into a bundle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from textwrap import shorten
from typing import Any, Final

import click
from click.core import ParameterSource
from rich.markup import escape
from rich.table import Table

from rkconvert.adapters.merged_model import AdapterSource
from rkconvert.commands.options import lora_option, max_context_option, revision_option
from rkconvert.conversion import matrix as matrices
from rkconvert.conversion import recipes
from rkconvert.conversion.convert import LORA_MODES, TARGETS, Options, convert
from rkconvert.output.publish import Destination, check_destination, push
from rkconvert.progress import Reporter
from rkconvert.rules.quantized_types import EMULATOR_ONLY, PLATFORMS, known_types
from rkconvert.toolkit import find_toolkit
from rkconvert.toolkit.options import toolkit_options
from rkruntime.abi import DEFAULT_RELEASE
from rkruntime.bundle.manifest import Bundle
from rkruntime.cli.flags import json_option, quiet_option
from rkruntime.errors import UsageError
from rkruntime.terminal import console, say, say_json
from rkruntime.yamltext import read_mapping

_PATH = click.Path(path_type=Path)
# Parameters for what happens to a conversion's result, not for the conversion itself.
_NOT_OPTIONS: Final = ("matrix", "push_to_hub", "public", "as_json", "quiet")


@click.command("convert")
@click.argument("checkpoint", required=False)
@recipes.option()
@revision_option()
@lora_option()
@click.option(
    "--target",
    type=click.Choice(TARGETS),
    default="emulator",
    show_default=True,
    help="Build for the emulator, or for a board with the vendor's toolkit.",
)
@click.option(
    "--platform", type=click.Choice(sorted(PLATFORMS)), default="rk3588", show_default=True, help="Build for this SoC."
)
@click.option(
    "--dtype",
    type=click.Choice([*known_types(), *EMULATOR_ONLY]),
    default="w8a8",
    show_default=True,
    help="Quantize to this type.",
)
@click.option("--force-dtype", is_flag=True, help="Convert even to a type that is known to fail or work badly.")
@max_context_option()
@click.option(
    "--npu-cores", type=click.IntRange(1, 16), show_default="all of the SoC's", help="Use this many NPU cores."
)
@click.option(
    "--release",
    show_default=f"the toolkit's, or {DEFAULT_RELEASE} for the emulator",
    help="Build for this RKLLM release.",
)
@click.option(
    "--lora-mode",
    type=click.Choice(LORA_MODES),
    default="merge",
    show_default=True,
    help="Merge the adapter, or write it to a file that is loaded with the model.",
)
@toolkit_options
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    show_default="NAME-PLATFORM-DTYPE-RELEASE",
    help="Write the bundle to this folder.",
)
@click.option(
    "--push-to-hub", metavar="OWNER/NAME", help="Upload the bundle to the Hugging Face hub, as a private repository."
)
@click.option("--public", is_flag=True, help="Make the uploaded repository public.")
@click.option(
    "--matrix", type=_PATH, help="Convert every combination of values that the key `matrix` of this recipe lists."
)
@json_option("Print the manifest as JSON; with --matrix, the outcome of each conversion.")
@quiet_option()
@click.pass_context
def run(
    context: click.Context,
    /,
    push_to_hub: str | None,
    public: bool,
    matrix: Path | None,
    as_json: bool,
    quiet: bool,
    **values: Any,
) -> None:
    """Turn a Gemma 2 (or Gemma 1) CHECKPOINT into a bundle that `rkedge chat` loads.

    CHECKPOINT is a folder in Hugging Face layout, a .gguf file or a hub id such as google/gemma-2-2b-it.
    """
    reporter = Reporter(quiet)
    if matrix is not None:
        context.exit(_run_matrix(context, matrix, reporter, as_json))
    options, to = options_of(**values), _destination(push_to_hub, public)
    if to:
        check_destination(to)
    bundle = convert(options, reporter)
    if as_json:
        say_json(asdict(bundle.manifest))
    else:
        size = sum(record.size for record in bundle.manifest.files.values())
        say(f"{bundle.path}: {bundle.manifest.dtype}, {size / 1e6:,.1f} MB, {bundle.manifest.parameters:,} weights")
    if to:
        say(push(bundle, to, reporter), err=as_json)


def _destination(repo: str | None, public: bool) -> Destination | None:
    if public and not repo:
        raise UsageError("--public has no effect without --push-to-hub.", hint="Add --push-to-hub OWNER/NAME.")
    return Destination(repo, public) if repo else None


def _run_matrix(context: click.Context, path: Path, reporter: Reporter, as_json: bool) -> int:
    """Convert every cell, print its outcome, and return the exit code."""
    fail = recipes.failure(path)
    content = read_mapping(path, fail)
    found = matrices.combinations(content.pop(matrices.KEY, None), fail)
    pairs = [_cell(context, {**content, **combination}, combination, path) for combination in found]
    cells = matrices.distinct([cell for cell, _ in pairs])
    destinations = {cell.options.output: to for cell, (_, to) in zip(cells, pairs, strict=True) if to}
    if len({to.repo for to in destinations.values()}) < len(destinations):
        raise UsageError(
            f"{path}: several conversions of the matrix would push to the same repository.", hint="Give each its own."
        )
    for to in destinations.values():
        check_destination(to)

    def upload(cell: matrices.Cell, bundle: Bundle) -> None:
        if to := destinations.get(cell.options.output):
            push(bundle, to, reporter)

    with matrices.folders(cells):
        outcomes = matrices.run(cells, reporter, upload)
    if as_json:
        say_json([asdict(outcome) for outcome in outcomes])
    else:
        _show(outcomes)
    return matrices.exit_code(outcomes)


def _cell(
    context: click.Context, content: dict[str, Any], combination: dict[str, Any], path: Path
) -> tuple[matrices.Cell, Destination | None]:
    """A cell's options: those of the matrix file, then a recipe's; the command line overrides both."""
    given = {
        name: value
        for name, value in context.params.items()
        if context.get_parameter_source(name) is ParameterSource.COMMANDLINE
    }
    varied = [name for name in recipes.resolve(combination, context.command, path) if name in given]
    if varied:
        raise UsageError(f"The matrix in {path} varies {varied[0]}, which is also set on the command line.")
    values = {**(context.default_map or {}), **recipes.resolve(content, context.command, path), **given}
    with context.command.make_context("convert", [], parent=context.parent, default_map=values) as filled:
        options = {name: value for name, value in filled.params.items() if name not in _NOT_OPTIONS}
        to = _destination(filled.params["push_to_hub"], filled.params["public"])
    output = options.pop("output")
    made = options_of(**options, output=None)
    # In a matrix, `output` is the folder for all bundles.
    made = replace(made, output=(output or Path()) / made.output)
    return matrices.Cell(matrices.label_of(combination), made), to


def _show(outcomes: Sequence[matrices.CellResult]) -> None:
    table = Table("conversion", "outcome", "MB", "seconds", "folder or reason")
    for item in outcomes:
        size = f"{item.nbytes / 1e6:,.1f}" if item.nbytes else ""
        seconds = f"{item.seconds:,.1f}" if item.status == "made" else ""
        last = shorten(item.message, 100, placeholder=" ...") or item.output
        table.add_row(escape(item.cell), item.status, size, seconds, escape(last))
    console().print(table)


def options_of(
    *, checkpoint: str | None, output: Path | None, release: str | None, loras: tuple[str, ...], **values: Any
) -> Options:
    """Build a conversion's options from the command's own. Raises UsageError."""
    if checkpoint is None:
        raise UsageError("There is no CHECKPOINT to convert.", hint="Name a folder, a .gguf file or a hub id.")
    adapters = tuple(AdapterSource.parse(text) for text in loras)
    name = "-".join([Path(checkpoint).resolve().name.removesuffix(".gguf"), *(lora.short_name for lora in adapters)])
    if release is None:
        emulated = values["target"] == "emulator"
        release = DEFAULT_RELEASE if emulated else find_toolkit(values["toolkit_python"]).version
    folder = output or Path(f"{name}-{values['platform']}-{values['dtype']}-{release}")
    return Options(checkpoint, folder, loras=adapters, release=release, **values)
