"""What all options have in common: a sentence, bounds, one wording for one meaning."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

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


def parameters() -> Iterator[tuple[str, click.Parameter]]:
    for path, command in commands(cli.cli, "rkedge"):
        for item in command.params:
            flag = isinstance(item, click.Option) and (item.is_flag or item.count)
            if not flag and not isinstance(command, click.Group):
                yield path, item


# Texts that a model or another program gets, and lists.
MAY_BE_EMPTY = {
    "rkedge calibrate system", "rkedge chat system", "rkedge run words", "rkedge run prompt", "rkedge run system",
    "rkedge run stop", "rkedge clocks command", "rkedge bench n_prompt", "rkedge bench n_gen", "rkedge bench n_depth",
}  # fmt: skip
GIVEN = list(parameters())


@pytest.mark.parametrize(("path", "item"), GIVEN, ids=[f"{path} {item.name}" for path, item in GIVEN])
def test_an_empty_value_is_refused(path: str, item: click.Parameter) -> None:
    context = click.Context(click.Command("x"))
    context.set_parameter_source(str(item.name), click.core.ParameterSource.COMMANDLINE)
    value: Any = ("x", "") if item.nargs == -1 or getattr(item, "multiple", False) else ""
    if f"{path} {item.name}" in MAY_BE_EMPTY:
        assert item.type_cast_value(context, value) in (value, [])
    else:
        with pytest.raises(click.BadParameter):
            item.type_cast_value(context, value)


@pytest.mark.parametrize(
    "words",
    [
        ["convert", ""], ["convert", "x", "--lora", ""], ["convert", "x", "-o", ""], ["plan", ""],
        ["plan", "x", "--html="], ["merge", "", "-o", "y"], ["chat", ""], ["inspect", ""], ["diagnose", ""],
        ["doctor", ""], ["fleet", "deploy", ""], ["toolkit", "info", "--toolkit-python="], ["bench", ""],
        ["serve", ""], ["compat", ""],
    ],
    ids=" ".join,
)  # fmt: skip
def test_an_empty_value_is_never_the_current_folder(
    words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is what a shell makes of "$MODEL" if there is no such variable."""
    monkeypatch.chdir(tmp_path)
    assert cli.main(words) == 2
    assert "it is empty" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_without_a_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["merge", str(tmp_path), "--lora", "=0.5", "-o", str(tmp_path / "out")]) == 2
    assert "names no folder" in capsys.readouterr().err
