"""A board in a virtual machine: Debian for arm64 with its own kernel, systemd and sshd, in qemu.

The image is made once and kept in the cache folder; each start works on a copy that goes when qemu ends. sshd listens
on a port of this machine's loopback, and nothing else of any network can be reached from there.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from tests.debian import debian
from tests.runtime.serve.sshd import free_port, make_key

TOOLS = ("qemu-system-aarch64", "mmdebstrap", "arch-test", "mke2fs", "ssh", "ssh-keygen")
PACKAGES = (
    "linux-image-cloud-arm64", "busybox-static", "systemd", "systemd-sysv", "udev", "dbus",
    "openssh-server", "sudo", "python3", "libgomp1",
)  # fmt: skip
# Under qemu-user, making the usual initramfs takes longer than everything else.
NO_INITRAMFS = "--dpkgopt=path-exclude=/etc/kernel/postinst.d/initramfs-tools"
USER = "pi"
# Of the disk; the file has holes where nothing is.
SIZE = "2G"
# qemu translates each instruction: a boot takes half a minute on an idle machine.
BOOT_S = 600.0
NETWORK = "[Match]\nName=e*\n\n[Network]\nDHCP=ipv4\n"
INIT = """\
#!/bin/busybox sh
/bin/busybox mount -t devtmpfs none /dev
for module in {modules}; do /bin/busybox insmod /$module; done
until [ -b /dev/vda ]; do /bin/busybox sleep 0.1; done
/bin/busybox mount -t ext4 /dev/vda /root
/bin/busybox mount --move /dev /root/dev
exec /bin/busybox switch_root /root /sbin/init
"""


def run(*words: str | Path, **more: object) -> str:
    """What a tool of this machine prints."""
    return subprocess.run(list(map(str, words)), check=True, capture_output=True, text=True, **more).stdout  # type: ignore[call-overload,no-any-return]


def runs_arm64() -> bool:
    """Whether this machine starts programs for arm64 as its own."""
    if shutil.which("arch-test") is None:
        return False
    return subprocess.run(["arch-test", "arm64"], capture_output=True, check=False).returncode == 0


def tree() -> Path:
    """Debian for arm64, with a kernel."""
    return debian("vm", "--arch=arm64", "--variant=minbase", NO_INITRAMFS, f"--include={','.join(PACKAGES)}")


def image() -> Path:
    """The folder with kernel, initramfs, disk and key; made if there is none."""
    made = tree()
    folder = made.with_name(f"{made.name}-image")
    if not folder.exists():
        partial = folder.with_name(f"{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(mode=0o700)
        _settle(made, make_key(partial / "key"))
        _initramfs(made, partial)
        run("mke2fs", "-q", "-t", "ext4", "-d", made, partial / "disk", SIZE)
        partial.rename(folder)
    return folder


def _settle(tree: Path, key: str) -> None:
    """A user who may use sudo, and a network."""
    chroot = ("chroot", tree)
    if subprocess.run([*chroot, "id", USER], capture_output=True, check=False).returncode:
        run(*chroot, "useradd", "-m", "-s", "/bin/bash", USER)
    keys = tree / "home" / USER / ".ssh/authorized_keys"
    keys.parent.mkdir(mode=0o700, exist_ok=True)
    keys.write_text(f"{key}\n")
    run(*chroot, "chown", "-R", f"{USER}:", f"/home/{USER}/.ssh")
    (tree / "etc/sudoers.d/pi").write_text(f"{USER} ALL=(ALL) NOPASSWD: ALL\n")
    (tree / "etc/systemd/network/dhcp.network").write_text(NETWORK)
    (tree / "etc/hostname").write_text("board\n")
    (tree / "etc/hosts").write_text("127.0.0.1 localhost board\n")
    run(*chroot, "systemctl", "enable", "systemd-networkd.service")


def _initramfs(tree: Path, folder: Path) -> None:
    """The kernel, and what it needs before it has a disk: the modules for it, and a shell that loads them."""
    version = next((tree / "lib/modules").iterdir()).name
    shutil.copy(tree / f"boot/vmlinuz-{version}", folder / "kernel")
    parts = tree / "initramfs"
    shutil.rmtree(parts, ignore_errors=True)
    for name in ("bin", "dev", "root"):
        (parts / name).mkdir(parents=True)
    shutil.copy(tree / "bin/busybox", parts / "bin")
    paths: list[str] = []
    for module in ("virtio_pci", "virtio_blk"):
        said = run("chroot", tree, "modprobe", "--set-version", version, "--show-depends", module)
        paths += [words[1] for words in map(str.split, said.splitlines()) if words[0] == "insmod"]
    wanted = list(dict.fromkeys(paths))
    for path in wanted:
        shutil.copy(tree / path.lstrip("/"), parts)
    (parts / "init").write_text(INIT.format(modules=" ".join(Path(path).name for path in wanted)))
    (parts / "init").chmod(0o755)
    with (folder / "initrd").open("wb") as file:
        pack = "cd /initramfs && find . | cpio --quiet --format=newc --create"
        subprocess.run(["chroot", tree, "sh", "-c", pack], stdout=file, check=True)
    shutil.rmtree(parts)


@dataclass
class Virtual:
    """A board that runs while its context does. `ssh` is the command; its host is `board`."""

    qemu: subprocess.Popen[bytes]
    ssh: list[str]
    console: Path

    def on_board(self, command: str, **more: object) -> subprocess.CompletedProcess[str]:
        """A line that a person types there, in a login of its own."""
        words = [*self.ssh, "board", command]
        return subprocess.run(words, capture_output=True, text=True, timeout=280, check=False, **more)  # type: ignore[call-overload,no-any-return]

    def wait(self) -> None:
        """Until somebody can log in."""
        end = time.monotonic() + BOOT_S
        while time.monotonic() < end:
            assert self.qemu.poll() is None, self.console.read_text(errors="replace")[-3000:]
            with suppress(subprocess.TimeoutExpired):
                done = subprocess.run([*self.ssh, "board", "true"], capture_output=True, timeout=30, check=False)
                if done.returncode == 0:
                    return
            time.sleep(0.5)
        raise AssertionError(self.console.read_text(errors="replace")[-3000:])

    def boot_id(self) -> str:
        """Differs from boot to boot."""
        return self.on_board("cat /proc/sys/kernel/random/boot_id").stdout

    def reboot(self) -> None:
        """Restart it, until somebody can log in again."""
        before = self.boot_id()
        self.on_board("sudo systemctl reboot")
        end = time.monotonic() + BOOT_S
        while time.monotonic() < end:
            self.wait()
            if self.boot_id() not in ("", before):
                return
        raise AssertionError(self.console.read_text(errors="replace")[-3000:])


@contextmanager
def running(folder: Path) -> Iterator[Virtual]:
    """A fresh one. Its console and ssh's configuration are in `folder`."""
    made, port = image(), free_port()
    console = folder / "console"
    options = {
        "machine": "virt", "cpu": "cortex-a76", "smp": str(os.cpu_count() or 1), "m": "2048",
        "accel": "tcg,thread=multi",
        "kernel": made / "kernel", "initrd": made / "initrd",
        "append": "console=ttyAMA0 systemd.show_status=1",
        "drive": f"file={made}/disk,if=virtio,format=raw,snapshot=on",
        "netdev": f"user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:{port}-:22",
        "device": "virtio-net-pci,netdev=net,romfile=",
        "serial": f"file:{console}", "display": "none", "monitor": "none",
    }  # fmt: skip
    words = [word for name, value in options.items() for word in (f"-{name}", str(value))]
    (folder / "config").write_text(
        f"Host board\n  HostName 127.0.0.1\n  Port {port}\n  User {USER}\n  IdentityFile {made}/key\n"
        f"  IdentitiesOnly yes\n  UserKnownHostsFile {folder}/known_hosts\n  StrictHostKeyChecking accept-new\n"
        "  BatchMode yes\n  LogLevel ERROR\n  ConnectTimeout 20\n  ServerAliveInterval 5\n"
    )
    qemu = subprocess.Popen(["qemu-system-aarch64", "-nodefaults", *words], stdin=subprocess.DEVNULL)
    board = Virtual(qemu, ["ssh", "-F", str(folder / "config")], console)
    try:
        board.wait()
        yield board
    finally:
        qemu.kill()
        qemu.wait(30)
