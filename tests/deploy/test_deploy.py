"""Deploying onto a tree behind sshd, with a real daemon there: what is changed, what is not, and what is refused."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.runtime.serve import sshd

from rkboard.deploy import trial
from rkboard.deploy.session import Session
from rkconvert.demo import questions
from rkruntime import cli
from rkruntime.bundle.manifest import open_bundle
from rkruntime.errors import BundleError, LibraryError, RKEdgeError, ServiceError
from rkruntime.files import sha256_file

from .client import Willing, put
from .tree import Tree

QA = {row.question: row.answer for row in questions()}
FIRST = "What is the RK3588?"

Put = Callable[..., Any]


@pytest.fixture
def deploy(destination: str, tree: Tree, program: Path, library: Path) -> Put:
    """Deploys a bundle; returns what was done and what was said."""

    def do(bundle: Path, given: Path | None = library) -> Any:
        person = Willing()
        found = {path.name: path for path in sorted(program.iterdir())}
        done = put(destination, str(tree.root), found, bundle, given, person)
        return done, person.told

    return do


@pytest.fixture
def session(destination: str, tree: Tree) -> Callable[[], Session]:
    return lambda: Session(destination, lambda _: None, str(tree.root))


def test_deploy_again_another_back_and_off(
    tree: Tree, deploy: Put, bundles: dict[str, Path], session: Callable[[], Session]
) -> None:
    before = tree.outside()
    deploy(bundles["base"])
    assert tree.ask(FIRST) == QA[FIRST]
    assert set(tree.in_use() or {}) == {"programs", "bundles", "libraries"}
    calls = tree.calls()
    done, _ = deploy(bundles["base"])
    assert done.changed == []
    assert set(tree.calls().removeprefix(calls).splitlines()) <= {
        "show --value --property=ActiveState rkedge.service",
        "--version",
    }
    done, _ = deploy(bundles["pirate"])
    assert [planned.title for planned in done.changed] == ["bundle", "service"]
    assert (tree.ask(FIRST) or "").startswith("Arr")
    with session() as there:
        there.call("lock")
        there.call("switch", parts=None)
        assert tree.ask(FIRST) == QA[FIRST]
        there.call("switch", parts=None)
        assert (tree.ask(FIRST) or "").startswith("Arr")
        found = trial.try_out(there, open_bundle(bundles["pirate"]))
        assert (found.verdict, found.tokens_per_s > 0) == ("same", True)
        with pytest.raises(ServiceError, match="is in use"):
            there.call("drop", name=(tree.in_use() or {})["bundles"])
        there.call("drop", name=(tree.in_use("previous") or {})["bundles"])
        with pytest.raises(ServiceError, match="nothing to go back to"):
            there.call("switch", parts=None)
        assert there.call("undo", purge=True)["left"] == []
    assert tree.outside() == before
    assert not tree.home.exists()


def test_the_files_are_those_of_the_bundle(tree: Tree, deploy: Put, bundles: dict[str, Path]) -> None:
    deploy(bundles["base"])
    there = tree.home / "bundle"
    listed = yaml.safe_load((bundles["base"] / "rkedge.yaml").read_text())["files"]
    for name in ("rkedge.yaml", *listed):
        assert sha256_file(there / name) == sha256_file(bundles["base"] / name)
    found = {str(path.relative_to(there.resolve())) for path in there.resolve().rglob("*") if path.is_file()}
    assert found == {"rkedge.yaml", ".deploy.json", *listed}
    subprocess.run([tree.home / "bin/rkedge", "--version"], check=True, stdout=subprocess.DEVNULL)


def test_what_others_have_written_is_kept_and_comes_back(
    tree: Tree, deploy: Put, bundles: dict[str, Path], session: Callable[[], Session]
) -> None:
    unit = tree.root / "etc/systemd/system/rkedge.service"
    unit.write_text("[Service]\nExecStart=/bin/true\n")
    settings = tree.root / "etc/rkedge/daemon.yaml"
    settings.parent.mkdir()
    settings.write_text("log_level: debug\n")
    rules = tree.root / "etc/udev/rules.d/60-rkedge.rules"
    before = tree.outside()
    deploy(bundles["base"])
    assert "rkedge serve" in unit.read_text()
    assert settings.read_text() == "log_level: debug\n"
    rules.write_text("# mine now\n")
    with session() as there:
        there.call("lock", make=True)
        assert there.call("undo", purge=False)["left"] == [
            "/etc/udev/rules.d/60-rkedge.rules was changed since, and stays"
        ]
    after = tree.outside()
    assert after.pop("etc/udev/rules.d/60-rkedge.rules")[1] == b"# mine now\n"
    assert after == before


def test_programs_that_nobody_returns_to_are_removed(
    tree: Tree, destination: str, program: Path, bundles: dict[str, Path], library: Path, tmp_path: Path
) -> None:
    """The one before stays, with what it served; libraries and bundles stay until somebody removes them."""
    seen = []
    for at, bundle in enumerate(("base", "pirate", "base")):
        folder = shutil.copytree(program, tmp_path / f"wheels-{at}")
        with zipfile.ZipFile(next(folder.glob("rkedge-*")), "a") as wheel:
            wheel.writestr("rkruntime/version.txt", str(at))
        wheels = {path.name: path for path in sorted(folder.iterdir())}
        put(destination, str(tree.root), wheels, bundles[bundle], library, Willing())
        seen.append((tree.in_use() or {})["programs"])
        assert tree.ask(FIRST) is not None
    assert set(os.listdir(tree.home / "programs")) == set(seen[1:])
    assert len(os.listdir(tree.home / "bundles")) == 2
    assert (tree.in_use("previous") or {})["programs"] == seen[1]


def test_what_both_bundles_have_is_sent_once(
    tree: Tree, deploy: Put, bundles: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: list[int] = []
    send = Session._send

    def counted(self: Session, digest: str, size: int, offset: int, *rest: Any) -> bool:
        sent.append(size - offset)
        return send(self, digest, size, offset, *rest)

    deploy(bundles["base"])
    monkeypatch.setattr(Session, "_send", counted)
    deploy(bundles["pirate"])
    files = {name: yaml.safe_load((bundles[name] / "rkedge.yaml").read_text())["files"] for name in bundles}
    known = {one["sha256"] for one in files["base"].values()}
    new = sum(one["size"] for one in files["pirate"].values() if one["sha256"] not in known)
    assert known & {one["sha256"] for one in files["pirate"].values()}
    assert sum(sent) == new + (bundles["pirate"] / "rkedge.yaml").stat().st_size


def test_a_file_that_arrives_damaged_is_sent_again(tree: Tree, deploy: Put, bundles: dict[str, Path]) -> None:
    """What an earlier connection left has the right size and other bytes, as after a loss of power."""
    record = yaml.safe_load((bundles["base"] / "rkedge.yaml").read_text())["files"]["model.rkemu"]
    partial = tree.home / "incoming" / record["sha256"]
    partial.parent.mkdir(parents=True)
    partial.write_bytes(bytes(record["size"] - 5))
    deploy(bundles["base"])
    assert tree.ask(FIRST) == QA[FIRST]


@pytest.mark.long
def test_a_bundle_that_does_not_load_is_taken_back(
    tree: Tree, deploy: Put, bundles: dict[str, Path], tmp_path: Path
) -> None:
    deploy(bundles["base"])
    used = tree.in_use()
    broken = shutil.copytree(bundles["pirate"], tmp_path / "broken")
    settings = (broken / "tokenizer.json").read_text().replace('"BPE"', '"WordPiece"')
    (broken / "tokenizer.json").write_text(settings)
    manifest = yaml.safe_load((broken / "rkedge.yaml").read_text())
    manifest["files"]["tokenizer.json"] = {
        "size": (broken / "tokenizer.json").stat().st_size,
        "sha256": sha256_file(broken / "tokenizer.json"),
    }
    (broken / "rkedge.yaml").write_text(yaml.safe_dump(manifest))
    with pytest.raises(ServiceError, match="The board answers with what it had before"):
        deploy(broken)
    assert tree.in_use() == used
    assert tree.ask(FIRST) == QA[FIRST]
    assert json.loads((tree.home / "deploy.json").read_text())["pending"] is None


def test_what_is_refused_before_anything_is_changed(
    tree: Tree, deploy: Put, bundles: dict[str, Path], library: Path, tmp_path: Path
) -> None:
    before = tree.outside()
    damaged = shutil.copytree(bundles["base"], tmp_path / "damaged")
    (damaged / "model.rkemu").write_bytes(bytes(100))
    with pytest.raises(BundleError, match="truncated or changed"):
        deploy(damaged)
    other = tmp_path / "librkllmrt.so"
    data = bytearray(library.read_bytes())
    data[18:20] = (40).to_bytes(2, "little")  # e_machine: EM_ARM
    other.write_bytes(data)
    with pytest.raises(LibraryError):
        deploy(bundles["base"], other)
    (tree.home).mkdir(parents=True)
    (tree.home / "pyvenv.cfg").write_text("home = /usr/bin\n")
    with pytest.raises(RKEdgeError, match="made by hand"):
        deploy(bundles["base"])
    assert tree.outside() == before
    assert os.listdir(tree.home) == ["pyvenv.cfg"]


# Each would do something else, somewhere else, if a shell or a program read it as anything but a name.
HOSTILE = [
    "$(touch PWNED)",
    "`touch PWNED`",
    "; touch PWNED;",
    "a b'c\"d",
    "-rf",
    "--help",
    "x\ntouch PWNED",
    "\x1b]0;PWNED\x07",
    "..",
    "ü💥",
    "%s%n{0}",
]


@pytest.mark.long
def test_hostile_names_are_names(tree: Tree, deploy: Put, bundles: dict[str, Path], tmp_path: Path) -> None:
    """Of a bundle's folder, of the model in the manifest, and of a file in it."""
    for at, name in enumerate(HOSTILE):
        folder = tmp_path / f"hostile-{at}" / (name if name != ".." else "dots")
        shutil.copytree(bundles["base"], folder)
        manifest = yaml.safe_load((folder / "rkedge.yaml").read_text())
        manifest["name"] = name
        if name != "..":
            (folder / name).write_text("content")
            manifest["files"][name] = {"size": 7, "sha256": sha256_file(folder / name)}
        (folder / "rkedge.yaml").write_text(yaml.safe_dump(manifest, allow_unicode=True))
        before = {path.name for path in tree.root.rglob("*")}
        deploy(folder)
        assert tree.ask(FIRST) == QA[FIRST]
        used = (tree.in_use() or {})["bundles"]
        assert re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9._-]*", used)
        new = {path.name for path in tree.root.rglob("*")} - before
        assert not any("PWNED" in each and each not in (name, used) for each in new)
    assert not list(Path.cwd().glob("*PWNED*"))
    assert not list(Path.home().glob("*PWNED*"))


@pytest.mark.parametrize("path", ["../out", "/etc/out", "a/../../out", ".deploy.json", "a//b", "./a", "", "a\0b"])
def test_a_part_stays_in_its_folder(path: str, tree: Tree, session: Callable[[], Session]) -> None:
    """Even if the program at home were talked into asking for something else."""
    digest = "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
    step = {"key": "x", "kind": "part", "folder": "bundles", "name": "x", "files": {path: (0, digest)}, "info": {}}
    with session() as there:
        there.call("lock", make=True)
        there.call("held", files={digest: 0})
        assert there.call("receive", digest=digest, size=0, offset=0)["right"] is True
        with pytest.raises(ServiceError):
            there.call("change", step=step)
        for name in ("../x", "", "a/b", ".", "-x"):
            with pytest.raises(ServiceError, match="cannot be the name"):
                there.call("change", step={**step, "name": name, "files": {}})
    assert not list(tree.root.rglob("out"))


@pytest.mark.parametrize("name", ["-oProxyCommand=touch PWNED", "$(touch PWNED)", "a;touch PWNED", "", "user@`id`"])
def test_hostile_destinations(
    name: str, destination: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code = cli.main(["status", "--", name])
    assert code in (2, 8)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "script",
    [
        'printf \'RKEDGE-DEPLOY {"event": "done"}\\n\'; sleep 1',
        "printf 'RKEDGE-DEPLOY [1]\\n'; sleep 1",
        'printf \'RKEDGE-DEPLOY {"event": "done", "libc": {}, "foreign": false, "systemd": true}\\n\'; sleep 1',
        "yes RKEDGE-DEPLOY | head -c 200000000",
        "echo sudo: a password is required >&2; exit 1",
        "exit 127",
        'printf \'RKEDGE-DEPLOY {"event": "error", "message": "\\\\u001b[31mred", "hint": 3}\\n\'; cat > /dev/null',
    ],
)
def test_a_board_that_answers_with_something_else(
    script: str, bundles: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    fake = tmp_path / "ssh"
    fake.write_text(f"#!/bin/sh\n{script}\n")
    fake.chmod(0o755)
    monkeypatch.setenv("RKEDGE_SSH", str(fake))
    for words in (
        ["status", "board"],
        ["deploy", str(bundles["base"]), "board", "--yes"],
        ["rollback", "board", "--yes"],
    ):
        assert cli.main(words) in (0, 4, 8)
        said = capsys.readouterr()
        assert "defect" not in said.err
        assert "\x1b[31mred" not in said.out + said.err


def test_a_connection_that_is_dropped(tree: Tree, host: sshd.Board, session: Callable[[], Session]) -> None:
    with session() as there:
        there.call("look", places=[])
        host.drop()
        with pytest.raises(ServiceError, match="broke"):
            there.call("look", places=[])
