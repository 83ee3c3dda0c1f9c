"""Environments from wheels: stand-ins of the vendor's, installed by the real pip without a network."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import platform
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from rkconvert.commands.toolkit import run
from rkconvert.toolkit.environment import find_python, setup
from rkconvert.toolkit.interpreter import environments_folder, find_toolkit
from rkconvert.toolkit.wheel import check_host, read_wheel
from rkruntime.errors import HostError, InputError, OutputError

STANDINS = Path(__file__).parent / "standins"
HERE = f"{sys.version_info[0]}{sys.version_info[1]}"


def write_wheel(
    path: Path, files: dict[str, str], name: str = "rkllm_toolkit", version: str = "1.2.3", tag: str = ""
) -> Path:
    info = f"{name}-{version}.dist-info"
    content = {
        **files,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name.replace('_', '-')}\nVersion: {version}\n",
        f"{info}/WHEEL": f"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: {tag or 'py3-none-any'}\n",
    }
    digests = {
        key: base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
        for key, text in content.items()
    }
    record = "".join(f"{key},sha256={digest},{len(content[key].encode())}\n" for key, digest in digests.items())
    with zipfile.ZipFile(path, "w") as archive:
        for key, text in {**content, f"{info}/RECORD": f"{record}{info}/RECORD,,\n"}.items():
            archive.writestr(key, text)
    return path


@pytest.fixture
def wheel(tmp_path: Path) -> Callable[..., Path]:
    """A wheel with a stand-in: `wheel(version, python)`."""

    def make(
        version: str = "1.2.3", python: str = HERE, platform_tag: str = "linux_x86_64", broken: bool = False
    ) -> Path:
        folder = STANDINS / ("toolkit-1.3" if version.startswith("1.3") else "toolkit-1.2")
        files = {
            "rkllm/__init__.py": "",
            "rkllm/api.py": "import a_part_that_is_missing\n" * broken + (folder / "rkllm" / "api.py").read_text(),
            **{path.name: path.read_text() for path in (STANDINS / "common").glob("*.py")},
        }
        tag = f"cp{python}-cp{python}-{platform_tag}"
        return write_wheel(tmp_path / f"rkllm_toolkit-{version}-{tag}.whl", files, version=version, tag=tag)

    return make


@pytest.fixture
def no_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """pip finds packages in a folder only, which has a setuptools that is one by name."""
    folder = tmp_path / "packages"
    folder.mkdir()
    write_wheel(folder / "setuptools-80.9.0-py3-none-any.whl", {"setuptools.py": ""}, "setuptools", "80.9.0")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    return folder


@pytest.mark.usefixtures("no_index")
def test_setup_and_use(wheel: Callable[..., Path]) -> None:
    path = wheel()
    interrupted = environments_folder() / f"1.2.3-py{HERE[0]}.{HERE[1:]}"
    (interrupted / "bin").mkdir(parents=True)
    (interrupted / "bin" / "python").write_text("cut off")
    done = CliRunner().invoke(run, ["setup", "--wheel", str(path), "--python", sys.executable, "--json"])
    assert done.exit_code == 0, done.output
    made = json.loads(done.stdout)
    assert made["toolkit"] == "1.2.3"
    assert int(made["packages"]["setuptools"].partition(".")[0]) < 81
    assert {"peft", "tokenizers", "sentencepiece", "accelerate"} <= set(made["packages"])
    found = find_toolkit()
    assert found.python == interrupted / "bin" / "python"
    assert (str(found.python), found.origin) == (made["python"], "rkedge toolkit setup")
    again = CliRunner().invoke(run, ["setup", "--wheel", str(path), "--python", sys.executable])
    assert isinstance(again.exception, OutputError)
    assert "--replace" in again.exception.hint


@pytest.mark.usefixtures("no_index")
def test_a_data_folder_with_spaces(
    wheel: Callable[..., Path], tmp_path: Path, no_index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "my data #1 %41"))
    write_wheel(no_index / "setuptools-90.0.0-py3-none-any.whl", {"setuptools.py": ""}, "setuptools", "90.0.0")
    (tmp_path / "own.txt").write_text("")
    monkeypatch.setenv("PIP_CONSTRAINT", str(tmp_path / "own.txt"))
    made = setup(read_wheel(wheel()), Path(sys.executable), lambda line: None)
    assert made.python.is_relative_to(tmp_path / "my data #1 %41")
    assert find_toolkit().python == made.python


@pytest.mark.usefixtures("no_index")
def test_one_setup_at_a_time_and_a_failed_one_keeps_the_old(wheel: Callable[..., Path]) -> None:
    path, refused = wheel(), []

    def start_another(line: str) -> None:
        if "Processing" in line:
            with pytest.raises(OutputError, match="Another `rkedge toolkit setup`") as caught:
                setup(read_wheel(path), Path(sys.executable), lambda line: None, replace=True)
            refused.append(caught.value)

    made = setup(read_wheel(path), Path(sys.executable), start_another)
    assert refused
    with pytest.raises(HostError, match="cannot be imported"):
        setup(read_wheel(wheel(broken=True)), Path(sys.executable), lambda line: None, replace=True)
    assert find_toolkit() == made
    assert os.listdir(environments_folder()) == [made.python.parent.parent.name]
    # As after a kill in the middle of a replacement.
    folder = made.python.parent.parent
    folder.rename(folder.with_name(f"{folder.name}.old"))
    (folder / "bin").mkdir(parents=True)
    assert find_toolkit().version == made.version
    with pytest.raises(OutputError, match="exists already"):
        setup(read_wheel(wheel()), Path(sys.executable), lambda line: None)
    assert find_toolkit() == made
    setup(read_wheel(wheel()), Path(sys.executable), lambda line: None, replace=True)
    assert os.listdir(environments_folder()) == [folder.name]


@pytest.mark.long
@pytest.mark.usefixtures("no_index")
def test_what_a_killed_setup_started_keeps_others_out(wheel: Callable[..., Path], tmp_path: Path) -> None:
    path, slow, go = wheel(), tmp_path / "python", tmp_path / "go"
    wait = f'case "$*" in *"-m venv"*) echo waiting; while [ ! -e "{go}" ]; do sleep 0.05; done; esac'
    slow.write_text(f'#!/bin/sh\n{wait}\nexec "{sys.executable}" "$@"\n')
    slow.chmod(0o755)
    command = [sys.executable, "-m", "rkruntime.cli", "toolkit", "setup", "--wheel", path, "--python", slow]
    with subprocess.Popen([*map(str, command)], stderr=subprocess.PIPE, text=True) as first:
        assert first.stderr is not None
        assert any(line == "waiting\n" for line in first.stderr)
        first.kill()
    try:
        with pytest.raises(OutputError, match="what a killed one had started"):
            setup(read_wheel(path), Path(sys.executable), lambda line: None)
    finally:
        go.touch()
    deadline = time.monotonic() + 100
    while True:
        try:
            made = setup(read_wheel(path), Path(sys.executable), lambda line: None)
            break
        except OutputError:
            assert time.monotonic() < deadline
            time.sleep(0.1)
    assert find_toolkit() == made


@pytest.mark.usefixtures("no_index")
def test_what_cannot_be_imported_leaves_nothing(wheel: Callable[..., Path]) -> None:
    lines: list[str] = []
    with pytest.raises(HostError, match="cannot be imported") as caught:
        setup(read_wheel(wheel(broken=True)), Path(sys.executable), lines.append)
    assert "a_part_that_is_missing" in str(caught.value.details["lines"])
    assert any("Successfully installed" in line for line in lines)
    assert os.listdir(environments_folder()) == []
    with pytest.raises(HostError, match="none is set up"):
        find_toolkit()


def test_what_cannot_be_installed_leaves_nothing(
    wheel: Callable[..., Path], no_index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def needs_torch(path: Path) -> None:
        with zipfile.ZipFile(path) as archive:
            texts = {name: archive.read(name).decode() for name in archive.namelist()}
        name = next(name for name in texts if name.endswith("METADATA"))
        texts[name] += "Requires-Dist: torch==2.6.0\n"
        with zipfile.ZipFile(path, "w") as archive:
            for key, text in texts.items():
                archive.writestr(key, text)

    path = wheel()
    needs_torch(path)
    with pytest.raises(HostError, match="could not be installed") as caught:
        setup(read_wheel(path), Path(sys.executable), lambda line: None)
    assert caught.value.details["diagnosis"]["class"] == "convert-environment"
    assert any("torch==2.6.0" in line for line in caught.value.log)
    assert os.listdir(environments_folder()) == []


@pytest.mark.usefixtures("no_index")
def test_ctrl_c_leaves_nothing(wheel: Callable[..., Path]) -> None:
    def interrupt(line: str) -> None:
        if "Processing" in line:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        setup(read_wheel(wheel()), Path(sys.executable), interrupt)
    assert os.listdir(environments_folder()) == []


def test_files_that_are_no_wheel(tmp_path: Path, wheel: Callable[..., Path]) -> None:
    good = wheel()
    path = tmp_path / "rkllm_toolkit-1.2.3-cp312-cp312-linux_x86_64.whl"
    for content, words in [
        (b"", "not a wheel"),
        (b"<html>", "not a wheel"),
        (good.read_bytes()[:400], "not a wheel"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer"),
    ]:
        path.write_bytes(content)
        with pytest.raises(InputError, match=words):
            read_wheel(path)
    with pytest.raises(InputError, match="No such file"):
        read_wheel(tmp_path / "none.whl")
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(InputError, match="not a regular file"):
        read_wheel(path)
    path.unlink()
    with pytest.raises(InputError, match="a wheel of torch, not of"):
        read_wheel(write_wheel(tmp_path / "torch-2.6.0-cp312-cp312-linux_x86_64.whl", {}, "torch", "2.6.0"))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme", "no metadata")
    with pytest.raises(InputError, match="METADATA"):
        read_wheel(path)


@pytest.mark.parametrize(
    ("version", "python", "error", "words"),
    [
        ("1.0.1", "38", HostError, "is not supported"),
        ("1.4.0", "312", HostError, "newer than any"),
        ("1.2.2", "38", InputError, "for Python 3.8"),
        ("1.2.3", "38", InputError, "for Python 3.8"),
        ("1.3.0", "39", InputError, "for Python 3.9"),
        ("1.2.3", "313", InputError, "for Python 3.13"),
        ("1.1.0", "310", InputError, "for Python 3.10"),
    ],
)
def test_releases_and_pythons(
    wheel: Callable[..., Path], version: str, python: str, error: type[Exception], words: str
) -> None:
    with pytest.raises(error, match=words):
        read_wheel(wheel(version, python))


@pytest.mark.parametrize("name", ["toolkit.whl", "rkllm_toolkit-1.2.2-cp312-cp312-linux_x86_64.whl", "rkllm (1).whl"])
def test_a_renamed_wheel_is_told_its_name(wheel: Callable[..., Path], name: str) -> None:
    path = wheel(python="312")
    with pytest.raises(InputError, match="was renamed") as caught:
        read_wheel(path.rename(path.with_name(name)))
    assert "rkllm_toolkit-1.2.3-cp312-cp312-linux_x86_64.whl" in caught.value.hint


def test_machines(wheel: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    check_host(read_wheel(wheel(platform_tag="manylinux_2_17_x86_64.manylinux2014_x86_64")))
    with pytest.raises(HostError, match="is for linux_aarch64"):
        check_host(read_wheel(wheel(platform_tag="linux_aarch64")))
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    with pytest.raises(HostError, match="not glibc"):
        check_host(read_wheel(wheel()))
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    with pytest.raises(HostError, match="linux on aarch64") as caught:
        check_host(read_wheel(wheel()))
    assert "on a PC" in caught.value.hint
    monkeypatch.setattr(sys, "platform", "darwin")
    with pytest.raises(HostError, match="darwin"):
        check_host(read_wheel(wheel()))


def test_pythons(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = f"{sys.version_info[0]}.{sys.version_info[1]}"
    assert find_python(own).exists()
    assert find_python(own, Path(sys.executable)) == Path(sys.executable)
    with pytest.raises(HostError, match=f"is Python {own}; the wheel is for 3.7"):
        find_python("3.7", Path(sys.executable))
    with pytest.raises(HostError, match="does not run as a Python interpreter"):
        find_python("3.7", tmp_path / "python")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("PYENV_ROOT", str(tmp_path))
    with pytest.raises(HostError, match=r"none was found") as caught:
        find_python("3.99")
    assert "3.99" in caught.value.hint
    # A shim that stands for no installed release says so and fails.
    shim = tmp_path / "python3.99"
    shim.write_text("#!/bin/sh\necho 'pyenv: version not installed' >&2; exit 127\n")
    shim.chmod(0o755)
    with pytest.raises(HostError, match="none was found"):
        find_python("3.99")
    pyenv = tmp_path / "versions" / "3.99.1" / "bin" / "python3.99"
    pyenv.parent.mkdir(parents=True)
    pyenv.write_text("#!/bin/sh\necho 3.99\n")
    pyenv.chmod(0o755)
    assert find_python("3.99") == pyenv
