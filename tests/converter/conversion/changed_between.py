"""A command killed at a random step, its inputs or options changed, and given again.

`python changed_between.py FOLDER SEED TRIALS` prints a line of JSON for each trial: what was changed,
whether the second run's result is that of a run from nothing, and whether both ended well.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kill_points import announce, run, state

from rkconvert import demo
from rkconvert.output import hf_folder
from rkruntime.bundle import rkemu

SHARD = 300_000
COMMANDS = ("merge", "convert")
PADDING = {
    "strategy": {"Fixed": 9}, "direction": "Left", "pad_to_multiple_of": None,
    "pad_id": 0, "pad_type_id": 0, "pad_token": "<pad>",
}  # fmt: skip


def edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def flip(path: Path) -> None:
    """Another mantissa in every weight, in a file of the size and the time of change that it had."""
    times = path.stat().st_atime_ns, path.stat().st_mtime_ns
    with path.open("r+b") as file:
        header = 8 + int.from_bytes(file.read(8), "little")
        file.seek(header)
        data = bytearray(file.read())
        data[::2] = bytes(byte ^ 0x11 for byte in data[::2])
        file.seek(header)
        file.write(data)
    os.utime(path, ns=times)


def weights(folder: Path) -> Path:
    return next(folder.glob("*.safetensors"))


def exchange(path: Path) -> None:
    """Another file in the place of this one, as `cp -p` leaves it."""
    other = path.with_name("other")
    shutil.copy2(path, other)
    flip(other)
    other.replace(path)


# Each gets the folder with `base` and `lora`, and the arguments, which it may change.
CHANGES: dict[str, Callable[[Path, list[str]], object]] = {
    "nothing": lambda at, line: None,
    "weight": lambda at, line: line.__setitem__(2, f"{at}/lora=-2"),
    "second adapter": lambda at, line: line.extend(["--lora", f"{at}/lora"]),
    "alpha": lambda at, line: edit(at / "lora" / "adapter_config.json", lora_alpha=77),
    "rslora": lambda at, line: edit(at / "lora" / "adapter_config.json", use_rslora=True),
    "adapter rewritten": lambda at, line: flip(weights(at / "lora")),
    "adapter exchanged": lambda at, line: exchange(weights(at / "lora")),
    "base rewritten": lambda at, line: flip(weights(at / "base")),
    "base exchanged": lambda at, line: exchange(weights(at / "base")),
    "config": lambda at, line: edit(at / "base" / "config.json", rms_norm_eps=1e-5),
    "generation": lambda at, line: (at / "base" / "generation_config.json").write_text('{"eos_token_id": [1, 107, 5]}'),
    "tokenizer": lambda at, line: edit(at / "base" / "tokenizer.json", padding=PADDING),
    "template": lambda at, line: (at / "base" / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}<u>{{ m['content'] }}</u>{% endfor %}"
    ),
}  # fmt: skip


def prepare(root: Path) -> list[str]:
    """Fresh inputs and empty places for results; the arguments that name them."""
    shutil.rmtree(root, ignore_errors=True)
    for name in ("out", "again"):
        (root / name).mkdir(parents=True)
    shutil.copytree(demo.checkpoint(), root / "base")
    shutil.copytree(demo.adapter(), root / "lora")
    return [str(root / "base"), "--lora", f"{root}/lora=0.5"]


def trial(root: Path, command: str, change: str, kill_at: int) -> dict[str, Any]:
    arguments, out, again = prepare(root), root / "out", root / "again"
    run([command, *arguments, "-o", str(out / "made"), "-q"], out, kill_at)
    CHANGES[change](root, arguments)
    steps = [run([command, *arguments, "-o", str(folder / "made"), "-q"], folder, 0) for folder in (out, again)]
    found, expected = state(out), state(again)
    differ = sorted(key for key in {*found, *expected} if found.get(key) != expected.get(key))
    return {"command": command, "change": change, "killed": kill_at, "differ": differ, "steps": steps}


def main(root: Path, seed: int, trials: int) -> None:
    announce(rkemu.Writer, "write_rows")
    announce(hf_folder, "_write")
    for function in (hf_folder.write_weights, hf_folder.resumable):
        function.__defaults__ = (SHARD,)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    said = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    place, rng, steps = root / "trial", random.Random(seed), {}
    for command in COMMANDS:
        steps[command] = run([command, *prepare(place), "-o", str(place / "out" / "made"), "-q"], place / "out", 0)
    names = [name for _ in range(trials // len(CHANGES) + 1) for name in rng.sample(list(CHANGES), len(CHANGES))]
    for name in names[:trials]:
        command = rng.choice([*COMMANDS, "merge"])
        # Behind the step before the last the result is whole, and not made again.
        row = trial(place, command, name, rng.randint(1, steps[command] - 2))
        os.write(said, (json.dumps(row) + "\n").encode())


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
