"""Board profiles (configs/boards/*.yaml), and how much of a board's memory a model can have."""

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
# Of 4096 MiB the kernel of a ROCK 5B counted 3739, of 16384 MiB that of an Orange Pi 5 Plus 15719; an idle Linux held
# 172 to 362 MiB (github.com/geerlingguy/sbc-reviews issues 3 and 5, github.com/andrewcell/opi5p). The worst of each.
_COUNTED_BY_KERNEL: Final = 3739 / 4096
_IDLE_BYTES: Final = 362 << 20


@dataclass(frozen=True)
class Board:
    """A board as its profile describes it.

    Attributes:
        soc: as in the table of types.
        ram_gib: the sizes of memory it is sold with.
        memory, memory_mhz: kind and clock of the memory; None if not known.
        sources: field -> where that was read.
        unknown: what was not found out.
    """

    name: str
    soc: str
    ram_gib: tuple[int, ...]
    memory: str | None = None
    memory_mhz: int | None = None
    sources: dict[str, str] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()


def usable_bytes(ram_gib: float) -> float:
    """Bytes that are left for one program on an idle board without a desktop."""
    return ram_gib * GIB * _COUNTED_BY_KERNEL - _IDLE_BYTES


@cache
def board_sizes(soc: str) -> tuple[int, ...]:
    """Sizes of memory in GiB that boards with this SoC are sold with, by the profiles."""
    boards = [find_board(name) for name in board_names()]
    return tuple(sorted({gib for board in boards if board.soc == soc for gib in board.ram_gib}))


def board_names() -> list[str]:
    """Names of all profiles."""
    return sorted(path.stem for path in (resource("configs") / "boards").glob("*.yaml"))


def find_board(name: str) -> Board:
    """The profile of that name, or a profile of one's own by its path (NAME.yaml).

    Raises:
        UsageError: there is none of that name.
        InputError: the file is not a profile.
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
        return InputError(f"{path}: {what}.", hint="Take configs/boards/rk3588.yaml as a pattern.")

    board = build(Board, read_mapping(path, fail), fail)
    if not board.ram_gib or min(board.ram_gib) < 1:
        raise fail("ram_gib must list sizes from 1 GiB on")
    return board
