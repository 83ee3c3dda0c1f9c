"""Fuzz the readers of models, adapters and prompt caches: `python -m tests.emulator.fuzz [INPUTS]`.

Needs clang++ with its libFuzzer.
"""

from __future__ import annotations

import os
import shutil
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from rkruntime.bundle.rkemu import TensorSpec, Writer
from rkruntime.resources import resource

SOURCES = ("cache", "file", "forward", "kernels", "kernels_plain", "ledger", "log", "memory", "model", "npu",
           "prompt_cache", "sampler", "threads", "tokenizer")  # fmt: skip
WORDS = ("blk.0.attn_q", ".scale", ".lora_a", ".lora_b", "output", "tokenizer.merges", "tokenizer.flags")
FLAGS = ("-std=c++17", "-O1", "-g", "-pthread", "-ffp-contract=off", "-fno-math-errno", "-fno-sanitize-recover=all",
         "-fsanitize=fuzzer,address,undefined", "-DFUZZING_BUILD_MODE_UNSAFE_FOR_PRODUCTION")  # fmt: skip
INPUTS = 500_000  # for each target
MAX_LENGTH = 16_384


def build(folder: Path, name: str) -> Path:
    """Compile a target."""
    emulator = resource("emulator")
    target = folder / f"{name}.bin"
    sources = [Path(__file__).with_name(f"{name}.cc"), *(emulator / f"{name}.cc" for name in SOURCES)]
    subprocess.run(["clang++", *FLAGS, f"-I{emulator}", *map(str, sources), "-o", str(target)], check=True)
    return target


def seed(path: Path, *, dtype: str, architecture: str, groups: int, tied: bool, sizes_only: bool = False) -> None:
    """A small model that is right in every respect."""
    rng = np.random.default_rng(len(path.name))
    vocab, hidden, inner, heads, kv_heads, dim, layers = 20, 8, 12, 2, 1, 4, 2
    tensors: dict[str, np.ndarray] = {}

    def matrix(name: str, *shape: int) -> None:
        if dtype == "FP32":
            tensors[name] = rng.standard_normal(shape).astype(np.float32)
            return
        tensors[name] = rng.integers(-128, 128, shape).astype(np.int8)
        tensors[f"{name}.scale"] = rng.random((shape[0], groups)).astype(np.float32)

    matrix("token_embd", vocab, hidden)
    if not tied:
        matrix("output", vocab, hidden)
    norms = ["attn_norm", "ffn_norm"] + (["attn_post_norm", "ffn_post_norm"] if architecture == "gemma2" else [])
    for layer in range(layers):
        for name, out, into in [
            ("attn_q", heads * dim, hidden), ("attn_k", kv_heads * dim, hidden), ("attn_v", kv_heads * dim, hidden),
            ("attn_o", hidden, heads * dim), ("ffn_gate", inner, hidden), ("ffn_up", inner, hidden),
            ("ffn_down", hidden, inner),
        ]:  # fmt: skip
            matrix(f"blk.{layer}.{name}", out, into)
        for name in norms:
            tensors[f"blk.{layer}.{name}"] = rng.standard_normal(hidden).astype(np.float32)
    tensors["output_norm"] = rng.standard_normal(hidden).astype(np.float32)
    texts = [
        b"<x>",
        b"<eos>",
        "▁".encode(),
        "é".encode(),
        "▁a".encode(),
        b"a",
        b"b",
        *(bytes([i]) for i in range(240, 253)),
    ]
    tensors["tokenizer.text"] = np.frombuffer(b"".join(texts), np.uint8)
    tensors["tokenizer.offsets"] = np.cumsum([0, *map(len, texts)]).astype(np.uint32)
    tensors["tokenizer.kinds"] = np.array([4, 1, 0, 0, 0, 0, 0] + [2] * 13, np.uint8)
    tensors["tokenizer.flags"] = np.array([7] + [0] * 19, np.uint8)
    tensors["tokenizer.merges"] = np.array([[2, 5, 4]], np.uint32)
    metadata = {
        "general.kind": "model", "general.architecture": architecture, "rkllm.target_platform": "RK3588",
        "rkllm.model_dtype": dtype, "rkllm.max_context": 64, "rkllm.npu_core_num": 3,
        "rkllm.chat_template.prefix": "<x>",
        "model.vocab_size": vocab, "model.hidden_size": hidden, "model.intermediate_size": inner,
        "model.num_hidden_layers": layers, "model.num_attention_heads": heads, "model.num_key_value_heads": kv_heads,
        "model.head_dim": dim, "model.sliding_window": 3, "model.layer_types": [1, 0], "model.rms_norm_eps": 1e-6,
        "model.rope_theta": 1e4, "model.query_pre_attn_scalar": 4.0, "model.attn_logit_softcapping": 5.0,
        "model.final_logit_softcapping": 5.0, "tokenizer.bos_token_id": 0, "tokenizer.unk_token_id": 1,
        "tokenizer.add_bos": 1, "tokenizer.eos_token_ids": [1],
    }  # fmt: skip
    specs = [TensorSpec(name, array.dtype.name, array.shape) for name, array in tensors.items()]
    with Writer(path, metadata, specs, sizes_only=sizes_only) as writer:
        if not sizes_only:
            for name, array in tensors.items():
                writer.write(name, array)


def adapter_seed(path: Path) -> None:
    """An adapter for the models of `seed`, right in every respect."""
    rng = np.random.default_rng(1)
    pairs = {"blk.0.attn_q": (8, 8), "blk.1.ffn_down": (8, 12)}
    tensors = {f"{name}.lora_a": rng.standard_normal((2, into)) for name, (_, into) in pairs.items()}
    tensors |= {f"{name}.lora_b": rng.standard_normal((out, 2)) for name, (out, _) in pairs.items()}
    specs = [TensorSpec(name, "float32", array.shape) for name, array in tensors.items()]
    with Writer(path, {"general.kind": "adapter", "adapter.alpha": 4.0}, specs) as writer:
        for name, array in tensors.items():
            writer.write(name, array.astype(np.float32))


def cache_seed(path: Path, length: int) -> None:
    """A prompt cache for the models of `seed`, without its checksum, which the target puts behind it."""
    half, layers, kv_heads, head_dim = 1, 2, 1, 4
    header = struct.pack("<8s8s5I", b"RKEMUKV1", b"fuzzing!", half, layers, kv_heads, head_dim, length)
    path.write_bytes(header + bytes(8 * length) + bytes(2 * layers * kv_heads * length * head_dim * 2))


def fuzz(name: str, inputs: int, folder: Path, *options: str) -> int:
    """Run the target over `folder`/NAME, its corpus; the exit status is libFuzzer's."""
    print(f"== {name}: {inputs:,} inputs", flush=True)
    command = [build(folder, name), f"-runs={inputs}", f"-max_len={MAX_LENGTH}", "-rss_limit_mb=2048",
               "-print_final_stats=1", f"-artifact_prefix={Path.cwd()}/", *options, folder / name]  # fmt: skip
    environment = os.environ | {"RKEMU_FUZZ_MODEL": str(folder / "model")}
    return subprocess.run([str(part) for part in command], env=environment, check=False).returncode


def main() -> int:
    """Build, seed and run both targets; the worst exit status."""
    inputs = int(sys.argv[1]) if len(sys.argv) > 1 else INPUTS
    with tempfile.TemporaryDirectory(prefix="rkemu-fuzz-") as name:
        folder = Path(name)
        models, others = folder / "file_fuzz", folder / "adapter_fuzz"
        models.mkdir()
        others.mkdir()
        seed(models / "w8a8", dtype="W8A8", architecture="gemma2", groups=1, tied=True)
        seed(models / "grouped", dtype="W8A8_G4", architecture="gemma2", groups=2, tied=False)
        seed(models / "float", dtype="FP32", architecture="gemma", groups=1, tied=True)
        seed(models / "sizes", dtype="W8A8", architecture="gemma", groups=1, tied=True, sizes_only=True)
        shutil.copy(models / "w8a8", folder / "model")
        adapter_seed(others / "adapter")
        for length in (0, 3, 8):
            cache_seed(others / f"cache-{length}", length)
        words = folder / "words.dict"
        words.write_text("".join(f'"{word}"\n' for word in WORDS))
        # The library says on stderr which prompt cache it has read.
        return max(
            fuzz("file_fuzz", inputs, folder, f"-dict={words}"),
            fuzz("adapter_fuzz", inputs, folder, f"-dict={words}", "-close_fd_mask=2"),
        )


if __name__ == "__main__":
    sys.exit(main())
