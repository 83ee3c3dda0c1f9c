"""The command table, and how errors leave."""

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from rkruntime import cli
from rkruntime.cli.flags import json_option
from rkruntime.errors import LoadError, RKEdgeError, UsageError


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
    @json_option("Print JSON.")
    def run(as_json: bool) -> None:
        raise LoadError("The load failed.", hint="Do this.", details={"lines": ["E rkllm: no"]})

    monkeypatch.setattr(cli.LazyGroup, "get_command", lambda self, ctx, name: run)
    monkeypatch.setitem(cli.COMMANDS, "fail", cli.Command("nowhere", "Fail."))


@pytest.mark.usefixtures("failing")
def test_an_error_is_the_log_two_lines_and_an_exit_code(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["fail"]) == LoadError.exit_code
    out, err = capsys.readouterr()
    assert out == ""
    assert err == "  E rkllm: no\nerror: The load failed.\nhint:  Do this.\n"


@pytest.mark.usefixtures("failing")
def test_with_json_the_error_is_json_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["fail", "--json"])
    error = json.loads(capsys.readouterr().out)
    assert error["error"] == "LoadError"
    assert error["details"] == {"lines": ["E rkllm: no"]}


@pytest.mark.usefixtures("failing")
def test_debug_shows_the_traceback_and_changes_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    usual = cli.main(["fail", "--json"]), capsys.readouterr()
    code, shown = cli.main(["--debug", "fail", "--json"]), capsys.readouterr()
    assert (code, shown.out) == (usual[0], usual[1].out)
    assert shown.err.startswith("Traceback")
    assert shown.err.endswith(usual[1].err)


def test_a_defect_is_no_traceback_either(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(cli.LazyGroup, "get_command", broken)
    assert cli.main(["run"]) == RKEdgeError.exit_code
    assert "ZeroDivisionError: division by zero" in capsys.readouterr().err
    assert cli.main(["--debug", "run"]) == RKEdgeError.exit_code
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (PermissionError(13, "Permission denied", "/etc/shadow"), "HostError", "Permission denied: /etc/shadow"),
        (OSError("odd"), "HostError", "odd"),
        (MemoryError(), "HostError", "not enough memory"),
        (ModuleNotFoundError("No module named 'torch.nn'", name="torch.nn"), "HostError", "install torch=="),
        (ModuleNotFoundError("No module named 'starlette'", name="starlette"), "HostError", "install 'starlette>="),
        (ModuleNotFoundError("No module named 'yaml'", name="yaml"), "HostError", "install 'pyyaml>="),
        (ModuleNotFoundError("No module named 'h11'", name="h11"), "HostError", "install h11"),
        (ModuleNotFoundError("No module named 'rkboard'", name="rkboard"), "HostError", "--force-reinstall FOLDER"),
        (ImportError("libgomp.so.1: cannot open", name="torch"), "HostError", "cannot be used: libgomp"),
    ],
)
def test_what_is_wrong_with_the_machine_is_no_defect(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, kind: str, words: str
) -> None:
    @click.command("fail")
    @json_option("Print JSON.")
    def run(as_json: bool) -> None:
        raise error

    monkeypatch.setattr(cli.LazyGroup, "get_command", lambda self, ctx, name: run)
    assert cli.main(["plan", "--json"]) == 5
    out, err = capsys.readouterr()
    found = json.loads(out)
    assert found["error"] == kind
    assert words in found["message"] + found["hint"]
    assert words in err.replace("\n", " ")
    assert "defect" not in err


@pytest.mark.usefixtures("failing")
def test_a_flag_is_what_click_parsed_and_not_what_stands_in_the_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    @click.command("fail")
    @click.option("-p", "--prompt")
    @json_option("Print JSON.")
    def run(prompt: str, as_json: bool) -> None:
        raise LoadError("The load failed.")

    monkeypatch.setattr(cli.LazyGroup, "get_command", lambda self, ctx, name: run)
    assert cli.main(["fail", "-p", "--json"]) == LoadError.exit_code
    assert capsys.readouterr().out == ""
    assert cli.main(["fail", "--prompt=--debug"]) == LoadError.exit_code
    assert "error: The load failed." in capsys.readouterr().err
    assert cli.main(["fail", "--json", "-p", "x"]) == LoadError.exit_code
    assert json.loads(capsys.readouterr().out)["error"] == "LoadError"


def test_a_wrong_value_is_json_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["plan", "m", "--ram", "lots", "--json"]) == 2
    assert json.loads(capsys.readouterr().out)["error"] == "UsageError"


@pytest.mark.parametrize(
    "line",
    [
        "plan m --bogus --json",
        "plan m --json --bogus",
        "plan --json m --ram",
        "plan one two --json",
        "--bogus plan m --json",
        "plna m --json",
        "emulator build --bogus --json",
        "emulator bulid --json",
    ],
)
def test_a_line_that_cannot_be_parsed_is_json_too(capsys: pytest.CaptureFixture[str], line: str) -> None:
    assert cli.main(line.split()) == 2
    assert json.loads(capsys.readouterr().out)["error"] == "UsageError"


@pytest.mark.parametrize(
    "line",
    ["plan m --bogus", "run B --bogus -p --json", "plan m --bogus -- --json", "plan m --revision --json --ram x"],
)
def test_a_word_that_only_looks_like_the_flag_is_not_it(capsys: pytest.CaptureFixture[str], line: str) -> None:
    assert cli.main(line.split()) == 2
    assert capsys.readouterr().out == ""


def test_a_command_that_cannot_be_imported_fails_as_json_too(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(cli.COMMANDS, "plan", cli.Command("rkruntime.nowhere", "Fail."))
    assert cli.main(["plan", "m", "--json"]) == 5
    assert json.loads(capsys.readouterr().out)["error"] == "HostError"
    assert cli.main(["plan", "m"]) == 5
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("words", [["help"], ["help", "run"], ["help", "emulator", "build"], ["help", "help"]])
def test_help_is_what_the_option_says(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) == 0
    found = capsys.readouterr().out
    assert cli.main([*words[1:], "--help"]) == 0
    assert found == capsys.readouterr().out


def test_help_on_nothing_suggests(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["help", "covnert"]) == 2
    assert "Did you mean 'convert'?" in capsys.readouterr().err


def test_the_version_in_short(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["-V"]) == 0
    assert capsys.readouterr().out.startswith("rkedge, version ")


@pytest.mark.parametrize("words", [[], ["toolkit"], ["emulator"]])
def test_a_command_alone_shows_its_help_in_lines(words: list[str], capfd: pytest.CaptureFixture[str]) -> None:
    assert cli.main(words) in (0, 2)
    lines = "".join(capfd.readouterr()).splitlines()
    assert "\\n" not in "".join(lines)
    assert lines[0].startswith("Usage: ")
    assert "Commands:" in lines


@pytest.mark.parametrize("command", ["doctor", "status", "logs", "rollback --yes", "undeploy --yes"])
def test_a_board_with_an_empty_name_is_none(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A variable of a script that was not set."""
    assert cli.main([*command.split(), ""]) == UsageError.exit_code
    assert "it is empty" in capsys.readouterr().err


def test_compat_does_not_take_an_empty_board_for_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["compat", str(tmp_path), "--board", "", "-o", str(tmp_path / "results")]) != 0
    assert capsys.readouterr().out == ""
