"""File trees that stand for boards, each made from a public report, and what a doctor should say of them."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

GOVERNORS = "conservative ondemand userspace powersave performance schedutil"
DEVFREQ_GOVERNORS = "rknpu_ondemand dmc_ondemand userspace powersave performance simple_ondemand"
ABI = Path(__file__).parents[1] / "data" / "rkllm-abi"


def functions_of(release: str) -> list[str]:
    """The functions in a release's rkllm.h, as they were measured."""
    return list(json.loads((ABI / f"{release}.json").read_text())["functions"])


@dataclass(frozen=True)
class Link:
    """A symbolic link."""

    target: str


@dataclass(frozen=True)
class Mode:
    """A file with these permissions."""

    mode: int
    text: str = ""


def elf(
    version: str = "1.2.3",
    *,
    machine: int = 183,
    bits: int = 64,
    functions: Sequence[str] | None = None,
    needs: Sequence[str] = ("libgomp.so.1", "libc.so.6"),
    glibc: str = "GLIBC_2.29",
) -> bytes:
    """A shared library with nothing but names in it, as small as its format allows."""
    exported = functions_of("1.2.3") if functions is None else functions
    names = [*needs, *exported, "GLIBC_2.17", glibc]
    strings, at = b"\0", {}
    for name in names:
        at[name] = len(strings)
        strings += name.encode() + b"\0"
    headers = 64 + 2 * 56
    dynamic = b"".join(struct.pack("<QQ", 1, at[name]) for name in needs)
    end = headers + len(dynamic) + 48
    dynamic += struct.pack("<QQQQQQ", 5, end, 10, len(strings), 0, 0)
    text = (
        f"\0RKLLM SDK (version: {version} | target: Linux | build: 0 2025-01-01 00:00:00)\0".encode()
        if version
        else b""
    )
    size = end + len(strings) + len(text)
    ident = b"\x7fELF" + bytes([bits // 32, 1, 1]) + bytes(9)
    head = ident + struct.pack("<HHIQQQIHHHHHH", 3, machine, 1, 0, 64, 0, 0, 64, 56, 2, 0, 0, 0)
    load = struct.pack("<IIQQQQQQ", 1, 5, 0, 0, 0, size, size, 4096)
    table = struct.pack("<IIQQQQQQ", 2, 6, headers, headers, headers, len(dynamic), len(dynamic), 8)
    return head + load + table + dynamic + strings + text


def process(pid: int, name: str, pages: int, *open_: str) -> dict[str, Any]:
    """Files of a process in /proc; a page has 4 KiB."""
    folder = f"proc/{pid}"
    links = {f"{folder}/fd/{number}": Link(target) for number, target in enumerate(open_)}
    return {f"{folder}/comm": f"{name}\n", f"{folder}/statm": f"{pages} {pages} 1 1 0 1 0\n", **links}


def drm(node: str, device: str, driver: str) -> dict[str, Any]:
    """A DRM node and its device."""
    return {
        f"sys/class/drm/{node}/device": Link(f"/sys/devices/platform/{device}"),
        f"sys/devices/platform/{device}/uevent": f"DRIVER={driver}\nOF_NAME={device.rpartition('.')[2]}\n",
        f"dev/dri/{node}": Mode(0o660),
    }


def clocks(folder: str, governor: str, now: int, best: int, listed: str, governors: str) -> dict[str, Any]:
    """A devfreq device."""
    values = {"governor": governor, "cur_freq": now, "min_freq": 0, "max_freq": best, "available_frequencies": listed}
    files = {f"sys/class/devfreq/{folder}/{name}": f"{value}\n" for name, value in values.items()}
    return files | {f"sys/class/devfreq/{folder}/available_governors": f"{governors}\n"}


def policy(first: int, best: int, related: str) -> dict[str, Any]:
    """A CPU cluster whose clock is up."""
    folder = f"sys/devices/system/cpu/cpufreq/policy{first}"
    values = {
        "scaling_governor": "performance", "scaling_available_governors": GOVERNORS, "scaling_cur_freq": best,
        "scaling_max_freq": best, "cpuinfo_max_freq": best, "related_cpus": related,
        "scaling_available_frequencies": f"408000 1200000 {best}",
    }  # fmt: skip
    return {f"{folder}/{name}": f"{value}\n" for name, value in values.items()}


NPU = "sys/devices/platform/fdab0000.npu"
DMC = "528000000 1068000000 1560000000 2112000000"
# Nodes, names and clocks are those of the vendor's script and kernel:
# https://github.com/airockchip/rknn-llm/blob/release-v1.2.3/scripts/fix_freq_rk3588.sh
# https://github.com/rockchip-linux/kernel/tree/develop-6.1
GOOD: dict[str, Any] = {
    "proc/device-tree/compatible": "radxa,rock-5b\0rockchip,rk3588\0",
    "proc/device-tree/model": "Radxa ROCK 5B\0",
    "proc/device-tree/npu@fdab0000/status": "okay\0",
    "proc/device-tree/iommu@fdab9000/status": "okay\0",
    "proc/sys/kernel/osrelease": "6.1.115-vendor-rk35xx\n",
    "proc/meminfo": "MemTotal:       16000000 kB\nMemFree: 1 kB\nMemAvailable:   12000000 kB\n",
    "proc/mounts": "/dev/nvme0n1p2 / ext4 rw 0 0\n",
    "proc/1/cgroup": "0::/init.scope\n",
    "proc/1/comm": "systemd\n",
    "etc/os-release": 'PRETTY_NAME="Armbian 25.2.1 bookworm"\nID=debian\n',
    "etc/debian_version": "12.9\n",
    "boot/config-6.1.115-vendor-rk35xx": "CONFIG_ROCKCHIP_RKNPU=y\nCONFIG_ROCKCHIP_RKNPU_DRM_GEM=y\n",
    "lib/modules/6.1.115-vendor-rk35xx/modules.builtin": "kernel/drivers/rknpu/rknpu.ko\nkernel/fs/ext4.ko\n",
    "sys/module/rknpu/version": "0.9.8\n",
    "sys/module/rknpu/parameters/bypass_irq_handler": "0\n",
    "sys/module/rknpu/parameters/bypass_soft_reset": "0\n",
    "sys/kernel/debug/rknpu/version": "RKNPU driver: v0.9.8\n",
    "sys/kernel/debug/rknpu/reset": "on\n",
    "sys/bus/platform/drivers/RKNPU/bind": "",
    "sys/bus/platform/devices/fdab0000.npu": Link(f"/{NPU}"),
    f"{NPU}/driver": Link("/sys/bus/platform/drivers/RKNPU"),
    f"{NPU}/iommu_group": Link("/sys/kernel/iommu_groups/0"),
    "sys/kernel/iommu_groups/0/name": "",
    **drm("card0", "display-subsystem", "rockchip-drm"),
    **drm("card1", "fdab0000.npu", "RKNPU"),
    **drm("renderD129", "fdab0000.npu", "RKNPU"),
    "dev/dma_heap/system": Mode(0o660),
    "sys/class/misc/autofs/dev": "10:235\n",
    **clocks("fdab0000.npu", "performance", 1000000000, 1000000000, "300000000 1000000000", DEVFREQ_GOVERNORS),
    **clocks("dmc", "dmc_ondemand", 2112000000, 2112000000, DMC, DEVFREQ_GOVERNORS),
    "sys/class/devfreq/dmc/upthreshold": "25\n",
    **policy(0, 1800000, "0 1 2 3"),
    **policy(4, 2352000, "4 5"),
    **policy(6, 2352000, "6 7"),
    "sys/devices/system/cpu/online": "0-7\n",
    "sys/devices/system/cpu/possible": "0-7\n",
    **{f"sys/devices/system/cpu/cpu{cpu}/cpuidle/state1/disable": "1\n" for cpu in range(8)},
    "sys/class/thermal/thermal_zone0/type": "soc-thermal\n",
    "sys/class/thermal/thermal_zone0/temp": "44384\n",
    "sys/class/thermal/cooling_device0/type": "thermal-cpufreq-0\n",
    "sys/class/thermal/cooling_device0/cur_state": "0\n",
    "sys/class/thermal/cooling_device0/max_state": "8\n",
    "sys/block/nvme0n1/queue/read_ahead_kb": "4096\n",
    "sys/fs/cgroup/memory.max": "max\n",
    "sys/fs/cgroup/system.slice/rkedge.service/cgroup.procs": "812\n",
    "run/systemd/system/x": "",
    "run/systemd/timesync/synchronized": "",
    "run/rkedge/rkedge.sock": Mode(0o660, '{"state": "ready", "error": null}'),
    "etc/systemd/system/rkedge.service": "[Service]\n",
    "etc/udev/rules.d/60-rkedge.rules": "# rules\n",
    "usr/lib/librkllmrt.so": elf(),
    "usr/lib/aarch64-linux-gnu/libgomp.so.1": "",
    "usr/lib/aarch64-linux-gnu/libc.so.6": "",
    "var/log/dmesg": "[    4.1] RKNPU fdab0000.npu: RKNPU: rknpu iommu is enabled, using iommu mode\n"
    "[    4.2] [drm] Initialized rknpu 0.9.8 20240828 for fdab0000.npu on minor 1\n",
    **process(812, "rkedge", 25000, "/dev/null"),
}
ME: dict[str, Any] = {
    "uid": 1000, "user": "radxa", "groups": [44, 105, 1000], "known_groups": {"video": 44, "render": 105},
    "open_files": [1024, 1048576], "cpus": list(range(8)), "python": "3.11.2", "bits": 64, "machine": "aarch64",
    "libc": "glibc 2.36", "venv": True, "sudo": True, "time": 1.79e9, "library_path": "",
}  # fmt: skip

NO_NODES = dict.fromkeys([path for path in GOOD if "card1" in path or "renderD129" in path])
NO_DRIVER: dict[str, Any] = {
    **dict.fromkeys([path for path in GOOD if "rknpu" in path.lower() and not path.startswith(("boot", "lib"))]),
    **NO_NODES,
    f"{NPU}/driver": None,
    f"{NPU}/iommu_group": None,
    "var/log/dmesg": None,
    "boot/config-6.1.115-vendor-rk35xx": None,
    "lib/modules/6.1.115-vendor-rk35xx/modules.builtin": None,
    "sys/bus/platform/drivers/rockchip-pinctrl/bind": "",
    "dev/dma_heap/system": None,
}  # fmt: skip
NO_DEVFREQ = dict.fromkeys([path for path in GOOD if path.startswith("sys/class/devfreq/")])


def driver(version: str) -> dict[str, Any]:
    """Another version of the driver, in every place."""
    return {
        "sys/module/rknpu/version": f"{version}\n",
        "sys/kernel/debug/rknpu/version": f"RKNPU driver: v{version}\n",
        "var/log/dmesg": f"[    4.2] [drm] Initialized rknpu {version} 20240322 for fdab0000.npu on minor 1\n",
    }


def kernel(release: str, options: str = "CONFIG_ROCKCHIP_RKNPU=y\n", modules: str = "") -> dict[str, Any]:
    """Another kernel."""
    return {
        "proc/sys/kernel/osrelease": f"{release}\n",
        f"boot/config-{release}": options or None,
        f"lib/modules/{release}/modules.dep": modules or None,
    }


@dataclass(frozen=True)
class Board:
    """A board by its differences from a good one: files (None removes), facts about the user, nodes that are closed.

    Attributes:
        source: Address of the report that it is made from.
        expected: Every finding that is not ok.
    """

    source: str
    files: Mapping[str, Any] = field(default_factory=dict)
    me: Mapping[str, Any] = field(default_factory=dict)
    closed: Sequence[str] = ()
    expected: Mapping[str, str] = field(default_factory=dict)
    document: Mapping[str, Any] = field(default_factory=dict)
    model: Mapping[str, Any] | None = None


def plant(root: Path, files: Mapping[str, Any]) -> Path:
    """Write a tree."""
    for name, content in files.items():
        path = root / name
        if content is None:
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, Link):
            path.symlink_to(content.target)
        elif isinstance(content, bytes):
            path.write_bytes(content)
        else:
            given = content if isinstance(content, Mode) else Mode(0o644, content)
            path.write_text(given.text)
            path.chmod(given.mode)
    return root
