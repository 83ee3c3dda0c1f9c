"""`rkedge firstrun`: what a board's library does, in a file that can be sent to others."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from rkruntime.cli.flags import json_option
from rkruntime.cli.options import bundle_argument, open_for_person, runtime_options
from rkruntime.engine.open import RuntimeOptions, SamplingOptions
from rkruntime.errors import RKEdgeError
from rkruntime.files import atomic_file
from rkruntime.folders import home
from rkruntime.printable import one_line
from rkruntime.terminal import say, say_json
from rkruntime.words import counted

if TYPE_CHECKING:
    from rkruntime.model import Model


def _write(report: dict[str, Any], path: Path) -> None:
    text = json.dumps(report, indent=1, ensure_ascii=False, default=str)
    own = str(home())
    with atomic_file(path) as file:
        file.write_text((text.replace(own, "~") if len(own) > 1 else text) + "\n", encoding="utf-8")


def _wish(report: Mapping[str, Any]) -> str:
    if report["complete"] or "error" in report:
        return ". Please send it to whoever gave you RKEdge: it answers what is open."
    return f" as far as it went, with {counted(len(report['answers']), 'answer')}. Run it again for the rest."


@click.command("firstrun")
@bundle_argument()
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default="first-run.json",
    show_default=True,
    help="Write this file.",
)
@click.option(
    "--risky", is_flag=True, help="Also try what is reported to have crashed a board: pause, prompt cache file."
)
@click.option("--slow", is_flag=True, help="Also ask what may take minutes: prompts longer than the sliding window.")
@json_option()
@runtime_options
def run(bundle: Path, output: Path, risky: bool, slow: bool, as_json: bool, runtime: RuntimeOptions) -> None:
    """Find out what the runtime library on this board really does, with the model of a BUNDLE, a folder or its name.

    Takes a few short runs. The file has this board's kernel, driver, memory and log lines, and the answers; it names
    neither host nor user.
    """
    from rkruntime.bundle.manifest import open_bundle
    from rkruntime.firstrun import SCHEMA, machine_report, report_of
    from rkruntime.probes import QUESTIONS, Trial, answer

    opened = open_bundle(bundle)

    def load() -> Model:
        return open_for_person(opened, runtime, SamplingOptions(temperature=0))

    report: dict[str, Any] = {
        "schema": SCHEMA,
        "rkedge": version("rkedge"),
        "bundle": opened.manifest.name,
        "machine": machine_report(),
        "answers": {},
        "complete": False,
    }
    _write(report, output)  # a path that cannot be written fails here, before a load that takes minutes
    trial = Trial(load)
    try:
        report["model"] = report_of(trial.model)
        for name, question in QUESTIONS.items():
            if (risky or not question.risky) and (slow or not question.slow):
                outcome = answer(name, trial)
                result = {"result": outcome.result} if outcome.result else {}
                report["answers"][name] = {"question": question.text, "says": outcome.says, **result, **outcome.facts}
                if not as_json:
                    say(f"{question.text}\n  {one_line(outcome.says)}")
        report["findings"] = [finding.as_dict() for finding in trial.model.engine.findings]
        report["complete"] = True
    except RKEdgeError as error:
        report["error"] = error.as_dict()
        raise
    finally:
        _write(report, output)  # before the model is closed, which may take time and be interrupted
        trial.close()
        say(f"\nWritten to {one_line(str(output))}{_wish(report)}", err=True)
    if as_json:
        say_json(report)
    if report["model"]["emulated"]:
        say("This is the emulator, so nothing of it is an answer about a board.", err=True)
