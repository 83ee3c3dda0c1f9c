"""What is read of a machine, and what is said before a load, on trees of files that stand for boards."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rkruntime import resources
from rkruntime.checks import machine
from rkruntime.checks.conditions import meets
from rkruntime.checks.preflight import LEVELS, Finding, ModelFacts, clamp_context, preflight
from rkruntime.versions import version

ROCK_5B = ("radxa,rock-5b", "rockchip,rk3588")
GB = 10**9

Board = Callable[..., Path]


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


@pytest.fixture
def board(tmp_path: Path) -> Board:
    """A tree of files of a board; each keyword replaces a part, None leaves it out."""

    def build(
        *,
        driver: dict[str, str] | None = None,
        compatible: tuple[str, ...] | None = ROCK_5B,
        capacities: list[int] | None = None,
        clocks: dict[tuple[int, ...], int] | None = None,
        cpus: str = "0-7",
        available_kb: int = 12_000_000,
        nodes: bool = True,
    ) -> Path:
        for name, text in ({"sys/module/rknpu/version": "0.9.8\n"} if driver is None else driver).items():
            _write(tmp_path / name, text)
        if compatible:
            _write(tmp_path / "proc/device-tree/compatible", "\0".join(compatible) + "\0")
        for cpu, capacity in enumerate(capacities or []):
            _write(tmp_path / f"sys/devices/system/cpu/cpu{cpu}/cpu_capacity", f"{capacity}\n")
        for related, clock in (clocks or {}).items():
            policy = tmp_path / f"sys/devices/system/cpu/cpufreq/policy{related[0]}"
            _write(policy / "related_cpus", " ".join(map(str, related)) + "\n")
            _write(policy / "cpuinfo_max_freq", f"{clock}\n")
        _write(tmp_path / "sys/devices/system/cpu/online", cpus + "\n")
        _write(tmp_path / "proc/meminfo", f"MemTotal:       16000000 kB\nMemAvailable:   {available_kb} kB\n")
        if nodes:
            _drm(tmp_path, "card0", "display-subsystem")
            _drm(tmp_path, "card1", "fdab0000.npu")
            _drm(tmp_path, "renderD129", "fdab0000.npu")
        return tmp_path

    return build


def _drm(root: Path, node: str, device: str) -> None:
    target = root / "sys/devices/platform" / device
    target.mkdir(parents=True, exist_ok=True)
    entry = root / "sys/class/drm" / node
    entry.mkdir(parents=True)
    (entry / "device").symlink_to(target)
    _write(root / "dev/dri" / node, "")


def _codes(found: Any) -> list[str]:
    return [finding.code for finding in found.findings]


GEMMA = ModelFacts(platform="rk3588", toolkit="1.2.3", dtype="w8a8", npu_cores=3, max_context=4096, size=3 * GB)
RK3588 = [530] * 4 + [1024] * 4


@pytest.mark.parametrize(
    ("files", "version", "source"),
    [
        ({"sys/module/rknpu/version": "0.9.8\n"}, "0.9.8", "/sys/module/rknpu/version"),
        ({"proc/rknpu/version": "RKNPU driver: v0.9.6\n"}, "0.9.6", "/proc/rknpu/version"),
        ({"sys/kernel/debug/rknpu/version": "RKNPU driver: v0.9.2\n"}, "0.9.2", "/sys/kernel/debug/rknpu/version"),
        (
            {"sys/module/rknpu/version": "0.9.8\n", "sys/kernel/debug/rknpu/version": "RKNPU driver: v0.8.2\n"},
            "0.9.8",
            "/sys/module/rknpu/version",
        ),
        (
            {"sys/module/rknpu/version": "\n", "proc/rknpu/version": "RKNPU driver: v0.9.7"},
            "0.9.7",
            "/proc/rknpu/version",
        ),
        ({}, None, "no file states it"),
    ],
)
def test_driver_version(board: Board, files: dict[str, str], version: str | None, source: str) -> None:
    assert machine.driver(board(driver=files)) == machine.Driver(version, source)


def test_an_unreadable_driver_version_is_unknown_not_old(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    root = board(driver={"sys/kernel/debug/rknpu/version": "RKNPU driver: v0.8.2\n"})
    plain = Path.read_text

    def refuse(path: Path, **options: Any) -> str:
        if "debug" in path.parts:
            raise PermissionError(13, "Permission denied")
        return plain(path, **options)

    monkeypatch.setattr(Path, "read_text", refuse)
    read = machine.driver(root)
    assert read.version is None
    assert "/sys/kernel/debug/rknpu/version can be read only by root" in read.source
    codes = _codes(preflight(GEMMA, runtime="1.2.3", root=root, allowed=range(8)))
    assert codes == ["driver-unknown"]


@pytest.mark.parametrize(
    ("names", "chip", "platform"),
    [
        (ROCK_5B, "rk3588", "rk3588"),
        (("xunlong,orangepi-5", "rockchip,rk3588s"), "rk3588s", "rk3588"),
        (("radxa,rock-5c-lite", "rockchip,rk3582", "rockchip,rk3588s"), "rk3588s", "rk3588"),
        (("friendlyarm,nanopi-r76s", "rockchip,rk3576"), "rk3576", "rk3576"),
        (("radxa,zero3", "rockchip,rk3566"), "rk3566", None),
        (("raspberrypi,5-model-b", "brcm,bcm2712"), None, None),
        (None, None, None),
    ],
)
def test_platform(board: Board, names: tuple[str, ...] | None, chip: str | None, platform: str | None) -> None:
    root = board(compatible=names)
    assert machine.soc(root) == chip
    assert machine.platform_of(machine.soc(root)) == platform


def test_the_device_tree_is_looked_for_twice(board: Board) -> None:
    root = board(compatible=None)
    _write(root / "sys/firmware/devicetree/base/compatible", "rockchip,rk3588\0")
    assert machine.soc(root) == "rk3588"


def test_memory_within_a_container(board: Board) -> None:
    root = board(available_kb=12_000_000)
    assert machine.memory(root) == machine.Memory(16_384_000_000, 12_288_000_000)
    _write(root / "sys/fs/cgroup/memory.max", "4000000000\n")
    _write(root / "sys/fs/cgroup/memory.current", "1000000000\n")
    assert machine.memory(root) == machine.Memory(4_000_000_000, 3_000_000_000)
    # A model file that was just copied or checked is no reason to refuse the model.
    _write(root / "sys/fs/cgroup/memory.current", "3900000000\n")
    stat = "anon 200000000\nfile 3700000000\nshmem 100000000\ninactive_file 3300000000\nactive_file 200000000\n"
    _write(root / "sys/fs/cgroup/memory.stat", stat + "slab_reclaimable 50000000\nslab 90000000\nworkingset_x 7\n")
    assert machine.memory(root) == machine.Memory(4_000_000_000, 3_650_000_000)
    _write(root / "sys/fs/cgroup/memory.stat", "anon\ninactive_file -3\nactive_file x\n\0")
    assert machine.memory(root) == machine.Memory(4_000_000_000, 100_000_000)
    _write(root / "sys/fs/cgroup/memory.max", "max\n")
    assert machine.memory(root) == machine.Memory(16_384_000_000, 12_288_000_000)
    assert machine.memory(root / "nothing") is None


def test_kills_for_lack_of_memory(tmp_path: Path) -> None:
    assert machine.kills_for_memory(tmp_path) is None
    _write(tmp_path / "proc/vmstat", "pgfault 3\noom_kill 12\noom_kill_x 5\n")
    assert machine.kills_for_memory(tmp_path) == 12


RK3588_CLOCKS = {(0, 1, 2, 3): 1_800_000, (4, 5): 2_256_000, (6, 7): 2_400_000}


@pytest.mark.parametrize(
    ("parts", "at_least", "allowed", "cpus", "big"),
    [
        ({"capacities": RK3588}, 3, range(8), (4, 5, 6, 7), True),
        ({"capacities": [530] * 4 + [1013, 1013, 1024, 1024]}, 3, range(8), (4, 5, 6, 7), True),
        ({"clocks": RK3588_CLOCKS}, 3, range(8), (4, 5, 6, 7), True),
        ({}, 3, range(8), (4, 5, 6, 7), True),  # by the platform
        ({"capacities": RK3588}, 6, range(8), (0, 1, 4, 5, 6, 7), False),
        ({"capacities": RK3588}, 3, {0, 1, 2, 3, 4}, (0, 1, 4), False),
        ({"capacities": RK3588}, 3, {6}, (6,), False),
        ({"capacities": RK3588, "cpus": "0-3,6-7"}, 2, range(8), (6, 7), True),
        (
            {"compatible": ("x,y", "rockchip,rk3562"), "capacities": [1024] * 4, "cpus": "0-3"},
            1,
            range(4),
            (0, 1, 2, 3),
            False,
        ),
        ({"compatible": None, "cpus": "0-63"}, 3, range(64), tuple(range(8)), False),
        ({"compatible": None, "cpus": ""}, 3, {0, 1}, (0, 1), False),
    ],
)
def test_cores(
    board: Board, parts: dict[str, Any], at_least: int, allowed: Any, cpus: tuple[int, ...], big: bool
) -> None:
    found = machine.cores(at_least, board(**parts), allowed)
    assert (found.cpus, found.big) == (cpus, big)
    assert found.mask == sum(2**cpu for cpu in cpus)


def test_cores_of_this_machine_are_its_own() -> None:
    found = machine.cores(1)
    assert found.cpus
    assert 0 < found.mask < 256


def test_npu_nodes_are_found_by_their_device(board: Board) -> None:
    root = board()
    assert machine.npu_nodes(root) == (root / "dev/dri/card1", root / "dev/dri/renderD129")
    _write(root / "dev/rknpu", "")
    assert machine.npu_nodes(root)[-1] == root / "dev/rknpu"


def test_a_good_board_has_no_findings(board: Board) -> None:
    found = preflight(GEMMA, runtime="1.2.3", root=board(capacities=RK3588), allowed=range(8))
    assert found.findings == ()
    assert found.context == 4096
    assert found.cores.mask == 0xF0


@pytest.mark.parametrize(
    ("model", "runtime", "parts", "codes"),
    [
        ({"toolkit": "1.2.2"}, "1.3.0", {}, ["toolkit-1.2.2-eos", "runtime-1.3.0-sve"]),
        ({"toolkit": "1.2.3"}, "1.3.0", {}, ["runtime-1.3.0-sve"]),
        ({"toolkit": "1.0.2b6"}, "1.2.3", {}, ["model-1.0-on-later-runtime"]),
        ({"toolkit": "1.2.1"}, "1.2.1b1", {}, ["runtime-older-than-toolkit"]),
        ({"toolkit": "1.2.1b1"}, "1.2.1", {}, []),
        ({"toolkit": "1.3.0"}, "1.2.3", {}, ["runtime-older-than-toolkit"]),
        ({"toolkit": "unknown"}, "1.2.3", {}, []),
        ({"toolkit": ""}, None, {}, []),
        ({}, "1.2.3", {"driver": {"sys/module/rknpu/version": "0.8.2"}}, ["driver-0.8"]),
        ({"size": GB}, "1.2.3", {"driver": {"sys/module/rknpu/version": "0.9.6"}}, ["driver-below-0.9.7"]),
        ({"size": 4 * GB}, "1.2.3", {"driver": {"sys/module/rknpu/version": "0.9.6"}}, ["driver-large-block"]),
        ({}, "1.2.3", {"driver": {"sys/module/rknpu/version": "0.9.7"}}, ["driver-0.9.7"]),
        ({}, "1.2.3", {"driver": {}}, ["driver-unknown"]),
        ({"platform": "rk3576"}, "1.2.3", {}, ["platform-mismatch"]),
        ({"dtype": "W4A16_G128"}, "1.2.3", {}, ["dtype-unsupported"]),
        ({"dtype": "fp16"}, "1.2.3", {}, []),
        ({}, "1.2.3", {"compatible": ("radxa,zero3", "rockchip,rk3566")}, ["platform-unsupported"]),
        ({}, "1.2.3", {"compatible": None}, ["platform-unknown"]),
        ({}, "1.2.3", {"available_kb": 2_000_000}, ["memory-short"]),
        ({"npu_cores": 9}, "1.2.3", {}, ["cpu-cores-below-npu-cores"]),
    ],
)
def test_findings(
    board: Board, model: dict[str, Any], runtime: str | None, parts: dict[str, Any], codes: list[str]
) -> None:
    facts = ModelFacts(**{**GEMMA.__dict__, **model})
    found = preflight(facts, runtime=runtime, root=board(**parts), allowed=range(8))
    assert _codes(found) == codes
    assert [finding.code for finding in found.errors] == [item.code for item in found.findings if item.level == "error"]
    assert [item["code"] for item in json.loads(json.dumps([item.as_dict() for item in found.findings]))] == codes
    for finding in found.findings:
        assert finding.message.endswith((".", "!")), finding
        assert "{" not in finding.message + finding.hint
        assert finding.hint
        assert finding.source


def test_a_model_larger_than_the_memory_is_an_error(board: Board) -> None:
    found = preflight(ModelFacts(size=30 * GB), runtime=None, root=board(), allowed=range(8))
    assert [(item.level, item.code) for item in found.findings] == [("error", "memory-short")]


def test_the_mainline_driver_is_named(board: Board) -> None:
    root = board(driver={"sys/module/rocket/version": "1.0.0"}, nodes=False)
    assert _codes(preflight(GEMMA, runtime="1.2.3", root=root, allowed=range(8))) == ["driver-mainline"]


@pytest.mark.parametrize("shown", ["sys/module/rocket/version", "sys/bus/platform/drivers/rocket/uevent"])
def test_the_mainline_driver_is_named_where_debugfs_is_closed(
    board: Board, monkeypatch: pytest.MonkeyPatch, shown: str
) -> None:
    """To users debugfs is closed with every driver."""
    root = board(driver={shown: "1.0.0"}, nodes=False)
    attempt = machine._attempt
    monkeypatch.setattr(machine, "_attempt", lambda path: PermissionError() if "debug" in path.parts else attempt(path))
    assert _codes(preflight(GEMMA, runtime="1.2.3", root=root, allowed=range(8))) == ["driver-mainline"]


def test_nodes_that_are_not_there(board: Board) -> None:
    root = board()
    for name in ("card1", "renderD129"):
        (root / "dev/dri" / name).unlink()
    found = preflight(GEMMA, runtime="1.2.3", root=root, allowed=range(8))
    assert _codes(found) == ["npu-device-closed"]


def test_the_emulator_needs_no_board(tmp_path: Path) -> None:
    found = preflight(GEMMA, runtime="1.3.0", context=9000, emulated=True, root=tmp_path, allowed={0, 1})
    assert _codes(found) == ["context-clamped"]
    assert found.context == 4096
    assert len(found.cores.cpus) >= GEMMA.npu_cores


@pytest.mark.parametrize(
    ("asked", "limit", "context", "notices"),
    [(None, 4096, 4096, 0), (2048, 4096, 2048, 0), (4096, 4096, 4096, 0), (8192, 4096, 4096, 1), (512, None, 512, 0)],
)
def test_context(asked: int | None, limit: int | None, context: int, notices: int) -> None:
    wanted, findings = clamp_context(asked, limit)
    assert (wanted, len(findings)) == (context, notices)
    assert all(str(asked) in finding.message and str(limit) in finding.message for finding in findings)


def test_findings_come_worst_first(board: Board) -> None:
    model = ModelFacts(platform="rk3576", toolkit="1.2.2", npu_cores=1, max_context=512, size=15 * GB)
    found = preflight(model, runtime="1.3.0", context=1024, root=board(), allowed=range(8))
    levels = [LEVELS.index(finding.level) for finding in found.findings]
    assert levels == sorted(levels)
    assert len(levels) == 5


def test_the_table_of_pairs_is_whole() -> None:
    table = resources.table("known_pairs")
    codes = [pair["code"] for pair in table["pairs"]]
    assert len(codes) == len(set(codes))
    for pair in table["pairs"]:
        assert pair["level"] in LEVELS
        assert set(pair["when"]) <= {"runtime", "toolkit", "driver", "platform", "model_bytes"}
        Finding(pair["level"], pair["code"], pair["message"], pair["hint"], pair["source"])


@pytest.mark.parametrize(
    ("facts", "wanted", "expected"),
    [
        ({"driver": "0.9.6"}, {"driver": "<0.9.7"}, True),
        ({"driver": "0.9.10"}, {"driver": "<0.9.7"}, False),
        ({"driver": "0.9.7"}, {"driver": ">=0.9.7 <0.9.8"}, True),
        ({"driver": "0.9"}, {"driver": "<0.9.1"}, True),
        ({}, {"driver": "<0.9.7"}, False),
        ({}, {"driver": "unknown"}, True),
        ({"driver": "0.9.8"}, {"driver": "unknown"}, False),
        ({"a": "1.2.1b1", "b": "1.2.1"}, {"a": "<{b}"}, True),
        ({"a": "1.2.1"}, {"a": "<{b}"}, False),
        ({"size": "3085697024"}, {"size": ">=3000000000"}, True),
        ({"platform": "RK3588"}, {"platform": "rk3588"}, True),
        ({"platform": "rk3588"}, {"platform": "<1.0.0"}, False),
        ({}, {}, True),
    ],
)
def test_conditions(facts: dict[str, str], wanted: dict[str, str], expected: bool) -> None:
    assert meets(facts, wanted) is expected


def test_versions_are_ordered() -> None:
    order = ["0.9.8", "1.0.2b6", "1.0.2", "1.2.0", "1.2.1b1", "1.2.1", "1.2.10", "1.3.0"]
    assert sorted(sorted(order, reverse=True), key=version) == order


@pytest.mark.parametrize("version", ["0.9.8\n", None])
def test_a_board_without_any_node_is_refused(board: Board, version: str | None) -> None:
    root = board(driver={"sys/module/rknpu/version": version} if version else {}, nodes=False)
    _drm(root, "card0", "display-subsystem")
    assert "npu-absent" not in _codes(preflight(GEMMA, runtime="1.2.3", root=root))  # /sys may be hidden
    (root / "sys/class/misc").mkdir()
    found = preflight(GEMMA, runtime="1.2.3", root=root)
    assert [item.level for item in found.findings if item.code == "npu-absent"] == ["error"]
    assert "npu-absent" not in _codes(preflight(GEMMA, runtime="1.2.3", emulated=True, root=root))
    (root / "proc/device-tree/compatible").write_text("dell,xps\0")
    assert "npu-absent" not in _codes(preflight(GEMMA, runtime="1.2.3", root=root))


def test_nodes_by_the_name_of_the_driver_and_of_the_misc_device(board: Board) -> None:
    root = board(nodes=False)
    (root / "sys/class/misc/rknpu").mkdir(parents=True)
    assert (
        _codes(preflight(GEMMA, runtime="1.2.3", root=root))[0] == "npu-device-closed"
    )  # /dev/rknpu is not in the container
    _drm(root, "card1", "npu@fdab0000")
    _write(root / "sys/devices/platform/npu@fdab0000/uevent", "DRIVER=RKNPU\nOF_NAME=npu\n")
    assert machine.npu_nodes(root) == (root / "dev/dri/card1", root / "dev/rknpu")


@pytest.mark.parametrize(
    ("closed", "code"),
    [
        (["card1"], "npu-render-only"),
        (["card1", "renderD129"], "npu-device-closed"),
        (["renderD129"], None),
    ],
)
def test_a_render_node_alone_does_not_do(board: Board, closed: list[str], code: str | None) -> None:
    root = board(capacities=RK3588)
    for name in closed:
        (root / "dev/dri" / name).unlink()
    found = preflight(GEMMA, runtime="1.2.3", root=root, allowed=range(8)).findings
    assert [finding.code for finding in found] == ([code] if code else [])
    assert all("video" in finding.hint for finding in found)
    _write(root / "dev/rknpu", "")
    assert not preflight(GEMMA, runtime="1.2.3", root=root, allowed=range(8)).findings


@pytest.mark.parametrize(("hard", "said"), [(1024, True), (16_383, True), (16_384, False), (-1, False)])
def test_a_hard_limit_of_open_files_is_named(
    board: Board, monkeypatch: pytest.MonkeyPatch, hard: int, said: bool
) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda kind: (min(hard, 1024), hard))
    found = preflight(GEMMA, runtime="1.2.3", root=board(capacities=RK3588), allowed=range(8)).findings
    assert [(finding.level, finding.code) for finding in found] == [("notice", "open-files-limit")] * said


def test_a_model_whose_table_can_stay_on_flash_is_not_refused(board: Board) -> None:
    found = preflight(ModelFacts(size=18 * GB), runtime="1.2.3", root=board(capacities=RK3588), allowed=range(8))
    assert [(item.level, item.code) for item in found.findings] == [("warning", "memory-short")]


@pytest.mark.parametrize("text", ["9" * 5000, "\u00b2", "\u0663", "-1", "1e9", "0x10", "", "x", "1 2 x", "\x1b[2J"])
def test_numbers_that_are_none_are_unknown(board: Board, text: str) -> None:
    root = board(capacities=RK3588, clocks=RK3588_CLOCKS)
    for path in [*root.rglob("cpu_capacity"), *root.rglob("cpuinfo_max_freq"), *root.rglob("related_cpus")]:
        path.write_text(text)
    (root / "sys/devices/system/cpu/cpu4x").mkdir()
    _write(root / "sys/devices/system/cpu/cpu4x/cpu_capacity", "1024\n")
    _write(root / "sys/fs/cgroup/memory.max", text)
    _write(root / "sys/fs/cgroup/memory.current", text)
    assert machine.cores(3, root, range(8)).cpus == (4, 5, 6, 7)  # by the platform
    assert machine.memory(root) == machine.Memory(16_384_000_000, 12_288_000_000)
    _write(root / "proc/meminfo", f"MemTotal: {text} kB\nMemAvailable: {text} kB\n")
    assert machine.memory(root) is None
