"""Check before a load: does this model fit this library, this driver, this board and its memory?

Nothing here calls the library. A finding of level `error` is known not to work, `warning` likely to fail or to answer
badly, `notice` worth knowing, such as a changed setting. What cannot be read is reported as unknown, never as
outdated. The known bad pairs are a table, data/known_pairs.yaml; docs/preflight.md lists what is checked.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Final, Literal, TypeAlias

from rkruntime import resources
from rkruntime.checks import machine
from rkruntime.checks.conditions import meets
from rkruntime.checks.types import types_by_soc
from rkruntime.errors import UsageError
from rkruntime.files import as_path
from rkruntime.schema import Between, check_fields, check_value
from rkruntime.versions import version
from rkruntime.words import counted

Level: TypeAlias = Literal["error", "warning", "notice"]
# A context in tokens. The upper limit is more than any machine has room for.
Context: TypeAlias = Annotated[int, Between(1, 1 << 20)]
LEVELS: Final[tuple[Level, ...]] = ("error", "warning", "notice")

_OPEN_FILES: Final = 16_384
# Share of a model file that is the embedding table, which the runtime can leave on flash since 1.2.0. It is 0.37 of the
# smallest Gemma 2's file (2B: 256,000 x 2,304 of fp16 in 3.2 GB), and less of the others'.
_TABLE_SHARE: Final = 0.4
_PERMISSION: Final = "https://github.com/rockchip-linux/rknn-toolkit2/issues/244 (reported; the reporter confirmed it)"


@dataclass(frozen=True)
class Finding:
    """One finding. `code` is for programs, `message` and `hint` are for people, `source` says how this is known."""

    level: Level
    code: str
    message: str
    hint: str
    source: str

    def as_dict(self) -> dict[str, str]:
        """Return the fields as JSON types."""
        return asdict(self)


@dataclass(frozen=True)
class ModelFacts:
    """What is known about a model before it is loaded; None or "" means unknown.

    Attributes:
        platform: `target_platform` of the conversion, such as `rk3588`.
        toolkit: Release of rkllm-toolkit that made the model file.
        dtype: Quantized type, such as `w8a8`.
        npu_cores: Number of NPU cores that the model was built for.
        max_context: Context built into the model file, in tokens.
        size: Size of the model file, in bytes.
    """

    platform: str = ""
    toolkit: str = ""
    dtype: str = ""
    npu_cores: int = 1
    max_context: int | None = None
    size: int | None = None

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class Preflight:
    """The result: findings, worst first, and the settings to load with.

    Attributes:
        context: Context in tokens, within the model's limit; None if neither was given.
        cores: CPU cores for the runtime.
    """

    findings: tuple[Finding, ...]
    context: int | None
    cores: machine.Cores

    @property
    def errors(self) -> tuple[Finding, ...]:
        """The findings of level `error`."""
        return tuple(finding for finding in self.findings if finding.level == "error")


def preflight(
    model: ModelFacts,
    *,
    runtime: str | None = None,
    context: int | None = None,
    emulated: bool = False,
    root: Path = machine.ROOT,
    allowed: Collection[int] | None = None,
) -> Preflight:
    """Check everything that can be known before the library is called.

    Args:
        model: `Bundle.known`, for a bundle.
        runtime: Release of the library, such as `1.2.3`; None if unknown.
        context: Tokens asked for; None means the model's own limit.
        emulated: The library is the emulator, so driver and board do not matter.
        root: File tree of the board.
        allowed: CPU cores this process may use; its CPU affinity by default.

    Raises:
        UsageError: An argument has a wrong type, or `runtime` is not a release.
    """
    _check_arguments(model=model, runtime=runtime, context=context, allowed=allowed)
    root = as_path("root", root)
    wanted, clamped = clamp_context(context, model.max_context)
    cores = cores_for(model.npu_cores, emulated=emulated, root=root, allowed=allowed)
    found = [*clamped, *check_memory(model, machine.memory(root))]
    if not emulated:
        found += _board(model, runtime, cores, root)
    found.sort(key=lambda finding: LEVELS.index(finding.level))
    return Preflight(tuple(found), wanted, cores)


def cores_for(
    npu_cores: int, *, emulated: bool, root: Path = machine.ROOT, allowed: Collection[int] | None = None
) -> machine.Cores:
    """Return the CPU cores for a model with `npu_cores` NPU cores; the emulator always gets as many."""
    cores = machine.cores(npu_cores, root, allowed)
    if emulated and len(cores.cpus) < npu_cores:
        return machine.Cores(tuple(range(npu_cores)), False, "the emulator pins nothing")
    return cores


def _check_arguments(**given: object) -> None:
    kinds = {"model": ModelFacts, "runtime": str | None, "context": int | None, "allowed": Collection[int] | None}
    for name, kind in kinds.items():
        check_value(name, kind, given[name])
    try:
        version(str(given["runtime"] or "0"))
    except ValueError as error:
        raise UsageError(f"runtime is not a release such as 1.2.3: {error}.") from None


def clamp_context(asked: int | None, limit: int | None) -> tuple[int | None, list[Finding]]:
    """Return the context to load with: the one asked for, or the limit if that is lower or none was asked for."""
    if asked is None or limit is None or asked <= limit:
        return (limit if asked is None else asked), []
    return limit, [
        Finding(
            "notice",
            "context-clamped",
            f"A context of {asked} tokens was asked for; the model was built for {limit}, which is used.",
            f"Ask for {limit} or less, or convert the model with a larger max_context (at most 16384).",
            "text in librkllmrt: max_context must be less than the model's max_context_limit",
        )
    ]


def check_memory(model: ModelFacts, memory: machine.Memory | None) -> Iterator[Finding]:
    """Whether the model's file fits into free memory."""
    if memory is None or model.size is None or model.size <= memory.available:
        return
    yield Finding(
        "error" if model.size * (1 - _TABLE_SHARE) > memory.total else "warning",
        "memory-short",
        f"The model file has {model.size / 1e9:.2f} GB, but only {memory.available / 1e9:.2f} GB of "
        f"{memory.total / 1e9:.2f} GB memory are free.",
        "Close other programs, or use a smaller model. Swap does not help: weights for the NPU stay in memory.",
        "https://github.com/c0zaut/ez-er-rkllm-toolkit/issues/2 (reported; the maintainer confirmed it)",
    )


def _board(model: ModelFacts, runtime: str | None, cores: machine.Cores, root: Path) -> Iterator[Finding]:
    driver, chip = machine.driver(root), machine.soc(root)
    yield from check_platform(model, chip)
    yield from check_dtype(model)
    yield from check_driver(driver)
    yield from check_nodes(root, driver, chip, lambda node: os.access(node, os.R_OK | os.W_OK))
    yield from check_pairs(model, runtime, driver.version, chip)
    yield from check_open_files(machine.most_open_files())
    yield from check_cpu_cores(model, cores)


def check_cpu_cores(model: ModelFacts, cores: machine.Cores) -> Iterator[Finding]:
    """Whether this process may use as many CPU cores as the model has NPU cores."""
    if len(cores.cpus) < model.npu_cores:
        yield Finding(
            "error",
            "cpu-cores-below-npu-cores",
            f"The model was built for {counted(model.npu_cores, 'NPU core')}, but this process may use only"
            f" {counted(len(cores.cpus), 'CPU core')}.",
            f"Give it {model.npu_cores} or more (taskset, the unit's CPUAffinity, the container's --cpuset-cpus).",
            "text in librkllmrt; user report, public address not known (reported; the reporter confirmed it)",
        )


def check_platform(model: ModelFacts, chip: str | None) -> Iterator[Finding]:
    """Whether RKLLM runs on this chip, and the model was made for it."""
    if chip is None:
        yield Finding(
            "notice",
            "platform-unknown",
            "The chip of this board could not be read from the device tree.",
            "The runtime reads it too. In a container, --security-opt systempaths=unconfined keeps /proc/device-tree.",
            "https://github.com/airockchip/rknn-toolkit2/issues/33 (reported; the reporter confirmed it)",
        )
        return
    platform = machine.platform_of(chip)
    if platform is None:
        yield Finding(
            "error",
            "platform-unsupported",
            f"This board has an {chip.upper()}, which RKLLM does not support.",
            "RKLLM runs on RK3588, RK3576, RK3562 and RV1126B.",
            "https://github.com/airockchip/rknn-llm/issues/416 (reported); text in librkllmrt",
        )
    elif model.platform and model.platform.lower() != platform:
        yield Finding(
            "error",
            "platform-mismatch",
            f"The model was made for {model.platform}, but this board is {platform} ({chip}).",
            f"Convert the model for {platform}.",
            "text in librkllmrt: the model's target_platform does not match the real platform",
        )


def check_dtype(model: ModelFacts) -> Iterator[Finding]:
    """Whether the model's type exists for its platform."""
    offered = types_by_soc()[0].get(model.platform.lower())
    if offered and model.dtype.lower().startswith("w") and model.dtype.lower() not in offered:
        yield Finding(
            "error",
            "dtype-unsupported",
            f"{model.dtype} is not offered for {model.platform}.",
            f"Convert the model again with one of {', '.join(offered)}.",
            "https://github.com/airockchip/rknn-llm/issues/186 (reported; the maintainer confirmed it)",
        )


def check_driver(driver: machine.Driver) -> Iterator[Finding]:
    """Whether it is the vendor's NPU driver, and its version is known."""
    if driver.mainline:
        yield Finding(
            "error",
            "driver-mainline",
            "This kernel has the mainline NPU driver (rocket), which librkllmrt cannot use.",
            "Boot the board's vendor kernel (5.10 or 6.1) with rknpu 0.9.8.",
            "https://github.com/NotPunchnox/rkllama/issues/97 (reported)",
        )
    elif driver.version is None:
        yield Finding(
            "notice",
            "driver-unknown",
            f"The version of the NPU driver is unknown: {driver.source}.",
            "Check as root: sudo cat /sys/kernel/debug/rknpu/version. It should be 0.9.8.",
            "drivers/rknpu, rknpu_debugger.c: the file is root's unless the kernel was built with RKNPU_PROC_FS",
        )


def check_nodes(
    root: machine.P, driver: machine.Driver, chip: str | None, can_open: Callable[[machine.P], bool]
) -> Iterator[Finding]:
    """Whether there is a device node of the NPU that this user can open."""
    nodes = machine.npu_nodes(root)
    # On any other machine, or in a container without /sys, missing nodes mean nothing.
    if not nodes and not driver.mainline and machine.platform_of(chip) and (root / "sys/class/misc").is_dir():
        yield Finding(
            "error",
            "npu-absent",
            "This kernel offers no NPU device: neither a DRM node of the rknpu driver nor /dev/rknpu.",
            "Boot the board's vendor kernel (5.10 or 6.1) with rknpu, whose device tree enables the NPU.",
            "drivers/rknpu, rknpu_drv.c: the driver registers a DRM device, or the misc device rknpu",
        )
    closed = [node for node in nodes if not can_open(node)]
    if nodes and len(closed) == len(nodes):
        names = ", ".join(str(node) for node in closed)
        yield Finding(
            "error",
            "npu-device-closed",
            f"This process cannot open the NPU ({names}): the nodes are missing here, or belong to root or a group.",
            "sudo usermod -aG video,render $USER, then log in again; in a container, pass --device /dev/dri.",
            _PERMISSION,
        )
    elif nodes and all(node in closed or node.name.startswith("renderD") for node in nodes):
        names = ", ".join(str(node) for node in closed)
        yield Finding(
            "warning",
            "npu-render-only",
            f"This process can open the NPU's render node, but not {names or 'a card node'}, which librkllmrt opens.",
            "sudo usermod -aG video $USER, then log in again; in a container, pass the whole of /dev/dri.",
            f"texts in librkllmrt: /dev/rknpu, %s/card%d; {_PERMISSION}",
        )


def check_open_files(limit: int | None) -> Iterator[Finding]:
    """Whether the runtime may open as many files as it needs."""
    if limit is not None and limit < _OPEN_FILES:
        yield Finding(
            "notice",
            "open-files-limit",
            f"This process may open at most {limit:,} files; the runtime opens one for each buffer on the NPU.",
            f"If a load fails with errno 24, raise the hard limit to {_OPEN_FILES:,} or more: nofile in"
            " /etc/security/limits.conf, LimitNOFILE= in a unit, --ulimit nofile= in a container.",
            "https://github.com/airockchip/rknn-llm/issues/17 (reported); the vendor's demos ask for 102400",
        )


def check_pairs(model: ModelFacts, runtime: str | None, driver: str | None, chip: str | None) -> Iterator[Finding]:
    """Yield findings on the combination of releases; an unknown fact meets no rule."""
    given = {
        "runtime": runtime,
        "toolkit": model.toolkit,
        "driver": driver,
        "platform": machine.platform_of(chip),
        "model_bytes": model.size,
    }
    # A toolkit version that is not a version, such as "unknown", counts as unknown.
    facts: Mapping[str, str] = {
        name: str(value) for name, value in given.items() if value and str(value)[0].isalnum() and value != "unknown"
    }
    groups = set()
    for pair in resources.table("known_pairs")["pairs"]:
        group = pair.get("group", pair["code"])
        if group not in groups and meets(facts, pair["when"]):
            groups.add(group)
            texts = (" ".join(pair[name].format_map(facts).split()) for name in ("message", "hint", "source"))
            yield Finding(pair["level"], pair["code"], *texts)
