"""The chip, the kernel, and which driver owns the NPU."""

from __future__ import annotations

import re
from typing import Final

from rkboard.doctor.document import Board
from rkboard.doctor.finding import Check, Fix, Verdict, ok, worst
from rkruntime.abi import DEFAULT_RELEASE
from rkruntime.checks import machine, preflight
from rkruntime.checks.diagnosis import diagnose

_VENDOR_KERNEL: Final = "Boot an image with the vendor's driver: docs/images.md lists them."
_DKMS: Final = "https://github.com/w568w/rknpu-module (tried on an RK3566), https://github.com/gahingwoo/kiln (RK3576)"
_PARTS: Final = {"rk3582": 2, "rk3583": 2}
_MANUAL: Final = "Rockchip_RKLLM_SDK manuals 1.1.0 to 1.3.0; drivers/rknpu of the vendor's kernel"
_OF_NPU: Final = re.compile(r"rknpu|\bnpu\b", re.IGNORECASE)  # and not "input"
# Lines that say why an NPU does not compute although its driver is there.
_TROUBLE: Final = re.compile(
    r"job (?:timeout|abort)|failed to|mismatch domain|non-iommu|swiotlb|soft reset|dma_map_sgtable", re.IGNORECASE
)


def architecture(board: Board) -> Verdict | None:
    """Whether this is a board at all."""
    if not board.computer:
        return ok(f"The processor is {board.me.machine}.") if board.me.machine else None
    return Verdict(
        "failure",
        f"This is not a Rockchip board: its processor is {board.me.machine}.",
        "The vendor's library is for ARM. What was converted for the emulator runs here, and needs no board.",
        "rkedge doctor user@board looks at a board over SSH.",
    )


def soc(board: Board) -> Verdict:
    """Whether RKLLM runs on this chip."""
    model = preflight.ModelFacts()
    return worst(list(preflight.check_platform(model, board.chip)), f"The chip is an {(board.chip or '').upper()}.")


def soc_cores(board: Board) -> Verdict | None:
    """Whether parts of the chip are switched off (RK3582, RK3583)."""
    names = machine.compatible(board.root)
    chip = next((chip for chip in _PARTS if f"rockchip,{chip}" in names), None)
    if board.platform != "rk3588":
        return None
    if chip is None:
        return ok("It is a whole RK3588 with three NPU cores.")
    return Verdict(
        "note",
        f"An {chip.upper()} is an RK3588 with fewer cores: {_PARTS[chip]} NPU cores are certain, three are not.",
        "A model that was built for three NPU cores may be refused.",
        f"rkedge convert --npu-cores {_PARTS[chip]}",
        "drivers/rknpu, rknpu_drv.c of the vendor's kernel: an RK3583 has two cores",
    )


def device_tree(board: Board) -> Verdict:
    """Whether the device tree enables the NPU."""
    files = board.matching("proc/device-tree/npu@*/status") + board.matching(
        "sys/firmware/devicetree/base/npu@*/status"
    )
    states = {(board.text(path) or "").strip("\0") for path in files}
    listed = any(name.startswith("npu@") for name in board.names("proc/device-tree"))
    if "disabled" in states and not states & {"okay", "ok"}:
        return Verdict(
            "failure",
            "The device tree has the NPU, but disabled.",
            "No driver is started for a disabled device.",
            "Enable it with an overlay of the image (armbian-config, /boot/orangepiEnv.txt, rsetup), or boot a device"
            " tree whose npu node says okay.",
            "https://github.com/airockchip/rknn-toolkit2/issues/33 and reports of boards (inferred)",
        )
    if states or listed:
        return ok("The device tree enables the NPU.")
    return Verdict(
        "unknown",
        "The device tree shows no node of the NPU.",
        "Without one, no driver is started. In a container it may be hidden.",
        "ls /proc/device-tree | grep npu, on the board itself",
    )


def kernel(board: Board) -> Verdict:
    """Whether the kernel is of a line that the vendor's driver is made for."""
    if not board.release:
        return Verdict("unknown", "The kernel's release could not be read.")
    if board.vendor_kernel:
        return ok(f"The kernel is {board.release}.")
    return Verdict(
        "note",
        f"The kernel is {board.release}; the vendor's are 5.10 and 6.1.",
        "The vendor's driver is part of those; for others there are only builds by third parties.",
        _VENDOR_KERNEL,
        _MANUAL,
    )


def npu_driver(board: Board) -> Verdict:
    """Whether the vendor's driver owns the NPU: not mainline's rocket, and not none."""
    bound = {path.rpartition("/")[2] for path in _bound(board)}
    bound = bound or {"RKNPU", "rocket"} & set(board.names("sys/bus/platform/drivers"))
    accel = [name for name in board.names("dev/accel") if name.startswith("accel")]
    if board.driver.mainline or (bound == {"rocket"}):
        named = f" (/dev/accel/{accel[0]})" if accel else ""
        return Verdict(
            "failure",
            f"The NPU belongs to mainline's driver rocket{named}.",
            "librkllmrt.so speaks to the vendor's driver rknpu only; rocket has another interface.",
            _VENDOR_KERNEL,
            "https://github.com/NotPunchnox/rkllama/issues/97 (reported)",
        )
    if "RKNPU" in bound or board.driver.version or board.npu_nodes:
        return ok("The NPU belongs to the vendor's driver rknpu.")
    if board.chip is None:
        return Verdict("unknown", "No driver of an NPU was found, and this may not be a board.")
    return Verdict(
        "failure",
        "No driver owns the NPU.",
        "librkllmrt.so says 'failed to open rknpu module' then.",
        _VENDOR_KERNEL,
        "https://github.com/orangepi-xunlong/orangepi-build/issues/306 (reported)",
    )


def _bound(board: Board) -> list[str]:
    links = board.document.links
    return [
        to for path, to in links.items() if path.startswith("sys/bus/platform/devices/") and path.endswith("/driver")
    ]


def driver_module(board: Board) -> Verdict | None:
    """Whether the driver is loaded, if it is a module."""
    built = _modules(board)
    if not any("rknpu" in line for line in built):
        return None
    if board.driver.version or board.npu_nodes or "RKNPU" in board.names("sys/bus/platform/drivers"):
        return ok("The driver is loaded.")
    return Verdict(
        "failure",
        "This kernel has the driver rknpu as a module, which is not loaded.",
        "Without it there is no device node.",
        "sudo modprobe rknpu; sudo dmesg | grep -i rknpu says why if it does not start",
        "lib/modules/RELEASE/modules.dep",
        [Fix(("modprobe", "rknpu"))],
    )


def _modules(board: Board) -> list[str]:
    paths = board.matching("lib/modules/*/modules.dep") + board.matching("lib/modules/*/modules.builtin")
    return [line.partition(":")[0] for path in paths for line in (board.text(path) or "").split("\n")]


def driver_build(board: Board) -> Verdict | None:
    """Whether the driver came with the kernel; builds for mainline kernels lack what the vendor's has."""
    if not board.driver.version and not board.npu_nodes:
        return None
    if not any("dkms/" in line or "extra/" in line for line in _modules(board) if "rknpu" in line):
        return ok("The driver came with the kernel.")
    return Verdict(
        "warning",
        "The driver is a build for another kernel than the vendor's (DKMS).",
        "It has no clock control: the NPU runs at the clock of the device tree. On chips whose NPU has several IOMMUs,"
        " mainline's driver manages only the first.",
        "If loads fail or the NPU is slow, boot an image with the vendor's kernel: docs/images.md",
        _DKMS,
    )


def driver_version(board: Board) -> Verdict | None:
    """Whether the driver is new enough for the library that was found, or for the default release."""
    if board.driver.mainline:
        return None
    found = list(preflight.check_driver(board.driver))
    known = [library.identity.version for library in board.document.libraries if library.identity.version]
    release = known[0] if known else DEFAULT_RELEASE
    found += preflight.check_pairs(preflight.ModelFacts(), release, board.driver.version, None)
    found = [one for one in found if one.code.startswith("driver")]
    return worst(found, f"The NPU driver is {board.driver.version} (from {board.driver.source}).")


def driver_versions_agree(board: Board) -> Verdict | None:
    """Whether all places that state the version agree, and with what the device itself answers."""
    places = {
        f"/{path}": match.group()
        for path in ("sys/module/rknpu/version", "proc/rknpu/version", "sys/kernel/debug/rknpu/version")
        if (match := machine.VERSION.search(board.text(path) or ""))
    }
    places |= {f"/{path}": node.version for path, node in board.document.nodes.items() if node.driver == "rknpu"}
    for line in board.document.log:
        if "Initialized" in line and "rknpu" in line.lower() and (match := machine.VERSION.search(line)):
            places["the kernel's log"] = match.group()
    if not places:
        return None
    listed = ", ".join(f"{place}: {version}" for place, version in places.items())
    if len(set(places.values())) == 1:
        return ok(f"The version of the driver: {listed}.")
    return Verdict(
        "warning",
        f"The places that state the driver's version do not agree: {listed}.",
        "What the device answers counts. A module that was built later may not have been loaded yet.",
        "sudo reboot",
        "drivers/rknpu of the vendor's kernel: they state one constant",
    )


def driver_parameters(board: Board) -> Verdict | None:
    """Whether the driver's switches for debugging are off."""
    names = ("bypass_irq_handler", "bypass_soft_reset")
    read = {name: board.text(f"sys/module/rknpu/parameters/{name}") for name in names}
    if all(value is None for value in read.values()):
        return None
    on = [name for name, value in read.items() if value not in (None, "0", "N")]
    if not on:
        return ok("The driver's debugging switches are off.")
    return Verdict(
        "warning",
        f"The driver's {' and '.join(on)} is on.",
        "Without interrupts or resets, a job that hangs stays until the next boot.",
        "Remove it from /etc/modprobe.d and the kernel's command line, and reboot.",
        "drivers/rknpu, rknpu_drv.c of the vendor's kernel: module parameters",
    )


def driver_reset(board: Board) -> Verdict | None:
    """Whether the driver may reset an NPU that hangs."""
    state = board.text("sys/kernel/debug/rknpu/reset")
    if state is None:
        return None
    if "off" not in state.split():
        return ok("The driver resets an NPU that hangs.")
    return Verdict(
        "warning",
        "Resets of the NPU are switched off.",
        "A job that hangs then stays until the next boot.",
        "echo on | sudo tee /sys/kernel/debug/rknpu/reset",
        "drivers/rknpu, rknpu_debugger.c of the vendor's kernel",
        [Fix(("tee", "/sys/kernel/debug/rknpu/reset"), "on")],
    )


def kernel_options(board: Board) -> Verdict | None:
    """Whether the kernel was built with the vendor's driver."""
    text = next(filter(None, map(board.text, [*board.matching("boot/config-*"), "proc/config.gz"])), None)
    if text is None:
        return None
    options = dict(line.split("=", 1) for line in text.split("\n") if "=" in line)
    if "CONFIG_ROCKCHIP_RKNPU" not in options:
        return Verdict(
            "warning",
            "This kernel was built without the vendor's driver (CONFIG_ROCKCHIP_RKNPU).",
            "Nothing but another kernel, or a build of the driver for this one, brings it.",
            _VENDOR_KERNEL,
            "drivers/rknpu/Kconfig of the vendor's kernel",
        )
    return ok("This kernel was built with the vendor's driver.")


def kernel_log(board: Board) -> Verdict:
    """Whether the kernel's log reports trouble with the NPU, and what it means."""
    closed = board.closed("dev/kmsg") and not board.document.log
    if closed:
        return Verdict("unknown", "The kernel's log can be read only by root.", mend="sudo dmesg | rkedge diagnose -")
    trouble = [line for line in board.document.log if _OF_NPU.search(line) and _TROUBLE.search(line)]
    if not trouble:
        return ok("The kernel's log reports no trouble with the NPU.")
    found = diagnose(trouble)
    why = found.cause if found.explained else ""
    mend = found.next_steps[0] if found.explained and found.next_steps else "sudo dmesg | rkedge diagnose -"
    evidence = found.evidence[0] if found.evidence else ""
    return Verdict("warning", f"The kernel's log: {trouble[-1]}", why, mend, evidence)


CHECKS: Final[tuple[Check, ...]] = (
    architecture,
    soc,
    soc_cores,
    device_tree,
    kernel,
    npu_driver,
    driver_module,
    driver_build,
    driver_version,
    driver_versions_agree,
    driver_parameters,
    driver_reset,
    kernel_options,
    kernel_log,
)
