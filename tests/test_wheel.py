"""The wheel in fresh environments outside of the clone, on each Python here: a command works, or says what it needs."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from tests.test_newcomer import has_an_index

from rkruntime import cli

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.long
VERSIONS = ("3.10", "3.11", "3.12", "3.13")
NEEDS = r"needs the (Python package|vendor's)|is missing|requires a login|No daemon answers|is not a local folder"
NO_BOARD = r"(board\.invalid|ssh).*(reach|resolve|installed|start)|needs the Python package"


def interpreter(version: str) -> str | None:
    """A Python of this version: on PATH, or where pyenv keeps them."""
    kept = sorted((Path.home() / ".pyenv/versions").glob(f"{version}.*/bin/python"))
    return str(kept[-1]) if kept else shutil.which(f"python{version}")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if not has_an_index():
        pytest.skip("pip reaches no index")
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT]
    subprocess.run(command, check=True)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The first command that needs the emulator builds it there, from the wheel's sources."""
    return tmp_path_factory.mktemp("home")


def test_it_has_the_emulator_and_what_users_edit(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder, place in (("board/emulator", "emulator"), ("configs", "configs")):
        files = subprocess.check_output(["git", "ls-files", folder], cwd=ROOT, text=True).splitlines()
        assert len(files) > 10
        inside = {f"rkruntime/resources/{place}/{name.removeprefix(f'{folder}/')}" for name in files}
        assert inside - names == set()


@pytest.mark.parametrize("form", ["base", "board"])
@pytest.mark.parametrize("version", VERSIONS)
def test_each_command_works_or_says_what_it_needs(
    wheel: Path, version: str, form: str, home: Path, tmp_path: Path
) -> None:
    python = interpreter(version)
    if python is None:
        pytest.skip(f"there is no Python {version} here")
    subprocess.run([python, "-m", "venv", tmp_path / "venv"], check=True)
    only = ["--no-deps", "--requirement", ROOT / "board" / "requirements.txt"] if form == "board" else []
    install = [tmp_path / "venv/bin/pip", "install", "--quiet", "--disable-pip-version-check", *only, wheel]
    subprocess.run(install, check=True)
    find = "import rkconvert.demo as demo; print(demo.checkpoint(), demo.adapter())"
    found = subprocess.check_output([tmp_path / "venv/bin/python", "-c", find], cwd=tmp_path, text=True)
    model, lora = found.split()
    made = tmp_path / "made"
    subprocess.run([sys.executable, "-m", "rkruntime.cli", "convert", model, "-q", "-o", made], check=True)
    works_in_base = {
        "demo": [], "plan": [model], "convert": [model, "--lora", lora, "-q", "-o", "my"],
        "merge": [model, "--lora", lora, "-q", "-o", "merged"], "calibrate": [model, "-q", "-o", "texts.json"],
        "emulator": ["path"], "compat": [model, "-q"],
    }  # fmt: skip
    works = {
        "up": ["made", "--no-chat"], "chat": ["made"], "run": ["made", "What can you do?"], "list": [], "down": [],
        "diagnose": [str(wheel.parent / "log")], "firstrun": ["made"], "inspect": ["made"], "help": [], "attach": [],
        "visit": ["open", "0123456789abcdef"],
        "bench": ["made", "-p", "16", "-n", "4", "-r", "1"], "top": ["--once"],
        "rm": ["made", "--yes"],
    }  # fmt: skip
    needs = {"toolkit": ["info"], "push": ["made", "me/made"], "serve": ["--config", "none"]}
    elsewhere = {
        "deploy": ["made", "board.invalid", "--yes"], "status": ["board.invalid"], "logs": ["board.invalid"],
        "rollback": ["board.invalid", "--yes"], "undeploy": ["board.invalid", "--yes"],
    }  # fmt: skip
    looks = {
        "doctor": [],
        "clocks": [],
        "fleet": ["status", str(wheel.parent / "fleet.yaml")],
    }  # what they find here decides their status
    (wheel.parent / "log").write_text("E rkllm: failed to open rknpu module\n")
    fleet = "{groups: {one: {bundle: made, boards: {far: {ssh: board.invalid}}}}}"
    (wheel.parent / "fleet.yaml").write_text(fleet)
    assert {*works_in_base, *works, *needs, *elsewhere, *looks} == set(cli.COMMANDS)
    environment = {"HOME": str(home), "PATH": "/usr/bin:/bin", "RKEDGE_SOCKET": str(tmp_path / "socket")}
    for name, words in {**works_in_base, **needs, **elsewhere, **looks, **works}.items():
        command = [tmp_path / "venv/bin/rkedge", name, *words]
        done = subprocess.run(
            command, cwd=tmp_path, env=environment, input="", capture_output=True, text=True, timeout=280, check=False
        )
        said = done.stdout + done.stderr
        assert "defect" not in said, (name, said)
        assert "Traceback" not in said, (name, said)
        if name in works or (name in works_in_base and form == "base"):
            assert done.returncode == 0, (name, said)
        elif done.returncode:
            assert name in looks or len(re.findall(r"^error: ", done.stderr, re.MULTILINE)) == 1, (name, said)
            assert name in {"serve", *looks} or re.search(NO_BOARD if name in elsewhere else NEEDS, said), (name, said)
