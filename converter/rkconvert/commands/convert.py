"""`rkedge convert`: a checkpoint, with or without a LoRA, becomes a bundle."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import click

from rkconvert import recipes
from rkconvert.board_file import LORA_MODES, ToolkitOptions
from rkconvert.convert import DEFAULT_RELEASE, TARGETS, Options, convert
from rkconvert.dtypes import EMULATOR_ONLY, known_types, platforms
from rkconvert.job import Lora
from rkconvert.progress import Reporter
from rkconvert.toolkit import find_toolkit
from rkconvert.toolkit.job import DEVICES
from rkconvert.toolkit.runner import PATIENCE

_PATH = click.Path(path_type=Path)


@click.command("convert")
@click.argument("checkpoint")
@recipes.option()
@click.option("--revision", help="Branch, tag or commit of a hub model.")
@click.option("--lora", "loras", multiple=True, help="Adapter to merge in, or FOLDER=WEIGHT; may be repeated.")
@click.option("--target", type=click.Choice(TARGETS), default="emulator", show_default=True, help="What it is for.")
@click.option(
    "--platform", type=click.Choice(sorted(platforms())), default="rk3588", show_default=True, help="SoC of the board."
)
@click.option(
    "--dtype",
    type=click.Choice([*known_types(), *EMULATOR_ONLY]),
    default="w8a8",
    show_default=True,
    help="Quantized type.",
)
@click.option("--force-dtype", is_flag=True, help="Try a type that is known not to work well.")
@click.option("--max-context", type=int, help="Longest context in tokens [default: the model's, at most 4096].")
@click.option("--npu-cores", type=int, help="NPU cores to build for [default: all that the SoC has].")
@click.option("--release", help=f"RKLLM release that it is for [default: the toolkit's; emulator: {DEFAULT_RELEASE}].")
@click.option(
    "--lora-mode", type=click.Choice(LORA_MODES), default="merge", show_default=True, help="Merge it, or a file for it."
)
@click.option("--toolkit-python", type=_PATH, help="Interpreter that has rkllm-toolkit [default: looked for].")
@click.option("--calibration", type=_PATH, help="Texts for the quantizer, from `rkedge calibrate` (toolkit).")
@click.option("--algorithm", default="normal", show_default=True, help="Of the quantizer (toolkit).")
@click.option("--optimization-level", type=int, default=1, show_default=True, help="1: more exact, maybe slower.")
@click.option("--hybrid-rate", type=float, default=0.0, show_default=True, help="Share of layers in the other kind.")
@click.option("--qparams", type=_PATH, help="A *.qparams file of an earlier run (toolkit).")
@click.option("--toolkit-device", type=click.Choice(DEVICES), default="cpu", show_default=True, help="Where it works.")
@click.option("--toolkit-load-dtype", default="float32", show_default=True, help="How it holds weights in memory.")
@click.option("--toolkit-patience", type=float, default=PATIENCE, help="Seconds of no life until it counts as hung.")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Folder to make [default: NAME-PLATFORM-DTYPE-RELEASE]."
)
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="No progress.")
def run(
    checkpoint: str,
    revision: str | None,
    loras: tuple[str, ...],
    target: str,
    platform: str,
    dtype: str,
    force_dtype: bool,
    max_context: int | None,
    npu_cores: int | None,
    release: str | None,
    lora_mode: str,
    output: Path | None,
    as_json: bool,
    quiet: bool,
    toolkit_python: Path | None,
    calibration: Path | None,
    algorithm: str,
    optimization_level: int,
    hybrid_rate: float,
    qparams: Path | None,
    toolkit_device: str,
    toolkit_load_dtype: str,
    toolkit_patience: float,
) -> None:
    """Turn a Gemma 2 (or Gemma 1) CHECKPOINT into a bundle that `rkedge chat` loads.

    CHECKPOINT is a folder in Hugging Face layout, a .gguf file or a hub id such as google/gemma-2-2b-it.
    """
    adapters = tuple(Lora.parse(text) for text in loras)
    name = "-".join([Path(checkpoint).resolve().name.removesuffix(".gguf"), *(lora.short_name for lora in adapters)])
    if release is None:
        release = find_toolkit(toolkit_python).version if target == "toolkit" else DEFAULT_RELEASE
    options = Options(
        checkpoint=checkpoint,
        revision=revision,
        output=output or Path(f"{name}-{platform}-{dtype}-{release}"),
        loras=adapters,
        target=target,
        platform=platform,
        dtype=dtype,
        force_dtype=force_dtype,
        max_context=max_context,
        release=release,
        npu_cores=npu_cores,
        lora_mode=lora_mode,
        toolkit=ToolkitOptions(
            python=toolkit_python,
            calibration=calibration,
            algorithm=algorithm,
            optimization_level=optimization_level,
            hybrid_rate=hybrid_rate,
            device=toolkit_device,
            load_dtype=toolkit_load_dtype,
            qparams=qparams,
            patience=toolkit_patience,
        ),
    )
    bundle = convert(options, Reporter(quiet))
    if as_json:
        click.echo(json.dumps(asdict(bundle.manifest), ensure_ascii=False, indent=2))
    else:
        size = sum(record.size for record in bundle.manifest.files.values())
        click.echo(
            f"{bundle.path}: {bundle.manifest.dtype}, {size / 1e6:,.1f} MB, {bundle.manifest.parameters:,} weights"
        )
