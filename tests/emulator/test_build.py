"""Building the library on demand, and `rkedge emulator`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from rkboard.emulator import build as emulator
from rkboard.emulator.abi_header import HEADER, header
from rkruntime import cli
from rkruntime.abi import EMULATED, RELEASES
from rkruntime.errors import HostError, UsageError


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def quick(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sources that compile at once, in place of the emulator's."""
    folder = tmp_path / "sources"
    folder.mkdir()
    for name in emulator.ABI_SOURCES:
        (folder / name).write_text(f'#include "abi.h"\nint {Path(name).stem}() {{ return RKEMU_LAYOUT; }}\n')
    (folder / "log.cc").write_text("int log_line() { return 1; }\n")
    (folder / emulator.EXPORTS).write_text("{ global: *; };\n")
    monkeypatch.setattr(emulator, "resource", lambda name: folder)
    return folder


def test_a_build_is_kept_until_something_changes(quick: Path) -> None:
    lines: list[str] = []
    first = emulator.build("1.2.3", progress=lines.append)
    assert first.name == "librkllmrt.so"
    assert len(lines) == 3
    stamp = first.stat().st_mtime_ns
    assert emulator.build("1.2.3", progress=lines.append) == first == emulator.library_path("1.2.3")
    assert first.stat().st_mtime_ns == stamp
    assert len(lines) == 3
    # The layout's own files only: log.o is shared.
    emulator.build("1.3.0", progress=lines.append)
    assert len(lines) == 5
    (quick / "log.cc").write_text("int log_line() { return 2; }\n")
    assert emulator.build("1.2.3") != first


def test_builds_at_the_same_time(quick: Path) -> None:
    compiled: list[str] = []
    with ThreadPoolExecutor(4) as pool:
        built = set(pool.map(lambda _: emulator.build("1.2.3", progress=compiled.append), range(8)))
    assert len(built) == 1
    assert len(compiled) == 3
    library = built.pop()
    assert [path.name for path in library.parent.iterdir() if path.name.startswith(".")] == []


def test_an_interrupted_build_leaves_nothing_that_is_taken_for_one(
    quick: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(self: Any, target: Path, command: Any, _: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(emulator._Build, "_make", stop)
        with pytest.raises(KeyboardInterrupt):
            emulator.build("1.2.3")
    assert not emulator.library_path("1.2.3").exists()
    assert emulator.build("1.2.3").is_file()


def test_no_compiler(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(HostError, match="no C\\+\\+ compiler was found") as error:
        emulator.build("1.2.3")
    assert error.value.hint == "Install one: sudo apt install g++"
    monkeypatch.setenv("CXX", "no-such-compiler -O9")
    with pytest.raises(HostError, match="looked for no-such-compiler"):
        emulator.build("1.2.3")
    with pytest.raises(HostError) as error:
        emulator.build("1.2.3", arch="aarch64" if emulator.host_arch() != "aarch64" else "x86_64")
    assert "apt install" in error.value.hint


def test_a_compiler_that_fails_is_quoted(quick: Path) -> None:
    (quick / "log.cc").write_text('#error "this is the reason"\n')
    with pytest.raises(HostError, match=r"build failed .*exit 1\)") as error:
        emulator.build("1.2.3")
    assert any("this is the reason" in line for line in error.value.log)
    assert "\n" not in error.value.message
    assert not emulator.library_path("1.2.3").exists()


def test_a_full_disk_is_told_from_a_bad_compiler(quick: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compiler = tmp_path / "full"
    compiler.write_text(
        "#!/bin/sh\n[ $1 = --version ] && exit 0\n"
        "echo '/tmp/x.s: Fatal error: cannot write /tmp/x.o: No space left on device' >&2\nexit 1\n"
    )
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    monkeypatch.delenv("LD_PRELOAD", raising=False)
    with pytest.raises(HostError, match="is full") as error:
        emulator.build("1.2.3")
    assert "XDG_CACHE_HOME" in error.value.hint


def test_a_cache_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/proc/self")
    with pytest.raises(HostError, match="Cannot build the emulator in /proc/self") as error:
        emulator.build("1.2.3")
    assert "XDG_CACHE_HOME" in error.value.hint


@pytest.mark.parametrize("release", ["1.0.1", "1.2.4", "", "../../etc"])
def test_unknown_releases(release: str) -> None:
    with pytest.raises(UsageError, match="has no release"):
        emulator.build(release)


def test_a_layout_that_nobody_emulates_yet_compiles(tmp_path: Path) -> None:
    """Its declarations are enough, as long as it takes nothing away."""
    newest = next(reversed(RELEASES))
    assert newest not in EMULATED
    (tmp_path / HEADER).write_text(header(newest))
    command = [*emulator.find_compiler().command, "-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Werror"]
    for name in emulator.ABI_SOURCES:
        source = emulator.resource("emulator") / name
        subprocess.run([*command, "-DRKLLM_BOOL=uint8_t", f"-I{tmp_path}", source], check=True)


@pytest.mark.long
@pytest.mark.skipif(not shutil.which("clang++"), reason="needs clang++, which g++ alone does not replace")
def test_clang_has_no_warnings_either() -> None:
    """The tests' own builds, by the first compiler that is there, have warnings as errors too."""
    sources = emulator.resource("emulator")
    flags = ["-std=c++17", "-fsyntax-only", "-Wall", "-Wextra", "-Wpedantic", "-Werror"]
    special = {kernel.source: kernel for kernel in emulator.KERNELS}
    for source in sorted(sources.glob("*.cc")):
        kernel = special.get(source.name)
        if kernel and kernel.arch != emulator.host_arch():
            continue
        layouts = ("1.1.4", "1.2.0", "1.2.1b1", "1.2.3", "1.3.0")
        for release in layouts if source.name in emulator.ABI_SOURCES else layouts[-1:]:
            made = emulator.build(release).parent
            found = ["-DRKLLM_BOOL=uint8_t", f"-I{made}", f"-I{made.parent}"]
            command = ["clang++", *flags, *(kernel.flags if kernel else ()), *found, str(source)]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not shutil.which("clang-format"), reason="needs clang-format")
def test_sources_are_formatted() -> None:
    sources = sorted(path for path in emulator.resource("emulator").iterdir() if path.suffix in (".cc", ".h"))
    done = subprocess.run(["clang-format", "--dry-run", *sources], capture_output=True, text=True, check=True)
    assert done.stderr == ""


class TestCommand:
    def test_build_and_path(self, quick: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["emulator", "build", "--release", "1.3.0"]) == 0
        library = capsys.readouterr().out.strip()
        assert Path(library).is_file()
        assert cli.main(["emulator", "path", "--release", "1.3.0"]) == 0
        assert capsys.readouterr().out.strip() == str(Path(library).parent)

    def test_all_layouts_as_json(self, quick: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["emulator", "build", "--all", "--json"]) == 0
        built = json.loads(capsys.readouterr().out)
        assert list(built) == ["1.1.4", "1.2.0", "1.2.1b1", "1.2.3", "1.3.0"]

    def test_env_is_for_a_shell(self, quick: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert cli.main(["emulator", "env"]) == 0
        script = capsys.readouterr().out + 'echo "$LD_LIBRARY_PATH"'
        for before, after in [("/else", ":/else"), ("", "")]:
            done = subprocess.run(
                ["sh", "-c", script], env={"LD_LIBRARY_PATH": before}, capture_output=True, text=True, check=True
            )
            assert done.stdout.strip() == f"{emulator.library_path().parent}{after}"

    def test_info(self, quick: Path, capsys: pytest.CaptureFixture[str]) -> None:
        emulator.build("1.2.0")
        assert cli.main(["emulator", "info", "--json"]) == 0
        releases = json.loads(capsys.readouterr().out)["releases"]
        assert {row["release"] for row in releases if row["built"]} == {"1.2.0"}
        assert cli.main(["emulator", "info"]) == 0
        assert "not built" in capsys.readouterr().out


def test_any_process_finds_it_by_ld_library_path(library: Any) -> None:
    code = "import ctypes; print(ctypes.CDLL('librkllmrt.so').rkllm_destroy(None))"
    environment = os.environ | {"LD_LIBRARY_PATH": str(library("1.3.0").parent)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "-1"
