"""What the doctor says of boards, as file trees made from public reports."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest

from rkboard.doctor import report
from rkboard.doctor.checks import GROUPS, code_of, judge
from rkboard.doctor.document import MARK, Document
from rkboard.doctor.document import Board as Judged
from rkboard.doctor.finding import STATUSES, Finding
from rkboard.doctor.probe import FILES, Probe
from rkboard.doctor.repair import fixes_of
from rkruntime.checks.preflight import ModelFacts

from .boards import BOARDS
from .sysroots import GOOD, ME, Board, plant

GEMMA = {
    "platform": "rk3588",
    "toolkit": "1.2.3",
    "dtype": "w8a8",
    "npu_cores": 3,
    "max_context": 4096,
    "size": 3 * 10**9,
}
CODES = {code_of(check) for checks in GROUPS.values() for check in checks}


class Asked(dict[str, Any]):
    """The files of a document, which remember what was asked for."""

    paths: set[str] = set()  # noqa: RUF012 - of all boards

    def get(self, path: str, default: Any = None) -> Any:
        self.paths.add(path)
        return super().get(path, default)


def document_of(root: Path, board: Board) -> dict[str, Any]:
    """The probe's document of a tree, as if the board's own user had asked."""
    probe = Probe(str(root))
    probe.run()
    found = json.loads(json.dumps(probe.found)) | {"seconds": 0.1}
    found["me"] = ME | board.me
    found["disks"] = {"/": {"free": 10**11, "size": 2 * 10**11}}
    if "run/rkedge/rkedge.sock" in found["nodes"]:  # the probe asks it only on the machine itself
        found["files"]["run/rkedge/rkedge.sock"] = {"text": GOOD["run/rkedge/rkedge.sock"].text}
    for path in board.closed:
        found["nodes"][path]["access"] = False
    for name, value in board.document.items():
        found[name] = found[name] | value if isinstance(value, dict) else value
    return found


def judged(root: Path, board: Board) -> list[Finding]:
    plant(root, GOOD | dict(board.files))
    document = Document.parse(MARK + json.dumps(document_of(root, board)).encode())
    model = None if board.model is None else ModelFacts(**{**GEMMA, **board.model})
    document = replace(document, files=Asked(document.files))
    return judge(Judged(document, ME["time"] if "time" not in board.me else None, model))


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Finding]]:
    return {name: judged(tmp_path_factory.mktemp("board"), board) for name, board in BOARDS.items()}


@pytest.mark.parametrize("name", list(BOARDS))
def test_a_board_is_told_what_is_wrong_with_it(verdicts: dict[str, list[Finding]], name: str) -> None:
    found = {finding.code: finding.status for finding in verdicts[name] if finding.status != "ok"}
    assert found == BOARDS[name].expected


@pytest.mark.parametrize("name", list(BOARDS))
def test_a_finding_says_what_to_do_and_how_it_is_known(verdicts: dict[str, list[Finding]], name: str) -> None:
    for finding in verdicts[name]:
        assert finding.verdict.said.strip(), finding
        if finding.status in ("failure", "warning"):
            assert finding.verdict.mend, finding
        assert "{" not in finding.verdict.said + finding.verdict.why
    printed = json.dumps([finding.as_dict() for finding in verdicts[name]])
    assert "None" not in printed


def test_every_check_has_a_board_where_it_fires_and_one_where_it_does_not(verdicts: dict[str, list[Finding]]) -> None:
    seen: dict[str, set[bool]] = {code: set() for code in CODES}
    for findings in verdicts.values():
        for finding in findings:
            seen[finding.code].add(finding.status == "ok")
    assert {code for code, fired in seen.items() if False not in fired} == set(), "never fires"
    assert {code for code, fired in seen.items() if True not in fired} == set(), "is never ok"
    assert len(CODES) >= 30
    assert len(BOARDS) >= 20


def test_every_board_has_a_public_source() -> None:
    assert [name for name, board in BOARDS.items() if not board.source.startswith("https://")] == []


def test_findings_come_with_the_worst_first(verdicts: dict[str, list[Finding]]) -> None:
    for findings in verdicts.values():
        for group in GROUPS:
            ranks = [STATUSES.index(finding.status) for finding in findings if finding.group == group]
            assert ranks == sorted(ranks)


@pytest.mark.parametrize(
    ("name", "status", "says"),
    [
        ("armbian-vendor", 0, "This board is ready"),
        ("ubuntu-rockchip-24.04", 0, "This board is ready"),
        ("radxa-6.1.43", 9, "may run here"),
        ("armbian-edge-rocket", 4, "will not run here"),
        ("iommu-unknown", 0, "This board is ready"),
    ],
)
def test_exit_status_and_verdict(verdicts: dict[str, list[Finding]], name: str, status: int, says: str) -> None:
    assert report.exit_status(verdicts[name]) == status
    assert says in report.verdict(verdicts[name])


@pytest.mark.parametrize(
    ("name", "commands"),
    [
        ("armbian-vendor", []),
        ("no-group", ["sudo usermod -aG video,render radxa"]),
        ("32-bit-system", ["sudo apt-get install -y python3-venv"]),
        ("wrong-rknpu-link", ["sudo rm /dev/rknpu"]),
        ("module-not-loaded", ["sudo modprobe rknpu"]),
        (
            "memory-clock-rises-too-late",
            [
                "echo 25 | sudo tee /sys/class/devfreq/dmc/upthreshold",
                "echo performance | sudo tee /sys/class/devfreq/dmc/governor",
            ],
        ),
        (
            "slow-clocks",
            [
                "echo 2352000 | sudo tee /sys/devices/system/cpu/cpufreq/policy6/scaling_max_freq",
                "echo performance | sudo tee /sys/class/devfreq/fdab0000.npu/governor",
                "echo performance | sudo tee /sys/devices/system/cpu/cpufreq/policy4/scaling_governor",
            ],
        ),
        ("armbian-edge-rocket", []),
        # Writing a clock of the NPU froze that board.
        ("orange-pi-5-pro-mainline", []),
    ],
)
def test_repairs(verdicts: dict[str, list[Finding]], name: str, commands: list[str]) -> None:
    assert [str(fix) for fix in fixes_of(verdicts[name])] == commands


@pytest.mark.parametrize("name", list(BOARDS))
def test_what_a_board_lacks_is_there_on_the_good_one(name: str) -> None:
    """So that leaving it out means something; boards with another kernel take its files out wherever they are."""
    lacking = {path for path, content in BOARDS[name].files.items() if content is None}
    assert not {path for path in lacking if path not in GOOD and not path.startswith(("boot/", "lib/modules/"))}


def test_every_row_on_images_has_an_address_and_a_date() -> None:
    page = (Path(__file__).parents[2] / "docs" / "images.md").read_text()
    rows = [line for line in page.splitlines() if line.startswith("| ") and not line.startswith(("| image", "| build"))]
    assert len(rows) >= 15
    assert [row for row in rows if "](https://" not in row] == []
    assert [row for row in rows if not re.search(r"\| 20\d\d-[01]\d-[0-3]\d \|$", row)] == []


@pytest.mark.usefixtures("verdicts")
def test_what_a_check_asks_for_the_probe_reads() -> None:
    patterns = [*" ".join(FILES).split(), "boot/config-*", "lib/modules/*/modules.*", "proc/config.gz"]
    asked = {path for path in Asked.paths if not any(fnmatchcase(path, pattern) for pattern in patterns)}
    # The kernel's log and the daemon's answer are not files, and a folder is there only if it could not be listed.
    assert asked == {"dev/kmsg", "run/rkedge/rkedge.sock", "dev/dri"}
