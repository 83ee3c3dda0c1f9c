"""The chat daemon: its unit, its socket, and what it says of itself."""

from __future__ import annotations

from typing import Final

from rkboard.doctor.document import Board
from rkboard.doctor.finding import Check, Fix, Verdict, ok
from rkruntime.printable import one_line

_SERVE: Final = "docs/serve.md"
_SOCKET: Final = "run/rkedge/rkedge.sock"
_UNITS: Final = ("etc/systemd/system/rkedge.service", "usr/lib/systemd/system/rkedge.service")


def _installed(board: Board) -> bool:
    return any(path in board.document.files for path in _UNITS)


def daemon_unit(board: Board) -> Verdict | None:
    """Whether the daemon's unit is installed."""
    if not board.names("run/systemd/system") and not _installed(board):
        return None
    if _installed(board):
        return ok("The daemon's unit is installed.")
    return Verdict("note", "The daemon's unit is not installed.", mend=_SERVE, source=_SERVE)


def daemon_running(board: Board) -> Verdict | None:
    """Whether the daemon runs."""
    if not _installed(board):
        return None
    if board.text("sys/fs/cgroup/system.slice/rkedge.service/cgroup.procs"):
        return ok("The daemon runs.")
    if _SOCKET in board.document.nodes and board.text(_SOCKET):
        return ok("The daemon answers.")
    return Verdict(
        "warning",
        "The daemon is installed, but does not run.",
        "Nobody can chat with this board.",
        "systemctl status rkedge; sudo systemctl start rkedge.socket rkedge.service",
        _SERVE,
        [Fix(("systemctl", "start", "rkedge.socket", "rkedge.service"))],
    )


def daemon_socket(board: Board) -> Verdict | None:
    """Whether this user may connect to it."""
    node = board.document.nodes.get(_SOCKET)
    if node is None:
        return None
    if node.kind != "socket" and board.document.root == "/":
        return Verdict(
            "warning", f"/{_SOCKET} is not a socket.", mend="sudo systemctl restart rkedge.socket", source=_SERVE
        )
    if node.access:
        return ok(f"{board.me.user or 'This user'} may chat.")
    return Verdict(
        "note",
        f"{board.me.user or 'This user'} may not connect to the daemon.",
        "Its socket is for the group rkedge.",
        "sudo usermod -aG rkedge $USER, then log in again",
        _SERVE,
    )


def daemon_model(board: Board) -> Verdict | None:
    """Whether it has loaded its model."""
    if board.text(_SOCKET) is None:
        return None
    status = board.mapping(_SOCKET)
    state = status.get("state")
    if not isinstance(state, str):
        return Verdict("unknown", "The daemon did not say how it is.", mend="journalctl -u rkedge")
    if state != "failed":
        return ok(f"The daemon's model is {one_line(state)[:40]}.")
    error = one_line(str(status.get("error") or state))[:300]
    return Verdict(
        "failure", f"The daemon could not load its model: {error}", mend="journalctl -u rkedge", source=_SERVE
    )


def udev_rule(board: Board) -> Verdict | None:
    """Whether the rule that gives the NPU to the group video is installed."""
    if not _installed(board):
        return None
    if any(path.endswith("60-rkedge.rules") for path in board.document.files):
        return ok("The udev rule is installed.")
    return Verdict(
        "note",
        "The udev rule for the NPU is not installed.",
        "The daemon runs without root, and opens the NPU as a member of the group video.",
        "sudo cp board/udev/60-rkedge.rules /etc/udev/rules.d/ && sudo udevadm trigger",
        _SERVE,
    )


CHECKS: Final[tuple[Check, ...]] = (daemon_unit, daemon_running, daemon_socket, daemon_model, udev_rule)
