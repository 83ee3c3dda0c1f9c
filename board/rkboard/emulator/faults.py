"""What the emulator does on demand: failures (RKEMU_FAULT) and guesses (RKEMU_GUESS), both from faults.yaml.

The build makes the library's tables of them; `python -m rkboard.emulator.faults docs/emulator.md` writes the page's.
"""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

import yaml

_FAULT_HEAD: Final = "| name | value | class of its log | what happens |\n|---|---|---|---|\n"
_GUESS_HEAD: Final = "| name | what the emulator does | what it does with this name |\n|---|---|---|\n"


@dataclass(frozen=True)
class Fault:
    """A row of `faults`.

    Attributes:
        act: what it does, an Act of board/emulator/faults.h.
        summary: what a client sees of it.
        stage: where it strikes, a Stage of faults.h.
        class_: what `rkedge diagnose` calls a log with this fault; empty where no log shows it.
        value: what the number in NAME=VALUE is; empty where there is none.
        default: that number, unless one is given.
        lines: what the library says; %T is a time, %V the value, %M the model's path.
        kernel: what the driver says, in the file that RKEMU_KERNEL_LOG names or else on stderr.
        driver: the driver that is claimed with this fault; empty for the usual one.
        source: where its text was reported.
    """

    name: str
    act: str
    summary: str
    stage: str = "none"
    class_: str = ""
    value: str = ""
    default: int = 0
    lines: str = ""
    kernel: str = ""
    driver: str = ""
    source: str = ""

    def as_dict(self) -> dict[str, Any]:
        """What `rkedge emulator info --faults --json` says of it."""
        named = ("value", "default", "summary", "lines", "kernel", "driver")
        return {"name": self.name, "class": self.class_, **{name: getattr(self, name) for name in named}}

    def as_cpp(self) -> str:
        """The row of rkemu::Fault."""
        texts = ", ".join(map(json.dumps, (self.lines, self.kernel, self.driver)))
        return f'"{self.name}", Stage::{self.stage}, Act::{self.act}, "{self.value}", {self.default}, {texts}'


@dataclass(frozen=True)
class Guess:
    """A row of `guesses`: what boards do is not known, and RKEMU_GUESS=NAME chooses the other way.

    Attributes:
        usual: what the emulator does.
        other: what it does with this name in RKEMU_GUESS.
        source: who reported what.
        only_told: RKEdge cannot be right with that, too: its probes tell it.
    """

    name: str
    usual: str
    other: str
    source: str = ""
    only_told: bool = False

    def as_dict(self) -> dict[str, str]:
        """What `rkedge emulator info --guesses --json` says of it."""
        return {"name": self.name, "usual": self.usual, "other": self.other}

    def as_cpp(self) -> str:
        """Its name and its member of rkemu::Guesses."""
        return f'"{self.name}", &Guesses::{self.name.replace("-", "_")}'


@cache
def _tables() -> Any:
    return yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))


def faults() -> list[Fault]:
    """All faults, in the order of the page."""
    return [Fault(class_=row.pop("class", ""), **row) for row in map(dict, _tables()["faults"])]


def guesses() -> list[Guess]:
    """All guesses, in the order of the page."""
    return [Guess(**row) for row in _tables()["guesses"]]


def sources() -> dict[str, str]:
    """Name and text of the files with the rows of the library's tables."""
    return {
        "faults.inc": "".join(f"{{{row.as_cpp()}}},\n" for row in faults()),
        "guesses.inc": "".join(f"{{{row.as_cpp()}}},\n" for row in guesses()),
    }


def page(text: str) -> str:
    """A page with the rows of its two tables as faults.yaml has them now."""
    rows = []
    for fault in faults():
        value = f"{fault.value}, {fault.default}" if fault.value else ""
        rows.append(f"| `{fault.name}` | {value} | {fault.class_} | {fault.summary} |\n")
    text = _replaced(text, _FAULT_HEAD, rows)
    return _replaced(text, _GUESS_HEAD, [f"| `{row.name}` | {row.usual} | {row.other} |\n" for row in guesses()])


def _replaced(text: str, head: str, rows: list[str]) -> str:
    start = text.index(head) + len(head)
    rest = re.compile(r"(\|.*\n)*").match(text, start)
    return text[:start] + "".join(rows) + text[rest.end() if rest else start :]


if __name__ == "__main__":
    _PAGE = Path(sys.argv[1])
    _PAGE.write_text(page(_PAGE.read_text(encoding="utf-8")), encoding="utf-8")
