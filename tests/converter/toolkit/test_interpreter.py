"""Which interpreter is taken, and what is said of those that cannot be."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from rkconvert.commands.toolkit import run
from rkconvert.toolkit.interpreter import MARKER, environments_folder, find_toolkit
from rkruntime.errors import HostError, UsageError

Environments = Callable[[str], Path]


def configure(home: Path, text: str) -> None:
    folder = home / "xdg_config_home" / "rkedge"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(text)


def test_the_order(environments: Environments, home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(HostError, match="none is set up") as caught:
        find_toolkit()
    assert "rkedge toolkit setup --wheel" in caught.value.hint
    for version in ("1.1.4", "1.2.0"):
        made = environments_folder() / f"{version}-py3"
        shutil.copytree(environments(version), made, symlinks=True)
        (made / MARKER).write_text("{}")
    half = environments_folder() / "1.3.0-py3"
    shutil.copytree(environments("1.3.0"), half, symlinks=True)
    assert find_toolkit().version == "1.2.0+standin"  # the newest that is whole
    configure(home, f"toolkit: {{python: {environments('1.1.4') / 'bin' / 'python'}}}")
    assert find_toolkit().version == "1.1.4+standin"
    monkeypatch.setenv("RKEDGE_TOOLKIT_PYTHON", str(environments("1.3.0") / "bin" / "python"))
    assert (find_toolkit().version, find_toolkit().origin) == ("1.3.0+standin", "RKEDGE_TOOLKIT_PYTHON")
    found = find_toolkit(environments("1.2.3"))  # the environment's folder will do
    assert (found.version, found.origin) == ("1.2.3+standin", "--toolkit-python")
    assert found.python == environments("1.2.3") / "bin" / "python"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("toolkit: [", "YAML"),
        ("toolkit: 3", "must be a mapping"),
        ("toolkit: {python: [1]}", "must be a path"),
        ("toolkit: {pyhton: /usr/bin/python3}", "did you mean python"),
    ],
)
def test_a_wrong_configuration(home: Path, text: str, words: str) -> None:
    configure(home, text)
    with pytest.raises(UsageError, match=words):
        find_toolkit()


@pytest.mark.parametrize("text", ["", "board: {}", "toolkit:", "toolkit: {python: null}"])
def test_a_configuration_that_names_none(home: Path, text: str) -> None:
    configure(home, text)
    with pytest.raises(HostError, match="none is set up"):
        find_toolkit()


def program(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_interpreters_that_are_none(tmp_path: Path, environments: Environments) -> None:
    with pytest.raises(HostError, match="does not exist or is not executable"):
        find_toolkit(tmp_path / "no-such-python")
    with pytest.raises(HostError, match="does not exist or is not executable"):
        find_toolkit(tmp_path)
    with pytest.raises(HostError, match=r"does not work as Python 3\.8 or later: it is broken"):
        find_toolkit(program(tmp_path / "broken", "echo it is broken >&2; exit 1"))
    with pytest.raises(HostError, match="does not work as Python"):
        find_toolkit(program(tmp_path / "silent", "exit 0"))
    with pytest.raises(HostError, match="has no rkllm-toolkit") as caught:
        find_toolkit(Path(__import__("sys").executable))
    assert "--user" in caught.value.hint


def test_a_package_of_a_release_that_is_not_used(environments: Environments, tmp_path: Path) -> None:
    copy = tmp_path / "env"
    shutil.copytree(environments("1.2.3"), copy, symlinks=True)
    packages = next(copy.glob("lib/python*/site-packages"))
    (packages / "standin.pth").unlink()
    (packages / "rkllm_toolkit-1.0.1.dist-info").mkdir()
    (packages / "rkllm_toolkit-1.0.1.dist-info" / "METADATA").write_text("Name: rkllm-toolkit\nVersion: 1.0.1\n")
    with pytest.raises(HostError, match=r"1\.0\.1 is not supported"):
        find_toolkit(copy)


def test_info(environments: Environments) -> None:
    done = CliRunner().invoke(run, ["info", "--toolkit-python", str(environments("1.1.4")), "--json"])
    facts = json.loads(done.stdout)
    assert facts["toolkit"] == "1.1.4+standin"
    assert facts["described_by"] == "1.1.1"
    assert "max_context" not in facts["arguments"]["build"]
    assert facts["dtypes"]["rk3588"] == ["w8a8", "w8a8_g128", "w8a8_g256", "w8a8_g512"]
    text = CliRunner().invoke(run, ["info", "--toolkit-python", str(environments("1.3.0"))]).stdout
    assert "1.3.0+standin, by --toolkit-python" in text
    assert "up to 16,384 tokens" in text
