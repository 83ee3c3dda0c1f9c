"""The command table, and how errors leave."""

import json
import subprocess
import sys

import click
import pytest
from click.testing import CliRunner

from rkruntime import cli
from rkruntime.errors import LoadError, RKEdgeError


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_each_command_is_there_under_its_name(name: str) -> None:
    command = cli.cli.get_command(click.Context(cli.cli), name)
    assert isinstance(command, click.Command)
    assert command.name == name
    assert command.help, f"rkedge {name} --help says nothing"
    assert CliRunner().invoke(command, ["--help"]).exit_code == 0


def test_help_imports_no_command() -> None:
    code = (
        "import sys; from rkruntime.cli import main; main(['--help']); "
        "heavy = {'numpy', 'torch', 'rich', 'yaml'} & set(sys.modules); "
        "sys.exit(str(heavy) if heavy or any('.commands.' in name for name in sys.modules) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "convert" in done.stdout


def test_a_near_name_is_offered(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["covnert"]) == 2
    assert "Did you mean 'convert'?" in capsys.readouterr().err


@pytest.fixture
def failing(monkeypatch: pytest.MonkeyPatch) -> None:
    @click.command("fail")
    @click.option("--json", "as_json", is_flag=True)
    def run(as_json: bool) -> None:
        raise LoadError("The load failed.", hint="Do this.", details={"lines": ["E rkllm: no"]})

    monkeypatch.setattr(cli.LazyGroup, "get_command", lambda self, ctx, name: run)
    monkeypatch.setitem(cli.COMMANDS, "fail", cli.Entry("nowhere", "Fail."))


@pytest.mark.usefixtures("failing")
def test_an_error_is_two_lines_and_an_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fail"]) == LoadError.exit_code
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "error: The load failed.\nhint:  Do this.\n"


@pytest.mark.usefixtures("failing")
def test_with_json_the_error_is_json_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["fail", "--json"])
    error = json.loads(capsys.readouterr().out)
    assert error["error"] == "LoadError"
    assert error["details"] == {"lines": ["E rkllm: no"]}


@pytest.mark.usefixtures("failing")
def test_debug_shows_the_traceback() -> None:
    with pytest.raises(RKEdgeError):
        cli.main(["--debug", "fail"])


def test_a_defect_is_no_traceback_either(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(cli.cli, "main", broken)
    assert cli.main(["run"]) == RKEdgeError.exit_code
    assert "ZeroDivisionError: division by zero" in capsys.readouterr().err
    with pytest.raises(ZeroDivisionError):
        cli.main(["--debug", "run"])


def test_a_reader_that_goes_away_is_no_error() -> None:
    command = [sys.executable, "-m", "rkruntime.cli", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.close()
        assert child.stderr.read() == b""
