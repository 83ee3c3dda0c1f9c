"""A real sshd on loopback with keys and a configuration of its own, and a daemon behind it."""

from __future__ import annotations

import getpass
import os
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SSHD = shutil.which("sshd") or "/usr/sbin/sshd"


@dataclass
class Board:
    """An sshd, the daemon behind it, and how to reach them.

    Attributes:
        ssh: the command with the configuration; its hosts are `open` (any command) and `chat` (the forced one).
    """

    daemon: Any
    ssh: list[str]
    sshd: subprocess.Popen[bytes]

    @property
    def destination(self) -> str:
        return f"{getpass.getuser()}@chat"

    def connections(self) -> list[int]:
        """Process ids of the sshd sessions."""
        children = Path(f"/proc/{self.sshd.pid}/task/{self.sshd.pid}/children").read_text()
        return [int(child) for child in children.split()]

    def drop(self) -> None:
        """Break every connection, as a lost network would."""
        for pid in self.connections():
            os.kill(pid, signal.SIGKILL)


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as one:
        return int(one.getsockname()[1])


def make_key(path: Path) -> str:
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)
    return path.with_suffix(".pub").read_text().strip()


@contextmanager
def running_board(daemon: Any, folder: Path) -> Iterator[Board]:
    """An sshd with its keys and configuration in `folder`, in front of a daemon."""
    folder.chmod(0o700)
    # As docs/serve.md has it.
    asked = 'SSH_ORIGINAL_COMMAND=\\"$SSH_ORIGINAL_COMMAND\\"'
    attach = f"/usr/bin/env -i {asked} {sys.executable} -I -m rkruntime.cli attach --socket {daemon.socket}"
    make_key(folder / "host")
    lines = [make_key(folder / "open"), f'restrict,command="{attach} --user ann" {make_key(folder / "chat")}']
    (folder / "authorized_keys").write_text("\n".join(lines) + "\n")
    port = free_port()
    (folder / "sshd_config").write_text(
        textwrap.dedent(f"""\
        Port {port}
        ListenAddress 127.0.0.1
        HostKey {folder}/host
        AuthorizedKeysFile {folder}/authorized_keys
        PasswordAuthentication no
        KbdInteractiveAuthentication no
        PermitRootLogin prohibit-password
        StrictModes no
        UsePAM no
        PidFile none
        AcceptEnv *
        Subsystem sftp internal-sftp
        """)
    )
    hosts = "".join(
        f"Host {name}\n  HostName 127.0.0.1\n  Port {port}\n  IdentityFile {folder}/{name}\n  IdentitiesOnly yes\n"
        f"  UserKnownHostsFile {folder}/known_hosts\n  StrictHostKeyChecking accept-new\n  BatchMode yes\n"
        f"  LogLevel ERROR\n  ServerAliveInterval 1\n  ServerAliveCountMax 3\n"
        for name in ("open", "chat")
    )
    (folder / "config").write_text(hosts)
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)
    log = (folder / "sshd.log").open("wb")
    sshd = subprocess.Popen([SSHD, "-D", "-e", "-f", str(folder / "sshd_config")], stderr=log)
    found = Board(daemon, ["ssh", "-F", str(folder / "config")], sshd)
    try:
        daemon.wait_until(lambda: b"listening" in (folder / "sshd.log").read_bytes())
        yield found
    finally:
        sshd.terminate()
        sshd.wait(10)
        log.close()


@contextmanager
def forwarding(board: Board, *options: str) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen([*board.ssh, "-N", "-o", "ExitOnForwardFailure=yes", *options])
    try:
        yield process
    finally:
        process.terminate()
        process.wait(10)


def connect(board: Board, port: int) -> socket.socket:
    """A connection to the near end, as soon as it listens."""
    opened: list[socket.socket] = []

    def attempt() -> bool:
        try:
            opened.append(socket.create_connection(("127.0.0.1", port), timeout=5))
        except ConnectionRefusedError:
            return False
        return True

    board.daemon.wait_until(attempt)
    return opened[0]
