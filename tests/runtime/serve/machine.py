"""A Debian with systemd as process 1 and a real sshd, in the place of a board. Its network is its own loopback."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.debian import debian

from .sshd import make_key

TOOLS = ("systemd-nspawn", "mmdebstrap", "nsenter", "ssh", "ssh-keygen")
PACKAGES = "systemd,systemd-sysv,udev,dbus,openssh-server,sudo,python3-venv"
# The image's first user, who may use sudo, and somebody else's account.
USERS = {"pi": "sudo", "guest": "users"}


@dataclass
class Machine:
    """It runs while its context does.

    Attributes:
        tree: its root.
        leader: its process 1, as this machine counts.
        ssh: the command, whose hosts are its accounts' names, and `chat` for another key of pi's.
    """

    tree: Path
    leader: int
    ssh: list[str]

    def at_home(self, *command: str, text: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
        """A command on a person's own machine, from where the board can be reached."""
        variables = {**os.environ, "RKEDGE_SSH": " ".join([*self.ssh, "-T"]), **environment}
        entered = ["nsenter", "--net", "--target", str(self.leader), *command]
        return subprocess.run(
            entered, env=variables, input=text, capture_output=True, text=True, timeout=280, check=False
        )

    def on_board(self, command: str, account: str = "pi", text: str = "") -> subprocess.CompletedProcess[str]:
        """A line that a person types there, in a login of its own."""
        done = self.at_home(*self.ssh, account, command, text=text)
        done.stderr = "".join(line for line in done.stderr.splitlines(True) if "unable to resolve host" not in line)
        return done


@contextmanager
def running_machine(folder: Path, name: str = "board", packages: str = PACKAGES) -> Iterator[Machine]:
    """A fresh one with its users; their keys are in `folder`. `name`: of the tree with these packages."""
    tree = folder / "board"
    subprocess.run(["cp", "-a", debian(name, "--variant=minbase", f"--include={packages}"), tree], check=True)
    key = make_key(folder / "open")
    for name, group in USERS.items():
        subprocess.run(["chroot", tree, "useradd", "-m", "-s", "/bin/bash", "-G", group, name], check=True)
        make = f"mkdir -m 700 .ssh && echo '{key}' > .ssh/authorized_keys"
        subprocess.run(["chroot", tree, "su", name, "-c", f"cd && {make}"], check=True)
    (tree / "etc/sudoers.d/pi").write_text("pi ALL=(ALL) NOPASSWD: ALL\n")
    options = f"  HostName 127.0.0.1\n  IdentitiesOnly yes\n  UserKnownHostsFile {folder}/known_hosts\n"
    options += "  StrictHostKeyChecking accept-new\n  BatchMode yes\n  LogLevel ERROR\n"
    hosts = [(name, name, "open") for name in USERS] + [("chat", "pi", "chat"), ("board", "pi", "open")]
    (folder / "config").write_text(
        "".join(f"Host {name}\n  User {user}\n  IdentityFile {folder}/{key}\n{options}" for name, user, key in hosts)
    )
    command = ["systemd-nspawn", f"--directory={tree}", "--boot", "--register=no", "--keep-unit", "--private-network"]
    command += ["--link-journal=no", "--hostname=board", "--console=pipe", "--quiet"]
    with (folder / "console").open("wb") as console:
        nspawn = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=console, stderr=console)
    try:
        yield Machine(tree, _leader(nspawn), ["ssh", "-F", str(folder / "config")])
    finally:
        nspawn.terminate()
        nspawn.wait(60)
        shutil.rmtree(tree)


def _leader(nspawn: subprocess.Popen[bytes]) -> int:
    """The machine's process 1, once sshd listens there."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        assert nspawn.poll() is None, "systemd-nspawn has ended"
        children = Path(f"/proc/{nspawn.pid}/task/{nspawn.pid}/children").read_text().split()
        if children and ":0016 " in _listeners(children[0]):
            return int(children[0])
        time.sleep(0.1)
    raise AssertionError("sshd never listened")


def _listeners(pid: str) -> str:
    try:
        return Path(f"/proc/{pid}/net/tcp").read_text()
    except OSError:
        return ""
