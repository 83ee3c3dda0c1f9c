"""What `rkedge firstrun` writes down beside the answers: what was loaded, and what machine this is."""

from __future__ import annotations

import grp
import os
import platform
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from rkruntime.checks import machine
from rkruntime.model import Model

SCHEMA: Final = "rkedge-first-run/1"
_KEPT_LINES: Final = 40


def report_of(model: Model) -> dict[str, Any]:
    """Return what was loaded, as JSON types."""
    info = asdict(model.engine.info)
    info["log"] = info["log"][-_KEPT_LINES:]
    return info


def machine_report(root: Path = machine.ROOT) -> dict[str, Any]:
    """Return what this machine has, as JSON types: None or empty if unreadable, without the names of host and user."""
    memory = machine.memory(root)
    return {
        "board": list(machine.compatible(root)),
        "soc": machine.soc(root),
        "kernel": platform.release(),
        "system": _system(),
        "machine": platform.machine(),
        "libc": " ".join(platform.libc_ver()),
        "python": platform.python_version(),
        "driver": asdict(machine.driver(root)),
        "memory": memory and asdict(memory),
        "nodes": {str(node): os.access(node, os.R_OK | os.W_OK) for node in machine.npu_nodes(root)},
        "dma_heaps": sorted(heap.name for heap in (root / "dev/dma_heap").glob("*")),
        "groups": _groups(),
        "most_open_files": machine.most_open_files(),
        "cores": asdict(machine.cores(root=root)),
    }


def _system() -> str:
    with suppress(OSError):
        return platform.freedesktop_os_release().get("PRETTY_NAME", "")
    return ""


def _groups() -> list[str]:
    """Return this process's groups that may bear on access to the NPU."""
    known = {"root", "video", "render", "rkedge"}
    found = set()
    for number in os.getgroups():
        with suppress(KeyError):
            found.add(grp.getgrgid(number).gr_name)
    return sorted(found & known)
