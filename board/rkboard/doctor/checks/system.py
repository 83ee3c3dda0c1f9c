"""Python, disks, the clock, and what could not be looked at."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import datetime, timezone
from typing import Final

from rkboard.doctor.document import Board
from rkboard.doctor.finding import Check, Fix, Verdict, ok, write
from rkruntime.versions import version

_PYTHON: Final = "3.10"
_UV: Final = "UV_PYTHON_INSTALL_DIR=/opt/uv uv venv --python 3.12 /opt/rkedge: a Python that ProtectHome= does not hide"
_LEAST_DISK: Final = 2 << 30
_SKEW_S: Final = 300.0
_OLDEST: Final = datetime(2025, 1, 1, tzinfo=timezone.utc).timestamp()
_READ_AHEAD: Final = 1024
# Paths that only root may read, and what they would tell.
_FOR_ROOT: Final = {
    "sys/kernel/debug": "the driver's version and load",
    "dev/kmsg": "the kernel's log",
    "proc/rknpu": "the driver's version",
}


def python(board: Board) -> Verdict:
    """Whether Python is new enough for rkedge itself."""
    try:
        enough = version(board.me.python) >= version(_PYTHON)
    except ValueError:
        return Verdict("unknown", "Python's version could not be read.")
    if enough:
        return ok(f"Python is {board.me.python}.")
    return Verdict(
        "warning",
        f"Python is {board.me.python}; rkedge needs {_PYTHON} or later.",
        "pip says 'no matching distribution' there. Debian 11 has 3.9, Ubuntu 20.04 has 3.8.",
        _UV,
        "https://docs.astral.sh/uv/reference/environment/",
    )


def python_bits(board: Board) -> Verdict:
    """Whether programs have 64 bits."""
    if board.me.bits == 64:
        return ok("Programs here have 64 bits.")
    return Verdict(
        "failure",
        "Python here is a 32-bit program.",
        "The vendor's library for Linux that rkedge calls has 64 bits.",
        "Use a 64-bit system image (arm64): getconf LONG_BIT must say 64.",
        "https://wiki.debian.org/Arm64Port",
    )


def python_venv(board: Board) -> Verdict:
    """Whether Python can make virtual environments."""
    if board.me.venv:
        return ok("Python can make virtual environments.")
    return Verdict(
        "note",
        "Python cannot make virtual environments here.",
        "rkedge is installed into one.",
        "sudo apt install python3-venv",
        "https://packages.debian.org/stable/python3-venv",
        [Fix(("apt-get", "install", "-y", "python3-venv"))] if board.text("etc/debian_version") else (),
    )


def disk_space(board: Board) -> Verdict | None:
    """Whether the disk has room for a bundle."""
    disks = board.document.disks
    disk = disks.get("/var/lib/rkedge") or disks.get("/")
    if disk is None:
        return None
    said = f"{disk.free / 1e9:.1f} GB are free where bundles go."
    if disk.free >= _LEAST_DISK:
        return ok(said)
    return Verdict(
        "warning",
        said,
        "The smallest Gemma 2 takes about 3.2 GB.",
        "sudo apt clean; journalctl --vacuum-size=100M; or use another disk",
        "docs/plan.md",
    )


def _root_disk(board: Board) -> str | None:
    """Return the name of the disk that / is on, such as nvme0n1."""
    for line in (board.text("proc/mounts") or "").split("\n"):
        source, _, rest = line.partition(" ")
        if rest.startswith("/ ") and (found := re.fullmatch(r"/dev/((?:nvme|mmcblk)\w+?)(?:p\d{1,3})?", source)):
            return found[1]
    return None


def disk_kind(board: Board) -> Verdict | None:
    """Whether the system is on an SD card."""
    disk = _root_disk(board)
    if disk is None:
        return None
    if f"{disk}boot0" in board.names("sys/block") or not disk.startswith("mmcblk"):
        return ok(f"The system is on {disk}.")
    return Verdict(
        "note",
        f"The system seems to be on an SD card ({disk}).",
        "At 20 MB/s, a model of 2.8 GB takes more than two minutes to load.",
        "Put the bundle on an NVMe or eMMC disk.",
        "https://www.sdassociation.org/developers/overview/speed-class/",
    )


def read_ahead(board: Board) -> Verdict | None:
    """Whether the kernel reads far enough ahead on NVMe disks."""
    rows = {
        name: value
        for name in board.names("sys/block")
        if re.fullmatch(r"nvme\d{1,2}n\d{1,2}", name)
        and (value := board.number(f"sys/block/{name}/queue/read_ahead_kb")) is not None
    }
    if not rows:
        return None
    low = [name for name, value in rows.items() if value < _READ_AHEAD]
    if not low:
        return ok("The kernel reads ahead far enough on NVMe disks.")
    return Verdict(
        "note",
        f"The kernel reads {rows[low[0]]} kB ahead on {low[0]}.",
        "A model is read from its beginning to its end; 4096 kB loads it faster.",
        f"echo 4096 | sudo tee /sys/block/{low[0]}/queue/read_ahead_kb (until the next boot)",
        "https://docs.kernel.org/admin-guide/abi-stable.html (queue/read_ahead_kb)",
        write("4096", *(f"sys/block/{name}/queue/read_ahead_kb" for name in low)),
    )


def time_right(board: Board) -> Verdict:
    """Whether the clock is right."""
    if board.me.time < _OLDEST:
        when = "in the past"
    elif board.now is not None and abs(board.me.time - board.now) > _SKEW_S:
        when = f"{abs(board.me.time - board.now):.0f} seconds off"
    else:
        return ok("The clock is right.")
    return Verdict(
        "warning",
        f"The board's clock is {when}.",
        "Downloads fail with certificates that are not valid yet, and logs cannot be compared.",
        "sudo timedatectl set-ntp true",
        "https://www.freedesktop.org/software/systemd/man/latest/timedatectl.html",
        [Fix(("timedatectl", "set-ntp", "true"))],
    )


def time_synchronized(board: Board) -> Verdict | None:
    """Whether the clock is set from the network."""
    names = board.names("run/systemd/timesync")
    if not names:
        return None
    if "synchronized" in names:
        return ok("The clock is set from the network.")
    return Verdict(
        "note",
        "The clock has not been set from the network since the last boot.",
        "It will be wrong after the next one.",
        "timedatectl timesync-status",
        "https://www.freedesktop.org/software/systemd/man/latest/systemd-timesyncd.service.html",
    )


def systemd(board: Board) -> Verdict:
    """Whether systemd runs."""
    if board.names("run/systemd/system") or board.text("proc/1/comm") == "systemd":
        return ok("systemd runs here.")
    return Verdict(
        "note",
        "systemd does not run here.",
        "rkedge serve runs without it, but nothing starts it at boot or again after a crash.",
        "docs/serve.md; in a container, let the container's manager restart it",
        "https://www.freedesktop.org/software/systemd/man/latest/sd_booted.html",
    )


def image(board: Board) -> Verdict:
    """Which system this is."""
    name = re.search(r"^PRETTY_NAME=\"?([^\"\n]*)", board.text("etc/os-release") or "", re.MULTILINE)
    if name is None:
        return Verdict("unknown", "/etc/os-release could not be read.")
    return ok(f"The system is {name[1]}, kernel {board.release or 'unknown'}.")


def seen(board: Board) -> Verdict:
    """Whether everything could be looked at."""
    if board.document.problems:
        return Verdict(
            "warning",
            f"Not everything could be looked at: {'; '.join(board.document.problems[:3])}.",
            "A file of a driver that hangs does not answer; a reboot may be all that helps.",
            "sudo dmesg | tail -50",
        )
    return ok(f"Everything was looked at in {board.document.seconds:.1f} seconds.")


def more_as_root(board: Board) -> Verdict:
    """Whether root could read more."""
    told = list(dict.fromkeys(_closed(board)))
    if not told:
        return ok("Nothing more could be read as root.")
    if board.me.uid == 0:
        return Verdict(
            "note", f"Not even root can read {', '.join(told)} here: a container hides it, or the kernel does."
        )
    return Verdict(
        "note",
        f"Only root can read {', '.join(told)}.",
        "The other findings do not need it.",
        "rkedge doctor --sudo (needs sudo that asks for no password)",
        "drivers/rknpu, rknpu_debugger.c of the vendor's kernel",
    )


def _closed(board: Board) -> Iterator[str]:
    for path in board.document.files:
        if board.closed(path):
            yield next((text for start, text in _FOR_ROOT.items() if path.startswith(start)), f"/{path}")
    if board.document.hidden_processes:
        yield "what processes of other users have open"


CHECKS: Final[tuple[Check, ...]] = (
    python,
    python_bits,
    python_venv,
    disk_space,
    disk_kind,
    read_ahead,
    time_right,
    time_synchronized,
    systemd,
    image,
    seen,
    more_as_root,
)
