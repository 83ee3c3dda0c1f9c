"""The failures that the emulator shows on demand: RKEMU_FAULT=NAME[=VALUE], listed by the library itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rkruntime.errors import HostError

# With RKEMU_FAULT=list the first call of any client prints the table and fails; no parameter is read.
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


def faults(library: Path) -> list[Fault]:
    """All faults that a built library knows, in its order.

    Raises:
        HostError: the library cannot be loaded on this machine, or says something else.
    """
    asked = subprocess.run(
        [sys.executable, "-c", _ASK, str(library)],
        env=os.environ | {"RKEMU_FAULT": "list"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    try:
        rows, _ = json.JSONDecoder().raw_decode(asked.stderr, asked.stderr.index("["))  # other lines stand around it
        return [_fault(row) for row in rows]
    except (ValueError, LookupError, TypeError) as error:
        raise HostError(
            f"{library} does not list its faults (exit {asked.returncode}): {asked.stderr[-300:].strip()}",
            hint="Build the emulator for this machine: rkedge emulator build",
        ) from error


def _fault(row: Mapping[str, Any]) -> Fault:
    return Fault(class_=row["class"], **{key: value for key, value in row.items() if key != "class"})
