"""docs/clocks.md, typed on a fresh Debian under a real systemd, with a board's clocks in a folder.

The unit is as it is but for a drop-in that names the folder.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.runtime.serve.machine import TOOLS, Machine, running_machine
from tests.runtime.serve.test_install import LIBRARY, commands, give
from tests.test_newcomer import lines

from rkconvert.demo import checkpoint
from rkruntime import cli

from .chip import BEST, FOLDERS, Chip, running, wait_until
from .test_clocks import BEFORE

PAGE = (Path(__file__).parents[2] / "docs" / "clocks.md").read_text()
TREE = "srv/board"
HOLD = "rkedge clocks -- "
missing = [tool for tool in TOOLS if shutil.which(tool) is None]
DROP_IN = f"""
[Service]
ExecStart=
ExecStart=/opt/rkedge/bin/rkedge clocks --keep --root /{TREE}
ExecStopPost=
ExecStopPost=-/opt/rkedge/bin/rkedge clocks --restore --root /{TREE}
ReadWritePaths=/{TREE}
"""

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(missing), reason=f"needs {', '.join(missing)}"),
    pytest.mark.skipif(os.geteuid() != 0, reason="systemd-nspawn starts a machine as root"),
]


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Machine, Chip]]:
    """A machine where the page has been typed, but for the last line."""
    bundle = tmp_path_factory.mktemp("bundle") / "my-bundle"
    assert cli.main(["convert", str(checkpoint()), "-q", "-o", str(bundle)]) == 0
    section = PAGE.split("## Who may do it")[1]
    with running_machine(tmp_path_factory.mktemp("machine")) as machine:
        give(machine, bundle)
        for command in [*commands()[:3], *(line.command for line in lines(section))][:-1]:
            done = machine.on_board(f"cd rkedge && {{ {command}\n}}")
            assert done.returncode == 0, (command, done.stderr)
        folder = machine.tree / "etc/systemd/system/rkedge-clocks@.service.d"
        folder.mkdir()
        (folder / "tree.conf").write_text(DROP_IN)
        assert machine.on_board("sudo systemctl daemon-reload").returncode == 0
        with running(machine.tree / TREE) as chip:
            yield machine, chip


def held(chip: Chip) -> bool:
    return {folder: now for folder, (_, now) in chip.state.items()} == BEST


def as_before(chip: Chip) -> bool:
    return chip.state == BEFORE and not (chip.root / "run/rkedge-clocks/state.json").exists()


def test_the_unit(board: tuple[Machine, Chip]) -> None:
    machine, chip = board

    def hold(command: str, account: str = "pi") -> Any:
        return machine.on_board(f"{HOLD}{command}", account)

    def left_alone() -> bool:
        listed = machine.on_board("systemctl list-units --no-legend --all 'rkedge-clocks@*'").stdout
        return as_before(chip) and not listed.strip()

    for account in ("pi", "guest"):
        refused = hold("echo it ran", account)
        assert (refused.returncode, refused.stdout) == (5, ""), refused.stderr
        assert "not in the group rkedge-clocks" in refused.stderr
    assert chip.seen == []

    typed = lines(PAGE.split("## Who may do it")[1])
    last = [line.command for line in typed][-1]
    assert machine.on_board(last).returncode == 0
    files = " ".join(f"/{TREE}/{folder}/*cur_freq" for folder in FOLDERS)
    done = hold(f"sh -c 'cat {files}; id -un; exit 3'")
    assert (done.returncode, done.stdout.split()) == (3, [*map(str, BEST.values()), "pi"]), done.stderr
    wait_until(left_alone)

    # The one who asked is killed; then the keeper; then systemd ends it.
    for ending in (
        "pkill -KILL -f '[r]kedge clocks -- sleep'",
        "sudo systemctl kill --signal=KILL 'rkedge-clocks@*'",
        "sudo systemctl stop 'rkedge-clocks@*'",
    ):
        machine.on_board(f"nohup {HOLD}sleep 20 > /dev/null 2>&1 &")
        wait_until(lambda: held(chip))
        assert machine.on_board("rkedge clocks -- true").returncode == 8  # it is held already
        assert machine.on_board(ending).returncode == 0, ending
        wait_until(left_alone)


def test_the_keeper_has_no_capability_and_no_network(board: tuple[Machine, Chip]) -> None:
    machine, chip = board
    machine.on_board(f"nohup {HOLD}sleep 5 > /dev/null 2>&1 &")
    wait_until(lambda: held(chip))
    pid = "$(systemctl show --property=MainPID --value 'rkedge-clocks@*')"
    said = machine.on_board(f"sudo cat /proc/{pid}/status; sudo nsenter --net --target {pid} ls /sys/class/net").stdout
    for name in ("CapPrm", "CapEff", "CapBnd"):
        assert re.search(rf"^{name}:\s+0+$", said, re.MULTILINE), said
    assert re.search(r"^NoNewPrivs:\s+1$", said, re.MULTILINE)
    wait_until(lambda: as_before(chip))


def test_the_daemon_holds_them_while_it_answers(board: tuple[Machine, Chip]) -> None:
    """Its own unit, hardened as it is, as the page has it installed and set."""
    machine, chip = board
    section = PAGE.split("## While the daemon answers")[1].split("\n## ")[0]
    named = f"sudo sed -i 's|^library: null|library: {LIBRARY}|' /etc/rkedge/daemon.yaml"
    for command in [*commands()[3:], named, *(line.command for line in lines(section))]:
        done = machine.on_board(f"cd rkedge && {{ {command}\n}}")
        assert done.returncode == 0, (command, done.stderr)
    settings = machine.tree / "etc/rkedge/daemon.yaml"
    settings.write_text(settings.read_text().replace("hold_clocks_s: 30 ", "hold_clocks_s: 5 "))
    assert "hold_clocks_s: 5 " in settings.read_text()
    assert machine.on_board("sudo systemctl reload rkedge").returncode == 0
    assert as_before(chip)

    def ask() -> None:
        done = machine.on_board("rkedge chat", text="What is the RK3588?\n")
        assert done.returncode == 0, done.stderr

    ask()
    wait_until(lambda: held(chip))
    wait_until(lambda: as_before(chip))
    ask()
    wait_until(lambda: held(chip))
    assert machine.on_board("sudo kill -KILL $(systemctl show --value --property=MainPID rkedge)").returncode == 0
    wait_until(lambda: as_before(chip))
