"""The emulator beside llama.cpp's Q8_0: same machine, same run, 2B-shaped random weights, 2 threads.

llama-cpp-python is not a dependency of this project: name an interpreter that has it in RKEDGE_LLAMA_PYTHON, or the
emulator's own figures are all there is. Runs of both alternate, and the ratio is taken of neighbours, because the speed
of a shared machine wanders. Builds of ggml with AMX were seen to crash in `ldtilecfg` when compiled with g++ 12; set
RKEDGE_LLAMA_NO_REPACK=1 to measure it without its extra buffer types then.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from rkboard.emulator import build as emulator
from rkruntime.bundle.rkemu import TensorSpec, Writer

HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, DIM, VOCAB = 2304, 9216, 26, 8, 4, 256, 256000
PROMPT, NEW, ROUNDS = 128, 24, 3
SCALE = 0.02 / 73  # a standard deviation of 0.02 over even int8
MATRICES = {
    "attn_q": (HEADS * DIM, HIDDEN),
    "attn_k": (KV_HEADS * DIM, HIDDEN),
    "attn_v": (KV_HEADS * DIM, HIDDEN),
    "attn_o": (HIDDEN, HEADS * DIM),
    "ffn_gate": (INNER, HIDDEN),
    "ffn_up": (INNER, HIDDEN),
    "ffn_down": (HIDDEN, INNER),
}
NORMS = ("attn_norm", "attn_post_norm", "ffn_norm", "ffn_post_norm")
GGUF_NAMES = {
    "attn_o": "attn_output", "attn_post_norm": "post_attention_norm", "ffn_post_norm": "post_ffw_norm"
}  # fmt: skip

EMULATOR = """
import ctypes, json, sys, time
sys.path[:0] = json.loads(sys.argv[3])
import importlib.util
spec = importlib.util.spec_from_file_location("client", sys.argv[4])
module = importlib.util.module_from_spec(spec); sys.modules["client"] = module; spec.loader.exec_module(module)
from pathlib import Path
began = time.perf_counter()
client = module.Client(Path(sys.argv[1]), Path(sys.argv[2]), "1.2.3", params={
    "max_context_len": 1024, "max_new_tokens": %d, "enabled_cpus_num": 4})
load = time.perf_counter() - began
assert client.status == 0
for line in sys.stdin:
    client.clear()
    assert client.run(json.loads(line)) == 0
    perf = client.last.perf
    print(json.dumps({"load": load, "prefill": perf.prefill_tokens / perf.prefill_time_ms * 1000,
        "decode": (perf.generate_tokens - 1) / perf.generate_time_ms * 1000, "rss": perf.memory_usage_mb}), flush=True)
"""

LLAMA = """
import json, os, resource, sys, time
import llama_cpp
from llama_cpp import Llama, llama_cpp as bare
if os.environ.get("RKEDGE_LLAMA_NO_REPACK"):
    usual = bare.llama_model_default_params
    def without():
        params = usual()
        params.use_extra_bufts = False
        return params
    bare.llama_model_default_params = llama_cpp.llama_model_default_params = without
began = time.perf_counter()
llm = Llama(sys.argv[1], n_ctx=1024, n_threads=2, n_threads_batch=2, n_batch=512, verbose=False)
load = time.perf_counter() - began
for line in sys.stdin:
    ids = json.loads(line)
    llm.reset()
    began = time.perf_counter(); llm.eval(ids); prefill = time.perf_counter() - began
    began = time.perf_counter()
    for token in range(100, 100 + %d - 1):
        llm.eval([token])
    decode = time.perf_counter() - began
    print(json.dumps({"load": load, "prefill": len(ids) / prefill, "decode": (%d - 1) / decode,
        "rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}), flush=True)
"""


def write_rkemu(path: Path) -> int:
    """The model for the emulator; returns the bytes of its tensors."""
    rng = np.random.default_rng(0)
    specs = []
    matrices = {"token_embd": (VOCAB, HIDDEN)}
    for layer in range(LAYERS):
        matrices |= {f"blk.{layer}.{name}": shape for name, shape in MATRICES.items()}
    for name, shape in matrices.items():
        specs += [TensorSpec(name, "int8", shape), TensorSpec(f"{name}.scale", "float32", (shape[0], 1))]
    specs += [TensorSpec(f"blk.{i}.{name}", "float32", (HIDDEN,)) for i in range(LAYERS) for name in NORMS]
    specs.append(TensorSpec("output_norm", "float32", (HIDDEN,)))
    texts = [f"{i:08x}".encode() for i in range(VOCAB)]
    tables = {
        "tokenizer.text": np.frombuffer(b"".join(texts), np.uint8),
        "tokenizer.offsets": np.arange(VOCAB + 1, dtype=np.uint32) * 8,
        "tokenizer.kinds": np.zeros(VOCAB, np.uint8),
        "tokenizer.merges": np.zeros((0, 3), np.uint32),
    }
    specs += [TensorSpec(name, table.dtype.name, table.shape) for name, table in tables.items()]
    metadata = {
        "general.kind": "model", "general.architecture": "gemma2", "general.name": "random", "rkllm.max_context": 4096,
        "rkllm.target_platform": "RK3588", "rkllm.model_dtype": "W8A8", "rkllm.npu_core_num": 3,
        "model.vocab_size": VOCAB, "model.hidden_size": HIDDEN, "model.intermediate_size": INNER,
        "model.num_hidden_layers": LAYERS, "model.num_attention_heads": HEADS, "model.num_key_value_heads": KV_HEADS,
        "model.head_dim": DIM, "model.sliding_window": 4096, "model.layer_types": [1 - i % 2 for i in range(LAYERS)],
        "model.rms_norm_eps": 1e-6, "model.rope_theta": 1e4, "model.query_pre_attn_scalar": 256.0,
        "model.attn_logit_softcapping": 50.0, "model.final_logit_softcapping": 30.0, "tokenizer.bos_token_id": 2,
        "tokenizer.unk_token_id": 3, "tokenizer.add_bos": 1, "tokenizer.eos_token_ids": [1],
    }  # fmt: skip
    with Writer(path, metadata, specs) as writer:
        for spec in specs:
            if spec.dtype == "int8":
                array: Any = rng.integers(-127, 128, spec.shape, np.int8)
            elif spec.name.endswith(".scale"):
                array = np.full(spec.shape, SCALE, np.float32)
            else:
                array = tables.get(spec.name, np.zeros(spec.shape, np.float32))
            writer.write(spec.name, array)
    return sum(spec.nbytes for spec in specs)


def write_gguf(path: Path) -> None:
    """The same shape in llama.cpp's Q8_0."""
    import gguf

    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(str(path), "gemma2")
    writer.add_context_length(8192)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_key_length(DIM)
    writer.add_value_length(DIM)
    writer.add_attn_logit_softcapping(50.0)
    writer.add_final_logit_softcapping(30.0)
    writer.add_sliding_window(4096)
    writer.add_tokenizer_model("llama")
    writer.add_add_space_prefix(False)
    writer.add_tokenizer_pre("default")
    writer.add_token_list([f"{i:08x}".encode() for i in range(VOCAB)])
    writer.add_token_scores([-float(i) for i in range(VOCAB)])
    writer.add_token_types([3] * 6 + [1] * (VOCAB - 6))
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(3)

    def matrix(name: str, rows: int, width: int) -> None:
        blocks = np.empty((rows, width // 32, 34), np.uint8)
        blocks[:, :, :2] = np.frombuffer(np.float16(SCALE).tobytes(), np.uint8)
        blocks[:, :, 2:] = rng.integers(-127, 128, (rows, width // 32, 32), np.int8).view(np.uint8)
        data = blocks.reshape(rows, -1)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=gguf.GGMLQuantizationType.Q8_0)

    matrix("token_embd", VOCAB, HIDDEN)
    for i in range(LAYERS):
        for name, shape in MATRICES.items():
            matrix(f"blk.{i}.{GGUF_NAMES.get(name, name)}", *shape)
        for name in NORMS:
            writer.add_tensor(f"blk.{i}.{GGUF_NAMES.get(name, name)}.weight", np.ones(HIDDEN, np.float32))
    writer.add_tensor("output_norm.weight", np.ones(HIDDEN, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


class Engine:
    """A process that answers a prompt's ids on stdin with its figures on stdout."""

    def __init__(self, command: list[str]) -> None:
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )

    def measure(self, ids: list[int]) -> dict[str, float]:
        """Figures of one run; SystemExit if the process is gone."""
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(ids) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise SystemExit(f"{self.process.args[0]} ended with {self.process.wait()}")  # type: ignore[index]
        return dict(json.loads(line))

    def close(self) -> None:
        """End it."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(60)


def show(name: str, rows: list[dict[str, float]]) -> None:
    """Medians of one engine."""
    middle = {key: statistics.median(row[key] for row in rows) for key in rows[0]}
    print(
        f"{name:10} prefill {middle['prefill']:7.1f} tok/s   decode {middle['decode']:6.2f} tok/s   "
        f"load {middle['load']:5.2f} s   peak {middle['rss']:6.0f} MB",
        flush=True,
    )


def main() -> int:
    """Write both models, measure in turns, print medians and ratios."""
    llama = os.environ.get("RKEDGE_LLAMA_PYTHON")
    with tempfile.TemporaryDirectory(prefix="rkemu-bench-") as name:
        folder = Path(name)
        weights = write_rkemu(folder / "model.rkemu") / 2**20
        client = Path(__file__).parents[1] / "emulator" / "conftest.py"
        arguments = [emulator.build("1.2.3"), folder / "model.rkemu", json.dumps(sys.path), client]
        engines = {"emulator": [sys.executable, "-c", EMULATOR % NEW, *map(str, arguments)]}
        if llama:
            write_gguf(folder / "model.gguf")
            engines["llama.cpp"] = [llama, "-c", LLAMA % (NEW, NEW), str(folder / "model.gguf")]
        else:
            print("no llama.cpp: RKEDGE_LLAMA_PYTHON names no interpreter that has llama-cpp-python")
        ids = [int(i) for i in np.random.default_rng(1).integers(6, VOCAB, PROMPT)]
        results: dict[str, list[dict[str, float]]] = {engine: [] for engine in engines}
        running = {engine: Engine(command) for engine, command in engines.items()}
        for engine in running.values():
            engine.measure(ids)
        for _ in range(ROUNDS):
            for engine_name, engine in running.items():
                time.sleep(0.2)
                results[engine_name].append(engine.measure(ids))
        for engine in running.values():
            engine.close()
    for engine_name, rows in results.items():
        show(engine_name, rows)
    peak = max(row["rss"] for row in results["emulator"])
    print(f"memory     {peak / weights:.3f} of the {weights:.0f} MB of weights")
    if llama:
        for what in ("prefill", "decode"):
            pairs = zip(results["emulator"], results["llama.cpp"], strict=True)
            ratio = statistics.median(ours[what] / theirs[what] for ours, theirs in pairs)
            print(f"{what:10} {ratio:.2f} x llama.cpp Q8_0")
    return 0


if __name__ == "__main__":
    sys.exit(main())
