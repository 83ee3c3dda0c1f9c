"""`rkedge bench`: the speed of a bundle, here or on a board."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rkboard.bench.remote import Place, measure_there, until_eof
from rkboard.bench.table import markdown
from rkruntime.cli.flags import Decorated, MayBeEmpty, json_option, quiet_option
from rkruntime.cli.options import open_for_person, runtime_options
from rkruntime.commands.chat import BundleOrHost
from rkruntime.engine.open import RuntimeOptions, SamplingOptions, given
from rkruntime.errors import BundleError, RKEdgeError, UsageError
from rkruntime.files import atomic_file
from rkruntime.printable import escaped, one_line
from rkruntime.terminal import say, say_json

if TYPE_CHECKING:
    from rkboard.bench.measure import Line
    from rkboard.bench.result import Result
    from rkboard.bench.session import Wanted


class _Numbers(MayBeEmpty, click.ParamType):  # type: ignore[type-arg]  # not generic in earlier releases of click
    """Numbers of tokens, separated by commas; a list without duplicates, perhaps empty."""

    name = "numbers"

    def __init__(self, least: int) -> None:
        self._number = click.IntRange(least, 1 << 20)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> list[int]:
        """See click."""
        if not isinstance(value, str):
            return list(value)
        parts = (part.strip() for part in value.split(","))
        number: Any = self._number
        found = [int(number.convert(part, param, ctx)) for part in parts if part]
        if len(found) > 16:
            self.fail("at most 16 numbers.", param, ctx)
        return list(dict.fromkeys(found))


def _tokens(short: str, name: str, usual: str, text: str, least: int = 1) -> Callable[[Decorated], Decorated]:
    return click.option(
        short, name, type=_Numbers(least), metavar="TOKENS,...", default=usual, show_default=True, help=text
    )


def _only_bundle() -> Path:
    """Return the only bundle that has a name, for a command without BUNDLE. Raises BundleError."""
    from rkruntime.bundle.names import find_bundle, named_bundles

    names = list(named_bundles())
    if len(names) == 1:
        return find_bundle(names[0])
    shown = ", ".join(names[:8])
    message = f"There are several bundles here: {shown}." if names else "There is no bundle here that has a name."
    raise BundleError(message, hint="Name the one to measure; on a board as in user@board:BUNDLE.")


def _write(result: Result, path: Path) -> None:
    with atomic_file(path) as partial:
        partial.write_text(escaped(json.dumps(result.as_dict(), ensure_ascii=False, indent=1)) + "\n", encoding="utf-8")


def _show_line(line: Line) -> None:
    from rkboard.bench.measure import spread

    said = line.problem or "{:.2f} ± {:.2f} t/s".format(*spread(line.speeds))
    say(one_line(f"{line.test.name}: {said}"), err=True, dim=True)


def _here(path: Path, runtime: RuntimeOptions, wanted: Wanted, quiet: bool) -> tuple[Result, int, RKEdgeError | None]:
    """Measure on this machine; return the result, the exit status, and the error that ended it early, if any."""
    from rkboard.bench.session import Session
    from rkruntime.bundle.manifest import open_bundle

    bundle = open_bundle(path)
    status = 0
    with open_for_person(bundle, runtime, SamplingOptions(temperature=0)) as model:
        session = Session(bundle, model, wanted)
        try:
            session.run((lambda _: None) if quiet else _show_line)
        except KeyboardInterrupt:  # what was measured is worth keeping
            status = 130
        if session.error is not None:
            status = session.error.exit_code
        return session.result(), status, session.error


def _words(wanted: Wanted, runtime: RuntimeOptions, quiet: bool) -> list[str]:
    """Return the same options as words for the command on a board."""
    lists = {"-p": wanted.prompts, "-n": wanted.news, "-d": wanted.depths}
    words = [word for name, numbers in lists.items() for word in (name, ",".join(map(str, numbers)))]
    words += ["-r", str(wanted.repetitions), *(["-q"] if quiet else [])]
    for name, value in given(runtime).items():
        option = f"--{name.replace('_', '-')}"
        words += [option] if value is True else [option, str(value)]
    return words


@click.command("bench")
@click.argument(
    "bundle", metavar="[BUNDLE|USER@BOARD[:BUNDLE]]", type=BundleOrHost(Place.parse, Place.is_one), required=False
)
@_tokens("-p", "--n-prompt", "128,512", "Read prompts of this many tokens.")
@_tokens("-n", "--n-gen", "64,128", "Generate so many tokens.")
@_tokens("-d", "--n-depth", "0,1024,3968", "Measure with this many tokens already in the context.", least=0)
@click.option(
    "-r", "--repetitions", type=click.IntRange(1, 100), default=5, show_default=True, help="Measure each this often."
)
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Also write the JSON document to this file.")
@click.option("--until-eof", "ends", is_flag=True, hidden=True, help="End the measurement when standard input does.")
@quiet_option()
@json_option("Print the result as a JSON document, which `rkedge compat` takes as evidence.")
@runtime_options
@click.pass_context
def run(
    context: click.Context,
    bundle: Path | Place | None,
    n_prompt: list[int],
    n_gen: list[int],
    n_depth: list[int],
    repetitions: int,
    output: Path | None,
    ends: bool,
    quiet: bool,
    as_json: bool,
    runtime: RuntimeOptions,
) -> None:
    """Measure how fast a BUNDLE is, here or with the rkedge of a board, and print a table as llama-bench does.

    Beside it stand the plan's prediction and the vendor's figures, and what clocks, temperature and driver were. Ctrl-C
    keeps what was measured. Without BUNDLE it is the only one that has a name (`rkedge list`).

    The table is Markdown. Hold the clocks meanwhile: rkedge clocks -- rkedge bench BUNDLE
    """
    from rkboard.bench.session import Wanted

    wanted = Wanted(n_prompt, n_gen, n_depth, repetitions)
    if not n_prompt and not n_gen:
        raise UsageError("There is nothing to measure.", hint="Give -p or -n some tokens, such as -p 128.")
    if output is not None and not output.parent.is_dir():
        raise UsageError(f"There is no folder {output.parent} to write into.")
    error: RKEdgeError | None = None
    if isinstance(bundle, Place):
        result, status = measure_there(bundle, _words(wanted, runtime, quiet), _pass_on)
    else:
        if ends:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            until_eof(lambda: os.kill(os.getpid(), signal.SIGINT))
        result, status, error = _here(bundle or _only_bundle(), runtime, wanted, quiet)
    _finish(result, output, as_json, error)
    context.exit(status)


def _pass_on(line: str) -> None:
    say(one_line(line), err=True, dim=True)


def _finish(result: Result, output: Path | None, as_json: bool, error: RKEdgeError | None) -> None:
    if output is not None:
        _write(result, output)
    if as_json:
        say_json(result.as_dict())
    else:
        say(markdown(result))
    texts: Sequence[tuple[str, str]] = [("error: ", error.message), ("hint:  ", error.hint)] if error else []
    for lead, text in texts:
        say(one_line(text), lead=lead, err=True)
