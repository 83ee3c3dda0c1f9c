"""`rkedge merge` on a model of Gemma 2 2B's shape, against a copy of its files and against peft.

The checkpoint (about 5 GB) and the adapter are made here, of random weights. Each way runs in a process of its own,
with a warm page cache, and in turn; peak memory is what the kernel says of the process (of a copy, that of this one).
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

from rkconvert.model.families import gemma2
from rkconvert.model.gemma import parse_config
from rkconvert.output.hf_folder import plan_shards
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


def touch_memory(scratch: Path, size: int) -> None:
    """Write and remove as much as will be written: a virtual machine takes its time for memory it has not used yet."""
    with scratch.open("wb") as file:
        for _ in range(0, size, 1 << 24):
            file.write(bytes(1 << 24))
    scratch.unlink()
    os.sync()


def measure(command: list[str]) -> tuple[float, float, float]:
    """Seconds until a command ends, seconds until what it wrote is on the disk, and its peak memory in MB."""
    before = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert process.stderr is not None
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    written = time.perf_counter() - before
    if status:
        sys.exit(f"{command[:3]} failed:\n{errors.decode()[-2000:]}")
    os.sync()
    return written, time.perf_counter() - before, usage.ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=26, help="fewer for a quick look")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--no-peft", action="store_true")
    parser.add_argument("--folder", type=Path, help="where to work; needs 16 GB")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        work = Path(name)
        base, lora, out = work / "base", work / "lora", work / "out"
        make_checkpoint(base, args.layers)
        make_adapter(lora, args.layers)
        size = sum(file.stat().st_size for file in base.iterdir())
        print(f"{size / 1e9:.2f} GB in {len(list(base.glob('*.safetensors')))} shards, rank {RANK}")
        ways = {
            "copy": ["cp", "-r", str(base), str(out)],
            "rkedge merge": [*RKEDGE, "merge", str(base), "--lora", str(lora), "-o", str(out), "--quiet"],
            "peft": [sys.executable, "-c", PEFT, str(base), str(lora), str(out)],
        }
        if args.no_peft:
            del ways["peft"]
        runs: dict[str, list[tuple[float, float, float]]] = {way: [] for way in ways}
        for _ in range(args.rounds):
            for way, command in ways.items():
                touch_memory(work / "scratch", size)
                runs[way].append(measure(command))
                shutil.rmtree(out)
        print(f"{'':14} {'written':>9} {'on disk':>9} {'peak memory':>12}   (medians of {args.rounds})")
        medians = {
            way: [statistics.median(column) for column in zip(*found, strict=True)] for way, found in runs.items()
        }
        for way, (written, flushed, memory) in medians.items():
            print(f"{way:14} {written:7.2f} s {flushed:7.2f} s {memory:9.0f} MB")
        for at, what in enumerate(("written", "on disk")):
            print(
                f"merge / copy, {what}: {medians['rkedge merge'][at] / medians['copy'][at]:.2f} (wanted: at most 1.5)"
            )


if __name__ == "__main__":
    main()
