"""What is brought to a board so that it needs no internet."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from io import BytesIO
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.tags import cpython_tags
from packaging.utils import parse_wheel_filename
from tests.test_newcomer import has_an_index

from rkboard.deploy.wheels import Target, own_wheel, program_name, requirements, wheels_for

ROOT = Path(__file__).parents[2]


def test_our_own_wheel_depends_on_its_files_only() -> None:
    assert own_wheel() == own_wheel()


def test_it_has_each_file_of_the_repository_that_a_board_needs() -> None:
    name, data = own_wheel()
    assert parse_wheel_filename(name)[0] == "rkedge"
    names = set(zipfile.ZipFile(BytesIO(data)).namelist())
    for folder, place in (
        ("runtime/rkruntime", "rkruntime"),
        ("board/rkboard", "rkboard"),
        ("converter/rkconvert", "rkconvert"),
        ("configs", "rkruntime/resources/configs"),
        ("board/emulator", "rkruntime/resources/emulator"),
        ("board/systemd", "rkruntime/resources/board/systemd"),
        ("board/udev", "rkruntime/resources/board/udev"),
    ):
        files = subprocess.check_output(["git", "ls-files", folder], cwd=ROOT, text=True).splitlines()
        assert files
        assert {f"{place}/{path.removeprefix(f'{folder}/')}" for path in files} <= names
    assert "rkruntime/resources/board/requirements.txt" in names
    assert not [each for each in names if each.endswith(".pyc")]


@pytest.mark.parametrize(("python", "needed"), [("3.10", True), ("3.11", False), ("3.13", False)])
def test_markers_are_judged_by_the_boards_python(python: str, needed: bool) -> None:
    """exceptiongroup is what 3.11 has built in: PEP 654."""
    names = {Requirement(line).name for line in requirements(python)}
    assert ("exceptiongroup" in names) is needed
    assert {"pip", "tokenizers", "uvicorn"} <= names
    assert "torch" not in names


def test_another_board_has_another_program() -> None:
    boards = [Target("3.11", "aarch64", 36), Target("3.12", "aarch64", 36), Target("3.11", "x86_64", 36)]
    names = {program_name(board, data) for board in boards for data in (b"one", b"other")}
    assert len(names) == 6


@pytest.mark.long
@pytest.mark.parametrize(("python", "libc"), [("3.10", 35), ("3.11", 36), ("3.13", 41)])
def test_each_wheel_runs_on_the_board(python: str, libc: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ubuntu 22.04, Debian 12 and 13, on aarch64: by the tags that a Python there accepts."""
    if not has_an_index():
        pytest.skip("pip reaches no index")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = wheels_for(Target(python, "aarch64", libc), lambda _: None)
    version = tuple(map(int, python.split(".")))
    platforms = [f"manylinux_2_{minor}_aarch64" for minor in range(libc, 16, -1)] + ["manylinux2014_aarch64"]
    accepted = set(cpython_tags(version, platforms=platforms))
    accepted_names = {str(tag) for tag in accepted} | {"py3-none-any"}
    for name in found:
        tags = {str(tag) for tag in parse_wheel_filename(name)[3]}
        assert tags & accepted_names, name
    projects = {parse_wheel_filename(name)[0] for name in found}
    assert projects >= {Requirement(line).name.lower() for line in requirements(python)} | {"rkedge"}
    assert wheels_for(Target(python, "aarch64", libc), lambda _: pytest.fail("nothing is downloaded twice")) == found


@pytest.mark.long
def test_it_is_the_wheel_that_the_build_backend_makes(tmp_path: Path) -> None:
    if not has_an_index():
        pytest.skip("pip reaches no index")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", tmp_path, ROOT]
    subprocess.run(command, check=True)
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as other, zipfile.ZipFile(BytesIO(own_wheel()[1])) as own:
        for name in own.namelist():
            if ".dist-info/" not in name:
                assert own.read(name) == other.read(name), name
        assert {name for name in other.namelist() if ".dist-info/" not in name} <= set(own.namelist())
