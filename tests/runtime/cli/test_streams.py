"""Standard streams as shells leave them: without a reader, on a full disk, closed."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from rkconvert.demo import checkpoint

LOG = "E rkllm: rkllm_init failed"
LINES = ["--help", "diagnose -", "diagnose - --json", "plan DEMO"]


def command(line: str) -> list[str]:
    return [sys.executable, "-m", "rkruntime.cli", *line.replace("DEMO", str(checkpoint())).split()]


def shell(line: str, redirections: str, text: str = LOG, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command line with the shell's redirections."""
    return subprocess.run(
        ["bash", "-c", f'"$@" {redirections}', "bash", *command(line)],
        input=text,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **environment},
        check=False,
    )


@pytest.mark.parametrize("line", LINES)
def test_a_reader_that_goes_away_is_no_error(line: str) -> None:
    with subprocess.Popen(
        command(line), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stderr is not None
        child.stdout.close()
        child.stdin.write(LOG)
        child.stdin.close()
        said = child.stderr.read()
    assert (child.returncode, said) == (141, "")


@pytest.mark.parametrize("line", LINES)
@pytest.mark.parametrize("where", [">/dev/full", ">&-"])
def test_an_answer_that_cannot_be_written_is_a_typed_error(line: str, where: str) -> None:
    done = shell(line, where)
    assert (done.returncode, done.stderr[:7], "defect" in done.stderr) == (5, "error: ", False), done.stderr
    assert not {"Traceback", "Exception"} & set(done.stderr.split())
    assert "standard output" in done.stderr or where != ">&-"


@pytest.mark.parametrize("module", ["rkruntime.cli", "click", "rkruntime.terminal", "rkruntime.commands.run"])
def test_ctrl_c_while_it_starts_shows_no_traceback(module: str) -> None:
    """A board's Python takes a second for its imports."""
    program = (
        "import signal, sys\n"
        "class Pressed:\n"
        "    def find_spec(self, name, *_):\n"
        f"        if name == {module!r}: signal.raise_signal(signal.SIGINT)\n"
        "sys.meta_path.insert(0, Pressed())\n"
        "from rkruntime.program import start\n"
        "sys.exit(start())"
    )
    command = [sys.executable, "-c", program, "run", "/no/such"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "\nstopped\n")


@pytest.mark.parametrize("where", [">/dev/full", ">&-"])
def test_an_error_whose_json_cannot_be_written_keeps_its_exit_code(where: str) -> None:
    for line, code in (("run /no/such --json", 3), ("run --bogus --json", 2)):
        done = shell(line, where)
        assert (done.returncode, "Traceback" in done.stderr) == (code, False), done.stderr


@pytest.mark.parametrize("where", ["2>/dev/full", "<&- 2>&-"])
def test_messages_that_nobody_can_read_change_nothing(where: str) -> None:
    for line, code in (("nope", 2), ("run /no/such -p x", 3), ("diagnose /dev/null", 3)):
        assert (shell(line, where).returncode, shell(line, "").returncode) == (code, code)


def test_an_input_that_is_closed_is_missed_only_by_who_reads_it() -> None:
    assert shell("plan DEMO", "<&-").returncode == 0
    done = shell("diagnose --json -", "<&-")
    assert (done.returncode, json.loads(done.stdout)["error"]) == (5, "HostError")
    assert "standard input" in json.loads(done.stdout)["message"]
