"""`rkedge merge` on a model of Gemma 2 2B's shape, against a copy of its files and against peft.

The checkpoint (about 5 GB) and the adapter are made here, of random weights. Each way runs in a process of its own,
with a warm page cache, and in turn; processor time and peak memory are the kernel's figures for all of its processes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import numpy as np
from tests.bench._machine import Cost, run
from tests.bench._report import Aim, Report, at_most, pairs, turns

from rkconvert.model.families import gemma2
from rkconvert.model.gemma import parse_config
from rkconvert.output.hf_folder import plan_shards
from rkconvert.output.host_memory import read_memory
from rkconvert.tensors.weights import TensorInfo

CONFIG = gemma2.FAMILY.defaults | {
    "architectures": ["Gemma2ForCausalLM"],
    "model_type": "gemma2",
    "dtype": "bfloat16",
    "hidden_activation": "gelu_pytorch_tanh",
    "pad_token_id": 0,
}
RANK = 16
SHARD = 2_500_000_000
LIMITS = """
The weights are random, and an adapter of another rank costs another time. `cp` copies within the kernel on one core, so
the ratio is worse where other work takes the second one. On a disk that is slower than memory both wait for it. On file
systems that share blocks between files (btrfs, XFS), `cp` copies nothing, and its ratio says nothing.

The processor time on all CPUs is a limit: the merge would take that long if nothing in it waited. Half of it is the
kernel's, for one copy of what is read and one of what is written, where `cp` makes a single one (copy_file_range); of
the rest a tenth is Python's start, and most the product and some ten passes over blocks that are in a core's cache. No
hash is in it.
"""
COSTS = {
    "wall_s": ("until written", "s"),
    "disk_s": ("until on the disk", "s"),
    "cpu_s": ("processor time", "s"),
    "peak_mb": ("peak memory", "MB"),
}
MEMORY = Path("/dev/shm")
PEFT_ROUNDS = 3  # each takes most of a minute
RKEDGE = [sys.executable, "-m", "rkruntime.cli"]
PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, lora, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base)
PeftModel.from_pretrained(model, lora).merge_and_unload().save_pretrained(out, max_shard_size="2GB")
"""


def random_bfloat16(rng: np.random.Generator, size: int) -> np.ndarray:
    """Finite weights around 0.01, as their bits."""
    bits = np.frombuffer(rng.bytes(size * 2), np.uint16)
    return (bits & np.uint16(0x80FF)) | np.uint16(0x3C00)


def make_checkpoint(folder: Path, layers: int) -> None:
    """config.json, an index and shards."""
    folder.mkdir()
    settings = CONFIG | {"num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(settings))
    tensors = {name: TensorInfo("BF16", shape) for name, shape in parse_config(settings).tensors().items()}
    rng = np.random.default_rng(0)
    plans = plan_shards(tensors, SHARD)
    for plan in plans:
        with (folder / plan.name).open("wb") as file:
            file.write(plan.header())
            for info in plan.tensors.values():
                for first in range(0, info.size, 1 << 24):
                    file.write(random_bfloat16(rng, min(1 << 24, info.size - first)).data)
    if len(plans) > 1:
        index = {name: plan.name for plan in plans for name in plan.tensors}
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def make_adapter(folder: Path, layers: int) -> None:
    """Rank 16 on all seven linear layers of each block, float32, as peft saves it."""
    from safetensors.numpy import save_file

    folder.mkdir()
    rng = np.random.default_rng(1)
    tensors = {}
    for name, shape in parse_config(CONFIG | {"num_hidden_layers": layers}).tensors().items():
        if "_proj" in name:
            module = f"base_model.model.{name.removesuffix('.weight')}"
            tensors[f"{module}.lora_A.weight"] = rng.standard_normal((RANK, shape[1]), np.float32) * 0.02
            tensors[f"{module}.lora_B.weight"] = rng.standard_normal((shape[0], RANK), np.float32) * 0.02
    save_file(tensors, folder / "adapter_model.safetensors")
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": 32, "target_modules": targets}
    (folder / "adapter_config.json").write_text(json.dumps(settings))


def memory_folders(layers: int) -> Iterator[Path]:
    """/dev/shm, if the inputs and a result have room there, and in memory as a whole."""
    needed = 3 * (layers * 160 + 1200) * 1_000_000
    with suppress(OSError):
        if min(shutil.disk_usage(MEMORY).free, read_memory().available) > needed:
            yield MEMORY


def kind_of(folder: Path) -> str:
    """Where files in a folder are."""
    return "in memory" if folder == MEMORY else "on a disk"


def touch_memory(scratch: Path, size: int) -> None:
    """Write and remove as much as will be written: a virtual machine takes its time for memory it has not used yet."""
    with scratch.open("wb") as file:
        for _ in range(0, size, 1 << 24):
            file.write(bytes(1 << 24))
    scratch.unlink()
    os.sync()


def main() -> int:
    """A copy, a merge and peft in turns, on a disk and, where there is room, in memory."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=26, help="fewer for a quick look")
    parser.add_argument("--no-peft", action="store_true")
    parser.add_argument("--folder", type=Path, action="append", help="where to work; needs 16 GB")
    args = parser.parse_args()
    report = Report("merge", __doc__, limits=LIMITS)
    report.version_of("numpy", "peft", "torch", "transformers")
    for folder in args.folder or [Path(tempfile.gettempdir()), *memory_folders(args.layers)]:
        with tempfile.TemporaryDirectory(dir=folder) as name:
            work = Path(name)
            make_checkpoint(work / "base", args.layers)
            make_adapter(work / "lora", args.layers)
            _measure(report, work, kind_of(folder), peft=not args.no_peft)
    return report.close()


def _measure(report: Report, work: Path, where: str, *, peft: bool) -> None:
    base, lora, out = work / "base", work / "lora", work / "out"
    size = sum(file.stat().st_size for file in base.iterdir())

    def way(*command: object) -> Callable[[], Cost]:
        def work_once() -> Cost:
            touch_memory(work / "scratch", size)
            cost = run([str(word) for word in command])
            shutil.rmtree(out)
            return cost

        return work_once

    ours = {"rkedge merge": way(*RKEDGE, "merge", base, "--lora", lora, "-o", out, "--quiet")}
    copy, other = way("cp", "-r", base, out), way(sys.executable, "-c", PEFT, base, lora, out)
    made = f"{size / 1e9:.2f} GB {where}"
    found = turns(ours | {"cp -r": copy}, pairs())
    _compare(report, made, found, {"cp -r": at_most(1.5)})
    cpus = len(os.sched_getaffinity(0))
    least = [cost.cpu_s / cpus for cost in found["rkedge merge"]]
    report.compare(
        f"{made}: processor time on {cpus} CPUs, until written",
        "s",
        {"rkedge merge": least, "cp -r": [cost.wall_s for cost in found["cp -r"]]},
    )
    if peft:
        _compare(report, f"{made}, in turns with peft", turns(ours | {"peft": other}, min(PEFT_ROUNDS, pairs())), {})


def _compare(report: Report, made: str, found: dict[str, list[Cost]], aims: dict[str, Aim]) -> None:
    for key, (what, unit) in COSTS.items():
        of = {name: [getattr(cost, key) for cost in costs] for name, costs in found.items()}
        report.compare(f"{made}: {what}", unit, of, aims=aims if key in ("wall_s", "disk_s") else None)


if __name__ == "__main__":
    sys.exit(main())
