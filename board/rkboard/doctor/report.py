"""Findings for people and for programs. Everything that a board said is printed through one_line."""

from __future__ import annotations

import shutil
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any, Final

from rkboard.doctor.document import Board
from rkboard.doctor.finding import STATUSES, Finding, Status
from rkruntime.errors import RefusedError
from rkruntime.printable import one_line
from rkruntime.terminal import say
from rkruntime.words import counted

SCHEMA: Final = "rkedge-doctor/1"
WARNINGS: Final = 9
"""Exit status if nothing is worse than a warning."""
_COLOURS: Final[dict[Status, str]] = {
    "failure": "red",
    "warning": "yellow",
    "unknown": "magenta",
    "note": "cyan",
    "ok": "green",
}
_MARGIN: Final = 9
_WIDTH: Final = (60, 110)


def worst_of(findings: Sequence[Finding]) -> Status:
    """Return the worst status among findings."""
    return min((finding.status for finding in findings), key=STATUSES.index, default="ok")


def exit_status(findings: Sequence[Finding]) -> int:
    """Return 4 with a failure, 9 with a warning, else 0: unknown weighs as a note."""
    return {"failure": RefusedError.exit_code, "warning": WARNINGS}.get(worst_of(findings), 0)


def verdict(findings: Sequence[Finding]) -> str:
    """Return the overall verdict in a line."""
    counts = Counter(finding.status for finding in findings)
    worst = [finding for finding in findings if finding.status == worst_of(findings)]
    listed = ", ".join(f"{counts[name]} {name}" if name in ("ok", "unknown") else counted(counts[name], name)
                       for name in STATUSES if counts[name])  # fmt: skip
    said = {
        "failure": "a model will not run here as it is",
        "warning": "a model may run here, but not as well as it could",
    }.get(worst_of(findings), "this board is ready")
    first = f" First: {worst[0].code}." if worst_of(findings) in ("failure", "warning") else ""
    return f"{said[0].upper()}{said[1:]} ({listed}).{first}"


def summary(board: Board) -> dict[str, Any]:
    """Return what the board is, in a few facts."""
    memory = board.number("proc/meminfo")
    model = (board.text("proc/device-tree/model") or "").strip("\0")
    return {
        "model": model or None,
        "soc": board.chip,
        "kernel": board.release or None,
        "driver": board.driver.version,
        "driver_source": board.driver.source,
        "memory": memory,
        "python": board.me.python,
        "user": board.me.user or None,
    }


def as_dict(board: Board, findings: Sequence[Finding], destination: str | None) -> dict[str, Any]:
    """Return the report as `--json` prints it."""
    return {
        "schema": SCHEMA,
        "destination": destination,
        "board": summary(board),
        "status": worst_of(findings),
        "verdict": verdict(findings),
        "counts": {name: sum(finding.status == name for finding in findings) for name in STATUSES},
        "findings": [finding.as_dict() for finding in findings],
    }


def show(board: Board, findings: Sequence[Finding], *, every: bool) -> None:
    """Print the table: groups and findings with the worst first; those that are ok in one line, unless `every`."""
    facts = summary(board)
    title = [facts["model"], facts["soc"], f"kernel {facts['kernel']}", f"driver {facts['driver'] or 'unknown'}"]
    say(one_line(", ".join(str(part) for part in title if part)), bold=True)
    groups = [(name, list(rows)) for name, rows in groupby(findings, key=lambda finding: finding.group)]
    for name, rows in sorted(groups, key=lambda item: STATUSES.index(worst_of(item[1]))):
        shown = [row for row in rows if every or row.status != "ok"]
        fine = "" if every else f"{sum(row.status == 'ok' for row in rows)} of {len(rows)} ok"
        say(f"\n{name}", bold=True, nl=False)
        say(f"  {fine}" if fine else "", dim=True)
        for row in shown:
            _show(row)
    say()
    say(one_line(verdict(findings)), bold=True, fg=_COLOURS[worst_of(findings)])


def _show(finding: Finding) -> None:
    found = finding.verdict
    say(f"{finding.status:{_MARGIN - 2}}  ", nl=False, fg=_COLOURS[finding.status])
    say("\n".join(_lines(f"{one_line(found.said)} [{finding.code}]"))[_MARGIN:])
    if finding.status == "ok":
        return
    for line in _lines(one_line(found.why)):
        say(line, dim=True)
    if found.mend:  # on one line, so that a command can be copied
        say(f"{'-> ':>{_MARGIN + 3}}{one_line(found.mend)}")


def _lines(text: str) -> Iterator[str]:
    width = min(max(shutil.get_terminal_size().columns, _WIDTH[0]), _WIDTH[1])
    margin = " " * _MARGIN
    yield from textwrap.wrap(text, width, initial_indent=margin, subsequent_indent=margin, break_on_hyphens=False)
