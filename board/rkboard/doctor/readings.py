"""Clocks, temperatures and throttling, as a board's files give them. One place for each of these facts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal

from rkboard.doctor.document import Board

CPUFREQ: Final = "sys/devices/system/cpu/cpufreq"
DEVFREQ: Final = "sys/class/devfreq"
_THERMAL: Final = "sys/class/thermal"
# In Hz: a value outside this range is not a clock of such a chip.
_CLOCKS: Final = range(10**6, 10**11)
_MOST_LISTED: Final = 64

STAYING: Final = ("userspace", "rknpu_ondemand")
"""Governors that keep the clock that was set last, whatever the load."""

Kind = Literal["cpu", "npu", "ddr"]


@dataclass(frozen=True)
class Clock:
    """A clock that the kernel controls. All clocks are in Hz; what could not be read is None or empty.

    Attributes:
        name: `npu`, `ddr`, or for a CPU's cluster its first core, such as `cpu0`.
        folder: The folder of its files, without the first slash.
        unit: The unit of its files, in Hz.
        listed: The clocks that the chip can run at, in ascending order.
        best: The highest clock of the hardware, as the kernel gives it.
        least, most: The limits that are set at the moment.
    """

    name: str
    kind: Kind
    folder: str
    unit: int
    governor: str | None
    governors: tuple[str, ...]
    now: int | None
    listed: tuple[int, ...]
    best: int | None
    least: int | None
    most: int | None

    @property
    def held(self) -> bool:
        """Whether the governor keeps the clock where it is, whatever the load."""
        return self.governor in ("performance", "powersave", *STAYING)


def _folders(board: Board, folder: str, pattern: str) -> Iterator[str]:
    """Yield the folders in `folder` whose whole name matches."""
    for name in board.names(folder):
        if re.fullmatch(pattern, name):
            yield f"{folder}/{name}"


def policies(board: Board) -> list[str]:
    """Return the cpufreq folders of the CPU's clusters."""
    return list(_folders(board, CPUFREQ, r"policy\d{1,3}"))


def npu(board: Board) -> str | None:
    """Return the devfreq folder of the NPU."""
    return next(_folders(board, DEVFREQ, r"[0-9a-f]{6,10}\.npu"), None)


def ddr(board: Board) -> str | None:
    """Return the devfreq folder of the memory."""
    return next(_folders(board, DEVFREQ, "dmc"), None)


def mhz(hertz: int | None) -> str:
    """Return a clock as text for people."""
    return "unknown" if hertz is None else f"{hertz / 1e6:.0f} MHz"


def clocks(board: Board) -> list[Clock]:
    """Return every clock that matters to a model."""
    found = [_cpu(board, folder) for folder in policies(board)]
    named: list[tuple[Kind, str | None]] = [("npu", npu(board)), ("ddr", ddr(board))]
    return found + [_device(board, kind, folder) for kind, folder in named if folder]


def _cpu(board: Board, folder: str) -> Clock:
    def number(name: str) -> int | None:
        value = board.number(f"{folder}/{name}")
        return None if value is None else value * 1000

    listed = _listed(board, f"{folder}/scaling_available_frequencies", 1000)
    return Clock(
        name=folder.rpartition("/")[2].replace("policy", "cpu"),
        kind="cpu",
        folder=folder,
        unit=1000,
        governor=board.text(f"{folder}/scaling_governor"),
        governors=tuple((board.text(f"{folder}/scaling_available_governors") or "").split()),
        now=number("scaling_cur_freq"),
        listed=listed,
        best=number("cpuinfo_max_freq") or max(listed, default=None),
        least=number("scaling_min_freq"),
        most=number("scaling_max_freq"),
    )


def _device(board: Board, kind: Kind, folder: str) -> Clock:
    listed = _listed(board, f"{folder}/available_frequencies", 1)
    return Clock(
        name=kind,
        kind=kind,
        folder=folder,
        unit=1,
        governor=board.text(f"{folder}/governor"),
        governors=tuple((board.text(f"{folder}/available_governors") or "").split()),
        now=board.number(f"{folder}/cur_freq"),
        listed=listed,
        best=max(listed, default=None),
        least=board.number(f"{folder}/min_freq"),
        most=board.number(f"{folder}/max_freq"),
    )


def _listed(board: Board, path: str, unit: int) -> tuple[int, ...]:
    found = {value * unit for value in board.numbers(path)}
    return tuple(sorted(value for value in found if value in _CLOCKS)[:_MOST_LISTED])


def temperatures(board: Board) -> dict[str, float]:
    """Return the temperature of each thermal zone, in degrees Celsius."""
    return {
        board.text(f"{path}/type") or "": number / 1000
        for path in _folders(board, _THERMAL, r"thermal_zone\d{1,3}")
        if (number := board.number(f"{path}/temp")) is not None and -50_000 < number < 200_000
    }


def cooling(board: Board) -> dict[str, int]:
    """Return by how many steps the kernel throttles each device for heat."""
    return {
        board.text(f"{path}/type") or path: board.number(f"{path}/cur_state") or 0
        for path in _folders(board, _THERMAL, r"cooling_device\d{1,3}")
        if re.search("cpufreq|devfreq", board.text(f"{path}/type") or "")
    }
