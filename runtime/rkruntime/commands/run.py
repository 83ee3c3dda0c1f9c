"""`rkedge run`: one prompt, one answer, for scripts."""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

import click

from rkruntime.cli.flags import TEXT, json_option
from rkruntime.cli.options import bundle_argument, open_for_person, runtime_options, sampling_options
from rkruntime.engine.open import RuntimeOptions, SamplingOptions
from rkruntime.errors import ModelError, UsageError
from rkruntime.printable import one_line
from rkruntime.terminal import MAX_TEXT, Terminal, say, say_json, too_much

if TYPE_CHECKING:
    from rkruntime.bundle.manifest import Bundle
    from rkruntime.engine.engine import ModelInfo
    from rkruntime.text.answer import Answer


# Exit status by verdict. 9 as in `rkedge doctor`: something worth knowing, but nothing that is known to fail.
_STATUS: Final = {"same": 0, "undecided": 9}


def _prompt(text: str | None, file: BinaryIO | None) -> str:
    """Return the given text, followed by the file's (-f); standard input if there is neither.

    With only a text, standard input is not read: `while read line; do rkedge run ... -p "$line"; done` loses no line.
    """
    if text is None and file is None:
        if sys.stdin.isatty():
            say("Type the prompt; end it with Ctrl-D.", err=True)
        file = sys.stdin.buffer
    given = file.read(MAX_TEXT + 1) if file else b""
    if len(given) > MAX_TEXT:
        raise too_much("The prompt")
    try:
        parts = [text or "", given.decode()]
    except UnicodeDecodeError as error:
        raise UsageError(
            f"The prompt is not UTF-8: {error}.", hint="Convert it first, for instance with iconv."
        ) from error
    prompt = "\n\n".join(part for part in parts if part.strip())
    if not prompt:
        raise UsageError(
            "There is no prompt.", hint='Write it after the bundle: rkedge run BUNDLE "...", or to standard input.'
        )
    return prompt


@click.command("run")
@bundle_argument()
@click.argument("words", metavar="[PROMPT]", type=TEXT, nargs=-1)
@click.option(
    "-p", "--prompt", type=TEXT, metavar="TEXT", show_default="standard input", help="Ask this; the same as PROMPT."
)
@click.option("-f", "--file", type=click.File("rb"), help="Append this file to the prompt; - is standard input.")
@click.option("--system", type=TEXT, default="", metavar="TEXT", help="Set the system prompt.")
@click.option(
    "--stop", type=TEXT, multiple=True, metavar="TEXT", help="End the answer before this text; may be repeated."
)
@click.option(
    "--selftest",
    is_flag=True,
    help="Ask the bundle's own questions instead, and compare with the float model's answers.",
)
@json_option()
@sampling_options
@runtime_options
def run(
    bundle: Path,
    words: tuple[str, ...],
    prompt: str | None,
    file: BinaryIO | None,
    system: str,
    stop: tuple[str, ...],
    selftest: bool,
    as_json: bool,
    sampling: SamplingOptions,
    runtime: RuntimeOptions,
) -> None:
    """Answer one PROMPT with the model of a BUNDLE, a folder or its name (`rkedge list`).

    Only the answer goes to standard output; if a limit of tokens or the end of the context cuts it, standard error says
    so. Without PROMPT, -p and -f the prompt is read from standard input. The exit status of --selftest is 0 if all is
    well, 7 if something is wrong and 9 if nothing could be decided.
    """
    from rkruntime.bundle.manifest import open_bundle
    from rkruntime.text.answer import UNFINISHED, Answer
    from rkruntime.text.template import Message

    if words and prompt is not None:
        raise UsageError("PROMPT and -p are the same.", hint="Give one of them; -f appends a file.")
    opened = open_bundle(bundle)
    if selftest:
        if words or prompt or file or system or stop or sampling != SamplingOptions():
            raise UsageError("--selftest asks its own questions, greedily.", hint="Leave prompt and sampling out.")
        raise click.exceptions.Exit(_selftest(opened, runtime, as_json))
    text = _prompt(" ".join(words) if words else prompt, file)
    terminal = Terminal()
    messages = [*([Message("system", system)] if system else []), Message("user", text)]
    with open_for_person(opened, runtime, sampling) as model:
        for piece in model.stream(messages, stop=stop):
            if isinstance(piece, Answer):
                answer, info = piece, model.engine.info
            elif not as_json:
                terminal.write(piece)
    if as_json:
        say_json(_report(answer, info))
    else:
        terminal.write("\n")
        terminal.not_whole(UNFINISHED.get(answer.reason))


def _selftest(bundle: Bundle, runtime: RuntimeOptions, as_json: bool) -> int:
    """Run the self-test and show it; returns the exit status."""
    from rkruntime.selftest import QuestionResult, run_selftest

    def show(result: QuestionResult) -> None:
        if not as_json:
            say(f"{one_line(result.question)}\n  {one_line(str(result))}")

    with open_for_person(bundle, runtime, SamplingOptions(temperature=0)) as model:
        result = run_selftest(model, show)
    if as_json:
        say_json(result.as_dict())
    else:
        for note in result.notes:
            say(f"note: {one_line(note)}")
        for problem in result.problems:
            say(f"{problem.code}: {one_line(problem.message)}\n  {problem.hint}")
        if not result.problems:
            say("same: these are the float model's answers, as far as rounding lets one tell.")
    if result.emulated:
        say("This is the emulator, so nothing of it is an answer about a board.", err=True)
    return _STATUS.get(result.verdict, ModelError.exit_code)


def _report(answer: Answer, info: ModelInfo) -> dict[str, Any]:
    return {
        "text": answer.text,
        "finish_reason": answer.reason.value,
        "prompt_tokens": answer.prompt_tokens,
        "completion_tokens": len(answer.tokens),
        "emulated": info.emulated,
        "release": info.release,
        "perf": asdict(answer.perf) if answer.perf else None,
    }
