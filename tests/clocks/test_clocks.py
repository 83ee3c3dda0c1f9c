"""Clocks are set as asked for, only where that can be checked, and are as before afterwards, whatever happens."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from tests.doctor.sysroots import Link

from rkboard.clocks import holding as holding_of
from rkruntime import cli
from rkruntime.program import own_command

from .chip import BEST, DMC, FASTEST, FOLDERS, IDLE, NPU, Chip, running, wait_until

STARTED: list[subprocess.Popen[str]] = []
BEFORE = {
    folder: (governor, FOLDERS[folder])
    for folder, governor in zip(FOLDERS, ["ondemand"] * 3 + ["rknpu_ondemand", "dmc_ondemand"], strict=True)
}


@pytest.fixture
def chip(tmp_path: Path) -> Iterator[Chip]:
    with running(tmp_path / "board") as found:
        yield found


def state_file(chip: Chip) -> Path:
    return chip.root / "run/rkedge-clocks/state.json"


@pytest.fixture(autouse=True)
def nothing_stays() -> Iterator[None]:
    """A test that fails leaves no process."""
    yield
    for process in STARTED:
        end(process)
    STARTED.clear()


def children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def end(process: subprocess.Popen[str], *others: int) -> None:
    """Kill it and its command, and the others first."""
    for pid in others:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.communicate()


def start(chip: Chip, *words: str) -> subprocess.Popen[str]:
    pipe = subprocess.PIPE
    command = own_command("clocks", "--root", str(chip.root), *words)
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True, start_new_session=True
    )
    STARTED.append(process)
    return process


def clocks(chip: Chip, *words: str) -> tuple[int, str, str]:
    process = start(chip, *words)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def as_before(chip: Chip) -> bool:
    return chip.state == BEFORE and not state_file(chip).exists()


def show(chip: Chip) -> list[str]:
    """Words that print the clocks as they are while the command runs."""
    return ["--", "cat", *(str(chip.names(folder)[2]) for folder in FOLDERS)]


def keeper_of(chip: Chip) -> int:
    wait_until(state_file(chip).exists)
    return int(json.loads(state_file(chip).read_text())["pid"])


def test_each_is_at_its_best_during_the_command_and_as_before_after_it(chip: Chip) -> None:
    status, out, err = clocks(chip, *show(chip))
    assert (status, [int(line) for line in out.splitlines()]) == (0, list(BEST.values()))
    for name, value in FASTEST.items():
        assert f"{name} {value}" in err
    wait_until(lambda: as_before(chip))


def test_only_what_is_named_is_touched(chip: Chip) -> None:
    status, out, _ = clocks(chip, "--ddr", "1320", "--cpu", "600", *show(chip))
    assert [int(line) for line in out.splitlines()] == [600000, 600000, 600000, 300000000, 1320000000]
    assert status == 0
    wait_until(lambda: as_before(chip))
    assert NPU not in {folder for folder, _ in chip.seen}


@pytest.mark.parametrize("status", [0, 3, 77])
def test_the_exit_status_is_the_commands(chip: Chip, status: int) -> None:
    assert clocks(chip, "--", "sh", "-c", f"exit {status}")[0] == status
    wait_until(lambda: as_before(chip))


def test_a_command_that_dies_of_a_signal(chip: Chip) -> None:
    assert clocks(chip, "--", "sh", "-c", "kill -9 $$")[0] == 137
    wait_until(lambda: as_before(chip))


def test_a_command_that_does_not_exist_changes_nothing(chip: Chip) -> None:
    status, _, err = clocks(chip, "--", "no-such-program")
    assert status == 2
    assert "no-such-program" in err
    assert chip.seen == []


def test_governors_that_were_fixed_by_somebody_are_so_again(tmp_path: Path) -> None:
    fixed = {f"{DMC}/governor": "userspace\n", f"{DMC}/userspace/set_freq": "1320000000\n"}
    with running(tmp_path, {**fixed, f"{DMC}/cur_freq": "1320000000\n"}) as chip:
        assert clocks(chip, *show(chip))[0] == 0
        wait_until(lambda: chip.state[DMC] == ("userspace", 1320000000))
        assert not state_file(chip).exists()


# Whatever is killed


def holding(chip: Chip) -> subprocess.Popen[str]:
    process = start(chip, "--", "sleep", "60")
    wait_until(lambda: {folder: now for folder, (_, now) in chip.state.items()} == BEST)
    command_of(process)
    return process


def command_of(process: subprocess.Popen[str]) -> int:
    """The command that runs with the clocks held."""
    found: list[int] = []

    def runs() -> bool:
        found[:] = [pid for pid in children(process.pid) if Path(f"/proc/{pid}/comm").read_text() == "sleep\n"]
        return bool(found)

    wait_until(runs)
    return found[0]


def test_killing_the_one_who_asked_restores(chip: Chip) -> None:
    process = holding(chip)
    process.kill()
    wait_until(lambda: as_before(chip))


def test_killing_the_keeper_restores_at_the_end_and_is_said(chip: Chip) -> None:
    process = holding(chip)
    keeper = keeper_of(chip)
    command = command_of(process)
    os.kill(keeper, signal.SIGKILL)
    os.kill(command, signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert "was killed" in err
    wait_until(lambda: as_before(chip))


def test_killing_both_leaves_what_the_next_one_restores(chip: Chip, capsys: pytest.CaptureFixture[str]) -> None:
    process = holding(chip)
    keeper = keeper_of(chip)
    os.kill(process.pid, signal.SIGSTOP)  # so that neither sees the other go
    end(process, keeper)
    assert state_file(chip).exists()
    assert cli.main(["clocks", "--root", str(chip.root)]) == 0
    assert "was not restored" in capsys.readouterr().out
    assert cli.main(["clocks", "--root", str(chip.root), "--restore"]) == 0
    wait_until(lambda: as_before(chip))


def test_what_was_left_is_restored_before_other_clocks_are_held(chip: Chip) -> None:
    process = holding(chip)
    keeper = keeper_of(chip)
    os.kill(process.pid, signal.SIGSTOP)
    end(process, keeper)
    assert clocks(chip, "--cpu", "600", "--", "true")[0] == 0
    wait_until(lambda: as_before(chip))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_a_signal_to_the_keeper_restores(chip: Chip, number: signal.Signals) -> None:
    holding(chip)
    keeper = keeper_of(chip)
    os.kill(keeper, number)
    wait_until(lambda: as_before(chip))


def test_ctrl_c_is_the_commands(chip: Chip) -> None:
    process = holding(chip)
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode == 130
    wait_until(lambda: as_before(chip))


def test_a_sigterm_is_passed_on(chip: Chip) -> None:
    process = holding(chip)
    process.terminate()
    process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    wait_until(lambda: as_before(chip))


def test_a_sigterm_that_comes_while_the_command_is_started(monkeypatch: pytest.MonkeyPatch) -> None:
    real = subprocess.Popen

    def slow(command: Any) -> Any:
        process = real(command)
        os.kill(os.getpid(), signal.SIGTERM)  # before anybody knows the process
        return process

    monkeypatch.setattr(subprocess, "Popen", slow)
    assert holding_of.run(["sleep", "60"]) == 128 + signal.SIGTERM


def test_nohup_is_for_the_command_too(chip: Chip) -> None:
    pipe = subprocess.PIPE
    words = own_command("clocks", "--root", str(chip.root), "--", "sh", "-c", "sleep 2; echo finished")
    with subprocess.Popen(["nohup", *words], stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True) as process:
        wait_until(lambda: chip.state[NPU][1] == BEST[NPU] and bool(children(process.pid)))
        process.send_signal(signal.SIGHUP)
        assert "finished" in process.communicate(timeout=60)[0]
    assert process.returncode == 0
    wait_until(lambda: as_before(chip))


def test_a_clock_that_stood_at_a_value_that_is_not_listed(tmp_path: Path) -> None:
    """No governor takes it down again: it would be left at its maximum."""
    for governor in ("userspace", "rknpu_ondemand"):
        files = {f"{NPU}/governor": f"{governor}\n", f"{NPU}/cur_freq": "390000000\n"}
        with running(tmp_path / governor, {**files, f"{NPU}/userspace/set_freq": "390000000\n"}) as chip:
            process = start(chip, "--", "true")
            said = process.communicate(timeout=60)[1]
            assert process.returncode == 0
            assert "npu is at 390 MHz, which the chip does not list" in said
            wait_until(lambda chip=chip, governor=governor: chip.state[NPU] == (governor, 400000000))  # type: ignore[misc]


def test_only_one_at_a_time(chip: Chip) -> None:
    process = holding(chip)
    seen = list(chip.seen)
    status, _, err = clocks(chip, "--", "true")
    assert status == 8
    assert f"process {keeper_of(chip)}" in err
    assert chip.seen == seen
    process.terminate()
    process.communicate(timeout=60)
    wait_until(lambda: as_before(chip))


# What a kernel may do


@pytest.mark.parametrize("folder", list(FOLDERS))
def test_a_clipped_value_is_an_error_and_leaves_nothing(tmp_path: Path, folder: str) -> None:
    """Boards whose chips are of a lesser quality take a value and do another."""
    with running(tmp_path, clip={folder: lambda value: min(value, BEST[folder] - 48000)}) as chip:
        status, out, err = clocks(chip, "--", "echo", "it ran")
        assert status == 5
        assert "it ran" not in out
        assert f"/{folder}/" in err
        wait_until(lambda: as_before(chip))


def test_a_governor_that_does_not_stay_is_an_error(tmp_path: Path) -> None:
    with running(tmp_path, stubborn=(DMC,)) as chip:
        status, out, err = clocks(chip, "--", "echo", "it ran")
        assert (status, out) == (5, "")
        assert "The clock ddr" in err
        wait_until(lambda: as_before(chip))


def test_another_governor_in_between_is_somebody_elses_and_stays(chip: Chip) -> None:
    process = holding(chip)
    command = command_of(process)
    chip.names(NPU)[0].write_text("performance\n")
    os.kill(command, signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert "npu has the governor performance from somebody else" in err
    wait_until(lambda: chip.state == {**BEFORE, NPU: ("performance", BEST[NPU])})
    assert not state_file(chip).exists()


def test_another_value_in_between_is_said_and_restored(chip: Chip) -> None:
    process = holding(chip)
    command = command_of(process)
    chip.names(DMC)[1].write_text("1320000000\n")
    wait_until(lambda: chip.now(DMC) == 1320000000)
    os.kill(command, signal.SIGTERM)
    _, err = process.communicate(timeout=60)
    assert "ddr was set to 2112 MHz and is at 1320 MHz" in err
    wait_until(lambda: as_before(chip))


def test_a_clock_that_is_not_taken_back_is_remembered(chip: Chip, capsys: pytest.CaptureFixture[str]) -> None:
    """And the others are restored; so is this one as soon as the kernel takes it."""
    process = holding(chip)
    command = command_of(process)
    governor = chip.names(DMC)[0]
    governor.rename(governor.with_name("kept"))
    governor.mkdir()
    os.kill(command, signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 5
    wait_until(lambda: all(chip.governor(folder) == BEFORE[folder][0] for folder in BEFORE if folder != DMC))
    assert [row["name"] for row in json.loads(state_file(chip).read_text())["saved"]] == ["ddr"]
    assert cli.main(["clocks", "--root", str(chip.root), "--restore"]) == 5
    assert "could not be restored" in capsys.readouterr().err
    governor.rmdir()
    governor.with_name("kept").rename(governor)
    assert cli.main(["clocks", "--root", str(chip.root), "--restore"]) == 0
    wait_until(lambda: as_before(chip))


# What is refused


SET = f"{DMC}/userspace/set_freq"
NEVER = {
    # https://github.com/antonioacg/rknpu-rk3588: writing a clock of the NPU froze the board.
    "mainline-dkms": ({"proc/sys/kernel/osrelease": "6.18.22-current-rockchip64\n"}, 4, "froze"),
    "vendor-kernel-with-another-module": ({"sys/module/rknpu/taint": "OE\n"}, 4, "froze"),
    "no-release": ({"proc/sys/kernel/osrelease": None}, 4, "froze"),
    "no-cur-freq": ({f"{DMC}/cur_freq": None}, 4, "does not say its value"),
    "no-list": ({f"{NPU}/available_frequencies": None}, 4, "values that the chip lists"),
    "empty": ({f"{DMC}/cur_freq": ""}, 4, "does not say its value"),
    "words": ({f"{DMC}/available_frequencies": "a b c\n"}, 4, "values that the chip lists"),
    "binary": ({f"{NPU}/governor": b"\xff\xfe\0", f"{NPU}/available_governors": b"\0" * 4096}, 4, "governor"),
    "no-userspace": ({f"{NPU}/available_governors": "rknpu_ondemand performance\n"}, 4, "not the governor userspace"),
    "limits-without-a-value": ({f"{DMC}/min_freq": "1\n", f"{DMC}/max_freq": "2\n"}, 4, "no such value"),
    "link-to-nothing": ({SET: Link("/nowhere")}, 5, "does not take"),
    "a-folder-to-write-to": ({SET: None, f"{SET}/x": ""}, 5, "not a regular"),
    "nowhere-to-write": ({SET: None}, 5, "does not take"),
}  # fmt: skip


@pytest.mark.parametrize("name", list(NEVER))
def test_what_could_do_harm_or_not_be_checked_is_refused(tmp_path: Path, name: str) -> None:
    files, expected, says = NEVER[name]
    with running(tmp_path / "board", {**files}) as chip:
        before = {path: path.read_bytes() for path in (chip.root / NPU).rglob("*") if path.is_file()}
        status, out, err = clocks(chip, "--", "echo", "it ran")
        assert (status, out) == (expected, "")
        assert says in " ".join(err.split())
        if "froze" in says:
            assert {path: path.read_bytes() for path in before} == before
            assert chip.seen == []
        assert not state_file(chip).exists()


def test_endless_files_and_fifos_are_not_waited_for(tmp_path: Path) -> None:
    with running(tmp_path / "board", {f"{DMC}/cur_freq": Link("/dev/zero")}, without=(DMC,)) as chip:
        os.mkfifo(chip.root / "dev/zero")
        status, _, err = clocks(chip, "--", "true")
        assert status == 4
        assert "does not say its value" in err
        assert chip.seen == []


def test_links_do_not_lead_out_of_the_tree(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_text("as it was\n")
    deep = "../" * 30 + str(outside).lstrip("/")
    for target in (str(outside), deep):
        root = tmp_path / f"board{len(target)}"
        with running(root, {f"{DMC}/userspace/set_freq": Link(target)}) as chip:
            assert clocks(chip, "--", "true")[0] == 5
            assert outside.read_text() == "as it was\n"


def test_on_such_a_kernel_the_others_may_be_named(tmp_path: Path) -> None:
    with running(tmp_path, {"proc/sys/kernel/osrelease": "6.18.22-current-rockchip64\n"}) as chip:
        status, out, _ = clocks(chip, "--cpu", "max", *show(chip))
        assert (status, [int(line) for line in out.splitlines()][:3]) == (0, list(BEST.values())[:3])
        assert clocks(chip, "--npu", "300", "--", "true")[0] == 4
        assert not {NPU, DMC} & {folder for folder, _ in chip.seen}


def test_a_board_without_control_of_the_memory_gets_a_note(tmp_path: Path) -> None:
    gone = dict.fromkeys(path for path in IDLE if path.startswith(DMC))
    with running(tmp_path, gone, without=(DMC,)) as chip:
        status, _, err = clocks(chip, "--", "true")
        assert status == 0
        assert "does not control the memory's clock" in err
        assert clocks(chip, "--ddr", "max", "--", "true")[0] == 4


def test_a_limit_is_kept_and_said(tmp_path: Path) -> None:
    with running(tmp_path, {f"{DMC}/max_freq": "1320000000\n"}) as chip:
        status, out, err = clocks(chip, *show(chip))
        assert status == 0
        assert out.splitlines()[-1] == "1320000000"
        assert "ddr is limited to 1320 MHz; the chip could do 2112 MHz" in err


@pytest.mark.parametrize("value", ["2111", "99", "2352", "-1", "1e3", "max;reboot", "٣٠٠", "300\n", "", "9" * 40])
def test_a_value_that_the_chip_does_not_list_is_refused(chip: Chip, value: str) -> None:
    status, _, err = clocks(chip, "--ddr", value, "--", "true")
    assert status in (2, 4)
    assert chip.seen == []
    if status == 4:
        assert "534, 1320, 1968, 2112" in err


# What is left in /run


HOSTILE: Mapping[str, Any] = {
    "empty": "",
    "binary": b"\xff" * 100,
    "nested": "[" * 20000,
    "list": "[]",
    "other-schema": '{"schema": "x"}',
    "huge": " " * (1 << 17),
    "path": {"folder": "etc"},
    "dots": {"folder": "sys/devices/system/cpu/cpufreq/policy0/../../../../../../etc"},
    "governor": {"governor": "x\nperformance"},
    "number": {"before": -1},
}


@pytest.mark.parametrize("name", list(HOSTILE))
def test_a_state_that_is_none_changes_nothing_and_is_named(
    chip: Chip, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    good = {"name": "ddr", "folder": DMC, "governor": "dmc_ondemand", "before": 534000000, "set": 2112000000}
    content = HOSTILE[name]
    if isinstance(content, dict):
        whole = {
            "schema": "rkedge-clocks-state/1",
            "pid": 1,
            "started": 1,
            "uid": 0,
            "since": 1.0,
            "saved": [{**good, **content}],
        }
        content = json.dumps(whole)
    state_file(chip).parent.mkdir(parents=True)
    state_file(chip).write_bytes(content if isinstance(content, bytes) else content.encode())
    for words in (["--restore"], ["--", "true"]):
        assert cli.main(["clocks", "--root", str(chip.root), *words]) == 5
        assert "state.json" in capsys.readouterr().err
    assert chip.seen == []


# The request, as the socket brings it


@pytest.mark.parametrize(
    "line",
    [
        b"", b"\n", b"x\n", b"[]\n", b"[" * 4000, b"\xff" * 5000, b'{"cpu": "../../etc"}\n', b'{"cpu": 1}\n',
        b'{"folder": "etc"}\n', b'{"schema": "rkedge-clocks-request/9"}\n', b'{"cpu": "max", "root": "/"}\n',
    ],
)  # fmt: skip
def test_a_request_that_is_none_changes_nothing(chip: Chip, line: bytes) -> None:
    command = own_command("clocks", "--keep", "--root", str(chip.root))
    done = subprocess.run(command, input=line, capture_output=True, timeout=60, check=False)
    assert json.loads(done.stdout)["event"] == "error"
    assert done.returncode == 2
    assert chip.seen == []


@pytest.mark.long
def test_a_request_that_is_never_sent_does_not_hold_anything(chip: Chip, monkeypatch: pytest.MonkeyPatch) -> None:
    process = subprocess.Popen(
        own_command("clocks", "--keep", "--root", str(chip.root)), stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdin is not None
    process.stdin.write(b'{"cpu": "max"')
    process.stdin.flush()
    wait_until(lambda: process.poll() is not None)
    assert chip.seen == []
    process.communicate()


# What is shown


def test_the_clocks_are_shown(chip: Chip, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["clocks", "--root", str(chip.root)]) == 0
    rows = [re.split(r"\s{2,}", line)[:1] + line.split()[1:4] for line in capsys.readouterr().out.splitlines()[1:6]]
    assert [row[1:] for row in rows] == [
        ["ondemand", "408", "MHz"], ["ondemand", "408", "MHz"], ["ondemand", "408", "MHz"],
        ["rknpu_ondemand", "300", "MHz"], ["dmc_ondemand", "534", "MHz"],
    ]  # fmt: skip
    assert cli.main(["clocks", "--root", str(chip.root), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {row["name"]: row["best"] for row in found["clocks"]} == {
        name: int(text.split()[0]) * 10**6 for name, text in FASTEST.items()
    }
    assert found["held"] is None


@pytest.mark.parametrize("words", [["--cpu", "max"], ["--restore", "--", "true"], ["--json", "--", "true"]])
def test_words_that_make_no_sense_together(chip: Chip, words: list[str]) -> None:
    assert cli.main(["clocks", "--root", str(chip.root), *words]) == 2


def test_an_empty_machine_has_no_clocks(tmp_path: Path) -> None:
    assert cli.main(["clocks", "--root", str(tmp_path)]) == 0
