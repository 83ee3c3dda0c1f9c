"""The verdict of a check, and the repairs that it offers."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias

from rkboard.doctor.document import Board
from rkruntime.checks import preflight

Status: TypeAlias = Literal["failure", "warning", "unknown", "note", "ok"]
STATUSES: Final[tuple[Status, ...]] = ("failure", "warning", "unknown", "note", "ok")
"""From the worst to the best. What could not be read is unknown, and weighs no more than a note."""

# Only characters that have no meaning in a shell, since words of a repair may come from the board.
_WORD: Final = re.compile(r"-{0,2}[A-Za-z0-9_/][A-Za-z0-9_./:=,+-]*")


@dataclass(frozen=True)
class Fix:
    """A command for root that changes one thing and can be undone; `text` is its standard input."""

    words: tuple[str, ...]
    text: str = ""

    def __post_init__(self) -> None:
        if not all(_WORD.fullmatch(word) and ".." not in word for word in (*self.words, self.text or "x")):
            raise ValueError("a word of a repair has other letters than those of names and paths")

    def __str__(self) -> str:
        command = f"sudo {' '.join(self.words)}"
        return f"echo {self.text} | {command}" if self.text else command


@dataclass(frozen=True)
class Verdict:
    """What a check found.

    Attributes:
        said: What was found, in a sentence.
        why: Why it matters.
        mend: What to do about it; a command where one is enough.
        source: How it is known.
        fixes: The commands that `--fix` runs after asking.
    """

    status: Status
    said: str
    why: str = ""
    mend: str = ""
    source: str = ""
    fixes: Sequence[Fix] = ()


@dataclass(frozen=True)
class Finding:
    """A verdict with the group and the name of its check."""

    group: str
    code: str
    verdict: Verdict

    @property
    def status(self) -> Status:
        """The status of the verdict."""
        return self.verdict.status

    def as_dict(self) -> dict[str, Any]:
        """The finding as `--json` prints it."""
        verdict = self.verdict
        return {
            "group": self.group,
            "code": self.code,
            "status": verdict.status,
            "read": verdict.said,
            "why": verdict.why,
            "mend": verdict.mend,
            "source": verdict.source,
            "fixes": [str(fix) for fix in verdict.fixes],
        }


Check: TypeAlias = Callable[[Board], Verdict | None]
"""A check; None where its question does not arise."""


def ok(said: str) -> Verdict:
    """Return the verdict that nothing has to be done."""
    return Verdict("ok", said)


def write(value: str, *paths: str) -> tuple[Fix, ...]:
    """Return repairs that write a value into kernel files, with a newline, as some drivers overwrite the last byte."""
    return tuple(Fix(("tee", f"/{path}"), value) for path in paths)


_LEVELS: Final[dict[str, Status]] = {"error": "failure", "warning": "warning", "notice": "note"}


def worst(found: Sequence[preflight.Finding], otherwise: str, *fixes: Fix) -> Verdict:
    """Return the worst finding of the checks before a load as a verdict, or `otherwise` if there is none."""
    if not found:
        return ok(otherwise)
    one = min(found, key=lambda finding: preflight.LEVELS.index(finding.level))
    status = "unknown" if one.code.endswith("-unknown") else _LEVELS[one.level]
    return Verdict(status, one.message, mend=one.hint, source=one.source, fixes=fixes)
