"""docs/serve.md, typed on a fresh Debian by somebody who has an account with sudo, under a real systemd and sshd.

Not tried: `apt`, as that Debian has no network (its image has the packages), and the udev rules, as a container has no
devices. In the place of the vendor's library is the emulated one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
from tests.test_newcomer import has_an_index, lines

from rkboard.emulator import build as emulator
from rkconvert.demo import questions

from .machine import TOOLS, Machine, running_machine
from .sshd import make_key

ROOT = Path(__file__).parents[3]
PAGE = (ROOT / "docs" / "serve.md").read_text()
QA = {row.question: row.answer for row in questions()}
FIRST = "What is the RK3588?"
RKEDGE = [sys.executable, "-m", "rkruntime.cli"]
LIBRARY = "/opt/emulator/librkllmrt.so"
missing = [tool for tool in TOOLS if shutil.which(tool) is None]

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}"),
    pytest.mark.skipif(os.geteuid() != 0, reason="systemd-nspawn starts a machine as root"),
]


def commands() -> list[str]:
    """What the page says to type for a service, as far as it can be tried."""
    section = re.search(r"^## As a service\n(.*?)^Python must be", PAGE, re.MULTILINE | re.DOTALL)
    assert section
    typed = [line.command for line in lines(section[1]) if not line.command.startswith("sudo apt ")]
    return [command.replace(" && sudo udevadm control --reload && sudo udevadm trigger", "") for command in typed]


def give(machine: Machine, bundle: Path) -> None:
    """What the page takes for granted: a copy of the repository with a bundle, packages, and a library."""
    clone = machine.tree / "home/pi/rkedge"
    clone.mkdir()
    files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True).stdout
    pack = ["tar", "--create", "--null", "--files-from=-"]
    packed = subprocess.run(pack, cwd=ROOT, input=files, capture_output=True, check=True).stdout
    subprocess.run(["tar", "--extract"], cwd=clone, input=packed, check=True)
    shutil.copytree(bundle, clone / "my-bundle")
    subprocess.run(["chroot", machine.tree, "chown", "-R", "pi:", "/home/pi/rkedge"], check=True)
    wheels = machine.tree / "opt/wheels"
    version = subprocess.run(
        ["chroot", machine.tree, "python3", "-c", "import sys; print(*sys.version_info[:2], sep='.')"],
        capture_output=True, text=True, check=True,
    ).stdout.strip()  # fmt: skip
    fetch = ["download", "--quiet", "--only-binary=:all:", f"--python-version={version}", f"--dest={wheels}"]
    wanted = ["--requirement", "board/requirements.txt", "hatchling"]
    subprocess.run([sys.executable, "-m", "pip", *fetch, *wanted], cwd=ROOT, check=True)
    (machine.tree / "etc/pip.conf").write_text("[global]\nno-index = true\nfind-links = /opt/wheels\n")
    (machine.tree / LIBRARY[1:]).parent.mkdir()
    shutil.copy(emulator.build(), machine.tree / LIBRARY[1:])


def chat(machine: Machine, host: str = "board", **environment: str) -> tuple[int, str, str]:
    """Exit code, answer and messages of `rkedge chat` at home."""
    done = machine.at_home(*RKEDGE, "chat", host, "--temperature", "0", text=f"{FIRST}\n", **environment)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def said() -> dict[str, str]:
    """What `rkedge chat` said after each command of the page."""
    return {}


@pytest.fixture(scope="module")
def board(
    bundles: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, said: dict[str, str]
) -> Iterator[Machine]:
    """A machine where the page has been typed."""
    if not has_an_index():
        pytest.skip("pip reaches no index")
    with running_machine(tmp_path_factory.mktemp("machine")) as machine:
        give(machine, bundles["base"])
        said[""] = chat(machine)[2]
        for command in commands():
            done = machine.on_board(f"cd rkedge && {{ {command}\n}}")
            assert done.returncode == 0, (command, done.stdout, done.stderr)
            if "/etc/rkedge/daemon.yaml" in command:
                done = machine.on_board(f"sudo sed -i 's|^library: null|library: {LIBRARY}|' /etc/rkedge/daemon.yaml")
                assert done.returncode == 0
            said[command] = chat(machine)[2]
        yield machine


def after(said: Mapping[str, str], words: str) -> str:
    (found,) = (text for command, text in said.items() if words in command)
    return found


def test_it_answers(board: Machine) -> None:
    for host in ("board", "pi@board"):
        assert chat(board, host)[:2] == (0, f"{QA[FIRST]}\n")
    done = board.on_board("rkedge chat", text=f"{FIRST}\n")
    assert (done.returncode, done.stdout) == (0, f"{QA[FIRST]}\n"), done.stderr


def test_on_the_way_there_it_says_what_is_missing(board: Machine, said: dict[str, str]) -> None:
    for step in ("", "pip install"):
        text = said[""] if not step else after(said, step)
        assert "The shell on board cannot find rkedge" in text
        assert "sudo ln -s /opt/rkedge/bin/rkedge /usr/local/bin/" in text
    for step in ("ln -s", "daemon.yaml"):
        assert "No daemon answers on /run/rkedge/rkedge.sock: No such file" in after(said, step)
    assert "The account pi may not use the daemon" in after(said, "systemctl")
    assert "sudo usermod -aG rkedge pi" in after(said, "systemctl")
    assert "error" not in after(said, "usermod")


def test_the_path_of_ssh_can_do_without_the_link(board: Machine) -> None:
    assert board.on_board("sudo rm /usr/local/bin/rkedge").returncode == 0
    try:
        code, _, said = chat(board)
        assert (code, "cannot find rkedge" in said) == (8, True)
        hint = re.search(r"export (RKEDGE_ATTACH)='(.*?)'", said)
        assert hint
        assert chat(board, **{hint[1]: hint[2]})[:2] == (0, f"{QA[FIRST]}\n")
    finally:
        assert board.on_board("sudo ln -s /opt/rkedge/bin/rkedge /usr/local/bin/").returncode == 0


def test_a_login_that_is_older_than_the_group(board: Machine) -> None:
    before = chat(board, "guest@guest")[2]
    step = re.search(r"(sudo usermod .*?), then", before)
    assert step, before
    older = ["-o", f"ControlPath={board.tree.parent}/%C", "-o", "ControlMaster=auto", "-o", "ControlPersist=60"]
    shared = {"RKEDGE_SSH": " ".join([*board.ssh, "-T", *older])}
    assert "may not use the daemon" in chat(board, "guest@guest", **shared)[2]
    assert board.on_board(step[1]).returncode == 0
    said = chat(board, "guest@guest", **shared)[2]
    assert "This login is older than the membership of guest in the group rkedge" in said
    assert board.at_home(*board.ssh, *older, "-O", "exit", "guest").returncode == 0
    assert chat(board, "guest@guest", **shared)[:2] == (0, f"{QA[FIRST]}\n")
    board.at_home(*board.ssh, *older, "-O", "exit", "guest")


def test_a_key_that_can_only_chat(board: Machine) -> None:
    found = re.search(r'^    (restrict,command=".*") ssh-ed25519 AAAA\.\.\. ann$', PAGE, re.MULTILINE)
    assert found
    key = make_key(Path(board.ssh[2]).with_name("chat"))
    assert board.on_board("cat >> .ssh/authorized_keys", text=f"{found[1]} {key}\n").returncode == 0
    assert chat(board, "chat")[:2] == (0, f"{QA[FIRST]}\n")
    done = board.at_home(*board.ssh, "chat", "id")
    assert (done.returncode, done.stdout) == (4, "")
    assert "may only be used to chat" in done.stderr


def test_the_tunnel(board: Machine) -> None:
    found = re.search(r"`(ssh -N -L (\d+):/run/\S+) user@board`", PAGE)
    assert found
    entered = ["nsenter", "--net", "--target", str(board.leader)]
    tunnel = subprocess.Popen([*entered, *board.ssh, *found[1].split()[1:], "board"])
    try:
        end = time.monotonic() + 20
        body = json.dumps({"messages": [{"role": "user", "content": FIRST}], "temperature": 0})
        while time.monotonic() < end:
            done = board.at_home("curl", "-s", f"http://localhost:{found[2]}/v1/chat/completions", "-d", body)
            if done.returncode == 0:
                break
            time.sleep(0.2)
        assert json.loads(done.stdout)["choices"][0]["message"]["content"] == QA[FIRST]
    finally:
        tunnel.terminate()
        tunnel.wait(10)


def test_it_starts_with_the_board_and_after_a_crash(board: Machine) -> None:
    assert board.on_board("systemctl is-enabled rkedge.socket rkedge.service").stdout.split() == ["enabled"] * 2
    assert board.on_board("sudo systemctl kill --signal=KILL rkedge.service").returncode == 0
    assert chat(board)[:2] == (0, f"{QA[FIRST]}\n")
    assert board.on_board("sudo systemctl reload rkedge").returncode == 0
    assert chat(board)[:2] == (0, f"{QA[FIRST]}\n")


def test_a_service_that_is_stopped(board: Machine) -> None:
    assert board.on_board("sudo systemctl stop rkedge.socket rkedge.service").returncode == 0
    code, _, said = chat(board)
    assert (code, "No daemon answers on /run/rkedge/rkedge.sock" in said) == (8, True)
    step = re.search(r"if it is a service, (systemctl start rkedge)", said)
    assert step
    assert board.on_board(f"sudo {step[1]}").returncode == 0
    assert chat(board)[:2] == (0, f"{QA[FIRST]}\n")


def test_a_service_that_does_not_start(board: Machine) -> None:
    """systemd keeps its socket open; whoever connects would wait for ever."""
    settings = "/etc/rkedge/daemon.yaml"
    board.on_board(f"sudo cp -a {settings} {settings}.kept && echo 'bundel: x' | sudo tee -a {settings}")
    board.on_board("sudo systemctl restart rkedge.service")
    code, _, said = chat(board)
    assert (code, "/run/rkedge/rkedge.sock is open, but no daemon answers there" in said) == (8, True)
    assert "bundel" in board.on_board("sudo journalctl -u rkedge").stdout
    assert board.on_board(f"sudo mv {settings}.kept {settings} && sudo systemctl restart rkedge").returncode == 0
    assert chat(board)[:2] == (0, f"{QA[FIRST]}\n")
