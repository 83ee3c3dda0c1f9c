"""A command killed at each step that it takes on the disk, one run after another.

`python kill_points.py convert|merge|matrix FOLDER STEP` runs the command below FOLDER in forked
processes, which kill themselves by SIGKILL before their Nth step: a file opened for writing, made, renamed or removed
there, or a block of weights written. For N = 1, 1 + STEP, ... it prints a line of JSON: what stood there after the
kill, and what after a second run that nobody killed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

from rkconvert import demo
from rkconvert.commands import convert, merge
from rkconvert.output import hf_folder
from rkruntime import cli
from rkruntime.bundle import rkemu

# Imported before the first fork, so that all runs begin alike.
COMMANDS = (convert, merge)
STEPS = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.truncate", "rkedge.rows"}


class Counter:
    """An audit hook that counts steps, and kills the process before step `last`; 0 for never."""

    def __init__(self, folder: Path, last: int, note: Path) -> None:
        self.folder, self.last, self.note, self.count = str(folder), last, note, 0

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, mode, flags = arguments
            writes = (isinstance(mode, str) and set(mode) & set("wax+")) or (flags or 0) & (os.O_WRONLY | os.O_RDWR)
            if not writes or not str(path).startswith(self.folder):
                return
        elif event not in STEPS:
            return
        self.count += 1
        if self.count == self.last:
            os.kill(os.getpid(), signal.SIGKILL)


def announce(owner: Any, name: str) -> None:
    """Make each call of a function that writes weights a step."""
    real = getattr(owner, name)

    def announced(*arguments: Any) -> Any:
        sys.audit("rkedge.rows")
        return real(*arguments)

    setattr(owner, name, announced)


def run(command: list[str], folder: Path, last: int, codes: tuple[int, ...] = (0,)) -> int:
    """Steps that were taken, or -9 after a kill. Any other exit code than those of `codes` is a failure."""
    note = folder.parent / "steps"
    child = os.fork()
    if child == 0:
        counter = Counter(folder, last, note)
        sys.addaudithook(counter)
        code = cli.main(command)
        taken = counter.count
        counter.last = -1
        note.write_text(json.dumps([code, taken]))
        os._exit(0)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return -os.WTERMSIG(status)
    code, taken = json.loads(note.read_text())
    assert code in codes, f"{command} ended with {code}"
    return int(taken)


def state(folder: Path) -> dict[str, str]:
    """Hash of every file below a folder, of those that say how long it took the name only."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            timed = path.name in ("convert.json", "rkedge.yaml")
            found[path.relative_to(folder).as_posix()] = "" if timed else hashlib.sha256(path.read_bytes()).hexdigest()
    return found


def command_line(name: str, folder: Path) -> list[str]:
    model, lora = str(demo.checkpoint()), str(demo.adapter())
    if name == "matrix":
        recipe = folder.parent / "matrix.yaml"
        grid = {"dtype": ["w8a8", "fp32"]}
        recipe.write_text(json.dumps({"checkpoint": model, "lora": [lora], "output": folder.name, "matrix": grid}))
        return ["convert", "--matrix", str(recipe), "-q", "--json"]
    return [name, model, "--lora", lora, "-o", str(folder / "made"), "-q"]


def main(name: str, root: Path, step: int) -> None:
    announce(rkemu.Writer, "write_rows")
    announce(hf_folder, "_write")
    folder = root / "out"
    folder.mkdir()
    command = command_line(name, folder)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    said, out = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(out, 1)
    steps = run(command, folder, 0)
    whole = state(folder)
    for last in sorted({*range(1, steps + 1, step), steps}):
        shutil.rmtree(folder)
        folder.mkdir()
        status = run(command, folder, last)
        # What has a name that begins with a dot is work in progress.
        there = {path.name: state(path) for path in folder.iterdir() if not path.name.startswith(".")}
        expected = {name: {key.partition("/")[2]: value for key, value in whole.items() if key.split("/")[0] == name}
                    for name in there}  # fmt: skip
        # A folder that is finished is refused by those that make one, and kept by a matrix.
        run(command, folder, 0, (0,) if name == "matrix" or not there else (3,))
        row = {
            "step": last,
            "of": steps,
            "status": status,
            "whole": there == expected,
            "bundles": len(there),
            "finished": state(folder) == whole and not list(folder.glob(".*")),
        }
        os.write(said, (json.dumps(row) + "\n").encode())


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
