"""Device nodes, who may open them, and what a container hides."""

from __future__ import annotations

import re
from typing import Final

from rkboard.doctor.document import Board
from rkboard.doctor.finding import Check, Fix, Verdict, ok, worst
from rkruntime.checks import preflight

_GROUPS: Final = ("video", "render")
_GROUP_SOURCE: Final = "https://github.com/rockchip-linux/rknn-toolkit2/issues/244 (reported; it helped there)"
_CONTAINER: Final = "https://github.com/airockchip/rknn-toolkit2/issues/33 (reported; the reporter confirmed it)"


def npu_nodes(board: Board) -> Verdict | None:
    """Whether this user can open a node of the NPU."""
    if board.driver.mainline:
        return None
    nodes = board.document.nodes

    def can_open(place: object) -> bool:
        node = nodes.get(str(place).lstrip("/"))
        return node is not None and node.access

    found = list(preflight.check_nodes(board.root, board.driver, board.chip, can_open))
    if not board.npu_nodes and not found:
        return Verdict("unknown", "No device node of an NPU was found, and this may not be a board.")
    return worst(found, f"{board.me.user or 'This user'} can open /{', /'.join(board.npu_nodes)}.", *_join(board))


def groups(board: Board) -> Verdict | None:
    """Whether this user is in the groups of the NPU's nodes."""
    if not board.npu_nodes:
        return None
    me, missing = board.me, _missing(board)
    if me.uid == 0:
        return ok("root needs no group.")
    if not missing:
        return ok("This user is in the groups video and render, as far as they exist.")
    return Verdict(
        "note",
        f"{me.user or 'This user'} is not in {' and '.join(missing)}.",
        "Images give the NPU's nodes to these groups.",
        f"sudo usermod -aG {','.join(missing)} $USER, then log in again",
        _GROUP_SOURCE,
        _join(board),
    )


def _missing(board: Board) -> list[str]:
    """Return the groups of the NPU that exist there and that this user is not in."""
    known = board.me.known_groups
    return [name for name in _GROUPS if name in known and known[name] not in board.me.groups]


def _join(board: Board) -> tuple[Fix, ...]:
    me, missing = board.me, _missing(board)
    if not missing or me.uid == 0 or not re.fullmatch(r"[a-z_][a-z0-9_-]{0,31}", me.user):
        return ()
    return (Fix(("usermod", "-aG", ",".join(missing), me.user)),)


def rknpu_link(board: Board) -> Verdict | None:
    """Whether /dev/rknpu is a link to a DRM node, to which the library would speak another language."""
    node = board.document.nodes.get("dev/rknpu")
    if node is None:
        return ok("There is no wrong /dev/rknpu.") if board.npu_nodes else None
    target = board.document.links.get("dev/rknpu", "")
    if not node.link:
        return ok("/dev/rknpu is the driver's own node.")
    return Verdict(
        "failure",
        f"/dev/rknpu is a link to /{target}." if target else "/dev/rknpu is a link.",
        "The library tries /dev/rknpu first and then uses the numbers of its ioctls, which a DRM node refuses.",
        "sudo rm /dev/rknpu, and the udev rule or script that makes it",
        "https://github.com/invisiofficial/rk-llama.cpp/issues/19 (reported)",
        [Fix(("rm", "/dev/rknpu"))],
    )


def node_modes(board: Board) -> Verdict | None:
    """Whether the nodes are open to everybody, or to root alone."""
    shown = {path: board.document.nodes[path] for path in board.npu_nodes if path in board.document.nodes}
    shown = {path: node for path, node in shown.items() if node.kind == "device" or board.document.root != "/"}
    if not shown:
        return None
    rule = "sudo cp board/udev/60-rkedge.rules /etc/udev/rules.d/ && sudo udevadm trigger"
    if alone := [path for path, node in shown.items() if not node.mode & 0o066]:
        return Verdict("warning", f"/{alone[0]} is for root alone.", "No daemon without root can use it.", rule, "udev")
    if everybody := [path for path, node in shown.items() if node.mode & 0o006]:
        return Verdict(
            "note",
            f"/{everybody[0]} is open to every user.",
            "Each of them can reset the NPU and fill its memory.",
            rule,
            "drivers/rknpu of the vendor's kernel: all its ioctls are allowed on the node",
        )
    return ok("The NPU's nodes belong to a group.")


def dma_heaps(board: Board) -> Verdict | None:
    """Whether the DMA heaps can be opened."""
    heaps = {path: node for path, node in board.document.nodes.items() if path.startswith("dev/dma_heap/")}
    if not heaps or not board.npu_nodes:
        return None
    if any(node.access for node in heaps.values()):
        return ok("DMA heaps can be opened.")
    return Verdict(
        "note",
        f"The DMA heaps ({len(heaps)}) cannot be opened.",
        "Drivers that were built with CONFIG_ROCKCHIP_RKNPU_DMA_HEAP, and vision models, take their buffers there.",
        "sudo cp board/udev/60-rkedge.rules /etc/udev/rules.d/ && sudo udevadm trigger",
        "https://github.com/armbian/build/pull/10085",
    )


def container_tree(board: Board) -> Verdict | None:
    """Whether a container shows the library the chip."""
    if not board.in_container:
        return None
    if board.chip:
        return ok("The container shows the device tree.")
    return Verdict(
        "failure",
        "This is a container that hides /proc/device-tree.",
        "The library reads the chip there, and says that the platform is unknown.",
        "docker run --security-opt systempaths=unconfined ...",
        _CONTAINER,
    )


def container_nodes(board: Board) -> Verdict | None:
    """Whether a container has the NPU's nodes."""
    if not board.in_container or not board.npu_nodes:
        return None
    missing = [path for path in board.npu_nodes if path not in board.document.nodes]
    if any(board.closed(path.rpartition("/")[0]) for path in missing):
        return Verdict("unknown", "Only root can see which of the NPU's nodes the container has.")
    if not missing:
        return ok("The container has the NPU's device nodes.")
    return Verdict(
        "failure",
        f"The container lacks /{', /'.join(missing)}.",
        "The library asks every card for its driver until it finds the NPU.",
        "docker run --device /dev/dri --device /dev/dma_heap ...",
        "https://github.com/invisiofficial/rk-llama.cpp/issues/19 (reported)",
    )


CHECKS: Final[tuple[Check, ...]] = (
    npu_nodes,
    groups,
    rknpu_link,
    node_modes,
    dma_heaps,
    container_tree,
    container_nodes,
)
