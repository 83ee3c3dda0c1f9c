"""Asks programs of other people the demo questions: `python -m tests.conformance --vendor DIR --rkllama DIR ...`.

Nothing of theirs is in this repository, and nothing here builds it. Servers are taken out of the checkouts, at the tags
of their releases; --llm-demo RELEASE=PROGRAM gives the vendor's C++ demo, built beforehand after its own instructions.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.conformance import clients, setup

from rkboard.emulator import build as emulator
from rkconvert.demo import Question, questions
from rkruntime.abi import EMULATED

_RELEASES = ("1.2.3", "1.3.0")


@dataclass
class Row:
    """A line of the table."""

    client: str
    release: str
    right: int = 0
    asked: int = 0
    seconds: float = 0
    problems: list[str] = field(default_factory=list)
    skipped: str = ""

    @property
    def verdict(self) -> str:
        """What is printed; `not run` is neither."""
        if self.skipped:
            return "not run"
        return "passed" if self.right == self.asked and not self.problems else "FAILED"


def _clients(arguments: argparse.Namespace, folder: Path) -> Iterator[clients.Client | Row]:
    demos = dict(entry.split("=", 1) for entry in arguments.llm_demo)
    for release in _RELEASES:
        if release in demos:
            yield clients.LlmDemo(release, Path(demos[release]).resolve())
        else:
            yield Row("vendor's llm_demo", release, skipped=f"give --llm-demo {release}=PROGRAM")
    python = setup.interpreter(arguments.cache) if arguments.vendor or arguments.rkllama else None
    if arguments.vendor and python:
        for release in _RELEASES:
            source = setup.from_git(arguments.vendor, f"release-v{release}", setup.FLASK)
            if release == "1.2.3":
                yield clients.FlaskServer("vendor's flask_server", release, python, clients.ask_flask, source)
                continue
            yield clients.FlaskServer("vendor's flask_server", release, python, clients.ask_openai, source)
            yield clients.FlaskServer("  streaming", release, python, clients.ask_openai_stream, source)
    else:
        yield Row("vendor's flask_server", "", skipped="give --vendor, a checkout of airockchip/rknn-llm")
    if arguments.rkllama and python:
        package = setup.rkllama_package(arguments.rkllama, folder)
        yield clients.Rkllama("rkllama, Ollama's API", python, clients.ask_ollama_stream, package)
        yield clients.Rkllama("rkllama, OpenAI's API", python, clients.ask_openai_stream, package)
    else:
        yield Row("rkllama", "1.3.0", skipped="give --rkllama, a checkout of NotPunchnox/rkllama")


def _try(client: clients.Client, given: clients.Setup, asked: Sequence[Question]) -> Row:
    row = Row(client.name, client.release, asked=len(asked))
    began = time.monotonic()
    try:
        answers = client.answers(given, [question.question for question in asked])
    except clients.ClientError as error:
        row.problems.append(str(error))
        return row
    finally:
        row.seconds = time.monotonic() - began
    if len(answers) != len(asked):
        row.problems.append(f"{len(answers)} answers to {len(asked)} questions")
    for question, answer in zip(asked, answers, strict=False):
        if answer.strip() == question.answer:
            row.right += 1
        else:
            row.problems.append(f"{question.question}\n  expected {question.answer!r}\n  got      {answer!r}")
    return row


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="tests.conformance", description=__doc__)
    parser.add_argument("--vendor", type=Path, help="checkout of airockchip/rknn-llm, with its tags")
    parser.add_argument("--rkllama", type=Path, help="checkout of NotPunchnox/rkllama")
    parser.add_argument("--llm-demo", action="append", default=[], metavar="RELEASE=PROGRAM")
    parser.add_argument("--questions", type=int, help="ask the first so many only")
    parser.add_argument(
        "--cache", type=Path, default=emulator.cache_folder().parent, help="folder of the servers' venv"
    )
    arguments = parser.parse_args()
    for entry in arguments.llm_demo:
        release, equals, _ = entry.partition("=")
        if not equals or release not in EMULATED:
            parser.error(f"--llm-demo {entry}: it is RELEASE=PROGRAM, such as 1.2.3=build/llm_demo")
    return arguments


def main() -> int:
    """Print a table, and what went wrong; 1 if a program that was run missed an answer."""
    arguments = _arguments()
    asked = questions()[: arguments.questions]
    rows = []
    with tempfile.TemporaryDirectory(prefix="conformance-") as name:
        folder = Path(name)
        model, tokenizer = setup.demo_model(folder)
        for number, client in enumerate(_clients(arguments, folder)):
            if isinstance(client, Row):
                rows.append(client)
            else:
                work = folder / str(number)
                work.mkdir()
                rows.append(_try(client, clients.Setup(model, tokenizer, emulator.build, work), asked))
            row = rows[-1]
            detail = row.skipped or f"{row.right} of {row.asked} exact, {row.seconds:.0f} s"
            print(f"{row.client:24} {row.release:6} {row.verdict:8} {detail}", flush=True)
            for problem in row.problems:
                print("    " + problem.replace("\n", "\n    "))
    verdicts = [row.verdict for row in rows]
    counts = {verdict: verdicts.count(verdict) for verdict in ("passed", "FAILED", "not run")}
    print(f"{counts['passed']} passed, {counts['FAILED']} failed, {counts['not run']} not run")
    return int(counts["FAILED"] > 0 or counts["passed"] == 0)


if __name__ == "__main__":
    sys.exit(main())
