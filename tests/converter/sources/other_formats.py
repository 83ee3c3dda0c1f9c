"""A checkpoint folder's weights as other formats store them: .bin, bitsandbytes, GGUF."""

from __future__ import annotations

import json

import gguf
import numpy as np
import torch
from bitsandbytes import functional as bnb
from safetensors.torch import load_file, save_file

from rkconvert.tensors.weights import row_blocks


def everything(checkpoint, block=700):
    weights = checkpoint.weights
    return {
        name: np.concatenate([weights.read(name, *place) for place in row_blocks(info.shape, block)])
        for name, info in weights.tensors.items()
    }


def state_of(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def as_bin(folder, shards=2):
    """The same folder with .bin files."""
    state = state_of(folder)
    for file in [*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")]:
        file.unlink()
    names = sorted(state)
    index = {name: f"pytorch_model-{at % shards}.bin" for at, name in enumerate(names)}
    for file in set(index.values()):
        torch.save({name: state[name] for name in names if index[name] == file}, folder / file)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return state


def quantize(folder, kind, nested=False, dtype=torch.bfloat16):
    """The folder's linear layers as bitsandbytes saves them; what it dequantizes them to."""
    state, saved, expected = state_of(folder), {}, {}
    for name, tensor in state.items():
        if "_proj" not in name:
            saved[name] = expected[name] = tensor
        elif kind == "int8":
            rows, scales, _ = bnb.int8_vectorwise_quant(tensor.half())
            saved |= {name: rows, name.replace("weight", "SCB"): scales}
            saved[name.replace("weight", "weight_format")] = torch.tensor(0, dtype=torch.uint8)
            expected[name] = bnb.int8_vectorwise_dequant(rows, scales).to(dtype)
        else:
            packed, quant = bnb.quantize_4bit(tensor.to(dtype), quant_type=kind, compress_statistics=nested)
            saved |= {name: packed, **{f"{name}.{key}": value for key, value in quant.as_dict(packed=True).items()}}
            expected[name] = bnb.dequantize_4bit(packed, quant)
    for file in [*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")]:
        file.unlink()
    save_file({name: tensor.contiguous() for name, tensor in saved.items()}, folder / "model.safetensors")
    settings = {"quant_method": "bitsandbytes", "load_in_4bit": kind != "int8", "load_in_8bit": kind == "int8"}
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"quantization_config": settings, "dtype": str(dtype).removeprefix("torch.")})
    )
    return expected


GGUF_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}


def gguf_name(name, family):
    plain = name.removesuffix(".weight")
    names = GGUF_NAMES | ({"post_attention_layernorm": "ffn_norm"} if family == "gemma" else {})
    for own, theirs in names.items():
        if plain == own:
            return f"{theirs}.weight"
        if plain.startswith("model.layers.") and plain.endswith(own):
            return f"blk.{plain.split('.')[2]}.{theirs}.weight"
    raise AssertionError(name)


def write_gguf(path, folder, kind, family="gemma2", more=lambda writer: None, **split):
    """A GGUF of the folder, as llama.cpp's converter lays it out; matrices of the type `kind`; `more` adds to it."""
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(path, family, **split)
    more(writer)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    if family == "gemma2":
        writer.add_attn_logit_softcapping(config["attn_logit_softcapping"])
        writer.add_final_logit_softcapping(config["final_logit_softcapping"])
        writer.add_sliding_window(config["sliding_window"])
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    texts = sorted(tokenizer["model"]["vocab"], key=tokenizer["model"]["vocab"].__getitem__)
    special = {token["content"] for token in tokenizer["added_tokens"]}
    kinds = [3 if text in special else 6 if text.startswith("<0x") else 1 for text in texts]
    texts += [f"<pad{at}>" for at in range(len(texts), config["vocab_size"])]
    kinds += [5] * (len(texts) - len(kinds))
    writer.add_tokenizer_model("llama")
    writer.add_add_space_prefix(False)
    writer.add_token_list(texts)
    writer.add_token_scores([-float(at) for at in range(len(texts))])
    writer.add_token_types(kinds)
    writer.add_bos_token_id(2)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(3)
    writer.add_chat_template((folder / "chat_template.jinja").read_text())
    expected = {}
    for name, tensor in state_of(folder).items():
        values = tensor.float().numpy()
        if values.ndim == 1:
            writer.add_tensor(gguf_name(name, family), values + np.float32(1))
            expected[name] = (values + np.float32(1)) - np.float32(1)
            continue
        block, _ = gguf.GGML_QUANT_SIZES[kind]
        assert values.shape[1] % block == 0
        packed = (
            gguf.quants.quantize(values, kind) if kind not in (0, 1) else values.astype([np.float32, np.float16][kind])
        )
        writer.add_tensor(gguf_name(name, family), packed, raw_dtype=kind)
        expected[name] = gguf.quants.dequantize(packed, kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return expected


TYPES = gguf.GGMLQuantizationType


def as_gguf(base, kind):
    write_gguf(base.parent / "model.gguf", base, kind)
    return base.parent / "model.gguf"
