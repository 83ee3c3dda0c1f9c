"""The command, on this machine and over a real sshd on loopback; the repairs, as the words that reach a shell."""

from __future__ import annotations

import getpass
import json
import os
import re
import resource
import shlex
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import pytest
from tests.forced import needs_sshd
from tests.runtime.serve import sshd

from rkboard.commands import doctor
from rkboard.doctor import repair, visit
from rkboard.doctor.document import MARK, Document
from rkboard.doctor.finding import Fix
from rkboard.doctor.visit import PROBE, look
from rkruntime import cli
from rkruntime.errors import ServiceError, UsageError

from .boards import BOARDS
from .sysroots import GOOD, plant
from .test_boards import document_of

HARMFUL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


@pytest.fixture
def reached(board: sshd.Board, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("RKEDGE_SSH", shlex.join([*board.ssh, "-T"]))
    return f"{getpass.getuser()}@open"


@needs_sshd
def test_a_board_over_ssh(reached: str, capsys: pytest.CaptureFixture[str]) -> None:
    status = cli.main(["doctor", reached, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert status in (0, 4, 9)
    assert found["destination"] == reached
    assert found["board"]["kernel"] == os.uname().release
    assert {finding["group"] for finding in found["findings"]} >= {"driver"}


@needs_sshd
def test_another_file_tree_over_ssh(forced: Callable[[str], str], tmp_path: Path) -> None:
    """The same findings there as here, also behind a login script that talks."""
    tree = plant(tmp_path / "tree", GOOD)
    noise = "head -c 300000 /dev/urandom; printf 'welcome \\033[2J\\nrkedge-pro\\n'; echo motd >&2\n"
    there = look(forced(f"{noise}exec python3 -I - --root {tree}\n"))
    here = look(None, tree)
    assert there.files == here.files
    assert there.nodes == here.nodes
    assert there.libraries == here.libraries


@needs_sshd
@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("echo sh: 1: python3: not found >&2; exit 127", "has no python3"),
        ("exit 3", "ended with 3"),
        ("cat > /dev/null; echo nothing", "before it had said anything"),
        ("exec cat /dev/zero", "megabytes of something other"),
        ("exec yes", "megabytes of something other"),
        ("cat > /dev/null; printf 'rkedge-probe: {}\\n'", "something other than what the probe prints"),
        ("cat > /dev/null; printf 'rkedge-probe: '; exec cat /dev/zero", "not JSON"),
        ("printf 'sudo: a password is required\\n' >&2; exit 1", "asks for a password"),
        ("exec sleep 1000", "did not end"),
    ],
)
def test_a_board_that_misbehaves(
    forced: Callable[[str], str], script: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "sleep" in script:
        monkeypatch.setattr(visit, "_PATIENCE_S", 1.0)
    with pytest.raises(ServiceError, match=says):
        look(forced(script))


@needs_sshd
def test_an_unknown_host_key_is_refused(board: sshd.Board, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    strict = ["-o", "StrictHostKeyChecking=yes", "-o", f"UserKnownHostsFile={tmp_path / 'none'}"]
    monkeypatch.setenv("RKEDGE_SSH", shlex.join([*board.ssh, "-T", *strict]))
    with pytest.raises(ServiceError, match="cannot be reached") as caught:
        look("open")
    assert "host key" in " ".join(caught.value.log).lower()


def test_no_option_of_ours_skips_host_keys() -> None:
    sources = [*(PROBE.parent).rglob("*.py"), Path(visit.ssh_command.__code__.co_filename)]
    assert not [path for path in sources if re.search("StrictHost|UserKnownHosts", path.read_text())]


@needs_sshd
def test_a_board_that_is_not_there(reached: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "nobody@nowhere.invalid"]) == ServiceError.exit_code
    assert "cannot be reached" in capsys.readouterr().err


@needs_sshd
@pytest.mark.parametrize("where", ["-oProxyCommand=touch owned", "a b;touch owned", "$(touch owned)"])
def test_a_destination_is_no_option_and_no_command(
    reached: str, where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["doctor", "--", where]) == UsageError.exit_code
    assert "is not a board that ssh can reach" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@needs_sshd
def test_a_repair_over_ssh_is_its_words_and_nothing_else(forced: Callable[[str], str], tmp_path: Path) -> None:
    log = tmp_path / "log"
    where = forced(f'printf "%s|" "$SSH_ORIGINAL_COMMAND" >> {log}; cat >> {log}')
    fix = Fix(("tee", "/sys/class/devfreq/dmc/upthreshold"), "25")
    assert repair.apply(fix, where, root=False) == ""
    assert log.read_text() == "sudo -n tee /sys/class/devfreq/dmc/upthreshold|25\n"
    assert repair.apply(Fix(("rm", "/dev/rknpu")), where, root=True) == ""
    assert log.read_text().endswith("rm /dev/rknpu|")
    refusing = forced("printf 'sudo: a password is \\033[2Jrequired\\n' >&2; exit 1")
    assert repair.apply(fix, refusing, root=False) == "sudo: a password is \\x1b[2Jrequired"


@pytest.fixture
def answering(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes an ssh that is this shell script."""

    def ssh(script: str) -> None:
        (tmp_path / "ssh.sh").write_text(script)
        monkeypatch.setenv("RKEDGE_SSH", f"sh {tmp_path / 'ssh.sh'}")

    return ssh


def test_a_login_script_that_ends_in_no_line_feed(answering: Callable[[str], None], tmp_path: Path) -> None:
    tree = plant(tmp_path / "tree", GOOD)
    answering(f"printf 'Welcome! '; exec python3 -I - --root {tree}\n")
    assert look("u@board").files == look(None, tree).files


@pytest.mark.parametrize("stream", [1, 2])
def test_a_repair_that_says_gigabytes(answering: Callable[[str], None], stream: int) -> None:
    """A board decides what comes back, and this machine's memory does not depend on it."""
    answering(f"cat > /dev/null; head -c 500000000 /dev/zero >&{stream}; printf '\\nthe end\\n' >&2; exit 3")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert repair.apply(Fix(("rm", "/dev/rknpu")), "u@board", root=True) == "the end"
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # KiB


@pytest.mark.parametrize(("status", "says"), [(0, ""), (3, "no such file")])
def test_a_repair_is_over_when_ssh_is(
    answering: Callable[[str], None], status: int, says: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The master of ssh's shared connections (ControlPersist) may keep what it was started with open for hours."""
    monkeypatch.setattr(repair, "_LIMIT_S", 20.0)
    answering(f"sleep 60 < /dev/null & echo $! > {tmp_path / 'pid'}; echo 'no such file' >&2; exit {status}")
    try:
        assert repair.apply(Fix(("rm", "/dev/rknpu")), "u@board", root=True) == says
    finally:
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGTERM)


@pytest.mark.parametrize(
    "word", ["a b", "$(id)", ";", "a;b", "", "`id`", "'", "a\nb", "../etc", "*", "~", "\x1b[2J", "ä", "--", "a&b", ">x"]
)
def test_a_repair_has_no_letter_that_a_shell_reads(word: str) -> None:
    with pytest.raises(ValueError, match="other letters"):
        Fix(("tee", word))
    if word:
        with pytest.raises(ValueError, match="other letters"):
            Fix(("tee", "/x"), word)


# The command


class Practice:
    """Boards instead of visits, one after the other, and a sudo that writes down what it is told."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self._folder, self._patch, self.log = tmp_path, monkeypatch, tmp_path / "sudo.log"
        self.visits = 0
        sudo = tmp_path / "bin" / "sudo"
        sudo.parent.mkdir()
        sudo.write_text(f'#!/bin/sh\nprintf "%s|" "$@" >> {self.log}\ncat >> {self.log}\n')
        sudo.chmod(0o755)
        monkeypatch.setenv("PATH", f"{sudo.parent}:{os.environ['PATH']}")

    def boards(self, *names: str, **more: Any) -> None:
        documents = []
        for number, name in enumerate(names):
            board = BOARDS[name]
            tree = plant(self._folder / f"tree{number}", GOOD | dict(board.files))
            documents.append(Document.parse(MARK + json.dumps(document_of(tree, board) | more).encode()))

        def visited(*_: Any, **__: Any) -> Document:
            self.visits += 1
            return documents[min(self.visits, len(documents)) - 1]

        self._patch.setattr(doctor, "look", visited)


@pytest.fixture
def practice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Practice:
    return Practice(tmp_path, monkeypatch)


def test_repairs_are_run_when_agreed_to_and_looked_at_again(
    practice: Practice, capsys: pytest.CaptureFixture[str]
) -> None:
    practice.boards("wrong-rknpu-link", "armbian-vendor")
    assert cli.main(["doctor", "--fix", "--yes", "--json"]) == 0
    out, err = capsys.readouterr()
    assert practice.log.read_text() == "-n|rm|/dev/rknpu|"
    assert "sudo rm /dev/rknpu: done" in err
    assert "Mended: rknpu-link" in err
    assert json.loads(out)["counts"]["failure"] == 0


def test_a_value_is_written_with_a_newline(practice: Practice) -> None:
    practice.boards("memory-clock-rises-too-late")
    assert cli.main(["doctor", "--fix", "--yes"]) == 9
    assert practice.log.read_text() == (
        "-n|tee|/sys/class/devfreq/dmc/upthreshold|25\n-n|tee|/sys/class/devfreq/dmc/governor|performance\n"
    )


def test_each_repair_is_asked_for(
    practice: Practice, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    practice.boards("slow-clocks")
    asked: list[str] = []

    def confirm(text: str, **_: Any) -> bool:
        asked.append(text)
        return "fdab0000.npu" in text

    monkeypatch.setattr(sys.stdin, "isatty", lambda: True)
    monkeypatch.setattr(click, "confirm", confirm)
    assert cli.main(["doctor", "--fix"]) == 9
    assert len(asked) == 3
    assert practice.log.read_text() == "-n|tee|/sys/class/devfreq/fdab0000.npu/governor|performance\n"
    assert "Mended: nothing yet" in capsys.readouterr().err


def test_nobody_is_asked_where_nobody_is(practice: Practice, monkeypatch: pytest.MonkeyPatch) -> None:
    practice.boards("slow-clocks")
    monkeypatch.setattr(sys.stdin, "isatty", lambda: False)
    assert cli.main(["doctor", "--fix"]) == 2
    assert not practice.log.exists()


def test_without_fix_nothing_is_run(practice: Practice) -> None:
    practice.boards("slow-clocks")
    assert cli.main(["doctor"]) == 9
    assert not practice.log.exists()
    assert practice.visits == 1


def test_a_sudo_that_is_missing_or_refuses(
    practice: Practice, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    practice.boards("wrong-rknpu-link")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert cli.main(["doctor", "--fix", "--yes"]) == 4
    assert "sudo rm /dev/rknpu: there is no sudo here" in capsys.readouterr().err
    sudo = tmp_path / "sudo"
    sudo.write_text("#!/bin/sh\nread line\necho 'sudo: a password is required' >&2\nexit 1\n")
    sudo.chmod(0o755)
    assert cli.main(["doctor", "--fix", "--yes"]) == 4
    assert "sudo rm /dev/rknpu: sudo: a password is required" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [["x@y", "--root", "."], ["--root", ".", "--fix"], ["--root", ".", "--sudo"], ["--yes"], ["--bundle", "/nowhere"]],
)
def test_options_that_do_not_go_together(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", *words]) in (2, 3)
    assert "defect" not in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["--verbose"], ["--json"]])
def test_nothing_that_a_board_says_instructs_the_terminal(
    practice: Practice, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    hostile = "\x1b[2Jx\x1b]0;owned\x07\x9b31m\u202egnp\u2028\rfalse\nerror: false line"
    texts = ("proc/sys/kernel/osrelease", "etc/os-release", "sys/class/devfreq/dmc/governor", "run/rkedge/rkedge.sock",
             "sys/class/thermal/thermal_zone0/type", "sys/module/rknpu/version")  # fmt: skip
    files = {path: {"text": f"PRETTY_NAME={hostile}"} for path in texts}
    process = {"pid": 1, "name": hostile, "uid": 0, "memory": 1 << 32, "nodes": ["/dev/dri/card1"]}
    library = {
        "path": hostile,
        "loader": True,
        "missing": [hostile],
        "version_texts": [f"RKLLM SDK (version: {hostile})"],
    }
    tree = document_of(plant(practice._folder / "hostile", GOOD), BOARDS["armbian-vendor"])
    me = tree["me"] | {"user": hostile, "libc": hostile, "python": hostile}
    changes = {"files": tree["files"] | files, "processes": [process], "libraries": [library], "me": me}
    practice.boards("armbian-vendor", problems=[hostile], log=[f"npu failed to {hostile}"], **changes)
    cli.main(["doctor", *words])
    out, err = capsys.readouterr()
    assert not HARMFUL.search(out + err)
    assert not re.search(r"^(error: )?false", out + err, re.MULTILINE)
    assert "gnp" in out
    if "--json" in words:
        json.loads(out)


def test_the_table_begins_with_the_worst_group(practice: Practice, capsys: pytest.CaptureFixture[str]) -> None:
    practice.boards("render-group-only")
    assert cli.main(["doctor"]) == 9
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Radxa ROCK 5B, rk3588, kernel 6.1.115-vendor-rk35xx, driver 0.9.8"
    assert lines[2].startswith("nodes and permissions")
    assert lines[3].startswith("warning  This process can open the NPU's render node")
    assert any("-> sudo usermod -aG video" in line for line in lines)
    assert lines[-1].startswith("A model may run here, but not as well as it could (1 warning, 1 note,")
    assert all(len(line) <= 110 or "-> " in line for line in lines)


def test_this_machine_and_a_tree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["doctor", "--json"]) in (0, 4, 9)
    assert json.loads(capsys.readouterr().out)["board"]["kernel"] == os.uname().release
    cli.main(["doctor", "--root", str(plant(tmp_path, GOOD)), "--verbose"])
    assert "driver 0.9.8" in capsys.readouterr().out
