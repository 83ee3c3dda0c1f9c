"""Memory, the NPU's address space, and who else uses them."""

from __future__ import annotations

from typing import Final

from rkboard.doctor.document import Board
from rkboard.doctor.finding import Check, Verdict, ok, worst
from rkruntime.checks import machine, preflight
from rkruntime.words import counted

_LEAST: Final = 1 << 30
_MUCH: Final = 1 << 30
_DOMAINS: Final = "https://github.com/airockchip/rknn-llm/issues/262 and 437 (reported): each domain covers 4 GB"
# What num_npu_core may be at most: doc/Rockchip_RKLLM_SDK_EN_1.2.0.pdf p.17 and CN 1.2.1 p.15 in
# https://github.com/airockchip/rknn-llm. Of another chip, the runtime says itself that it does not run there.
_NPU_CORES: Final = {"rk3588": 3, "rk3576": 2, "rk3562": 1, "rv1126b": 1}


def memory_free(board: Board) -> Verdict:
    """Whether memory is free."""
    found = machine.memory(board.root)
    if found is None:
        return Verdict("unknown", "/proc/meminfo could not be read.")
    said = f"{found.available / 1e9:.1f} GB of {found.total / 1e9:.1f} GB memory are free."
    if found.available >= _LEAST:
        return ok(said)
    return Verdict(
        "warning",
        said,
        "Weights for the NPU stay in memory; swap does not help.",
        "Stop what the finding memory-holders names, or use a larger board.",
        "https://github.com/c0zaut/ez-er-rkllm-toolkit/issues/2 (reported; the maintainer confirmed it)",
    )


def memory_above_4gb(board: Board) -> Verdict | None:
    """Whether the NPU reaches all of the memory, with a driver on a kernel that is not the vendor's."""
    found = machine.memory(board.root)
    if found is None or not board.npu_nodes:
        return None
    if found.total <= 4 << 30 or board.vendor_kernel:
        return ok("The NPU reaches all of the memory.")
    return Verdict(
        "warning",
        f"The driver runs on a kernel that is not the vendor's, with {found.total / 1e9:.0f} GB of memory.",
        "Mainline's IOMMU driver can put its tables above 4 GB, where some NPUs cannot read them: jobs then time out.",
        "Use the vendor's kernel; or, to find out, boot once with mem=3840M on the kernel's command line.",
        "https://github.com/armbian/build/pull/9403 (RK3568), https://github.com/w568w/rknpu-module (RK3566)",
    )


def memory_limit(board: Board) -> Verdict | None:
    """Whether a container or a unit limits memory."""
    limit = board.number("sys/fs/cgroup/memory.max")
    total = next(iter(board.numbers("proc/meminfo")), 0) * 1024
    if limit is None or not total or limit >= total:
        return ok("No control group limits memory.") if board.text("sys/fs/cgroup/memory.max") else None
    return Verdict(
        "note",
        f"A control group limits memory to {limit / 1e9:.1f} GB of {total / 1e9:.1f} GB.",
        "A process that needs more is killed. Buffers of the NPU are not reliably counted.",
        "docker run --memory, or MemoryMax= of the unit",
        "https://docs.kernel.org/admin-guide/cgroup-v2.html",
    )


def memory_holders(board: Board) -> Verdict | None:
    """Whether a process holds much memory."""
    if not board.document.processes:
        return None
    large = [one for one in board.document.processes if one.memory >= _MUCH and not one.me]
    if not large:
        return ok("No process holds more than 1 GB.")
    listed = ", ".join(f"{one.name} ({one.pid}): {one.memory / 1e9:.1f} GB" for one in large[:5])
    return Verdict("note", f"Much memory is held by {listed}.", "A model needs its whole file's size, and more.")


def npu_users(board: Board) -> Verdict | None:
    """Whether another process has the NPU open."""
    if not board.npu_nodes:
        return None
    npu = {f"/{path}" for path in board.npu_nodes}
    users = [one for one in board.document.processes if not one.me and npu & set(one.nodes)]
    if users:
        listed = ", ".join(f"{one.name} ({one.pid})" for one in users[:5])
        return Verdict(
            "note",
            f"The NPU is open in {listed}.",
            "Models share its cores, and 4 GB of addresses unless each has a domain of its own.",
            "Stop them, or give each model its own: rkedge serve, base_domain_id in the settings.",
            _DOMAINS,
        )
    if board.document.hidden_processes:
        said = "What processes of other users have open can be read only by root."
        return Verdict("unknown", said, mend="rkedge doctor --sudo")
    return ok("No other process has the NPU open.")


def iommu(board: Board) -> Verdict | None:
    """Whether the NPU uses its IOMMU; without it, it needs contiguous memory."""
    if not board.npu_nodes:
        return None
    links = board.document.links
    groups = [path for path in links if path.endswith(".npu/iommu_group")]
    states = {(board.text(path) or "").strip("\0") for path in board.matching("proc/device-tree/iommu@fdab9000/status")}
    said_off = [line for line in board.document.log if "non-iommu mode" in line]
    if said_off or states == {"disabled"}:
        return Verdict(
            "failure",
            said_off[-1] if said_off else "The device tree disables the NPU's IOMMU.",
            "Weights then have to lie in one piece in reserved memory, which has room for a few MB.",
            "Boot firmware or a device tree that enables the IOMMU of the NPU.",
            "https://github.com/rockchip-linux/rknn-toolkit2/issues/44 (reported; the reporter confirmed it)",
        )
    if groups or any("using iommu" in line for line in board.document.log):
        return ok("The NPU uses its IOMMU.")
    return Verdict("unknown", "Whether the NPU uses its IOMMU could not be read.", mend="sudo dmesg | grep -i iommu")


def open_files(board: Board) -> Verdict:
    """Whether a process may open as many files as the runtime needs buffers."""
    hard = board.me.open_files[1] if len(board.me.open_files) == 2 else None
    limit = "no limit" if hard is None else f"{hard:,}"
    return worst(list(preflight.check_open_files(hard)), f"Open files of a process: {limit}.")


def cpu_cores(board: Board) -> Verdict | None:
    """Whether there are CPU cores for the runtime, and the big ones are on."""
    npu = _NPU_CORES.get(board.platform or "", 1)
    usable = machine.cores(npu, board.root, board.me.cpus)
    online, possible = (board.text(f"sys/devices/system/cpu/{name}") for name in ("online", "possible"))
    if not board.me.cpus:
        return None
    if len(usable.cpus) < npu:
        return Verdict(
            "failure",
            f"Only {counted(len(usable.cpus), 'CPU core')} may be used here.",
            f"The runtime refuses a model with more NPU cores than that, and this chip has {npu}.",
            "taskset, the unit's CPUAffinity, the container's --cpuset-cpus",
            "text in librkllmrt: the number of enabled CPUs must be greater than or equal to that of NPU cores",
        )
    if online and possible and online != possible:
        return Verdict(
            "warning",
            f"CPU cores {online} of {possible} are on.",
            "The runtime's own work is done on the big cores, where there are any.",
            "echo 1 | sudo tee /sys/devices/system/cpu/cpuN/online, for each N that is off",
            "the vendor's demos set enabled_cpus_mask to cores 4 to 7",
        )
    return ok(f"The runtime gets CPU cores {', '.join(map(str, usable.cpus))}.")


CHECKS: Final[tuple[Check, ...]] = (
    memory_free,
    memory_above_4gb,
    memory_limit,
    memory_holders,
    npu_users,
    iommu,
    open_files,
    cpu_cores,
)
