"""Read what this machine is, without root where possible: NPU driver, SoC, memory, CPU cores, device nodes.

Every function takes the root of a file tree, so that tests can imitate a board. What cannot be read is
unknown, never "old" or "none". Paths and texts: sources of the rknpu driver 0.9.6 and 0.9.8, public board logs.
"""

from __future__ import annotations

import os
import re
import resource
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, Final, Protocol, TypeVar

ROOT: Final = Path("/")
P = TypeVar("P", bound="Place")


class Place(Protocol):
    """The methods that a path needs: a pathlib.Path, or an object that stands for a file on another machine."""

    @property
    def name(self) -> str: ...  # noqa: D102

    @property
    def parent(self: P) -> P: ...  # noqa: D102

    def __lt__(self, other: Any, /) -> bool: ...
    def __truediv__(self: P, path: str, /) -> P: ...
    def read_text(self, encoding: str | None = None, errors: str | None = None) -> str: ...  # noqa: D102
    def is_dir(self) -> bool: ...  # noqa: D102
    def exists(self) -> bool: ...  # noqa: D102
    def glob(self: P, pattern: str, /) -> Iterable[P]: ...  # noqa: D102
    def resolve(self: P) -> P: ...  # noqa: D102


# Where the mainline NPU driver shows up, as a module or built in.
_MAINLINE: Final = ("sys/module/rocket", "sys/bus/platform/drivers/rocket")
VERSION: Final = re.compile(r"\d{1,9}\.\d{1,9}\.\d{1,9}")
"""The driver's version in a text."""
# Read in this order: the first needs no root and exists for every driver that sets a module version.
_DRIVER_VERSION: Final = ("sys/module/rknpu/version", "proc/rknpu/version", "sys/kernel/debug/rknpu/version")
# The first exists only in kernels built with RKNPU_PROC_FS, the second is root's. rknpu 0.9.x writes
# "NPU load:  Core0:  0%, Core1:  0%, Core2:  0%,", and "NPU load:  0%" for a single core.
NPU_LOAD: Final = ("proc/rknpu/load", "sys/kernel/debug/rknpu/load")
_LOAD: Final = re.compile(r"(?:(Core\d{1,2}):|NPU load:)\s*(\d{1,3})%", re.ASCII)
_MOST_CORES: Final = 16
# The device tree's `compatible`, of which containers hide one path or both.
_COMPATIBLE: Final = ("proc/device-tree/compatible", "sys/firmware/devicetree/base/compatible")
_CPUS: Final = "sys/devices/system/cpu"

# Device-tree names to RKLLM's platforms. RK3588S, RK3583 and RK3582 are RK3588s with fewer interfaces or cores;
# runtimes since 1.0.2 treat them as one (airockchip/rknn-llm issue 59).
_PLATFORMS: Final = {
    "rk3588": "rk3588",
    "rk3588s": "rk3588",
    "rk3588s2": "rk3588",
    "rk3583": "rk3588",
    "rk3582": "rk3588",
    "rk3576": "rk3576",
    "rk3576s": "rk3576",
    "rk3562": "rk3562",
    "rv1126b": "rv1126b",
}
_MOST_CLOCKS: Final = 32
# Number of CPUs that enabled_cpus_mask can name: CPU0 to CPU7.
_MASKABLE: Final = 8
# A big core has at least this share of the best core's capacity or clock. A little core has about half the capacity,
# but 0.75 of the clock on an RK3588 and 0.96 on an RK3576; the two big clusters of an RK3588 differ by a few percent
# in clock.
_BIG_CAPACITY: Final = 0.75
_BIG_CLOCK: Final = 0.9
# CPU4 to CPU7 in the vendor's examples for both.
_BIG_BY_PLATFORM: Final = {"rk3588": range(4, 8), "rk3576": range(4, 8)}


@dataclass(frozen=True)
class Driver:
    """The NPU driver. `version` is None if it could not be read; `source` says where it was found, or why not."""

    version: str | None
    source: str
    mainline: bool = False


@dataclass(frozen=True)
class Cores:
    """CPU cores for the runtime.

    Attributes:
        cpus: Core numbers, in order.
        big: Whether they are only the big cores.
        source: What big and little cores were told apart by.
    """

    cpus: tuple[int, ...]
    big: bool
    source: str

    @property
    def mask(self) -> int:
        """`enabled_cpus_mask`: bit N for CPU N."""
        return sum(1 << cpu for cpu in self.cpus)


@dataclass(frozen=True)
class Memory:
    """Bytes of main memory. `available` can be had without swapping, within the container's own limit."""

    total: int
    available: int


def _attempt(path: Place) -> str | OSError:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        return error


def _read(path: Place) -> str:
    """Return the file's text, or "" if it cannot be read."""
    found = _attempt(path)
    return found if isinstance(found, str) else ""


def driver(root: Place = ROOT) -> Driver:
    """Return the version of the NPU driver, and where it was found."""
    found = {name: _attempt(root / name) for name in _DRIVER_VERSION}
    for name, text in found.items():
        if isinstance(text, str) and (match := VERSION.search(text)):
            return Driver(match.group(), f"/{name}")
    # Checked before permissions, because debugfs is closed to users whether or not rknpu is there.
    if any((root / name).is_dir() for name in _MAINLINE) and not (root / "sys/module/rknpu").is_dir():
        return Driver(None, "this kernel has mainline's driver rocket", mainline=True)
    closed = [f"/{name}" for name, text in found.items() if isinstance(text, PermissionError)]
    return Driver(None, f"{', '.join(closed)} can be read only by root" if closed else "no file states it")


def compatible(root: Place = ROOT) -> tuple[str, ...]:
    """Return the device tree's names for the board and its chip, most specific first; empty if unreadable."""
    for name in _COMPATIBLE:
        if text := _read(root / name):
            return tuple(part for part in text.split("\0") if part.strip())
    return ()


def soc(root: Place = ROOT) -> str | None:
    """Return the Rockchip SoC (`rk3588s`, `rk3566`), supported or not; None on other machines or if unreadable."""
    for name in reversed(compatible(root)):
        vendor, _, chip = name.partition(",")
        if vendor == "rockchip" and re.fullmatch(r"r[kv]\d{3,4}[a-z0-9]*", chip):
            return chip
    return None


def platform_of(chip: str | None) -> str | None:
    """Return the `target_platform` of a SoC, such as `rk3588` for an `rk3588s`; None if RKLLM does not support it."""
    return _PLATFORMS.get(chip or "")


def memory(root: Place = ROOT) -> Memory | None:
    """Return main memory from /proc/meminfo, or the container's limit (cgroup v2) if that is lower."""
    lines = _read(root / "proc/meminfo")
    found = dict(re.findall(r"^(MemTotal|MemAvailable):\s+([0-9]{1,15}) kB", lines, re.MULTILINE))
    if len(found) < 2:
        return None
    total, available = (int(found[name]) * 1024 for name in ("MemTotal", "MemAvailable"))
    limit, used = (_number(_read(root / "sys/fs/cgroup" / name)) for name in ("memory.max", "memory.current"))
    if limit is not None and used is not None:
        total = min(total, limit)
        available = min(available, max(0, limit - used + _reclaimable(root)))
    return Memory(total, available)


def npu_load(root: Place = ROOT) -> dict[str, float]:
    """Return the share of time that each NPU core was busy, 0 to 1, by core; empty if unreadable."""
    texts = (_read(root / name) for name in NPU_LOAD)
    return {
        (core or "core0").lower(): int(percent) / 100
        for core, percent in _LOAD.findall(next(filter(None, texts), ""))[:_MOST_CORES]
    }


def _reclaimable(root: Place) -> int:
    """Return the bytes that are charged to the container but given back when a program needs them.

    As MemAvailable does for a machine, this counts the page cache, active or not, which may hold a model file that was
    just checked, and the kernel's own caches. Shared memory is in neither.
    https://docs.kernel.org/admin-guide/cgroup-v2.html#memory-interface-files
    """
    stat = dict(re.findall(r"^(\w+) (\d+)$", _read(root / "sys/fs/cgroup/memory.stat"), re.MULTILINE))
    return sum(_number(stat.get(name, "")) or 0 for name in ("active_file", "inactive_file", "slab_reclaimable"))


def kills_for_memory(root: Path = ROOT) -> int | None:
    """Count the processes that the kernel has killed for lack of memory since boot; None if unknown."""
    try:
        with FileIO(f"{root}/proc/vmstat") as file:  # read before every run, so without decoding it
            found = re.search(rb"\noom_kill (\d+)\n", file.read())
    except OSError:
        return None
    return int(found[1]) if found else None


def boot_id(root: Path = ROOT) -> str:
    """What names this start of the system, and no other one; empty if that is unknown."""
    return _read(root / "proc/sys/kernel/random/boot_id").strip()


def most_open_files() -> int | None:
    """Return this process's hard limit of open files, to which a worker raises its soft limit; None if unlimited."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return None if hard == resource.RLIM_INFINITY else hard


def npu_nodes(root: P) -> tuple[P, ...]:
    """Return the NPU's device nodes, which may be missing in /dev: its DRM nodes, by the device's or the driver's name,
    and /dev/rknpu, which older drivers have.
    """
    entries = sorted((root / "sys/class/drm").glob("*"))
    nodes = tuple(
        root / "dev/dri" / entry.name
        for entry in entries
        if re.fullmatch(r"(card|renderD)\d+", entry.name) and _is_npu(entry / "device")
    )
    legacy = root / "dev/rknpu"
    return (*nodes, legacy) if legacy.exists() or (root / "sys/class/misc/rknpu").exists() else nodes


def _is_npu(device: Place) -> bool:
    return device.resolve().name.endswith(".npu") or "DRIVER=RKNPU" in _read(device / "uevent").splitlines()


def cores(at_least: int = 1, root: Place = ROOT, allowed: Collection[int] | None = None) -> Cores:
    """Choose the big CPU cores, plus the next best ones until there are `at_least`.

    Big and little cores are told apart by the kernel's cpu_capacity, the cpufreq policies' highest clock or the
    platform, whichever shows a difference first. Without a difference (RK3562, a PC), all cores are chosen, up to the
    eight that the mask can name; likewise if the machine has, or this process may use, fewer than `at_least`.

    Args:
        allowed: Cores that this process may use; by default, its CPU affinity.
    """
    usable = set(os.sched_getaffinity(0) if allowed is None else allowed)
    online = [cpu for cpu in _online(root) if cpu in usable and cpu < _MASKABLE] or sorted(usable)[:_MASKABLE]
    vendor = _BIG_BY_PLATFORM.get(platform_of(soc(root)) or "", ())
    for ranks, share, source in (
        (_capacities(root), _BIG_CAPACITY, "cpu_capacity"),
        (_clocks(root), _BIG_CLOCK, "cpufreq policies"),
        ({cpu: int(cpu in vendor) for cpu in online}, 1.0, "the platform"),
    ):
        best = max((ranks.get(cpu, 0) for cpu in online), default=0)
        big = [cpu for cpu in online if ranks.get(cpu, 0) >= share * best]
        if best and len(big) < len(online):
            by_rank = sorted(online, key=lambda cpu: (-ranks.get(cpu, 0), cpu))
            chosen = big if len(big) >= at_least else by_rank[:at_least]
            return Cores(tuple(sorted(chosen)), len(chosen) == len(big), source)
    return Cores(tuple(online), False, "all cores alike")


def clocks(root: Path = ROOT) -> dict[str, int]:
    """Return the current clocks in Hz: of NPU, memory and others by their devices' names, and of CPU policies."""
    found = {path.parent.name: _number(_read(path)) for path in (root / "sys/class/devfreq").glob("*/cur_freq")}
    for path in (root / _CPUS / "cpufreq").glob("policy[0-9]*/scaling_cur_freq"):
        kilohertz = _number(_read(path))
        found[path.parent.name] = None if kilohertz is None else 1000 * kilohertz
    return {name: clock for name, clock in sorted(found.items())[:_MOST_CLOCKS] if clock is not None}


def _online(root: Place) -> list[int]:
    found: set[int] = set()
    for first, last in re.findall(r"(\d{1,4})(?:-(\d{1,4}))?", _read(root / _CPUS / "online")):
        found.update(range(int(first), min(int(last or first), _MASKABLE - 1) + 1))
    return sorted(found)


def _capacities(root: Place) -> dict[int, int]:
    return {
        cpu: capacity
        for path in (root / _CPUS).glob("cpu[0-9]*/cpu_capacity")
        if (cpu := _number(path.parent.name[3:])) is not None and (capacity := _number(_read(path))) is not None
    }


def _clocks(root: Place) -> dict[int, int]:
    clocks: dict[int, int] = {}
    for policy in (root / _CPUS / "cpufreq").glob("policy[0-9]*"):
        highest = _number(_read(policy / "cpuinfo_max_freq"))
        if highest is not None:
            cpus = map(_number, _read(policy / "related_cpus").split())
            clocks |= {cpu: highest for cpu in cpus if cpu is not None}
    return clocks


def _number(text: str) -> int | None:
    """Return the whole number in a file's text; None if it is something else."""
    return int(text) if re.fullmatch(r"\s*[0-9]{1,18}\s*", text) else None
