"""What the emulator does on demand, listed by the library itself: failures (RKEMU_FAULT), guesses (RKEMU_GUESS)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from rkruntime.errors import HostError

_Row = TypeVar("_Row")

# With the variable set to `list` the first call of any client prints the table and fails; no parameter is read.
_ASK: Final = """
import ctypes, sys
handle, param, callbacks = ctypes.c_void_p(), ctypes.create_string_buffer(1024), ctypes.create_string_buffer(1024)
ctypes.CDLL(sys.argv[1]).rkllm_init(ctypes.byref(handle), param, callbacks)
"""


@dataclass(frozen=True)
class Fault:
    """A row of board/emulator/faults_table.cc.

    Attributes:
        class_: What `rkedge diagnose` calls a log with this fault; empty if no log shows it.
        value: What the number in NAME=VALUE means; empty if there is none.
        default: That number, unless one is given.
        lines: What the library prints; %T is a time, %V the value, %M the model's path.
        kernel: What the driver prints, to the file that RKEMU_KERNEL_LOG names or else to stderr.
        driver: The driver that is reported with this fault; empty for the usual one.
    """

    name: str
    class_: str
    value: str
    default: int
    summary: str
    lines: str
    kernel: str
    driver: str

    def as_dict(self) -> dict[str, Any]:
        """The row as in JSON."""
        row = dict(vars(self))
        return {"name": row.pop("name"), "class": row.pop("class_"), **row}


@dataclass(frozen=True)
class Guess:
    """A row of board/emulator/guesses.cc: what boards do is unknown, and RKEMU_GUESS=NAME selects the alternative.

    Attributes:
        usual: What the emulator does by default.
        other: What it does with this name in RKEMU_GUESS.
    """

    name: str
    usual: str
    other: str


def faults(library: Path) -> list[Fault]:
    """All faults that a built library supports, in its order.

    Raises:
        HostError: The library cannot be loaded on this machine, or prints something else.
    """
    return _listed(library, "RKEMU_FAULT", _fault)


def guesses(library: Path) -> list[Guess]:
    """All guesses that a built library supports, in its order. Raises HostError as `faults` does."""
    return _listed(library, "RKEMU_GUESS", lambda row: Guess(**row))


def _listed(library: Path, variable: str, make: Callable[[Mapping[str, Any]], _Row]) -> list[_Row]:
    asked = subprocess.run(
        [sys.executable, "-c", _ASK, str(library)],
        env=os.environ | {"RKEMU_FAULT": "", variable: "list"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    try:
        rows, _ = json.JSONDecoder().raw_decode(asked.stderr, asked.stderr.index("["))  # other lines surround it
        return [make(row) for row in rows]
    except (ValueError, LookupError, TypeError) as error:
        raise HostError(
            f"{library} does not list {variable} (exit {asked.returncode}): {asked.stderr[-300:].strip()}",
            hint="Build the emulator for this machine: rkedge emulator build",
        ) from error


def _fault(row: Mapping[str, Any]) -> Fault:
    return Fault(class_=row["class"], **{key: value for key, value in row.items() if key != "class"})
