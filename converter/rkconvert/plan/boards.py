"""Board profiles (configs/boards/*.yaml), and how much of a board's memory a model can use."""

from __future__ import annotations

import difflib
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Final

from rkruntime.errors import InputError, UsageError
from rkruntime.resources import resource
from rkruntime.schema import build
from rkruntime.yamltext import read_mapping

GIB: Final = 1 << 30
DEFAULT_BOARD: Final = "rk3588"
# A ROCK 5B's kernel reports 3739 of 4096 MiB, an Orange Pi 5 Plus's 15719 of 16384; an idle Linux used 172
# to 362 MiB (github.com/geerlingguy/sbc-reviews issues 3 and 5, github.com/andrewcell/opi5p). The worst of each.
_COUNTED_BY_KERNEL: Final = 3739 / 4096
_IDLE_BYTES: Final = 362 << 20


@dataclass(frozen=True)
class Board:
    """A board, as described by its profile.

    Attributes:
        soc: Name of the SoC, as in the table of types.
        ram_gib: Sizes of memory that it is sold with, in GiB.
        memory, memory_mhz: Type and clock (MHz) of the memory; None if unknown.
        sources: Source of each field.
        unknown: What could not be found out.
    """

    name: str
    soc: str
    ram_gib: tuple[int, ...]
    memory: str | None = None
    memory_mhz: int | None = None
    sources: dict[str, str] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()


def usable_bytes(ram_gib: float) -> float:
    """Return the bytes left for one program on an idle board without a desktop."""
    return ram_gib * GIB * _COUNTED_BY_KERNEL - _IDLE_BYTES


@cache
def board_sizes(soc: str) -> tuple[int, ...]:
    """Return sizes of memory in GiB that boards with this SoC are sold with, from the profiles."""
    boards = [find_board(name) for name in board_names()]
    return tuple(sorted({gib for board in boards if board.soc == soc for gib in board.ram_gib}))


def board_names() -> list[str]:
    """Return the names of all profiles."""
    return sorted(path.stem for path in (resource("configs") / "boards").glob("*.yaml"))


def find_board(name: str) -> Board:
    """Load a shipped profile by name, or the user's own by path (NAME.yaml).

    Raises:
        UsageError: There is no profile of that name.
        InputError: The file is not a profile.
    """
    if name.endswith((".yaml", ".yml")):
        return read_board(Path(name))
    names = board_names()
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        guess = f"Did you mean {near[0]}? " if near else ""
        raise UsageError(f"There is no board profile {name!r}.", hint=f"{guess}There are: {', '.join(names)}.")
    return read_board(resource("configs") / "boards" / f"{name}.yaml")


def read_board(path: Path) -> Board:
    """Read a profile; InputError says what is wrong with it."""

    def fail(what: str) -> InputError:
        return InputError(f"{path}: {what}.", hint="Use configs/boards/rk3588.yaml as a template.")

    board = build(Board, read_mapping(path, fail), fail)
    if not board.ram_gib or min(board.ram_gib) < 1:
        raise fail("ram_gib must list sizes of at least 1 GiB")
    return board
