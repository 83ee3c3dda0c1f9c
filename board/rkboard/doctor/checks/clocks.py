"""Clocks and governors of CPU, NPU and DDR, idle states, temperature and throttling."""

from __future__ import annotations

from typing import Final

from rkboard.doctor.document import Board
from rkboard.doctor.finding import Check, Verdict, ok, write
from rkboard.doctor.readings import CPUFREQ, DEVFREQ, cooling, mhz, npu, policies, temperatures

_SCRIPT: Final = "scripts/fix_freq_rk3588.sh of https://github.com/airockchip/rknn-llm"
_DDR: Final = "https://github.com/airockchip/rknn-llm/issues/532 (reported; the reporter confirmed it)"
_UPTHRESHOLD: Final = "https://github.com/ThomasKaiser/Knowledge/tree/master/articles (ROCK 5B, measured)"
_FROZEN: Final = (
    "https://github.com/antonioacg/rknpu-rk3588/blob/deaea9e/docs/porting-journal.md"
    "#known-issue-devfreq-userspace-governor-hangs-the-board (one report: an Orange Pi 5 Pro, Linux 6.18.22)"
)
_FAST: Final = ("performance", "userspace")
_FOR_A_COMMAND: Final = "for the time of a command: rkedge clocks -- COMMAND; until the next boot:"
_MOST_UPTHRESHOLD: Final = 25
# In degrees Celsius: the first trip points of the vendor's device tree for the RK3588.
_WARM, _HOT = 75.0, 85.0
_TRIPS: Final = "thermal-zones in rk3588s.dtsi of https://github.com/rockchip-linux/kernel (75 and 85 degrees)"


def cpu_governor(board: Board) -> Verdict | None:
    """Whether the CPU's governors keep its clocks up."""
    found = policies(board)
    slow = [path for path in found if (board.text(f"{path}/scaling_governor") or "performance") not in _FAST]
    if not found:
        return Verdict("unknown", "The kernel shows no clock control of the CPU.") if board.chip else None
    if not slow:
        return ok("The CPU's governors keep its clocks up.")
    names = ", ".join(sorted({board.text(f"{path}/scaling_governor") or "" for path in slow}))
    able = [path for path in slow if "performance" in (board.text(f"{path}/scaling_available_governors") or "").split()]
    return Verdict(
        "note",
        f"The CPU's governor is {names}.",
        "It keeps clocks low between the short bursts of each token; 12 tokens/s became 21 with fixed clocks.",
        f"{_FOR_A_COMMAND} echo performance | sudo tee /{CPUFREQ}/policy*/scaling_governor",
        "https://github.com/airockchip/rknn-llm/issues/29 (reported; the reporter confirmed it)",
        write("performance", *(f"{path}/scaling_governor" for path in able)),
    )


def cpu_limit(board: Board) -> Verdict | None:
    """Whether the CPU's clock is limited below what the chip can do."""
    rows = [
        (path, board.number(f"{path}/scaling_max_freq"), board.number(f"{path}/cpuinfo_max_freq"))
        for path in policies(board)
    ]
    known = [(path, limit, best) for path, limit, best in rows if limit is not None and best is not None]
    if not known:
        return None
    low = [(path, limit, best) for path, limit, best in known if limit < best]
    if not low:
        return ok("The CPU may run as fast as the chip can.")
    listed = ", ".join(
        f"{mhz(limit * 1000)} of {mhz(best * 1000)} ({path.rpartition('/')[2]})" for path, limit, best in low
    )
    return Verdict(
        "warning",
        f"The CPU's clock is limited to {listed}.",
        "Part of each token is computed on the CPU.",
        "/etc/default/cpufrequtils on Armbian and Orange Pi images; heat may limit it too",
        _SCRIPT,
        [fix for path, _, best in low for fix in write(str(best), f"{path}/scaling_max_freq")],
    )


def cpu_idle(board: Board) -> Verdict | None:
    """Whether deep idle states are off, as the vendor's script sets them."""
    states = [board.text(path) for path in board.matching("sys/devices/system/cpu/cpu*/cpuidle/state1/disable")]
    if not states:
        return None
    if all(state != "0" for state in states):
        return ok("Deep idle states of the CPU are off.")
    return Verdict(
        "note",
        f"Deep idle states of {states.count('0')} CPU cores are on.",
        "Waking up adds to the time of each token; the vendor's figures are taken without them.",
        "echo 1 | sudo tee /sys/devices/system/cpu/cpu*/cpuidle/state1/disable (until the next boot)",
        _SCRIPT,
    )


def npu_clock(board: Board) -> Verdict | None:
    """Whether the NPU's clock is the best that it lists."""
    path = npu(board)
    if path is None:
        if not board.npu_nodes:
            return None
        return Verdict(
            "note",
            "The kernel shows no clock control of the NPU.",
            "It runs at the clock of the device tree.",
            "sudo cat /sys/kernel/debug/clk/clk_summary | grep npu",
            "https://github.com/w568w/rknpu-module",
        )
    best = max(board.numbers(f"{path}/available_frequencies"), default=None)
    now, limit = board.number(f"{path}/cur_freq"), board.number(f"{path}/max_freq")
    if best is None or now is None:
        return Verdict("unknown", "The NPU's clock could not be read.")
    if now >= best and (limit is None or limit >= best):
        return ok(f"The NPU's clock is {mhz(now)}.")
    said = f"The NPU's clock is {mhz(now)}, at most {mhz(limit)}; the chip lists {mhz(best)}."
    if not board.npu_clock_is_safe:
        return Verdict(
            "warning",
            said,
            "This build of the driver lacks what changes clock and voltage together: writing a clock froze a board.",
            "Leave the clock alone here. For the full clock, boot the vendor's kernel: docs/images.md",
            _FROZEN,
        )
    able = "performance" in (board.text(f"{path}/available_governors") or "").split()
    return Verdict(
        "warning",
        said,
        "The governor rknpu_ondemand keeps the clock that was set last, whatever the load.",
        f"{_FOR_A_COMMAND} echo performance | sudo tee /{path}/governor",
        f"rknpu_devfreq.c of the vendor's kernel; {_SCRIPT}",
        write("performance", f"{path}/governor") if able else (),
    )


def ddr_scaling(board: Board) -> Verdict | None:
    """Whether the kernel can change the memory's clock."""
    if not board.platform or not board.names(DEVFREQ):
        return None
    if "dmc" in board.names(DEVFREQ):
        return ok("The kernel controls the memory's clock.")
    old = next((line for line in board.document.log if "current ATF version 0x0" in line), None)
    return Verdict(
        "warning" if old else "note",
        "There is no /sys/class/devfreq/dmc" + (": the boot firmware cannot change the clock." if old else "."),
        "The memory keeps the clock that the boot firmware gave it. The speed of answers is the memory's.",
        "Use boot firmware (u-boot with the vendor's BL31) that can, and a device tree with dmc enabled.",
        f"{_DDR}; https://github.com/edk2-porting/edk2-rk3588/issues/205",
    )


def ddr_clock(board: Board) -> Verdict | None:
    """Whether the memory's clock is the best that it lists: the largest factor in the speed of answers."""
    path = f"{DEVFREQ}/dmc"
    best = max(board.numbers(f"{path}/available_frequencies"), default=None)
    now, limit = board.number(f"{path}/cur_freq"), board.number(f"{path}/max_freq")
    if "dmc" not in board.names(DEVFREQ):
        return None
    if best is None or now is None:
        return Verdict("unknown", "The memory's clock could not be read.")
    governor = board.text(f"{path}/governor") or "unknown"
    if now >= best:
        return ok(f"The memory's clock is {mhz(now)} (governor {governor}).")
    capped = limit is not None and limit < best
    able = "performance" in (board.text(f"{path}/available_governors") or "").split()
    return Verdict(
        "warning" if capped or governor in ("powersave", *_FAST) else "note",
        f"The memory's clock is {mhz(now)} of {mhz(best)} (governor {governor}"
        + (f", limited to {mhz(limit)})." if capped else ")."),
        "From 528 to 2112 MHz the same model went from 5.5 to 11.2 tokens/s. An idle board may be slow on purpose: look"
        " again while it answers.",
        f"{_FOR_A_COMMAND} echo performance | sudo tee /{path}/governor",
        f"{_DDR}; https://github.com/oRKLLM/ork-driver (measured)",
        write("performance", f"{path}/governor") if able else (),
    )


def ddr_upthreshold(board: Board) -> Verdict | None:
    """Whether the memory's governor raises the clock early enough."""
    path = f"{DEVFREQ}/dmc"
    value = board.number(f"{path}/upthreshold")
    if value is None or board.text(f"{path}/governor") in _FAST:
        return None
    if value <= _MOST_UPTHRESHOLD:
        return ok(f"The memory's clock rises above a load of {value} %.")
    return Verdict(
        "warning",
        f"The memory's clock rises only above a load of {value} %.",
        "The vendor's default of 40 raises it too late; 25 was enough in measurements.",
        f"echo 25 | sudo tee /{path}/upthreshold (until the next boot)",
        _UPTHRESHOLD,
        write("25", f"{path}/upthreshold"),
    )


def temperature(board: Board) -> Verdict | None:
    """Whether the hottest zone is cool enough."""
    zones = temperatures(board)
    if not zones:
        return None
    hottest = max(zones, key=lambda name: zones[name])
    said = f"The hottest zone is {hottest}: {zones[hottest]:.0f} degrees."
    if zones[hottest] < _WARM:
        return ok(said)
    return Verdict(
        "warning" if zones[hottest] >= _HOT else "note",
        said,
        "From 75 degrees on the kernel may lower clocks, from 85 it does.",
        "Use a larger heat sink or a fan.",
        _TRIPS,
    )


def throttling(board: Board) -> Verdict | None:
    """Whether the kernel lowers clocks for heat."""
    active = cooling(board)
    if not active:
        return None
    if not any(active.values()):
        return ok("No clock is lowered for heat.")
    listed = ", ".join(f"{name} by {state}" for name, state in active.items() if state)
    return Verdict(
        "warning",
        f"The kernel lowers clocks for heat: {listed}.",
        "Figures taken now are those of a hot board.",
        "Use a larger heat sink or a fan.",
        "https://docs.kernel.org/driver-api/thermal/sysfs-api.html",
    )


CHECKS: Final[tuple[Check, ...]] = (
    cpu_governor,
    cpu_limit,
    cpu_idle,
    npu_clock,
    ddr_scaling,
    ddr_clock,
    ddr_upthreshold,
    temperature,
    throttling,
)
