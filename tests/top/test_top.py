"""What `rkedge top` shows: of trees that behave as a board's, of a daemon at work, over ssh, and of hostile boards."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from tests.doctor.sysroots import GOOD, Mode, plant
from tests.forced import needs_sshd, wait_until

from rkboard.doctor import visit
from rkboard.doctor.document import Board, Document
from rkboard.doctor.probe import METRICS, Probe
from rkboard.doctor.visit import watch
from rkboard.top import screen
from rkboard.top.sample import Sample
from rkruntime import cli
from rkruntime.errors import ServiceError

HARMFUL = re.compile("[\x00-\x08\x0a-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
SOCKET = "run/rkedge/rkedge.sock"
# The driver's own format: rknpu_debugger.c of rknpu 0.9.8, for three cores and for one.
LOAD = {
    "NPU load:  Core0: 25%, Core1:  0%, Core2: 100%,\n": {"core0": 0.25, "core1": 0.0, "core2": 1.0},
    "NPU load:  7%\n": {"core0": 0.07},
}
RKEDGE = [sys.executable, "-m", "rkruntime.cli"]


@pytest.fixture
def tree() -> Iterator[Path]:
    """A board, in a folder whose name leaves room for a socket's."""
    folder = Path(tempfile.mkdtemp(prefix="top"))
    yield plant(folder / "root", {**GOOD, SOCKET: None, "run/rkedge/x": ""})
    shutil.rmtree(folder)


def live(root: Path, **files: Any) -> Board:
    """A look at a tree, with other answers in the place of files."""
    probe = Probe(str(root))
    probe.live()
    found = json.loads(json.dumps(probe.found)) | {"seconds": 0.1}
    found["files"].update(files)
    return Board(Document.of(found))


def told(sample: Sample) -> str:
    return "\n".join(screen.plain(sample))


@pytest.mark.parametrize("text", LOAD)
@pytest.mark.parametrize("path", ["proc/rknpu/load", "sys/kernel/debug/rknpu/load"])
def test_a_board(tree: Path, path: str, text: str) -> None:
    (tree / path).parent.mkdir(parents=True, exist_ok=True)
    (tree / path).write_text(text)
    sample = Sample.of(live(tree))
    assert sample.npu_load == LOAD[text]
    assert {clock.name: clock.now for clock in sample.clocks} == {
        "cpu0": 1_800_000_000, "cpu4": 2_352_000_000, "cpu6": 2_352_000_000, "npu": 10**9, "ddr": 2_112_000_000,
    }  # fmt: skip
    assert sample.temperatures == {"soc-thermal": 44.384}
    assert (sample.memory.total, sample.memory.available) == (16_000_000 << 10, 12_000_000 << 10)  # type: ignore[union-attr]
    assert sample.board == "Radxa ROCK 5B"
    assert list(sample.unknown) == ["daemon"]


def test_what_is_unknown_says_why(tree: Path) -> None:
    shutil.rmtree(tree / "sys/class")
    shutil.rmtree(tree / "sys/devices")
    (tree / "proc/meminfo").unlink()
    sample = Sample.of(live(tree))
    assert set(sample.unknown) == {
        "npu_load", "clock cpu", "clock npu", "clock ddr", "temperature", "memory", "daemon",
    }  # fmt: skip
    closed = {"sys/kernel/debug/rknpu/load": {"error": "EACCES"}, SOCKET: {"error": "EACCES"}}
    sample = Sample.of(live(tree, **closed))
    assert "--sudo" in sample.unknown["npu_load"]
    assert "group rkedge" in sample.unknown["daemon"]
    assert "unknown: only root" in told(sample)


def test_a_daemon_at_work(tree: Path, start_daemon: Callable[..., Any], capsys: pytest.CaptureFixture[str]) -> None:
    """Tokens are counted while an answer is being computed, not only at its end."""
    daemon = start_daemon(RKEMU_TOKEN_US="600000")
    os.link(daemon.socket, tree / SOCKET)
    asking = threading.Thread(target=daemon.ask, args=("What is the RK3588?",), kwargs={"max_tokens": 150})
    asking.start()
    daemon.wait_until(lambda: daemon.metric("rkedge_answer_tokens") > 2)
    assert daemon.metric("rkedge_generated_tokens_total") == 0
    assert cli.main(["top", "--root", str(tree), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    asking.join()
    assert found["schema"] == "rkedge-top/1"
    assert 0 < found["daemon"]["tokens_per_s"] < 9  # in whole tokens
    assert (found["daemon"]["busy"], found["daemon"]["waiting"], found["daemon"]["emulated"]) == (1, 0, True)
    assert daemon.metric("rkedge_answer_tokens") == 0
    assert daemon.metric("rkedge_generated_tokens_total") > 5
    assert cli.main(["top", "--root", str(tree)]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^tokens/s +0.0, emulated$", text, re.MULTILINE)
    assert re.search(r"^requests +0 in progress, 0 waiting$", text, re.MULTILINE)
    daemon.stop()
    (tree / SOCKET).unlink(missing_ok=True)
    assert Sample.of(live(tree)).daemon is None


def test_a_daemon_that_was_restarted_has_no_rate(tree: Path) -> None:
    def at(uptime: float, tokens: int, begun: int) -> Board:
        status = json.dumps({"state": "ready", "uptime_s": uptime, "queue": {"waiting": 2, "busy": True}})
        text = f"# HELP x y\nrkedge_generated_tokens_total {tokens}.0\nrkedge_answer_tokens {begun}.0\n"
        return live(tree, **{SOCKET: {"text": status}, METRICS: {"text": text}})

    rates = [
        Sample.of(at(*after), at(*before)).daemon.tokens_per_s  # type: ignore[union-attr]
        for before, after in (
            ((10.0, 100, 0), (12.0, 100, 10)),  # an answer has begun
            ((10.0, 100, 10), (12.0, 120, 0)),  # and ended
            ((10.0, 100, 50), (12.0, 100, 0)),  # or was broken off
            ((10.0, 100, 0), (1.0, 0, 0)),
        )
    ]
    assert rates == [5.0, 5.0, 0.0, None]


@needs_sshd
def test_over_ssh(tree: Path, forced: Callable[[str], str], capsys: pytest.CaptureFixture[str]) -> None:
    (tree / "sys/kernel/debug/rknpu/load").write_text(next(iter(LOAD)))
    board = forced(f"echo welcome; exec python3 -I - --every 1 --root {tree}\n")
    assert cli.main(["top", board]) == 0
    text = capsys.readouterr().out
    assert text.startswith(f"{board}, Radxa ROCK 5B, Linux 6.1.115-vendor-rk35xx\n")
    assert re.search(r"^npu core2 +100%$", text, re.MULTILINE)
    assert re.search(r"^clock ddr +2112 MHz of 2112 MHz, dmc_ondemand$", text, re.MULTILINE)


@needs_sshd
def test_nothing_stays_on_the_board(tree: Path, forced: Callable[[str], str], tmp_path: Path) -> None:
    """Whatever ends it: Ctrl-C at a terminal, or a kill."""
    pid_file = tmp_path / "pid"
    for end in ("ctrl-c", "kill"):
        board = forced(
            f"echo $$ > {pid_file}.new; mv {pid_file}.new {pid_file}; exec python3 -I - --every 0.5 --root {tree}\n"
        )
        here, there = pty.openpty()
        process = subprocess.Popen(
            [*RKEDGE, "top", board, "--every", "0.5"], stdin=there, stdout=there, stderr=there, start_new_session=True,
            preexec_fn=lambda: os.close(os.open(os.ttyname(0), os.O_RDWR)),  # its terminal, for Ctrl-C
            env={**os.environ, "TERM": "xterm"},
        )  # fmt: skip
        os.close(there)
        shown = b""
        end_at = time.monotonic() + 60
        while b"Radxa" not in shown and time.monotonic() < end_at:
            if select.select([here], [], [], 0.5)[0]:
                shown += os.read(here, 1 << 16)
        assert b"Radxa" in shown
        pid = int(pid_file.read_text())
        os.kill(pid, 0)
        if end == "ctrl-c":
            os.write(here, b"\x03")
        else:
            process.kill()
        while True:  # what it still says, so that it does not wait for a reader
            try:
                if not os.read(here, 1 << 16):
                    break
            except OSError:
                break
        assert process.wait(30) == (0 if end == "ctrl-c" else -signal.SIGKILL)
        os.close(here)
        wait_until(lambda pid=pid: not Path(f"/proc/{pid}").exists() or zombie(pid))


def zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] == "Z"
    except OSError:
        return True


@needs_sshd
@pytest.mark.parametrize(
    ("script", "says"),
    [
        ("echo 'sh: 1: python3: not found' >&2; exit 127", "has no python3"),
        ("exec yes", "megabytes of something"),
        ("printf 'sudo: a password is required\\n' >&2; exit 1", "asks for a password"),
        ("cat > /dev/null; printf 'rkedge-probe: {}\\n'; sleep 100", "than what the probe prints"),
        ("python3 -I -; sleep 100", "says nothing any more"),
        ("python3 -I -; exec yes", "says nothing any more"),
        ("python3 -I - ; exit 3", "says nothing any more"),
    ],
)
def test_a_board_that_misbehaves(
    forced: Callable[[str], str], script: str, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(visit, "_PAUSE_S", 0.5)
    with pytest.raises(ServiceError, match=says):
        list(watch(forced(script), 0.5))


@needs_sshd
def test_a_board_that_floods_with_documents_takes_no_memory(forced: Callable[[str], str], tree: Path) -> None:
    """It waits until they are read, and can be left at any time."""
    script = f"python3 -I - --root {tree} > {tree}/line; while cat {tree}/line; do :; done"
    found = watch(forced(script), 0.5)
    assert [next(found).root for _ in range(200)] == [str(tree)] * 200
    found.close()


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=8,
)
FIELDS = ["state", "model", "emulated", "queue", "uptime_s", "busy", "waiting"]


@pytest.fixture(scope="module")
def looked(tmp_path_factory: pytest.TempPathFactory) -> Board:
    return live(plant(tmp_path_factory.mktemp("tree") / "root", {**GOOD, SOCKET: Mode(0o660, "x")}))


@given(
    status=st.dictionaries(st.sampled_from(FIELDS), ANYTHING).map(json.dumps) | st.text(max_size=60),
    metrics=st.text(max_size=60)
    | st.from_regex(r"\Arkedge_generated_tokens_total [-+0-9.einfaNx]{1,30}\n", fullmatch=True),
    texts=st.lists(st.text(max_size=40), min_size=4, max_size=4),
)
def test_whatever_a_board_says_is_shown_harmlessly(looked: Board, status: str, metrics: str, texts: list[str]) -> None:
    names = ["proc/device-tree/model", "sys/kernel/debug/rknpu/load", "sys/class/thermal/thermal_zone0/type"]
    names.append("sys/class/devfreq/dmc/governor")
    files = {SOCKET: status, METRICS: metrics, **dict(zip(names, texts, strict=True))}
    whole = {name: {"text": text} for name, text in files.items()}
    data = json.loads(json.dumps({"files": whole}))
    document = looked.document
    again = Board(
        Document.of(
            {
                **{name: getattr(document, name) for name in ("schema", "root", "seconds")},
                "me": json.loads(json.dumps(vars(document.me))),
                "folders": {key: list(value) for key, value in document.folders.items()},
                "links": {}, "nodes": {}, "processes": [], "libraries": [], "disks": {}, "log": [], "problems": [],
                "files": {**{key: vars(value) for key, value in document.files.items()}, **data["files"]},
            }
        )
    )  # fmt: skip
    sample = Sample.of(again, again)
    for line in (*screen.plain(sample), screen.title(sample, None)):
        assert not HARMFUL.search(line)
        assert len(line) < 2000
    json.dumps(sample.as_dict(), allow_nan=False)
    for row in screen.rows(sample):
        assert len(screen._bar(row.share)) in (0, 24)


def test_a_tree_goes_with_no_board(tmp_path: Path) -> None:
    assert cli.main(["top", "board", "--root", str(tmp_path)]) == 2
    assert cli.main(["top", ""]) == 2


@pytest.mark.parametrize("width", [20, 40, 71, 72, 200])
def test_every_letter_of_a_value_is_on_a_screen_of_any_width(tree: Path, width: int) -> None:
    sample = Sample.of(live(tree))
    lines = io.StringIO()
    Console(file=lines, width=width).print(screen.table(sample, None, width))
    whole = screen.title(sample, None) + "".join(row.name + row.value for row in screen.rows(sample))
    assert sorted(re.sub(r"[\s█░]", "", lines.getvalue())) == sorted(re.sub(r"\s", "", whole))


def test_a_terminal_that_cannot_be_written_anew_has_one_table(tree: Path) -> None:
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [*RKEDGE, "top", "--root", str(tree)], stdout=theirs, stderr=theirs, env={**os.environ, "TERM": "dumb"}
    ) as process:
        os.close(theirs)
        assert process.wait(60) == 0
    said = os.read(ours, 1 << 16).decode()
    os.close(ours)
    assert "clock ddr" in said
    assert "\x1b[?1049h" not in said  # the other screen
