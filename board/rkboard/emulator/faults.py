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
        class_: what `rkedge diagnose` calls a log with this fault; empty where no log shows it.
        value: what the number in NAME=VALUE is; empty where there is none.
        default: that number, unless one is given.
        lines: what the library says; %T is a time, %V the value, %M the model's path.
        kernel: what the driver says, in the file that RKEMU_KERNEL_LOG names or else on stderr.
        driver: the driver that is claimed with this fault; empty for the usual one.
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
        """The row as JSON holds it."""
        row = dict(vars(self))
        return {"name": row.pop("name"), "class": row.pop("class_"), **row}


@dataclass(frozen=True)
class Guess:
    """A row of board/emulator/guesses.cc: what boards do is not known, and RKEMU_GUESS=NAME chooses the other way.

    Attributes:
        usual: what the emulator does.
        other: what it does with this name in RKEMU_GUESS.
    """

    name: str
    usual: str
    other: str


def faults(library: Path) -> list[Fault]:
    """All faults that a built library knows, in its order.

    Raises:
        HostError: the library cannot be loaded on this machine, or says something else.
    """
    return _listed(library, "RKEMU_FAULT", _fault)


def guesses(library: Path) -> list[Guess]:
    """All guesses that a built library knows, in its order. Raises HostError as `faults` does."""
    return _listed(library, "RKEMU_GUESS", lambda row: Guess(**row))


def _listed(library: Path, variable: str, make: Callable[[Mapping[str, Any]], _Row]) -> list[_Row]:
    asked = subprocess.run(
        [sys.executable, "-c", _ASK, str(library)],
        env=os.environ | {"RKEMU_FAULT": "", variable: "list"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    try:
        rows, _ = json.JSONDecoder().raw_decode(asked.stderr, asked.stderr.index("["))  # other lines stand around it
        return [make(row) for row in rows]
    except (ValueError, LookupError, TypeError) as error:
        raise HostError(
            f"{library} does not list {variable} (exit {asked.returncode}): {asked.stderr[-300:].strip()}",
            hint="Build the emulator for this machine: rkedge emulator build",
        ) from error


def _fault(row: Mapping[str, Any]) -> Fault:
    return Fault(class_=row["class"], **{key: value for key, value in row.items() if key != "class"})
