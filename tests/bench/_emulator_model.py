"""Models of random weights in the shape of Gemma 2 2B, but with fewer layers, for the emulator and for llama.cpp."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from rkruntime.bundle.rkemu import TensorSpec, Writer

# 4 of 26 layers, so that long contexts take seconds; a vocabulary of the same share keeps the head's part of a token.
HIDDEN, INNER, LAYERS, HEADS, KV_HEADS, DIM, VOCAB = 2304, 9216, 4, 8, 4, 256, 39424
MAX_CONTEXT = 4096
KV_BYTES = LAYERS * KV_HEADS * DIM * 2 * 2  # of a position: keys and values, half floats
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


def shape() -> dict[str, Any]:
    """What an engine needs to know that writes its own."""
    return {
        "hidden": HIDDEN, "inner": INNER, "layers": LAYERS, "heads": HEADS, "kv_heads": KV_HEADS, "dim": DIM,
        "vocab": VOCAB, "scale": SCALE,
    }  # fmt: skip


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
        "general.kind": "model", "general.architecture": "gemma2", "general.name": "random",
        "rkllm.max_context": MAX_CONTEXT,
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
