"""Large models are merged and quantized in several processes: the same bytes, the same errors, nothing left behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.converter.sources.other_formats import TYPES, write_gguf

from rkconvert import demo
from rkconvert.output import hf_folder
from rkconvert.output.hf_folder import resumable, write_weights
from rkconvert.tensors import processes
from rkruntime.bundle.rkemu import Writer
from rkruntime.cli import main

LIMIT = 300_000
COMMANDS = ["merge", "convert"]


@pytest.fixture
def several(monkeypatch: pytest.MonkeyPatch) -> None:
    """As for a large model on a machine with three CPUs, in shards of LIMIT bytes."""
    monkeypatch.setattr(processes, "PROCESSES", 3)
    monkeypatch.setattr(processes, "LITTLE", 0)
    for function in (write_weights, resumable):
        monkeypatch.setattr(function, "__defaults__", (LIMIT,))


def line(command: str, base: Path, output: Path, *more: str) -> list[str]:
    return [command, str(base), "--lora", str(demo.adapter()), "-o", str(output), "-q", *more]


def weights(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.suffix in (".safetensors", ".rkemu")}


def patched(monkeypatch: pytest.MonkeyPatch, at: int, event: Callable[[], object]) -> None:
    """Let something happen when a process is about to write for the `at`th time."""

    def announced(real: Callable[..., Any]) -> Callable[..., Any]:
        calls = [0]

        def write(*arguments: Any) -> Any:
            calls[0] += 1
            if calls[0] == at:
                event()
            return real(*arguments)

        return write

    for owner, name in ((hf_folder, "_write"), (Writer, "write_rows")):
        monkeypatch.setattr(owner, name, announced(getattr(owner, name)))


@pytest.mark.parametrize("kind", ["folder", "gguf"])
@pytest.mark.parametrize(
    ("command", "options"),
    [("merge", ""), ("convert", ""), ("convert", "--dtype w8a8_g128 --force-dtype"), ("convert", "--dtype fp32")],
)
def test_the_bytes_are_those_of_one_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, several: None, command: str, kind: str, options: str
) -> None:
    base = demo.checkpoint()
    if kind == "gguf":
        base = tmp_path / "demo.gguf"
        write_gguf(base, demo.checkpoint(), TYPES.F16)
    with monkeypatch.context() as patch:
        patch.setattr(processes, "PROCESSES", 1)
        assert main(line(command, base, tmp_path / "one", *options.split())) == 0
    forks: list[int] = []
    real = os.fork
    monkeypatch.setattr(os, "fork", lambda: (forks.append(1), real())[1])
    assert main(line(command, base, tmp_path / "several", *options.split())) == 0
    assert len(forks) == 3
    one, other = weights(tmp_path / "one"), weights(tmp_path / "several")
    assert len(one) == (1 if command == "convert" else len(other))
    assert one == other
    assert sorted(path.name for path in (tmp_path / "one").iterdir()) == sorted(
        path.name for path in (tmp_path / "several").iterdir()
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_a_weight_that_is_not_a_number(tmp_path: Path, several: None, capsys: Any, command: str) -> None:
    base = shutil.copytree(demo.checkpoint(), tmp_path / "base")
    file = base / "model-00002-of-00003.safetensors"
    tensors = load_file(file)
    name = next(name for name in tensors if "down_proj" in name)
    tensors[name][3, 5] = torch.nan
    save_file(tensors, file, {"format": "pt"})
    assert main(line(command, base, tmp_path / "out")) == 3
    assert f"The tensor {name} has NaN" in " ".join(capsys.readouterr().err.split())
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("at", [2, 9])
def test_a_disk_that_fills_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, several: None, capsys: Any, command: str, at: int
) -> None:
    def full() -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    assert main(line(command, demo.checkpoint(), tmp_path / "whole")) == 0
    with monkeypatch.context() as patch:
        patched(patch, at, full)
        assert main(line(command, demo.checkpoint(), tmp_path / "out")) == 5
    said = " ".join(capsys.readouterr().err.split())
    assert "disk is full" in said
    kept = tmp_path / ".out.partial"
    # At its second write no process has finished a shard.
    assert kept.exists() == ("kept in" in said) == (command == "merge" and bool(list(kept.glob("*.safetensors"))))
    assert not list(kept.glob("*.partial"))
    assert main(line(command, demo.checkpoint(), tmp_path / "out")) == 0
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_source_that_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, several: None, capsys: Any, command: str
) -> None:
    base = shutil.copytree(demo.checkpoint(), tmp_path / "base")
    file = sorted(base.glob("*.safetensors"))[-1]
    patched(monkeypatch, 3, file.touch)
    assert main(line(command, base, tmp_path / "out")) == 3
    assert "changed while it was read" in " ".join(capsys.readouterr().err.split())
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


@pytest.mark.parametrize(("command", "at"), [("merge", 2), ("merge", 9), ("convert", 5)])
def test_a_process_that_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, several: None, capsys: Any, command: str, at: int
) -> None:
    """As by a kernel that is short of memory, which used to end the whole run, and to leave what was finished."""
    assert main(line(command, demo.checkpoint(), tmp_path / "whole")) == 0
    with monkeypatch.context() as patch:
        patched(patch, at, lambda: os.kill(os.getpid(), signal.SIGKILL))
        assert main(line(command, demo.checkpoint(), tmp_path / "out")) == 5
    said = " ".join(capsys.readouterr().err.split())
    assert "was ended from outside (Killed)" in said
    kept = tmp_path / ".out.partial"
    assert kept.exists() == ("what took long is kept in" in said)
    assert kept.exists() == (command == "merge" and bool(list(kept.glob("*.safetensors"))))
    recorded = json.loads((kept / hf_folder.STATE).read_text()) if kept.exists() else {}
    left = {name: (kept / name).stat().st_mtime_ns for name in recorded}
    assert main(line(command, demo.checkpoint(), tmp_path / "out")) == 0
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    assert all((tmp_path / "out" / name).stat().st_mtime_ns == time for name, time in left.items())


KILLED = """
import os, signal, sys
from rkconvert.output import hf_folder
from rkconvert.tensors import processes
from rkruntime.bundle.rkemu import Writer
from rkruntime.cli import main
processes.PROCESSES, processes.LITTLE = 3, 0
for function in (hf_folder.write_weights, hf_folder.resumable):
    function.__defaults__ = (int(sys.argv[2]),)
at, calls, parent = int(sys.argv[1]), [0], os.getpid()
def announced(real):
    def write(*arguments):
        calls[0] += 1
        if calls[0] == at:
            os.kill(parent, signal.SIGKILL)
        return real(*arguments)
    return write
hf_folder._write, Writer.write_rows = announced(hf_folder._write), announced(Writer.write_rows)
sys.exit(main(sys.argv[3:]))
"""


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("at", [1, 8, 17])
def test_a_kill_and_the_same_command_again(tmp_path: Path, several: None, command: str, at: int) -> None:
    """At once: what the killed run had started may still be at work."""
    assert main(line(command, demo.checkpoint(), tmp_path / "whole")) == 0
    run = [sys.executable, "-c", KILLED, str(at), str(LIMIT), *line(command, demo.checkpoint(), tmp_path / "out")]
    killed = subprocess.run(run, capture_output=True, text=True, check=False)
    assert (killed.returncode, killed.stderr) == (-signal.SIGKILL, "")
    assert main(line(command, demo.checkpoint(), tmp_path / "out")) == 0
    assert weights(tmp_path / "out") == weights(tmp_path / "whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "whole"]
