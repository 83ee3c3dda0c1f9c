"""Blocks of Gemma 2 in the vendor's rknn-toolkit2: which types it takes, and how near its simulator is to ours.

`python -m tests.rknn.measure` writes converter/rkconvert/compat/rknn.yaml, with the environment that
`rkedge toolkit setup --rknn` made. Some ten minutes on two cores.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from tests.rknn.blocks import CAP, EPSILON

from rkconvert import demo
from rkconvert.toolkit.rknn import find_rknn

DATA = Path(__file__).parents[2] / "converter" / "rkconvert" / "compat" / "rknn.yaml"
# The types that RKEdge plans with, on SoCs that the toolkit and RKLLM both know.
TRIED = {"rk3588": ("w8a8", "w4a16", "fp16"), "rk3576": ("w8a8", "w4a16", "fp16"), "rk3562": ("w8a8", "w4a16", "fp16")}
ROWS = 16
COMPARED = 4
_HEAD = """\
# Written by `python -m tests.rknn.measure`; do not edit. vendor, ours: cosine to float32, largest error in
# standard deviations; of the vendor's simulator, and of w8a8 as the emulator computes it.
"""
_VERSION = "import importlib.metadata as m; print(m.version('rknn-toolkit2'))"


@dataclass(frozen=True)
class Block:
    """A part of a model: its graph's name in blocks.py, weights, and inputs [samples, ROWS, width]."""

    name: str
    kind: str
    weights: Mapping[str, Any]
    samples: Any

    @property
    def outputs(self) -> int:
        return int(self.weights["w"].shape[0] if self.kind in ("matrix", "head") else self.samples.shape[2])

    def computed(self, times: Callable[[Any, Any], Any]) -> Any:
        """The result for the first samples, with a product of values and a matrix [outputs, inputs]."""
        x, weights = self.samples[:COMPARED], self.weights
        if self.kind == "norm":
            return x / np.sqrt((x * x).mean(-1, keepdims=True) + EPSILON) * (1 + weights["w"])
        if self.kind == "mlp":
            gate = times(x, weights["gate"])
            gelu = 0.5 * gate * (1 + np.tanh((2 / np.pi) ** 0.5 * (gate + 0.044715 * gate**3)))
            return times(gelu * times(x, weights["up"]), weights["down"])
        values = times(x, weights["w"]) if "w" in weights else x
        return CAP * np.tanh(values / CAP) if self.kind in ("head", "softcap") else values


def demo_blocks() -> Iterator[Block]:
    """One layer and the head of the demo model, with what they are given when it answers questions."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(demo.checkpoint(), dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(demo.checkpoint())
    layer, seen = model.model.layers[1], {}
    attention = {name: getattr(layer.self_attn, name) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    parts = {**attention, "mlp": layer.mlp, "norm": layer.input_layernorm, "head": model.lm_head}
    for name, module in parts.items():
        module.register_forward_hook(lambda _, given, __, name=name: seen.setdefault(name, []).append(given[0][0]))
    for row in demo.questions()[:16]:
        turns = [{"role": "user", "content": row.question}, {"role": "model", "content": row.answer}]
        with torch.no_grad():
            model(tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=True)["input_ids"])
    samples = {
        name: np.stack([rows[:ROWS].detach().numpy() for rows in found if len(rows) >= ROWS])
        for name, found in seen.items()
    }
    weight = {name: module.weight.detach().numpy() for name, module in parts.items() if name != "mlp"}
    gated = {name: getattr(layer.mlp, f"{name}_proj").weight.detach().numpy() for name in ("gate", "up", "down")}
    for name in attention:
        yield Block(f"demo {name}", "matrix", {"w": weight[name]}, samples[name])
    yield Block("demo mlp", "mlp", gated, samples["mlp"])
    yield Block("demo norm", "norm", {"w": weight["norm"]}, samples["norm"])
    yield Block("demo head", "head", {"w": weight["head"]}, samples["head"])
    yield Block("demo softcap", "softcap", {}, samples["head"] @ weight["head"].T)


def shaped_blocks() -> Iterator[Block]:
    """Blocks of Gemma 2 2B's sizes with random weights and inputs: nobody's model can be downloaded in a test."""
    random = np.random.default_rng(1)

    def normal(*shape: int) -> Any:
        return random.standard_normal(shape).astype(np.float32)

    def matrix(outputs: int, inputs: int) -> Any:
        return normal(outputs, inputs) * np.float32(inputs**-0.5)

    x, heads = normal(8, ROWS, 2304), normal(8, ROWS, 2048)
    yield Block("2B q_proj", "matrix", {"w": matrix(2048, 2304)}, x)
    yield Block("2B k_proj", "matrix", {"w": matrix(1024, 2304)}, x)
    yield Block("2B o_proj", "matrix", {"w": matrix(2304, 2048)}, heads)
    yield Block("2B mlp", "mlp", {"gate": matrix(9216, 2304), "up": matrix(9216, 2304), "down": matrix(2304, 9216)}, x)
    yield Block("2B norm", "norm", {"w": normal(2304) * np.float32(0.2)}, x)


def rounded(values: Any) -> Any:
    """To int8 per row, symmetric, as the emulator computes."""
    scale = np.abs(values).max(-1, keepdims=True) / 127
    return np.round(values / np.where(scale == 0, 1, scale)) * scale


def likeness(found: Any, true: Any) -> list[float]:
    """Cosine, and the largest error in standard deviations of the true values."""
    a, b = found.ravel().astype(float), true.ravel().astype(float)
    cosine = a @ b / (np.linalg.norm(a) * np.linalg.norm(b))
    return [round(float(cosine), 6), round(float(np.abs(a - b).max() / b.std()), 3)]


def measure(python: Path, blocks: Sequence[Block], tried: Mapping[str, Sequence[str]]) -> list[dict[str, Any]]:
    """A row for each block, SoC and type."""
    with tempfile.TemporaryDirectory() as folder:
        jobs, by_name = [], {block.name: block for block in blocks}
        for block in blocks:
            file = f"{folder}/{block.name}.npz"
            np.savez(file, samples=block.samples, **block.weights)
            jobs += [
                {"block": block.name, "kind": block.kind, "file": file, "outputs": block.outputs, "compared": COMPARED,
                 "platform": soc, "type": dtype, "result": f"{folder}/{block.name}-{soc}-{dtype}.npy"}
                for soc, types in tried.items() for dtype in types
            ]  # fmt: skip
        command = [str(python), "-I", str(Path(__file__).with_name("blocks.py"))]
        done = subprocess.run(command, input=json.dumps(jobs), capture_output=True, text=True, check=False)
        lines = [json.loads(line) for line in done.stdout.splitlines()]
        if len(lines) != len(jobs):
            raise RuntimeError(done.stderr[-2000:])
        return [_row(by_name[line["job"]["block"]], line) for line in lines]


def _row(block: Block, line: Mapping[str, Any]) -> dict[str, Any]:
    job = line["job"]
    row = {"block": block.name, "soc": job["platform"], "type": job["type"]}
    if "words" in line:
        return {**row, "refused_by": line["refused_by"], "words": line["words"]}
    found, true = np.load(job["result"]), block.computed(lambda x, w: x @ w.T)
    ours = block.computed(lambda x, w: rounded(x) @ rounded(w).T)
    beside = {"ours": likeness(ours, true)} if job["type"] == "w8a8" else {}
    return {**row, "vendor": likeness(found, true), **beside}


def main() -> None:
    python = find_rknn()
    if python is None:
        sys.exit("There is no rknn-toolkit2 here: rkedge toolkit setup --rknn")
    version = subprocess.run([python, "-c", _VERSION], capture_output=True, text=True, check=True).stdout.strip()
    rows = measure(python, [*demo_blocks(), *shaped_blocks()], TRIED)
    data = {"tool": f"rknn-toolkit2 {version}", "rows": rows}
    text = yaml.safe_dump(data, sort_keys=False, width=118, default_flow_style=None)
    DATA.write_text(_HEAD + text)


if __name__ == "__main__":
    main()
