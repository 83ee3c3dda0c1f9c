"""A board's life, on Debian for arm64 with its own kernel: `make test-vm`, each test a step with its time.

The machine has no network but the connection to its sshd. In the place of the NPU and the vendor's library is the
emulated one, built for aarch64; what it says of speed is that of an emulated machine on top.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.doctor.boards import BOARDS
from tests.doctor.sysroots import GOOD, plant
from tests.test_newcomer import has_an_index

from rkboard.emulator import build as emulator
from rkconvert.demo import adapter, checkpoint, questions
from rkruntime import cli

from .board import TOOLS, USER, Virtual, running, runs_arm64

ANSWERS = {row.question: row.answer for row in questions()}
FIRST = "What is the RK3588?"
PIRATE = "Arr"
missing = [tool for tool in (*TOOLS, "aarch64-linux-gnu-g++") if shutil.which(tool) is None]

pytestmark = [
    pytest.mark.vm,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}"),
    pytest.mark.skipif(os.geteuid() != 0, reason="mmdebstrap makes the image as root"),
    pytest.mark.skipif(not runs_arm64(), reason="programs for arm64 do not run here: qemu-user-static, binfmt-support"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("vm")


@pytest.fixture(scope="module")
def library(folder: Path) -> Path:
    return Path(shutil.copy(emulator.build(arch="aarch64"), folder))


@pytest.fixture(scope="module")
def bundles(folder: Path) -> dict[str, Path]:
    for name, lora in (("base", []), ("pirate", ["--lora", str(adapter())])):
        assert cli.main(["convert", str(checkpoint()), *lora, "-q", "-o", str(folder / name)]) == 0
    return {name: folder / name for name in ("base", "pirate")}


@pytest.fixture(scope="module")
def board(folder: Path) -> Iterator[Virtual]:
    if not has_an_index():
        pytest.skip("pip reaches no index")
    with running(folder) as found:
        yield found


def rkedge(board: Virtual, *words: str | Path, text: str = "", fine: tuple[int, ...] = (0,)) -> str:
    """What the command prints on a person's own machine."""
    command = [sys.executable, "-m", "rkruntime.cli", *map(str, words)]
    environment = {**os.environ, "RKEDGE_SSH": " ".join([*board.ssh, "-T"])}
    done = subprocess.run(command, input=text, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode in fine, (words, done.stdout, done.stderr)
    return done.stdout


def chat(board: Virtual) -> str:
    return rkedge(board, "chat", "board", "--temperature", "0", text=f"{FIRST}\n").strip()


def test_it_boots(board: Virtual) -> None:
    assert board.on_board("uname -m; cat /proc/1/comm").stdout.split() == ["aarch64", "systemd"]
    assert board.on_board("systemctl is-system-running --wait").stdout.strip() == "running"
    assert board.on_board("python3 -c 'import pip'").returncode != 0
    assert board.on_board("python3 -c 'import socket; socket.create_connection((\"10.0.2.2\", 22), 5)'").returncode != 0


def test_deploy(board: Virtual, bundles: dict[str, Path], library: Path) -> None:
    said = rkedge(board, "deploy", bundles["base"], "board", "--library", library, "--yes", "--json")
    done = json.loads(said)
    assert done["trial"]["verdict"] == "same"
    assert done["trial"]["tokens_per_s"] > 0
    assert done["emulated"] is True


def test_deploying_again_changes_nothing(board: Virtual, bundles: dict[str, Path], library: Path) -> None:
    said = rkedge(board, "deploy", bundles["base"], "board", "--library", library, "--no-test", "--json")
    assert json.loads(said)["changed"] == []


def test_doctor(board: Virtual) -> None:
    """The machine has no NPU, and is not an RK3588."""
    found = json.loads(rkedge(board, "doctor", "board", "--json", fine=(9,)))
    codes = {finding["code"]: finding["status"] for finding in found["findings"]}
    assert codes["daemon-running"] == "ok"
    assert codes["soc"] == "unknown"


@pytest.mark.parametrize(("name", "status"), [("armbian-vendor", "ok"), ("radxa-6.1.43", "warning")])
def test_doctor_there_on_the_tree_of_a_board(board: Virtual, tmp_path: Path, name: str, status: str) -> None:
    files = GOOD | dict(BOARDS[name].files)
    packed = subprocess.run(["tar", "-C", plant(tmp_path / "tree", files), "-c", "."], capture_output=True, check=True)
    subprocess.run([*board.ssh, "board", f"mkdir {name} && tar -C {name} -x"], input=packed.stdout, check=True)
    done = board.on_board(f"rkedge doctor --root {name} --json")
    found = {finding["code"]: finding["status"] for finding in json.loads(done.stdout)["findings"]}
    assert found["driver-version"] == status


def test_bench(board: Virtual) -> None:
    place = f"{USER}@board:/opt/rkedge/bundle"
    options = ("--library", "/opt/rkedge/library/librkllmrt.so", "-p", "16", "-n", "8", "-d", "0", "-r", "2")
    found = json.loads(rkedge(board, "bench", place, *options, "--json"))
    assert found["runs"]
    assert "emulated" in json.dumps(found)


def test_chat(board: Virtual) -> None:
    assert chat(board) == ANSWERS[FIRST]


def test_reboot(board: Virtual) -> None:
    board.reboot()
    assert board.on_board("cat /proc/uptime").returncode == 0


def test_chat_after_the_reboot(board: Virtual) -> None:
    assert chat(board) == ANSWERS[FIRST]


def test_deploy_a_second_model(board: Virtual, bundles: dict[str, Path]) -> None:
    done = json.loads(rkedge(board, "deploy", bundles["pirate"], "board", "--yes", "--json"))
    assert done["changed"] == ["bundle", "service"]
    assert chat(board).startswith(PIRATE)


def test_roll_back(board: Virtual) -> None:
    rkedge(board, "rollback", "board", "--yes")


def test_chat_after_the_roll_back(board: Virtual) -> None:
    assert chat(board) == ANSWERS[FIRST]


def test_undeploy(board: Virtual) -> None:
    rkedge(board, "undeploy", "board", "--purge", "--yes")
    left = board.on_board("sudo find / -xdev -path /proc -prune -o -name '*rkedge*' -print").stdout.split()
    assert [path for path in left if not path.startswith((f"/home/{USER}/", "/var/log/"))] == []
    assert board.on_board("id rkedge").returncode != 0
