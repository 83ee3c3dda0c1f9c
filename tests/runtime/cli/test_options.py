"""What all options have in common: a sentence, bounds, one wording for one meaning."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from tests.pages import commands

from rkruntime import cli
from rkruntime.cli.options import runtime_options

# The same name with a meaning of its own in each command.
SEVERAL_MEANINGS = {
    "--port",
    "--output",
    "--system",
    "--socket",
    "--dtype",
    "--platform",
    "--release",
    "--verify",
    "--public",
    "--selftest",
    "--json",
    "--quiet",
    "--python",
    "--yes",
    "--board",
    "--bundle",
    "--library",
    "--risky",
    "--target",
}
WITH_A_NUMBER = click.types.IntParamType, click.types.FloatParamType


ALL = [
    (path, item)
    for path, command in commands(cli.cli, "rkedge")
    for item in command.params
    if isinstance(item, click.Option)
]
NUMBERS = [(path, item) for path, item in ALL if isinstance(item.type, WITH_A_NUMBER)]


def name(item: click.Option) -> str:
    return max(item.opts, key=len)


def test_each_option_is_explained_in_one_sentence() -> None:
    for path, item in ALL:
        assert item.help, (path, name(item))
        assert re.fullmatch(r"[A-Z][^\n]*\.", item.help), (path, item.help)
        assert "[default" not in item.help, (path, item.help)


def test_one_meaning_has_one_wording() -> None:
    wordings = defaultdict(set)
    for _, item in ALL:
        wordings[name(item)].add(item.help)
    assert {each for each, texts in wordings.items() if len(texts) > 1} <= SEVERAL_MEANINGS


def test_each_number_has_bounds() -> None:
    assert len(NUMBERS) > 15
    for path, item in NUMBERS:
        assert isinstance(item.type, (click.IntRange, click.FloatRange)), (path, name(item))
        assert item.type.min is not None, (path, name(item))
        assert item.type.max is not None, (path, name(item))


@pytest.mark.parametrize("text", ["nan", "-nan", "inf", "-inf", "1e999", "-1e999", "9" * 400, "-" + "9" * 400, "", "x"])
def test_what_is_not_within_them_is_refused(text: str) -> None:
    for _, item in NUMBERS:
        with pytest.raises(click.BadParameter):
            item.type.convert(text, item, None)


@pytest.mark.parametrize(
    ("path", "former"), [("chat", "--abi"), ("run", "--abi"), ("serve", "--abi"), ("plan", "--toolkit")]
)
def test_a_release_is_called_release_and_former_names_work(path: str, former: str) -> None:
    command = cli.cli.get_command(click.Context(cli.cli), path)
    assert command is not None
    assert former not in command.get_help(click.Context(command))
    words = [] if path == "serve" else ["./x"]
    given = []
    for flag in (former, "--release"):
        with command.make_context(path, [*words, flag, "1.1.4"]) as context:
            given.append(context.params)
    assert given[0] == given[1]
    assert "1.1.4" in given[0].values()
    with pytest.raises(click.UsageError):
        command.make_context(path, [*words, former])


def test_options_are_taken_out_of_what_the_command_gets() -> None:
    @click.command()
    @runtime_options
    def run(runtime: object) -> None:
        click.echo(str(runtime))

    done = CliRunner().invoke(run, ["--abi", "1.2.0", "--max-context", "64"])
    assert "release='1.2.0', max_context=64" in done.output


RKEDGE = Path(sys.executable).with_name("rkedge")
BASH = """
eval "$(_RKEDGE_COMPLETE=bash_source rkedge)"
COMP_WORDS=(rkedge $1) COMP_CWORD=$2
_rkedge_completion rkedge
printf '%s\\n' "${COMPREPLY[@]}"
"""


def complete(shell: str, typed: str) -> list[str]:
    """bash: what its own completion function offers; the others: what their functions get from rkedge."""
    environment = {**os.environ, "PATH": f"{RKEDGE.parent}:{os.environ['PATH']}"}
    words = str(len(typed.split()))
    command = ["bash", "-c", BASH, "bash", typed, words]
    if shell != "bash":
        last = typed.split()[-1] if shell == "fish" else words
        environment |= {
            "_RKEDGE_COMPLETE": f"{shell}_complete",
            "COMP_WORDS": f"rkedge {typed}",
            "COMP_CWORD": last,
        }
        command = [str(RKEDGE)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=100)
    return re.split(r"[\n,\t]", done.stdout)


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
@pytest.mark.parametrize(
    ("typed", "wanted"),
    [("conv", "convert"), ("emulator bu", "build"), ("plan --re", "--release"), ("convert --target em", "emulator")],
)
def test_completion(shell: str, typed: str, wanted: str) -> None:
    offered = complete(shell, typed)
    assert wanted in offered
    assert "calibrate" not in offered


def test_completion_leaves_former_names_out() -> None:
    assert "--toolkit" not in complete("bash", "plan --")
