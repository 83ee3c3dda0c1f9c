"""Deploying is cut at random moments: the old model answers or the new one does, and a second run completes."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from tests.runtime.serve import sshd

from rkconvert.demo import questions
from rkruntime.errors import ServiceError
from rkruntime.files import sha256_file

from .client import Willing, put
from .conftest import wait_until
from .tree import Tree

ROOT = Path(__file__).parents[2]
QA = {row.question: row.answer for row in questions()}
FIRST = "What is the RK3588?"
# What there is to be sent each time, so that some cuts come in the middle of it.
PADDING = 24 << 20
pytestmark = [pytest.mark.long, pytest.mark.timeout(1200)]


def below(pid: int) -> Iterator[int]:
    """A process and its descendants."""
    yield pid
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        for child in task.read_text().split():
            yield from below(int(child))


def there(host: sshd.Board) -> list[int]:
    """What runs behind sshd, but the daemon, which has a session of its own."""
    found = []
    for connection in host.connections():
        for pid in below(connection):
            with contextlib.suppress(OSError):
                if b"rkboard.deploy.there" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    found.append(pid)
    return found


def new_version(bundle: Path, folder: Path, content: bytes) -> Path:
    made = shutil.copytree(bundle, folder)
    (made / "report/padding").write_bytes(content)
    manifest = yaml.safe_load((made / "rkedge.yaml").read_text())
    manifest["files"]["report/padding"] = {"size": len(content), "sha256": sha256_file(made / "report/padding")}
    (made / "rkedge.yaml").write_text(yaml.safe_dump(manifest))
    return made


def answers(tree: Tree) -> bool:
    """Whether one of the two models answers, in its own words."""
    said = tree.ask(FIRST, 30)
    return said is not None and (said == QA[FIRST] or said.startswith("Arr"))


def test_the_switch_is_cut_at_each_step(
    tree: Tree, destination: str, program: Path, library: Path, bundles: dict[str, Path], tmp_path: Path
) -> None:
    """What switches is killed before and after it asks systemd for something: for another bundle, and for a library."""
    other = tmp_path / "other" / library.name
    other.parent.mkdir()
    other.write_bytes(library.read_bytes() + b"another file")
    wheels = {path.name: path for path in sorted(program.iterdir())}
    put(destination, str(tree.root), wheels, bundles["base"], library, Willing())
    settled = tree.outside()
    named, used = ["pirate", "base"], [other, library]
    for verb in ("enable", "start", "reload", "restart"):
        for when in ("before", "after"):
            (tree.root / f"run/{when}-{verb}").touch()
            bundle = bundles[named[0]]
            chosen = used[0] if verb == "restart" else used[1]
            with pytest.raises(ServiceError):
                put(destination, str(tree.root), wheels, bundle, chosen, Willing())
            wait_until(lambda: answers(tree))
            done = put(destination, str(tree.root), wheels, bundle, chosen, Willing())
            assert [planned.title for planned in done.changed] == ["service"]
            assert (tree.ask(FIRST) == QA[FIRST]) == (named[0] == "base")
            assert put(destination, str(tree.root), wheels, bundle, chosen, Willing()).changed == []
            assert tree.outside() == settled
            named.reverse()
            if verb == "restart":
                used.reverse()


@pytest.mark.parametrize("seed", [int(os.environ.get("RKEDGE_SEED", "14"))])
def test_twenty_cuts(
    seed: int, tree: Tree, host: sshd.Board, destination: str, program: Path, library: Path, bundles: dict[str, Path],
    tmp_path: Path,
) -> None:  # fmt: skip
    chance = random.Random(seed)
    command = [sys.executable, "-m", "tests.deploy.client", destination, str(tree.root), str(program)]

    def start(bundle: Path) -> subprocess.Popen[bytes]:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        return subprocess.Popen([*command, str(bundle), str(library)], env=environment, cwd=ROOT)

    def run(bundle: Path) -> float:
        began = time.monotonic()
        assert start(bundle).wait(240) == 0
        return time.monotonic() - began

    run(bundles["base"])
    assert answers(tree)
    longest = run(new_version(bundles["pirate"], tmp_path / "first", chance.randbytes(PADDING)))
    settled = tree.outside()
    ways: list[Callable[[subprocess.Popen[bytes]], None]] = [
        lambda client: client.kill(),
        lambda client: [os.kill(pid, signal.SIGKILL) for pid in list(below(client.pid))[1:]] and None,
        lambda client: host.drop(),
        lambda client: [os.kill(pid, signal.SIGKILL) for pid in there(host)] and None,
    ]
    cut = switching = 0
    for at in range(60):
        if cut == 20:
            break
        kind = "base" if at % 2 else "pirate"
        bundle = new_version(bundles[kind], tmp_path / f"version-{at}", chance.randbytes(PADDING))
        client = start(bundle)
        time.sleep(chance.uniform(0.1, longest))
        cut += client.poll() is None
        ways[at % len(ways)](client)
        client.wait(60)
        switching += b'"pending": {' in (tree.home / "deploy.json").read_bytes()
        wait_until(lambda: answers(tree))
        assert tree.outside() == settled
        run(bundle)
        said = tree.ask(FIRST)
        assert said is not None
        assert (said == QA[FIRST]) == (kind == "base")
        assert tree.outside() == settled
        shutil.rmtree(bundle)
    print(f"{cut} cuts, {switching} of them while the daemon was changing")
    assert cut == 20
