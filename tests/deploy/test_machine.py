"""`rkedge deploy` and its kin on a Debian with systemd as process 1 and a real sshd, by somebody who may use sudo.

Not tried: device nodes, as a container has none. In the place of the vendor's library is the emulated one.
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
from tests.runtime.serve.machine import TOOLS, Machine, running_machine
from tests.test_newcomer import has_an_index

from rkboard.deploy.wheels import Target, wheels_for
from rkboard.emulator import build as emulator
from rkconvert.demo import adapter, checkpoint, questions
from rkruntime import cli

QA = {row.question: row.answer for row in questions()}
FIRST = "What is the RK3588?"
PIRATE = "Arr"
RKEDGE = [sys.executable, "-m", "rkruntime.cli"]
missing = [tool for tool in TOOLS if shutil.which(tool) is None]

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}"),
    pytest.mark.skipif(os.geteuid() != 0, reason="systemd-nspawn starts a machine as root"),
]


def in_tree(machine: Machine, *words: str) -> str:
    return subprocess.run(["chroot", machine.tree, *words], capture_output=True, text=True, check=True).stdout.strip()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("deploy")


@pytest.fixture(scope="module")
def library(folder: Path) -> Path:
    return Path(shutil.copy(emulator.build(), folder))


@pytest.fixture(scope="module")
def bundles(folder: Path) -> dict[str, Path]:
    for name, lora in (("base", []), ("pirate", ["--lora", str(adapter())])):
        assert cli.main(["convert", str(checkpoint()), *lora, "-q", "-o", str(folder / name)]) == 0
    return {name: folder / name for name in ("base", "pirate")}


@pytest.fixture(scope="module")
def board(folder: Path) -> Iterator[Machine]:
    """A fresh machine, whose network is its own loopback; the wheels are in the cache here."""
    if not has_an_index():
        pytest.skip("pip reaches no index")
    (folder / "machine").mkdir()
    with running_machine(folder / "machine") as machine:
        minor = in_tree(machine, "python3", "-c", "import sys; print(sys.version_info[1])")
        libc = in_tree(machine, "python3", "-c", "import os; print(os.confstr('CS_GNU_LIBC_VERSION').split('.')[1])")
        wheels_for(Target(f"3.{minor}", os.uname().machine, int(libc)), print)
        yield machine


def rkedge(machine: Machine, *words: str | Path) -> dict[str, object]:
    done = machine.at_home(*RKEDGE, *map(str, words))
    assert done.returncode == 0, (words, done.stdout, done.stderr)
    return json.loads(done.stdout) if "--json" in words else {"said": done.stdout, "told": done.stderr}


def chat(machine: Machine) -> str:
    done = machine.at_home(*RKEDGE, "chat", "board", "--temperature", "0", text=f"{FIRST}\n")
    return done.stdout.strip() if done.returncode == 0 else f"{done.returncode}: {done.stderr}"


def listing(machine: Machine) -> str:
    """All that is in the system's folders of configuration and programs, and when it was changed."""
    find = "find /etc /usr /opt /home /srv /root -xdev -printf '%p %y %m %u %g %s %l\\n' | sort"
    return machine.on_board(f"sudo sh -c '{find}'").stdout


def test_deploying(board: Machine, bundles: dict[str, Path], library: Path) -> None:
    before = listing(board)
    planned = rkedge(board, "deploy", bundles["base"], "board", "--library", library, "--plan")
    assert "joins the group rkedge" in str(planned["told"])
    asked = board.at_home(*RKEDGE, "deploy", str(bundles["base"]), "board", "--library", str(library))
    assert (asked.returncode, "Add --yes" in asked.stderr) == (2, True)
    assert listing(board) == before
    done = rkedge(board, "deploy", bundles["base"], "board", "--library", library, "--yes", "--json")
    assert done["trial"]["verdict"] == "same"  # type: ignore[index]
    assert done["trial"]["tokens_per_s"] > 0  # type: ignore[index]
    assert done["emulated"] is True
    assert done["doctor"]
    assert chat(board) == QA[FIRST]
    assert board.on_board("systemctl is-enabled rkedge.socket rkedge.service").stdout.split() == ["enabled"] * 2
    assert board.on_board("rkedge --version").returncode == 0
    assert board.on_board("stat -c %U:%a /run/rkedge").stdout.strip() == "root:755"
    assert board.on_board("cat /opt/rkedge/bundle/rkedge.yaml", account="guest").returncode != 0


def test_once_more(board: Machine, bundles: dict[str, Path], library: Path) -> None:
    before = board.on_board("systemctl show --property=MainPID rkedge.service").stdout
    done = rkedge(board, "deploy", bundles["base"], "board", "--library", library, "--no-test", "--json")
    assert done["changed"] == []
    assert board.on_board("systemctl show --property=MainPID rkedge.service").stdout == before


def test_another_bundle_and_back(board: Machine, bundles: dict[str, Path]) -> None:
    process = board.on_board("systemctl show --property=MainPID rkedge.service").stdout
    done = rkedge(board, "deploy", bundles["pirate"], "board", "--yes", "--json")
    assert done["changed"] == ["bundle", "service"]
    assert chat(board).startswith(PIRATE)
    assert board.on_board("systemctl show --property=MainPID rkedge.service").stdout == process
    rkedge(board, "rollback", "board", "--yes")
    assert chat(board) == QA[FIRST]
    shown = str(rkedge(board, "status", "board")["said"])
    assert "pirate" in shown
    assert "in use" in shown
    assert "loaded" in str(rkedge(board, "logs", "board")["said"])


def test_the_machine_restarts(board: Machine) -> None:
    board.on_board("sudo systemctl kill --signal=KILL rkedge.service")
    assert chat(board) == QA[FIRST]
    board.on_board(
        "sudo systemctl stop rkedge.socket rkedge.service; sudo systemctl start multi-user.target sockets.target"
    )
    assert chat(board) == QA[FIRST]


def test_a_bundle_that_does_not_load_is_taken_back(board: Machine, bundles: dict[str, Path], library: Path) -> None:
    """A library that cannot be loaded: the old one answers again."""
    broken = library.parent / "broken" / library.name
    broken.parent.mkdir()
    data = bytearray(library.read_bytes())
    at = data.find(b"libc.so.6\0")
    data[at : at + 9] = b"libz.so.9"
    broken.write_bytes(data)
    done = board.at_home(*RKEDGE, "deploy", str(bundles["base"]), "board", "--library", str(broken), "--yes")
    assert done.returncode == 8
    assert "The board answers with what it had before" in done.stderr
    assert chat(board) == QA[FIRST]


def test_sudo_that_asks_for_a_password(board: Machine, bundles: dict[str, Path]) -> None:
    done = board.at_home(*RKEDGE, "status", "guest@guest")
    assert done.returncode == 8
    assert "sudo on guest@guest asks for a password, or refuses" in done.stderr


def test_a_host_key_that_has_changed(board: Machine) -> None:
    known = Path(board.ssh[2]).with_name("known_hosts")
    kept = known.read_text()
    key = known.with_name("other")
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key], check=True)
    public = " ".join(key.with_suffix(".pub").read_text().split()[:2])
    known.write_text("".join(f"{line.split()[0]} {public}\n" for line in kept.splitlines()))
    try:
        done = board.at_home(*RKEDGE, "status", "board")
        assert done.returncode == 8
        assert "Host key verification failed" in done.stderr
    finally:
        known.write_text(kept)


def test_undeploying_leaves_the_system_as_it_was(board: Machine, bundles: dict[str, Path]) -> None:
    rkedge(board, "undeploy", "board", "--purge", "--yes")
    paths = {line.split()[0] for line in listing(board).splitlines()}
    assert [path for path in paths if "rkedge" in path and "__pycache__" not in path] == []
    assert board.on_board("id rkedge").returncode != 0
    assert board.on_board("systemctl status rkedge.service").returncode == 4
