"""`rkedge merge`: merge adapters into a base model, as a plain Hugging Face folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click

from rkconvert.adapters.merged_model import AdapterSource, MergedModel, merged_model, resume_key
from rkconvert.commands.options import lora_option, revision_option
from rkconvert.model.chat_template import find_template
from rkconvert.output.disk import require_space, spare
from rkconvert.output.hf_folder import STATE, copy_side_files, forget_shards, resumable, write_json, write_weights
from rkconvert.output.work_folder import refuse_made, work_folder
from rkconvert.progress import Reporter
from rkconvert.sources.open import open_source
from rkconvert.tensors.inputs import tokenizer_files
from rkruntime.bundle.manifest import GENERATION_CONFIG, TEMPLATE
from rkruntime.cli.flags import json_option, quiet_option
from rkruntime.terminal import say, say_json
from rkruntime.words import counted


def merge(model: MergedModel, loras: Sequence[AdapterSource], output: Path, reporter: Reporter) -> None:
    """Write the merged model to the new folder `output`; resumes a killed run."""
    require_space(output, model.nbytes)
    key = resume_key(model.inputs, command="merge", weights=[lora.weight for lora in loras])
    with work_folder(output, key, resumable(model.weights), [STATE]) as folder:
        with spare(folder), reporter.bar("merging", model.nbytes) as advance:
            write_weights(folder, model.weights, advance)
        write_json(folder / "config.json", model.hf_config())
        copy_side_files(model.tokenizer_folder, folder, tokenizer_files(model.tokenizer_folder))
        if find_template(model.tokenizer_folder) is None and (template := find_template(model.checkpoint.path)):
            (folder / TEMPLATE).write_text(template, encoding="utf-8")
        copy_side_files(model.checkpoint.path, folder, [GENERATION_CONFIG])
        for files in model.inputs:
            files.check()
        forget_shards(folder)


@click.command("merge")
@click.argument("checkpoint")
@revision_option()
@lora_option(required=True)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="Write the merged model to this folder."
)
@json_option()
@quiet_option()
def run(
    checkpoint: str, revision: str | None, loras: tuple[str, ...], output: Path, as_json: bool, quiet: bool
) -> None:
    """Merge LoRA adapters into a CHECKPOINT as peft does, in little memory.

    The result equals peft's up to the rounding of float32 sums. In 16-bit formats nearly all elements are identical;
    docs/convert.md lists the exceptions that were measured.

    CHECKPOINT is a folder, a .gguf file or a hub id.

    After a killed run, the same command continues where it stopped.
    """
    refuse_made(output)
    adapters = [AdapterSource.parse(text) for text in loras]
    model = merged_model(open_source(checkpoint, revision), adapters)
    reporter, notes = Reporter(quiet), (*model.checkpoint.notes, *model.notes)
    for note in notes:
        reporter.note(f"note: {note}")
    merge(model, adapters, output, reporter)
    if as_json:
        made = {"output": str(output), "bytes": model.nbytes, "tensors": len(model.weights.tensors), "notes": notes}
        say_json(made, indent=None)
    else:
        say(f"{output}: {counted(len(model.weights.tensors), 'tensor')}, {model.nbytes / 1e6:,.1f} MB")
