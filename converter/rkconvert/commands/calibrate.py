"""`rkedge calibrate`: texts in the model's template, for the toolkit's quantizer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click

from rkconvert.adapters.chat import read_chat, stop_tokens
from rkconvert.adapters.merged_model import AdapterSource, MergedModel, merged_model
from rkconvert.calibrate.build import FEW_ROWS, Answer, Builder, Built
from rkconvert.calibrate.chats import Dialogue, default_chats, read_chats, read_texts
from rkconvert.calibrate.dataset import TokenCounter, validate_dataset, write_dataset
from rkconvert.calibrate.targets import NEW_TOKENS, CpuModel, missing_packages
from rkconvert.commands.options import lora_option, max_context_option, revision_option
from rkconvert.model.chat_template import ChatTemplate
from rkconvert.model.tokenizer import tokenizer_bytes
from rkconvert.output.disk import spare
from rkconvert.output.host_memory import read_memory
from rkconvert.output.work_folder import scratch_folder
from rkconvert.progress import Reporter
from rkconvert.rules.context import choose_context
from rkconvert.rules.releases import release
from rkconvert.sources.open import open_source
from rkconvert.toolkit.staging import stage
from rkruntime.abi import CALLABLE
from rkruntime.bundle.manifest import TOKENIZER
from rkruntime.cli.flags import TEXT, json_option, quiet_option
from rkruntime.files import refuse_existing
from rkruntime.terminal import say, say_json
from rkruntime.text.tokenizer import Tokenizer
from rkruntime.words import counted

_PATH = click.Path(path_type=Path)
TARGETS = ("auto", "model", "given")


@click.command("calibrate")
@click.argument("checkpoint")
@revision_option()
@lora_option()
@click.option(
    "--text",
    "texts",
    multiple=True,
    type=_PATH,
    help="Read questions from this file, one per line; a tab starts the answer.",
)
@click.option(
    "--chats",
    "chat_files",
    multiple=True,
    type=_PATH,
    help="Read chats from this JSON Lines file, in OpenAI's or ShareGPT's format.",
)
@click.option("--default", "with_default", is_flag=True, help="Add the questions that come with RKEdge.")
@click.option("--system", type=TEXT, default="", help="Use this system prompt in chats that have none.")
@click.option(
    "--targets",
    type=click.Choice(TARGETS),
    default="auto",
    show_default=True,
    help="Calibrate with the float model's answers, with the given ones, or with the model's if it can be run here.",
)
@click.option(
    "--new-tokens",
    type=click.IntRange(1, 4096),
    metavar="TOKENS",
    default=NEW_TOKENS,
    show_default=True,
    help="Limit the length of each generated answer.",
)
@click.option(
    "--limit",
    type=click.IntRange(1, 1_000_000),
    default=64,
    show_default=True,
    help="Use at most this many conversations, taken evenly from all.",
)
@max_context_option()
@click.option("--check", "check_file", type=_PATH, help="Only check whether this file is usable with the model.")
@click.option(
    "-o",
    "--output",
    type=_PATH,
    default=Path("data_quant.json"),
    show_default=True,
    help="Write the calibration data to this file.",
)
@json_option()
@quiet_option()
def run(
    checkpoint: str,
    revision: str | None,
    loras: tuple[str, ...],
    texts: tuple[Path, ...],
    chat_files: tuple[Path, ...],
    with_default: bool,
    system: str,
    targets: str,
    new_tokens: int,
    limit: int,
    max_context: int | None,
    check_file: Path | None,
    output: Path,
    as_json: bool,
    quiet: bool,
) -> None:
    """Make calibration data for a CHECKPOINT, for `rkedge convert --target toolkit --calibration FILE`.

    CHECKPOINT is a folder in Hugging Face layout, a .gguf file or a hub id such as google/gemma-2-2b-it.

    Without --text and --chats, the questions that come with RKEdge are used.
    """
    reporter = Reporter(quiet)
    if not check_file:
        refuse_existing(output)
    model = merged_model(open_source(checkpoint, revision), [AdapterSource.parse(text) for text in loras])
    tables, template = read_chat(model)
    for note in (*model.checkpoint.notes, *model.notes, *template.notes):
        reporter.note(f"note: {note}")
    count = TokenCounter(model.tokenizer_folder / TOKENIZER)
    context = choose_context(max_context, model.weights.config.max_position_embeddings)
    if check_file:
        rows = validate_dataset(check_file, template, count, context)
        _say({"file": str(check_file), "rows": len(rows)}, f"{check_file}: {counted(len(rows), 'usable row')}", as_json)
        return
    chats = _collect(texts, chat_files, with_default, system, limit)
    file = model.tokenizer_folder / TOKENIZER
    tokenizer = Tokenizer.parse(tokenizer_bytes(file), file)
    stop = stop_tokens(model, tables, template)
    computed = _answers(model, template, tokenizer, stop, targets, new_tokens, reporter)
    with spare(output.parent), computed as (answer, reason):
        tell = _teller(reporter, len(chats), answer is not None)
        built = Builder(template, tokenizer, count, context, answer).build(chats, tell)
    for files in model.inputs:
        files.check()
    write_dataset(output, built.rows)
    _report(built, output, answer is None, reason, as_json, reporter)


def _collect(
    texts: Sequence[Path], chat_files: Sequence[Path], with_default: bool, system: str, limit: int
) -> list[Dialogue]:
    """Return at most `limit` conversations, taken evenly from all of them."""
    chats = [chat for path in texts for chat in read_texts(path)]
    chats += [chat for path in chat_files for chat in read_chats(path)]
    if with_default or not chats:
        chats += default_chats()
    picked = [chats[at * len(chats) // limit] for at in range(limit)] if len(chats) > limit else chats
    return [chat.under(system) for chat in picked]


@contextmanager
def _answers(
    model: MergedModel,
    template: ChatTemplate,
    tokenizer: Tokenizer,
    stop: Sequence[int],
    targets: str,
    new_tokens: int,
    reporter: Reporter,
) -> Iterator[tuple[Answer | None, str]]:
    """Yield the function that answers; or None, with a reason if any, to use the given answers."""
    reason = _why_not(model) if targets == "auto" else ""
    if targets == "given" or reason:
        yield None, reason
        return
    # The transformers installed here also reads a folder made for the newest release.
    newest = release(CALLABLE[-1])
    with scratch_folder("rkedge-calibrate-") as folder:
        with reporter.bar("reading the model", model.nbytes) as advance:
            stage(model, template, newest, folder, advance)
        float_model = CpuModel(folder, model.nbytes, tokenizer, stop)
        yield lambda prompt: float_model.answer(prompt, new_tokens), ""


def _why_not(model: MergedModel) -> str:
    """Return why the float model cannot answer here, or an empty string."""
    if missing := missing_packages():
        return f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed"
    if (free := read_memory().available) < model.nbytes:
        return f"the model needs {model.nbytes / 1e9:.1f} GB of memory, but only {free / 1e9:.1f} GB is free"
    return ""


def _teller(reporter: Reporter, total: int, slow: bool) -> Any:
    return lambda number: reporter.note(f"answer {number} of {total}") if slow else None


def _report(built: Built, output: Path, given: bool, reason: str, as_json: bool, reporter: Reporter) -> None:
    for words, many in built.left_out.items():
        reporter.note(f"note: {many} conversation{'s' * (many > 1)} {words} left out")
    if len(built.rows) < FEW_ROWS:
        reporter.note(f"note: few rows ({len(built.rows)}); the vendor's own example has 19")
    whose = "given" if given else "model"
    facts = {"file": str(output), "rows": len(built.rows), "targets": whose, "left_out": dict(built.left_out)}
    said = f"answers as given{reason and f', for {reason}'}" if given else "answers of the model"
    _say(facts, f"{output}: {counted(len(built.rows), 'row')}, {said}", as_json)


def _say(facts: dict[str, Any], text: str, as_json: bool) -> None:
    if as_json:
        say_json(facts)
    else:
        say(text)
