"""The Debian package: on a Debian with systemd and a real sshd, and for arm64 in a tree under qemu-user.

In the place of the vendor's library is the emulated one, where the vendor's page says to put it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.runtime.serve.machine import PACKAGES, TOOLS, Machine, running_machine
from tests.test_newcomer import has_an_index
from tests.vm.board import runs_arm64, tree

from rkboard import debian
from rkboard.deploy.wheels import Target, wheels_for
from rkboard.emulator import build as emulator
from rkconvert.demo import checkpoint, questions
from rkruntime import cli

ANSWERS = {row.question: row.answer for row in questions()}
FIRST = "What is the RK3588?"
RKEDGE = [sys.executable, "-m", "rkruntime.cli"]
APT = "sudo DEBIAN_FRONTEND=noninteractive apt-get"
# Modules that are compiled for this Python, ours before those of the system, and the one that only the system has.
COMPILED = """
import json, markupsafe._speedups, numpy, tokenizers, yaml._yaml
print(json.dumps([one.__file__ for one in (markupsafe._speedups, yaml._yaml, tokenizers, numpy)]))
"""
missing = [tool for tool in (*TOOLS, "dpkg-buildpackage", "dh") if shutil.which(tool) is None]

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(1800),
    pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}"),
    pytest.mark.skipif(os.geteuid() != 0, reason="mmdebstrap and systemd-nspawn work as root"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not has_an_index():
        pytest.skip("pip reaches no index")
    return tmp_path_factory.mktemp("debian")


@pytest.fixture(scope="module")
def bundle(folder: Path) -> Path:
    assert cli.main(["convert", str(checkpoint()), "-q", "-o", str(folder / "base")]) == 0
    return folder / "base"


@pytest.fixture(scope="module")
def package(folder: Path) -> Path:
    return debian.build("amd64", folder, print)


@pytest.fixture(scope="module")
def board(folder: Path, package: Path, bundle: Path) -> Iterator[Machine]:
    """A machine without a network, with what the package depends on, and with the files in pi's home folder."""
    (folder / "machine").mkdir()
    with running_machine(folder / "machine", "packaged", f"{PACKAGES},libgomp1,python3-numpy") as machine:
        for path in (package, bundle, emulator.build()):
            subprocess.run(["cp", "-rL", path, machine.tree / "home/pi"], check=True)
        yield machine


def said(machine: Machine, command: str) -> str:
    done = machine.on_board(command)
    assert done.returncode == 0, (command, done.stdout, done.stderr)
    return done.stdout


def chat(machine: Machine) -> str:
    return machine.at_home(*RKEDGE, "chat", "board", "--temperature", "0", text=f"{FIRST}\n").stdout.strip()


def process(machine: Machine) -> str:
    return said(machine, "systemctl show --property=MainPID --value rkedge.service").strip()


def put_model(machine: Machine) -> None:
    """As docs/packages.md says."""
    said(machine, "sudo install -m 644 librkllmrt.so /usr/lib/")
    said(machine, "sudo install -d -o rkedge -g rkedge -m 700 /var/lib/rkedge")
    said(machine, "sudo cp -r base /var/lib/rkedge/bundle && sudo chown -R rkedge: /var/lib/rkedge/bundle")
    # A bundle for the emulator would have one built, for which this machine has no compiler.
    said(machine, "sudo sed -i 's#^library: null#library: /usr/lib/librkllmrt.so#' /etc/rkedge/daemon.yaml")
    said(machine, "sudo systemctl enable --now rkedge.socket rkedge.service && sudo usermod -aG rkedge pi")


def test_what_was_set_up_by_deploying_is_not_taken_over(board: Machine, bundle: Path, package: Path) -> None:
    minor, libc = (
        said(board, f"python3 -c 'import os, sys; print({expression})'").strip()
        for expression in ("sys.version_info[1]", 'os.confstr("CS_GNU_LIBC_VERSION").split(".")[1]')
    )
    wheels_for(Target(f"3.{minor}", os.uname().machine, int(libc)), print)
    done = board.at_home(*RKEDGE, "deploy", str(bundle), "board", "--library", str(emulator.build()), "--yes")
    assert done.returncode == 0, done.stderr
    refused = board.on_board(f"{APT} install -y ./{package.name}")
    assert refused.returncode != 0
    assert "rkedge undeploy USER@BOARD" in refused.stdout + refused.stderr
    assert chat(board) == ANSWERS[FIRST]
    assert board.at_home(*RKEDGE, "undeploy", "board", "--purge", "--yes").returncode == 0


def test_installed_without_a_model(board: Machine, package: Path) -> None:
    before = said(board, "dpkg --get-selections")
    said(board, f"{APT} install -y ./{package.name}")
    assert set(said(board, "dpkg --get-selections").splitlines()) - set(before.splitlines()) == {
        "rkedge\t\t\t\t\t\tinstall"
    }
    assert board.on_board("systemctl is-enabled rkedge.socket rkedge.service").stdout.split() == ["disabled"] * 2
    assert board.on_board("systemctl is-active rkedge.socket rkedge.service").stdout.split() == ["inactive"] * 2
    assert said(board, "systemctl --failed --no-legend --plain") == ""
    said(board, "rkedge --version")
    assert json.loads(board.on_board("rkedge doctor --json").stdout)["findings"]
    *ours, numpy = json.loads(said(board, f"/usr/lib/rkedge/bin/python -I -c '{COMPILED}'"))
    assert all(path.startswith("/usr/lib/rkedge/lib/") for path in ours)
    assert numpy.startswith("/usr/lib/python3/dist-packages/")
    assert said(board, "find /usr/lib/rkedge -name 'cli.cpython-*.pyc'")


def test_with_a_model(board: Machine) -> None:
    put_model(board)
    assert chat(board) == ANSWERS[FIRST]
    assert said(board, "systemctl show --property=User --value rkedge.service").strip() == "rkedge"


def test_deploying_is_refused(board: Machine, bundle: Path) -> None:
    done = board.at_home(*RKEDGE, "deploy", str(bundle), "board", "--yes")
    assert done.returncode == 4, done.stderr
    assert "sudo apt purge rkedge" in done.stderr
    assert chat(board) == ANSWERS[FIRST]


def test_an_upgrade_restarts_the_daemon(board: Machine, package: Path) -> None:
    before = process(board)
    said(board, f"{APT} install -y --reinstall ./{package.name}")
    assert process(board) not in ("0", before)
    assert "library: /usr/lib/librkllmrt.so" in said(board, "cat /etc/rkedge/daemon.yaml")
    assert chat(board) == ANSWERS[FIRST]


def test_an_upgrade_is_complete_although_the_daemon_does_not_start_again(board: Machine, package: Path) -> None:
    said(board, "sudo sed -i 's#^library: .*#library: /nowhere#; $ a unknown_setting: 1' /etc/rkedge/daemon.yaml")
    said(board, f"{APT} install -y --reinstall ./{package.name}")
    assert said(board, "dpkg --audit") == ""
    said(
        board,
        "sudo sed -i 's#^library: .*#library: /usr/lib/librkllmrt.so#; /^unknown_setting/d' /etc/rkedge/daemon.yaml",
    )
    said(board, "sudo systemctl restart rkedge.service")
    assert chat(board) == ANSWERS[FIRST]


def test_removed_and_installed_again(board: Machine, bundle: Path, package: Path) -> None:
    said(board, f"{APT} remove -y rkedge")
    # What is left of it would take the place of what is deployed with it when it is purged.
    done = board.at_home(*RKEDGE, "deploy", str(bundle), "board", "--yes")
    assert done.returncode == 4, done.stderr
    assert "sudo apt purge rkedge" in done.stderr
    assert board.on_board("systemctl is-active rkedge.socket rkedge.service").stdout.split() == ["inactive"] * 2
    assert said(board, "sudo ls /usr/lib/rkedge /usr/bin/rkedge 2>&1 || true").count("No such file") == 2
    said(board, "sudo ls /var/lib/rkedge/bundle /etc/rkedge/daemon.yaml")
    said(board, f"{APT} install -y ./{package.name} && sudo systemctl enable --now rkedge.socket rkedge.service")
    assert chat(board) == ANSWERS[FIRST]


@pytest.mark.parametrize("theirs", ["/opt/rkedge/deploy.json", "/etc/systemd/system/rkedge.service"])
def test_a_purge_leaves_others_what_is_theirs(theirs: str, board: Machine, package: Path) -> None:
    said(board, f"{APT} remove -y rkedge && sudo mkdir -p /opt/rkedge && sudo touch {theirs}")
    said(board, "sudo install -d -o rkedge /var/lib/rkedge/sessions && sudo touch /var/lib/rkedge/sessions/precious")
    said(board, f"{APT} purge -y rkedge && sudo rm {theirs} && sudo rmdir /opt/rkedge")
    said(board, "sudo ls /var/lib/rkedge/sessions/precious && id rkedge")
    links = "/etc/systemd/system/multi-user.target.wants/rkedge.service"
    said(board, f"readlink {links}")
    said(board, f"{APT} install -y ./{package.name}")


def test_a_purge_ends_although_somebody_runs_as_its_user(board: Machine, package: Path) -> None:
    said(board, "sudo systemd-run --quiet --unit=theirs -p User=rkedge sleep 1000")
    said(board, f"{APT} purge -y rkedge")
    assert said(board, "dpkg --audit") == ""
    said(board, "id rkedge && sudo systemctl stop theirs")
    said(board, f"{APT} install -y ./{package.name}")


def test_a_unit_that_is_masked_was_not_made_by_hand(board: Machine, package: Path) -> None:
    said(board, f"{APT} remove -y rkedge && sudo systemctl mask rkedge.service")
    said(board, f"{APT} install -y ./{package.name}")
    assert board.on_board("systemctl is-enabled rkedge.service").stdout.strip() == "masked"
    said(board, "sudo systemctl unmask rkedge.service")


def test_a_purge_empties_a_disk_of_its_own(board: Machine, package: Path) -> None:
    said(board, "sudo mkdir -p /var/cache/rkedge && sudo mount -t tmpfs none /var/cache/rkedge")
    said(board, "sudo touch /var/cache/rkedge/secret")
    said(board, f"{APT} purge -y rkedge")
    assert said(board, "dpkg --audit") == ""
    assert (
        said(board, "sudo ls -A /var/cache/rkedge && sudo umount /var/cache/rkedge && sudo rmdir /var/cache/rkedge")
        == ""
    )
    assert board.on_board("id rkedge").returncode != 0
    said(board, f"{APT} install -y ./{package.name}")


def test_purged(board: Machine) -> None:
    said(board, f"{APT} purge -y rkedge")
    found = said(board, "sudo find / -xdev -name '*rkedge*' -not -path '/proc/*' -not -path '/home/*'").split()
    assert [path for path in found if not path.startswith(("/var/log/", "/var/cache/apt/"))] == []
    assert board.on_board("id rkedge").returncode != 0
    assert board.on_board("getent group rkedge rkedge-clocks").stdout == ""
    assert said(board, "systemctl --failed --no-legend --plain") == ""


def test_a_person_who_has_the_daemons_name_stays(board: Machine, package: Path) -> None:
    said(board, "sudo useradd --create-home rkedge")
    said(board, f"{APT} install -y ./{package.name} && {APT} purge -y rkedge")
    assert "/home/rkedge" in said(board, "getent passwd rkedge")
    assert said(board, "getent group rkedge rkedge-clocks || true").split(":")[0] == "rkedge"


@pytest.mark.arm64
@pytest.mark.skipif(not runs_arm64(), reason="programs for arm64 do not run here: qemu-user-static, binfmt-support")
def test_on_arm64(folder: Path, bundle: Path) -> None:
    """Installed, asked and purged, without a system that runs: sudo, systemd and udev are not asked for anything."""
    root, package = folder / "arm64", debian.build("arm64", folder, print)
    subprocess.run(["cp", "-a", tree(), root], check=True)
    for path in (package, bundle, emulator.build(arch="aarch64")):
        subprocess.run(["cp", "-rL", path, root / "tmp"], check=True)

    def there(command: str, fine: tuple[int, ...] = (0,)) -> str:
        words = ["chroot", root, "sh", "-c", f"cd /tmp && {command}"]
        done = subprocess.run(words, capture_output=True, text=True, check=False)
        assert done.returncode in fine, (command, done.stdout, done.stderr)
        return done.stdout

    there(f"DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends ./{package.name}")
    assert json.loads(there("rkedge doctor --json", fine=(4, 9)))["findings"]
    there("chown -R rkedge base && install -d -o rkedge /tmp/state")
    serve = "cd state && HOME=/tmp/state exec rkedge serve ../base --library ../librkllmrt.so --socket socket"
    daemon = subprocess.Popen(["chroot", "--userspec=rkedge", root, "sh", "-c", f"cd /tmp && {serve}"])
    try:
        end = time.monotonic() + 600
        while not (root / "tmp/state/socket").exists():
            assert daemon.poll() is None
            assert time.monotonic() < end
            time.sleep(0.5)
        said = there(f"echo '{FIRST}' | RKEDGE_SOCKET=/tmp/state/socket rkedge chat --temperature 0")
        assert said.strip() == ANSWERS[FIRST]
    finally:
        daemon.terminate()
        daemon.wait(120)
    there("apt-get purge -y rkedge")
    assert there("id rkedge || true") == ""
    assert there("find /usr /etc /var/lib -name '*rkedge*' -not -path '/var/lib/dpkg/*'") == ""
