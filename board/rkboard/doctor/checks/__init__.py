"""Checks by subject: functions from a board's document to a verdict. A new one gets a row in its module's CHECKS."""

from __future__ import annotations

from typing import Final

from rkboard.doctor.checks import bundle, clocks, daemon, driver, library, memory, nodes, system
from rkboard.doctor.document import Board
from rkboard.doctor.finding import STATUSES, Check, Finding

GROUPS: Final[dict[str, tuple[Check, ...]]] = {
    "driver": driver.CHECKS,
    "nodes and permissions": nodes.CHECKS,
    "memory and NPU users": memory.CHECKS,
    "library": library.CHECKS,
    "clocks": clocks.CHECKS,
    "system": system.CHECKS,
    "daemon": daemon.CHECKS,
    "bundle": bundle.CHECKS,
}


def code_of(check: Check) -> str:
    """Return a check's name for programs."""
    return check.__name__.replace("_", "-")


def judge(board: Board) -> list[Finding]:
    """Run the checks; return their findings by group, in each the worst first."""
    groups = {"driver": (driver.architecture,), "daemon": daemon.CHECKS} if board.computer else GROUPS
    found = [
        Finding(group, code_of(check), verdict)
        for group, checks in groups.items()
        for check in checks
        if (verdict := check(board)) is not None
    ]
    order = list(GROUPS)
    return sorted(found, key=lambda one: (order.index(one.group), STATUSES.index(one.status)))
