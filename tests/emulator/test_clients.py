"""C++ programs around the library: callbacks that do not return, signals, and how programs are linked to it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rkboard.emulator import build as emulator
from rkboard.emulator.abi_header import HEADER, header

HERE = Path(__file__).parent
every_layout = pytest.mark.parametrize("release", ["1.1.4", "1.2.0", "1.2.1b1", "1.2.3", "1.3.0"])
Run = Callable[..., subprocess.CompletedProcess[str]]


def compile_client(source: str, target: Path, release: str, *linking: str | Path) -> Path:
    command = [*emulator.find_compiler().command, "-std=c++17", "-pthread", "-Wall", "-Wextra", "-Werror"]
    include = target.with_name(f"{target.name}-include")
    include.mkdir(exist_ok=True)
    (include / HEADER).write_text(header(release))
    subprocess.run([*command, "-I", include, HERE / source, "-o", target, *linking], check=True)
    return target


def run_client(program: Path, library: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"LD_LIBRARY_PATH": str(library.parent)}
    command = [str(part) for part in (program, *arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)


@pytest.fixture(scope="module")
def unwind(tmp_path_factory: pytest.TempPathFactory, library: Any, small: Any) -> Run:
    """Runs unwind.cc, built once for a release: `unwind(release, what)`."""
    folder = tmp_path_factory.mktemp("unwind")

    def run(release: str, what: str) -> subprocess.CompletedProcess[str]:
        program = folder / release
        if not program.exists():
            compile_client("unwind.cc", program, release, "-L", library(release).parent, "-lrkllmrt")
        return run_client(program, library(release), what, small.path)

    return run


@every_layout
@pytest.mark.parametrize("kind", ["", "-async"])
def test_a_callback_that_throws_ends_its_run_and_nothing_else(release: str, kind: str, unwind: Run) -> None:
    for what, line in [("throw", "the callback's own reason"), ("throw-int", "the client's callback threw")]:
        done = unwind(release, what + kind)
        assert (done.stdout, done.returncode) == ("ok\n", 0), done.stderr
        assert f"E rkllm: emulator: {line}" in done.stderr


@every_layout
@pytest.mark.parametrize("kind", ["", "-async"])
@pytest.mark.skipif("RKEMU_TEST_SANITIZE" in os.environ, reason="sanitizers do not follow threads that end so")
def test_a_callback_may_end_its_thread(release: str, kind: str, unwind: Run) -> None:
    for what in ("exit", "cancel"):
        done = unwind(release, what + kind)
        assert (done.stdout, done.returncode) == ("ok\n", 0), done.stderr


def test_abort_and_is_running_in_a_signal_handler(unwind: Run) -> None:
    """A thousand signals or more while runs begin and end: a lock that the same thread holds would hang soon."""
    done = unwind("1.2.3", "storm")
    assert (done.stdout, done.returncode) == ("ok\n", 0), done.stderr


def test_a_program_linked_by_path_finds_the_library_by_its_name(library: Any, small: Any, tmp_path: Path) -> None:
    from elftools.elf.elffile import ELFFile

    program = compile_client("ask.cc", tmp_path / "ask", "1.2.3", library("1.2.3"))
    with program.open("rb") as file:
        needed = [tag.needed for tag in ELFFile(file).get_section_by_name(".dynamic").iter_tags("DT_NEEDED")]
    assert "librkllmrt.so" in needed
    done = run_client(program, library("1.2.2"), small.path)
    assert "rkllm-runtime version: 1.2.2" in done.stderr
