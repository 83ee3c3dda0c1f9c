"""What one asks for over a socket, as systemd's unit has it; and what becomes of any board's files."""

from __future__ import annotations

import errno
import os
import re
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.doctor.boards import BOARDS
from tests.doctor.sysroots import GOOD, plant

from rkboard.clocks import holding
from rkboard.clocks.wishes import Wish, goals
from rkboard.doctor.checks import clocks as checks
from rkboard.doctor.document import Board, Document
from rkboard.doctor.probe import Probe
from rkboard.doctor.visit import glance
from rkruntime import cli
from rkruntime.errors import RefusedError
from rkruntime.program import own_command

from .chip import BEST, DMC, FOLDERS, IDLE, NPU, running, wait_until
from .test_clocks import BEFORE, as_before

Serve = Callable[[Callable[[socket.socket], object]], None]


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serve]:
    """Have each connection to the unit's socket answered in this way."""
    path = tmp_path / "socket"
    monkeypatch.setattr(holding, "SOCKET", path)
    listener = socket.socket(socket.AF_UNIX)

    def begin(answer: Callable[[socket.socket], object]) -> None:
        listener.bind(str(path))
        listener.listen()

        def follow() -> None:
            with suppress(OSError):
                while True:
                    link, _ = listener.accept()
                    with link:
                        answer(link)

        threading.Thread(target=follow, daemon=True).start()

    yield begin
    with suppress(OSError):
        listener.shutdown(socket.SHUT_RDWR)
    listener.close()


def test_a_keeper_of_the_unit_holds_and_restores(
    serve: Serve, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    with running(tmp_path / "board") as chip:
        command = own_command("clocks", "--keep", "--root", str(chip.root))
        serve(lambda link: subprocess.run(command, stdin=link.fileno(), stdout=link.fileno(), check=False))
        files = [str(chip.names(folder)[2]) for folder in FOLDERS]
        assert cli.main(["clocks", "--", "cat", *files]) == 0
        assert [int(line) for line in capfd.readouterr().out.splitlines()] == list(BEST.values())
        wait_until(lambda: as_before(chip))


@pytest.mark.parametrize(
    "answer", [b"", b"\n", b"garbage\n", b"[]\n", b"[" * 70000, b"\xff" * 70000, b'{"event": 1}\n']
)
def test_a_keeper_that_says_nonsense_is_an_error_before_the_command(
    serve: Serve, answer: bytes, capfd: pytest.CaptureFixture[str]
) -> None:
    def say(link: socket.socket) -> None:
        with suppress(OSError):
            link.sendall(answer)

    serve(say)
    assert cli.main(["clocks", "--", "echo", "it ran"]) == 5
    said = capfd.readouterr()
    assert "it ran" not in said.out
    assert "did not answer" in said.err


def test_without_the_unit_only_root_may(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(holding, "SOCKET", tmp_path / "none")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert cli.main(["clocks", "--", "true"]) == 5
    assert "sudo rkedge clocks" in capsys.readouterr().err


def test_others_than_the_group_are_told_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def closed(_self: object, _address: object) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(socket.socket, "connect", closed)
    assert cli.main(["clocks", "--", "true"]) == 5
    assert "usermod -aG rkedge-clocks" in capsys.readouterr().err


# Whatever a board's files say


@pytest.mark.parametrize("name", list(BOARDS))
def test_no_board_of_the_doctor_has_its_npu_set_where_that_froze_one(name: str, tmp_path: Path) -> None:
    board = glance(plant(tmp_path, {**GOOD, **BOARDS[name].files}))
    vendor = board.release.startswith(("5.10.", "6.1."))
    with suppress(RefusedError):
        chosen, _ = goals(board, Wish())
        assert vendor or all(goal.clock.kind != "npu" for goal in chosen)


FILE = st.sampled_from([path for path in IDLE if "devfreq" in path or "cpufreq" in path])
TEXT = st.one_of(
    st.text(max_size=20),
    st.lists(st.integers(-(10**20), 10**20), max_size=4).map(lambda numbers: " ".join(map(str, numbers))),
    st.sampled_from(["userspace", "0", "2112000000", "1 2 3", "userspace performance", "\0", "9" * 5000]),
)
VALUE = st.sampled_from(["auto", "max", "keep", "300", "2112", "408", "99999"])


@given(st.dictionaries(FILE, TEXT, max_size=6), st.tuples(VALUE, VALUE, VALUE))
def test_what_is_chosen_is_listed_within_the_limits_and_can_be_read_back(
    changed: dict[str, str], wanted: tuple[str, str, str]
) -> None:
    files = {path: {"text": text} for path, text in (IDLE | changed).items() if isinstance(text, str)}
    probe = Probe("/nowhere")
    probe.me()
    names = sorted({path.split("/")[3] for path in files if path.startswith("sys/class/devfreq/")})
    folders = {"sys/class/devfreq": names, "sys/devices/system/cpu/cpufreq": ["policy0", "policy4", "policy6"]}
    board = Board(Document.of({**probe.found, "files": files, "folders": folders, "seconds": 0.0}))
    try:
        chosen, _ = goals(board, Wish(cpu=wanted[0], npu=wanted[1], ddr=wanted[2]))
    except RefusedError:
        return
    for goal in chosen:
        clock, where = goal.clock, goal.clock.folder
        assert wanted[["cpu", "npu", "ddr"].index(clock.kind)] != "keep"
        listed = "available_frequencies" if clock.kind != "cpu" else "scaling_available_frequencies"
        # Whatever stands around a number, which no kernel writes: it is one of the file's numbers.
        numbers = re.findall(r"[0-9]+", files[f"{where}/{listed}"]["text"])
        assert str(goal.hertz // clock.unit) in [number.lstrip("0") for number in numbers]
        assert "userspace" in clock.governors
        assert clock.now
        assert (clock.least or 0) <= goal.hertz
        assert clock.most is None or goal.hertz <= clock.most


def test_the_doctor_names_the_command(tmp_path: Path) -> None:
    board = glance(plant(tmp_path, IDLE))
    mends: dict[str, Any] = {check.__name__: verdict.mend for check in checks.CHECKS if (verdict := check(board))}
    for name in ("cpu_governor", "npu_clock", "ddr_clock"):
        assert "rkedge clocks -- COMMAND" in mends[name]


def test_the_folders_of_the_tests_are_those_of_the_vendors_script() -> None:
    """fix_freq_rk3588.sh of 1.3.0 writes to these, and to those of the GPU, which is not ours."""
    assert set(FOLDERS) == {*(f"sys/devices/system/cpu/cpufreq/policy{first}" for first in (0, 4, 6)), NPU, DMC}
    assert BEFORE.keys() == BEST.keys()
