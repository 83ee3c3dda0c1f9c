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
from rkconvert.commands.options import (
    dtype_option,
    lora_option,
    max_context_option,
    public_option,
    release_option,
    revision_option,
)
from rkconvert.conversion import matrix as matrices
from rkconvert.conversion import recipes
from rkconvert.conversion.convert import LORA_MODES, TARGETS, Options, convert, target_of
from rkconvert.output.publish import Destination, check_destination, push
from rkconvert.progress import Reporter
from rkconvert.rules.quantized_types import EMULATOR_ONLY, PLATFORMS
from rkconvert.toolkit.options import toolkit_options
from rkruntime.abi import DEFAULT_RELEASE
from rkruntime.bundle.manifest import Bundle
from rkruntime.cli.flags import json_option, quiet_option
from rkruntime.errors import UsageError
from rkruntime.terminal import console, say, say_json
from rkruntime.yamltext import read_mapping

_PATH = click.Path(path_type=Path)
# Parameters for what happens to a conversion's result, not for the conversion itself.
_OF_THE_RUN: Final = ("as_json", "quiet")
_NOT_OPTIONS: Final = ("matrix", "push_to_hub", "public", *_OF_THE_RUN)


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
@dtype_option(*EMULATOR_ONLY)
@click.option("--force-dtype", is_flag=True, help="Convert even to a type that is known to fail or work badly.")
@max_context_option()
@click.option(
    "--npu-cores", type=click.IntRange(1, 16), show_default="all of the SoC's", help="Use this many NPU cores."
)
@release_option(show_default=f"the toolkit's, or {DEFAULT_RELEASE} for the emulator")
@click.option(
    "--lora-mode",
    type=click.Choice(LORA_MODES),
    default="merge",
    show_default=True,
    help="Merge the adapter, or write it to a file that is loaded with the model.",
)
@toolkit_options()
@click.option(
    "--selftest/--no-selftest",
    default=None,
    show_default="for a board, and for models of up to 16 MiB",
    help="Compute three answers of the float model, for `rkedge run BUNDLE --selftest`.",
)
@click.option(
    "--references/--no-references",
    default=None,
    show_default="for models of up to 16 MiB",
    help="Compute what the probes of `rkedge compat --board` compare with: the model without window and soft-caps.",
)
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
@public_option()
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
    if matrix is not None:
        context.exit(_run_matrix(context, matrix))
    reporter, options, to = Reporter(quiet), options_of(**values), _destination(push_to_hub, public)
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


def _run_matrix(context: click.Context, path: Path) -> int:
    """Convert every cell, print its outcome, and return the exit code."""
    fail = recipes.failure(path)
    content = read_mapping(path, fail)
    found = matrices.combinations(content.pop(matrices.KEY, None), fail)
    shared = {**(context.default_map or {}), **recipes.resolve(content, context.command, path), **_given(context)}
    with _filled(context, shared) as filled:
        reporter, as_json = Reporter(filled.params["quiet"]), filled.params["as_json"]
    pairs = [_cell(context, shared, combination, path) for combination in found]
    cells = matrices.distinct([cell for cell, _ in pairs])
    destinations = {cell.options.output: to for cell, (_, to) in zip(cells, pairs, strict=True) if to}
    if len({to.repo for to in destinations.values()}) < len(destinations):
        raise UsageError(
            f"{path}: several conversions of the matrix would push to the same repository.", hint="Give each its own."
        )
    for output, to in destinations.items():
        # An earlier run that made this bundle may have uploaded it, too.
        check_destination(to, empty=not output.is_dir())

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


def _given(context: click.Context) -> dict[str, Any]:
    """Return the parameters on the command line, which override the matrix file as that overrides a recipe."""
    source = context.get_parameter_source
    return {name: value for name, value in context.params.items() if source(name) is ParameterSource.COMMANDLINE}


def _filled(context: click.Context, values: dict[str, Any]) -> click.Context:
    """Return a context of the command in which these values stand for its command line."""
    return context.command.make_context("convert", [], parent=context.parent, default_map=values)


def _cell(
    context: click.Context, shared: dict[str, Any], combination: dict[str, Any], path: Path
) -> tuple[matrices.Cell, Destination | None]:
    """Return a cell, and the destination of its bundle."""
    varied, keys = recipes.resolve(combination, context.command, path), recipes.keys(context.command)
    for key in combination:
        if keys[key].name in _OF_THE_RUN:
            raise UsageError(f"The matrix in {path} varies {key}, which applies to all conversions.")
        if keys[key].name in _given(context):
            raise UsageError(f"The matrix in {path} varies {key}, which is also set on the command line.")
    with _filled(context, {**shared, **varied}) as filled:
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
        raise UsageError("Name what to convert.", hint="CHECKPOINT is a folder, a .gguf file or a hub id.")
    adapters = tuple(AdapterSource.parse(text) for text in loras)
    name = "-".join([Path(checkpoint).resolve().name.removesuffix(".gguf"), *(lora.short_name for lora in adapters)])
    options = Options(checkpoint=checkpoint, output=Path(), loras=adapters, release=release, **values)
    release = release or target_of(options).release
    folder = output or Path(f"{name}-{options.platform}-{options.dtype}-{release}")
    return replace(options, output=folder, release=release)
