"""What the emulator can be told to do: failures (RKEMU_FAULT) and guesses (RKEMU_GUESS), both from faults.yaml.

The build turns them into the library's tables; `python -m rkboard.emulator.faults docs/emulator.md` writes the page's.
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
        act: What it does: an Act of board/emulator/faults.h.
        summary: What a client sees of it.
        stage: Where it strikes: a Stage of faults.h.
        class_: The name that `rkedge diagnose` gives to a log with this fault; empty where no log shows it.
        value: What the number in NAME=VALUE means; empty where there is none.
        default: The number if none is given.
        lines: What the library prints; %T is a time, %V the value, %M the model's path.
        kernel: What the driver prints, into the file that RKEMU_KERNEL_LOG names or else to stderr.
        driver: The driver version that the library states with this fault; empty for the usual one.
        source: Where its text was reported.
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
        """Return what `rkedge emulator info --faults --json` prints about it."""
        named = ("value", "default", "summary", "lines", "kernel", "driver")
        return {"name": self.name, "class": self.class_, **{name: getattr(self, name) for name in named}}

    def as_cpp(self) -> str:
        """Return its row in C++, for rkemu::Fault."""
        texts = ", ".join(map(json.dumps, (self.lines, self.kernel, self.driver)))
        return f'"{self.name}", Stage::{self.stage}, Act::{self.act}, "{self.value}", {self.default}, {texts}'


@dataclass(frozen=True)
class Guess:
    """A row of `guesses`: what boards do is not known, and RKEMU_GUESS=NAME selects the alternative.

    Attributes:
        usual: What the emulator does by default.
        other: What it does with this name in RKEMU_GUESS.
        source: Who reported what.
        only_told: RKEdge cannot work correctly with the alternative, but its probes detect it.
    """

    name: str
    usual: str
    other: str
    source: str = ""
    only_told: bool = False

    def as_dict(self) -> dict[str, str]:
        """Return what `rkedge emulator info --guesses --json` prints about it."""
        return {"name": self.name, "usual": self.usual, "other": self.other}

    def as_cpp(self) -> str:
        """Return its row in C++: its name and its member of rkemu::Guesses."""
        return f'"{self.name}", &Guesses::{self.name.replace("-", "_")}'


@cache
def _tables() -> Any:
    return yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))


def faults() -> list[Fault]:
    """Return all faults, in the order of the page."""
    return [Fault(class_=row.pop("class", ""), **row) for row in map(dict, _tables()["faults"])]


def guesses() -> list[Guess]:
    """Return all guesses, in the order of the page."""
    return [Guess(**row) for row in _tables()["guesses"]]


def sources() -> dict[str, str]:
    """Return name and text of the C++ files with the rows of the library's tables."""
    return {
        "faults.inc": "".join(f"{{{row.as_cpp()}}},\n" for row in faults()),
        "guesses.inc": "".join(f"{{{row.as_cpp()}}},\n" for row in guesses()),
    }


def page(text: str) -> str:
    """Return a page with its two tables updated from faults.yaml."""
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
