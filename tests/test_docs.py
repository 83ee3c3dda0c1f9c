"""The pages: their links lead somewhere, and they name what the code reads."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from itertools import dropwhile
from pathlib import Path

import click
import pytest
from tests.pages import DOCS
from tests.pages import PAGES as WRITTEN

from rkruntime import cli
from rkruntime.errors import RKEdgeError

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def anchor(heading: str) -> str:
    """As GitHub makes it of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith(("http://", "https://")):
            continue
        path, _, fragment = target.partition("#")
        other = page.parent / path if path else page
        assert other.exists(), target
        if fragment:
            headings = re.findall(r"^#+ (.*)$", other.read_text(), re.MULTILINE)
            assert fragment in map(anchor, headings), target


def test_every_page_can_be_found() -> None:
    readme = (ROOT / "README.md").read_text()
    assert [page.name for page in (ROOT / "docs").glob("*.md") if f"docs/{page.name}" not in readme] == []


def test_every_variable_is_named() -> None:
    sources = [
        *(ROOT / "runtime").rglob("*.py"), *(ROOT / "converter").rglob("*.py"), *(ROOT / "board").rglob("*.py"),
        *(ROOT / "board" / "emulator").glob("*.cc"),
    ]  # fmt: skip
    read = {
        name
        for source in sources
        for name in re.findall(r"[\"'](RK(?:EDGE|EMU)_(?!HAVE)[A-Z_]+)[\"']", source.read_text())
    }
    assert {"RKEDGE_LIBRARY", "RKEMU_FAULT"} <= read
    page = (ROOT / "docs" / "environment.md").read_text()
    assert {name for name in read if f"`{name}`" not in page} == set()


@pytest.mark.parametrize("name", list(WRITTEN))
def test_written_pages_are_up_to_date(name: str) -> None:
    assert (DOCS / name).read_text() == WRITTEN[name](), "python -m tests.pages"


def shown_commands(text: str) -> Iterator[list[str]]:
    """The words of each `rkedge` command in a page: in code blocks, in code within a sentence, behind a pipe."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    code = "\n".join([*blocks, *re.findall(r"^    +(.*)$", text, re.MULTILINE)])
    for line in [*code.replace("\\\n", " ").splitlines(), *re.findall(r"`([^`\n]+)`", text)]:
        for command in re.findall(r"(?:^|[|(;] *|sudo |do |\$ )(rkedge .*)", line):
            words = shlex.split(re.split(r" # |  {4,}|[|;)<>]", command)[0].replace("...", ""), comments=True)
            if len(words) > 1:
                yield words[1:]


def what_is_wrong(command: click.Command, words: list[str]) -> str:
    """That a command or a flag does not exist, or that a value is not of its kind."""
    if isinstance(command, click.Group):
        name, *rest = [*dropwhile(lambda word: word.startswith("-"), words), ""]
        found = command.get_command(click.Context(command), name)
        return what_is_wrong(found, rest[:-1]) if found else f"there is no command {name}" * bool(name)
    try:
        command.make_context("rkedge", list(words))
    except (click.MissingParameter, click.BadOptionUsage, click.exceptions.Exit, RKEdgeError):
        pass  # a sentence leaves arguments and values out, and the files of an example are not here
    except click.UsageError as error:
        return error.format_message()
    return ""


@pytest.mark.parametrize("page", [page for page in PAGES if page.name not in WRITTEN], ids=lambda page: page.name)
def test_commands_in_the_pages_exist(page: Path) -> None:
    problems = {shlex.join(words): what_is_wrong(cli.cli, words) for words in shown_commands(page.read_text())}
    assert {line: problem for line, problem in problems.items() if problem} == {}


@pytest.mark.parametrize("line", ["paln x", "plan x --rom 8", "plan x --ram much", "emulator bulid", "plan x y"])
def test_a_wrong_line_would_be_noticed(line: str) -> None:
    (words,) = shown_commands(f"Type `rkedge {line}`.")
    assert what_is_wrong(cli.cli, words)


def test_commands_in_pages_are_found() -> None:
    found = [words for page in PAGES if page.name not in WRITTEN for words in shown_commands(page.read_text())]
    assert len(found) > 60
    assert ["plan", "./gemma-2-2b-it"] in found
    assert ["diagnose", "-"] in found
