"""Sources other than safetensors, against the libraries that made them."""

from __future__ import annotations

import json
import os
import pickle
import random
import shutil
import tempfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from bitsandbytes import functional as bnb
from bitsandbytes import utils as bnb_utils
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

from rkconvert import demo
from rkconvert.adapters.merged_model import AdapterSource, merged_model
from rkconvert.output import hf_folder
from rkconvert.sources.checkpoint import open_checkpoint
from rkconvert.sources.gguf_tokenizer import tokenizer_json
from rkconvert.sources.names import plain_name
from rkconvert.sources.open import open_source
from rkconvert.tensors.formats import to_float32
from rkconvert.tensors.tensor_files import ADAPTER_FILES, open_tensor_files
from rkconvert.tensors.weights import row_blocks
from rkruntime.bundle import rkemu
from rkruntime.cli import main
from rkruntime.errors import AdapterError, CheckpointError, HostError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def everything(checkpoint, block=700):
    weights = checkpoint.weights
    return {
        name: np.concatenate([weights.read(name, *place) for place in row_blocks(info.shape, block)])
        for name, info in weights.tensors.items()
    }


def state_of(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


# .bin


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_bin_files(make_model, bits, dtype):
    base = make_model(dtype=dtype)
    state = as_bin(base)
    for name, values in everything(open_checkpoint(base)).items():
        np.testing.assert_array_equal(values, bits(state[name]), err_msg=name)


def test_bin_file_with_views_and_parameters(make_model, bits):
    base = make_model()
    state = as_bin(base, 1)
    big = torch.cat([state["model.norm.weight"], state["model.layers.0.input_layernorm.weight"]])
    half = len(big) // 2
    state["model.norm.weight"] = big[:half]
    state["model.layers.0.input_layernorm.weight"] = torch.nn.Parameter(big[half:])
    torch.save(state, base / "pytorch_model-0.bin")
    for name, values in everything(open_checkpoint(base)).items():
        np.testing.assert_array_equal(values, bits(state[name]), err_msg=name)


def test_bin_file_with_tensors_that_are_not_contiguous(make_model, bits):
    base = make_model()
    state = as_bin(base, 1)
    names = [name for name in state if state[name].ndim == 2][:4]
    first, second, third, fourth = names
    vector = "model.norm.weight"
    state[first] = state[first].t().contiguous().t()
    state[second] = torch.cat([state[second], state[second]], dim=1)[:, : state[second].shape[1]]
    state[third] = torch.stack([state[third], state[third]], dim=2)[:, :, 1]
    state[fourth] = state[fourth][:1].expand(state[fourth].shape)
    state[vector] = torch.ones(1, dtype=state[vector].dtype).expand(state[vector].shape)
    assert not any(state[name].is_contiguous() for name in (*names, vector))
    torch.save(state, base / "pytorch_model-0.bin")
    for name, values in everything(open_checkpoint(base)).items():
        np.testing.assert_array_equal(values, bits(state[name].contiguous()), err_msg=name)


def test_strides_of_a_stranger(make_model):
    base = make_model()
    state = as_bin(base, 1)
    name = "model.norm.weight"
    size = state[name].numel()
    for tensor, words in (
        (torch.as_strided(torch.ones(1), (1 << 15, 1 << 15), (0, 0)), "too large to rearrange"),
        (torch.ones(2).expand(size, 2), "model.norm.weight"),
    ):
        torch.save(state | {name: tensor}, base / "pytorch_model-0.bin")
        with pytest.raises(CheckpointError, match=words):
            open_checkpoint(base)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_code_in_a_pickle_is_not_run(make_model, tmp_path):
    base = make_model()
    state = as_bin(base, 1)
    torch.save(state | {"model.norm.weight": Evil(tmp_path / "ran")}, base / "pytorch_model-0.bin")
    with pytest.raises(CheckpointError, match=r"asks for (io|_io|builtins)\.open, which no weights need"):
        open_checkpoint(base)
    assert not (tmp_path / "ran").exists()


def test_a_pickle_alone_and_a_cut_archive_are_refused(make_model, tmp_path):
    base = make_model()
    as_bin(base, 1)
    file = base / "pytorch_model-0.bin"
    whole = file.read_bytes()
    file.write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    with pytest.raises(CheckpointError, match=r"not a \.bin file of torch 1\.6"):
        open_checkpoint(base)
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="or is truncated"):
        open_checkpoint(base)
    assert not (tmp_path / "ran").exists()


def test_a_bin_file_that_points_beyond_its_storage(make_model):
    base = make_model()
    as_bin(base, 1)
    source, target = base / "pytorch_model-0.bin", base / "changed.bin"
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for info in old.infolist():
            data = old.read(info)
            new.writestr(info, data[:16] if info.filename.endswith("data/3") else data)
    target.replace(source)
    with pytest.raises(CheckpointError, match="larger than its storage"):
        open_checkpoint(base)


# bitsandbytes


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


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("kind", "nested"), [("nf4", False), ("nf4", True), ("fp4", False), ("fp4", True), ("int8", False)]
)
def test_bitsandbytes(make_model, bits, kind, nested, dtype):
    # Rows of whole blocks, as every real model has: for others bitsandbytes' CPU kernel (0.50.2) takes wrong scales.
    base = make_model(intermediate_size=128)
    expected = quantize(base, kind, nested, dtype)
    checkpoint = open_checkpoint(base)
    for name, values in everything(checkpoint).items():
        # Some of its kernels, by processor, give a negative zero for fp4's; only the sign of that may differ.
        theirs, kind = bits(expected[name]), checkpoint.weights.tensors[name].dtype
        np.testing.assert_array_equal(to_float32(values, kind), to_float32(theirs, kind), err_msg=name)
    assert "bitsandbytes" in checkpoint.notes[0]


def test_an_adapter_on_a_quantized_base(make_model, make_adapter, peft_merge, assert_merged, tmp_path):
    base = make_model(intermediate_size=128)
    adapter = make_adapter(base)
    floats = tmp_path / "floats"
    shutil.copytree(base, floats)
    for file in floats.glob("*.safetensors*"):
        file.unlink()
    save_file(quantize(base, "nf4", nested=True), floats / "model.safetensors")
    mine, theirs = (
        merged_model(open_checkpoint(base), [AdapterSource(str(adapter))]),
        peft_merge(floats, {adapter: 1.0}),
    )
    for name, info in mine.weights.tensors.items():
        assert_merged(name, mine.weights.read(name, 0, info.shape[0]), theirs[name])


def test_scales_that_do_not_fit(make_model):
    base = make_model()
    quantize(base, "nf4")
    state = load_file(base / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    for changed, match in (
        ({f"{name}.absmax": state[f"{name}.absmax"][:-1]}, "bytes and scales of its shape"),
        ({f"{name}.quant_map": state[f"{name}.quant_map"] * float("nan")}, "not finite"),
        ({f"{name}.quant_state.bitsandbytes__nf4": torch.zeros(3, dtype=torch.uint8)}, "does not describe"),
    ):
        save_file(state | changed, base / "model.safetensors")
        with pytest.raises(CheckpointError, match=match):
            open_checkpoint(base)
    save_file({key: value for key, value in state.items() if key != f"{name}.absmax"}, base / "model.safetensors")
    with pytest.raises(CheckpointError, match="no usable scales"):
        open_checkpoint(base)


ORDERS = bnb_utils.LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING


@pytest.mark.parametrize("order", [*ORDERS, "of another kind"])
@pytest.mark.parametrize("as_text", [False, True])
def test_an_int8_matrix_in_the_order_of_a_gpus_tiles(make_model, order, as_text):
    base = make_model()
    quantize(base, "int8")
    state = load_file(base / "model.safetensors")
    key = "model.layers.1.mlp.up_proj.weight_format"
    if as_text:
        (base / "model.safetensors").unlink()
        torch.save(state | {key: order}, base / "pytorch_model.bin")
    else:
        save_file(state | {key: torch.tensor(ORDERS.get(order, 9), dtype=torch.uint8)}, base / "model.safetensors")
    if order == "row":
        open_checkpoint(base)
        return
    with pytest.raises(CheckpointError, match="is not stored row by row") as caught:
        open_checkpoint(base)
    assert "original" in caught.value.hint


def test_other_quantizers_are_named(make_model, edit_json):
    base = make_model()
    edit_json(base / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(CheckpointError, match="already quantized by gptq"):
        open_checkpoint(base)


# GGUF

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


@pytest.mark.parametrize("family", ["gemma2", "gemma"])
@pytest.mark.parametrize("kind", [TYPES.F32, TYPES.F16, TYPES.BF16, TYPES.Q8_0, TYPES.Q5_1, TYPES.Q4_0])
def test_gguf(make_model, tmp_path, family, kind):
    base = make_model(family=family, hidden_size=64, intermediate_size=96)
    path = tmp_path / "model.gguf"
    expected = write_gguf(path, base, kind, family)
    checkpoint = open_source(str(path))
    assert checkpoint.name == "model"
    assert checkpoint.config == open_checkpoint(base).config
    assert bool(checkpoint.notes) == (kind in (TYPES.Q5_1, TYPES.Q4_0))
    for name, values in everything(checkpoint).items():
        floats = to_float32(values, checkpoint.weights.tensors[name].dtype)
        np.testing.assert_array_equal(floats, expected[name], err_msg=name)


def can_make(kind):
    try:
        gguf.quants.quantize(np.ones((1, 256), np.float32), kind)
    except NotImplementedError:
        return False
    return True


def can_read(kind):
    try:
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


ONLY_LLAMA_CPP = [kind for kind in TYPES if can_read(kind) and not can_make(kind)]


@pytest.mark.parametrize("kind", ONLY_LLAMA_CPP, ids=lambda kind: kind.name)
def test_gguf_of_types_that_only_llama_cpp_writes(make_model, tmp_path, kind, monkeypatch):
    # gguf reads these types and cannot make them, so the bytes are random: any bytes are a matrix.
    base = make_model(hidden_size=256, intermediate_size=256, num_hidden_layers=1, num_attention_heads=16)
    rng = np.random.default_rng(int(kind))
    block, size = gguf.GGML_QUANT_SIZES[kind]

    def random(values, _):
        found = rng.integers(0, 256, (*values.shape[:-1], values.shape[-1] // block, size)).astype(np.uint8)
        # Every half-precision scale in a block would be random too; keep their exponents small.
        found &= 0x3F
        return found.reshape(*values.shape[:-1], -1)

    monkeypatch.setattr(gguf.quants, "quantize", random)
    expected = write_gguf(tmp_path / "model.gguf", base, kind)
    checkpoint = open_source(str(tmp_path / "model.gguf"))
    assert kind.name in checkpoint.notes[0]
    for name, values in everything(checkpoint).items():
        np.testing.assert_array_equal(values, expected[name], err_msg=name)


@pytest.fixture
def parts(make_model, tmp_path):
    """A model with a head of its own in three parts, by gguf's own writer; their paths and values."""
    base = make_model(hidden_size=64, intermediate_size=96, tie_word_embeddings=False)
    expected = write_gguf(tmp_path / "model.gguf", base, TYPES.Q8_0, split_max_tensors=-(-len(state_of(base)) // 3))
    paths = [tmp_path / f"model-0000{at}-of-00003.gguf" for at in (1, 2, 3)]
    assert all(path.is_file() for path in paths)
    return paths, expected


def test_gguf_in_parts(parts):
    paths, expected = parts
    checkpoint = open_source(str(paths[0]))
    assert checkpoint.name == "model"
    assert not checkpoint.config.tie_word_embeddings
    assert {*checkpoint.inputs.weights} == {*paths}
    for name, values in everything(checkpoint).items():
        floats = to_float32(values, checkpoint.weights.tensors[name].dtype)
        np.testing.assert_array_equal(floats, expected[name], err_msg=name)
    os.utime(paths[2], (1, 1))
    with pytest.raises(CheckpointError, match=r"00003-of-00003\.gguf changed"):
        checkpoint.inputs.check()


def edited(path, **values):
    """The file with other values of numbers in its header, found by gguf's own reader."""
    with path.open("r+b") as file:
        for name, value in values.items():
            reader = gguf.GGUFReader(path, "r")
            field = reader.fields[name.replace("_", ".")]
            offset, form = int(field.offset + sum(len(part.tobytes()) for part in field.parts[:-1])), field.parts[-1]
            del reader
            file.seek(offset)
            file.write(np.array([value], form.dtype).tobytes())


def one_part_again(paths):
    shutil.copy(paths[1], paths[2])
    edited(paths[2], split_no=2)


def a_part_of_another_model(paths):
    other = paths[0].parent / "other"
    other.mkdir()
    writer = gguf.GGUFWriter(other / "x.gguf", "gemma2")
    writer.add_uint16("split.no", 1)
    writer.add_uint16("split.count", 3)
    writer.add_int32("split.tensors.count", 5)
    writer.add_tensor("blk.0.attn_norm.weight", np.ones(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (other / "x.gguf").replace(paths[1])


def in_another_order(paths):
    paths[1].rename(paths[0].parent / "kept")
    paths[2].rename(paths[1])
    (paths[0].parent / "kept").rename(paths[2])


PARTS = {
    "missing": (lambda paths: paths[1].unlink(), "model-00002-of-00003.gguf is not beside it"),
    "a folder": (lambda paths: (paths[1].unlink(), paths[1].mkdir()), "is not beside it"),
    "cut": (lambda paths: os.truncate(paths[2], paths[2].stat().st_size - 33), "is cut"),
    "empty": (lambda paths: os.truncate(paths[2], 0), "not a GGUF file"),
    "another model": (a_part_of_another_model, "not part 2 of the model"),
    "another order": (in_another_order, "its split.no is 2, not 1"),
    "one twice": (one_part_again, "is in 2 parts"),
    "wrong count": (lambda paths: edited(paths[0], split_tensors_count=4), "not part 2 .* split.tensors.count"),
    "all wrong": (lambda paths: [edited(path, split_tensors_count=4) for path in paths], "the first part says 4"),
    "fewer parts": (lambda paths: edited(paths[0], split_count=2), "does not end with -00001-of-00002.gguf"),
    "more parts": (lambda paths: edited(paths[0], split_count=4), "does not end with -00001-of-00004.gguf"),
    "another name": (lambda paths: shutil.copy(paths[0], paths[0].with_name("x.gguf")), "x.gguf says that it is part"),
    "the second": (lambda paths: None, "is part 2 of 3 of a model"),
    "whole beside parts": (lambda paths: write_gguf_part(paths[1]), "does not say that it is a part"),
}


def write_gguf_part(path):
    writer = gguf.GGUFWriter(path, "gemma2")
    writer.add_tensor("blk.0.attn_norm.weight", np.ones(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("what", PARTS)
def test_gguf_parts_that_do_not_fit_together(parts, what):
    paths, _ = parts
    change, words = PARTS[what]
    change(paths)
    named = {"another name": paths[0].with_name("x.gguf"), "the second": paths[1]}.get(what, paths[0])
    with pytest.raises(CheckpointError, match=words) as caught:
        open_source(str(named))
    if what == "the second":
        assert str(paths[0]) in caught.value.hint
    assert caught.value.hint or what in ("cut", "empty")


@pytest.mark.parametrize("kind", [TYPES.Q8_K, TYPES.Q8_1, TYPES.I8, TYPES.F64, TYPES.Q1_0], ids=lambda kind: kind.name)
def test_gguf_of_types_that_the_package_cannot_read(make_model, tmp_path, kind):
    base = make_model(hidden_size=256, intermediate_size=256, num_hidden_layers=1, num_attention_heads=16)
    path = tmp_path / "model.gguf"
    write_gguf(path, base, TYPES.Q8_0)
    data = bytearray(path.read_bytes())
    name = b"token_embd.weight"
    at = data.index(name) + len(name) + 4 + 2 * 8
    assert data[at] == TYPES.Q8_0
    data[at] = kind
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"cannot dequantize|ends at byte|overlaps"):
        open_source(str(path))


def test_gguf_tokenizer(make_model, tmp_path):
    write_gguf(tmp_path / "demo.gguf", demo.checkpoint(), TYPES.F16)
    checkpoint = open_source(str(tmp_path / "demo.gguf"))
    mine, theirs = (
        Tokenizer.from_buffer((path / "tokenizer.json").read_bytes()) for path in (checkpoint.path, demo.checkpoint())
    )
    for row in demo.questions():
        for text in (row.question, row.answer, row.pirate, "new words: Übermut, 12 ≠ 13 \n\n 🙂"):
            assert mine.decode(mine.encode(text).ids) == text
            assert mine.encode(text).ids == theirs.encode(text).ids
    assert (checkpoint.path / "chat_template.jinja").read_bytes().decode() == demo.tokenizer.CHAT_TEMPLATE


def test_a_gguf_leaves_nothing_among_the_temporary_files(tmp_path, monkeypatch):
    """Nor while it works: what is never written needs no removal after a kill."""
    write_gguf(tmp_path / "demo.gguf", demo.checkpoint(), TYPES.F16)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    real = rkemu.Writer.write_rows

    def write(*arguments):
        assert list((tmp_path / "temporary").iterdir()) == []
        return real(*arguments)

    monkeypatch.setattr(rkemu.Writer, "write_rows", write)
    assert main(["convert", str(tmp_path / "demo.gguf"), "-o", str(tmp_path / "made"), "-q"]) == 0
    assert (tmp_path / "made" / "tokenizer.json").is_file()


RUNS = [" " * count for count in range(2, 9)]


def tokenizer_with_runs_of_spaces():
    """The demo's, with runs of spaces as Gemma's own tokenizer.json has them, in the place of unused tokens."""
    content = json.loads((demo.checkpoint() / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    for at, run in enumerate(RUNS):
        marks = run.replace(" ", "▁")
        vocab[marks] = vocab.pop(f"<unused{at}>")
        token = next(token for token in content["added_tokens"] if token["content"] == f"<unused{at}>")
        token |= {"content": marks, "special": False}
    pairs = [["▁" * left, "▁" * (length - left)] for length in range(2, 9) for left in range(1, length)]
    content["model"]["merges"] = (
        sorted(pairs, key=lambda pair: (-len(pair[0]), -len(pair[1]))) + content["model"]["merges"]
    )
    return content


@pytest.mark.parametrize(("as_stored", "kind"), [("▁", 4), (" ", 4), ("▁", 1)], ids=["marks", "spaces", "normal"])
def test_gguf_runs_of_spaces(tmp_path, as_stored, kind):
    """Converters stored Gemma's runs of spaces in three ways; each is the original's tokenizer."""
    original = tokenizer_with_runs_of_spaces()
    vocab = sorted(original["model"]["vocab"], key=original["model"]["vocab"].__getitem__)
    special = {token["content"] for token in original["added_tokens"]}
    runs = {run.replace(" ", "▁") for run in RUNS}
    kinds = [kind if text in runs else 3 if text in special else 6 if text.startswith("<0x") else 1 for text in vocab]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.tokens": [text.replace("▁", as_stored) if text in runs else text for text in vocab],
        "tokenizer.ggml.scores": [0.0 if text in runs else -float(at) for at, text in enumerate(vocab)],
        "tokenizer.ggml.token_type": kinds,
    }
    made = tokenizer_json(SimpleNamespace(path=tmp_path / "x.gguf", metadata=metadata))
    mine, theirs = (Tokenizer.from_str(json.dumps(content)) for content in (made, original))
    assert len(theirs.encode("    return").ids) < len(theirs.encode("return").ids) + 2
    rng = random.Random(1)
    pieces = [*RUNS, " ", " " * 20, "return", "What", "\n", "\t", ".", "🙂", "<start_of_turn>", "é"]
    for _ in range(500):
        text = "".join(rng.choices(pieces, k=rng.randint(1, 8)))
        assert mine.encode(text).ids == theirs.encode(text).ids, repr(text)
        assert mine.decode(mine.encode(text).ids) == theirs.decode(theirs.encode(text).ids)


def test_gguf_of_the_27b_scales_its_queries_otherwise(make_model, tmp_path, monkeypatch):
    base = make_model(num_hidden_layers=2)
    write_gguf(tmp_path / "model.gguf", base, TYPES.F16)
    monkeypatch.setattr("rkconvert.sources.gguf_model._LAYERS_27B", 2)
    assert open_source(str(tmp_path / "model.gguf")).config.query_pre_attn_scalar == 64 // 4


@pytest.mark.parametrize(
    "more",
    [
        lambda writer: (
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR), writer.add_rope_scaling_factor(4.0)
        ),
        lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.YARN),
        lambda writer: writer.add_float32("gemma2.rope.scale_linear", 4.0),
        lambda writer: writer.add_tensor("rope_freqs.weight", np.full(8, 2, np.float32)),
        lambda writer: writer.add_rope_dimension_count(8),
        lambda writer: writer.add_attention_scale(0.5),
        lambda writer: writer.add_causal_attention(False),
    ],
)  # fmt: skip
def test_a_gguf_that_asks_for_another_computation_is_refused(make_model, tmp_path, more):
    write_gguf(tmp_path / "model.gguf", make_model(), TYPES.F16, more=more)
    with pytest.raises(CheckpointError, match="Gemma 1 and 2"):
        open_source(str(tmp_path / "model.gguf"))


def test_the_end_of_a_turn_in_a_gguf_ends_an_answer(make_model, tmp_path):
    write_gguf(tmp_path / "model.gguf", make_model(), TYPES.F16, more=lambda writer: writer.add_eot_token_id(7))
    assert open_source(str(tmp_path / "model.gguf")).config.eos_token_ids == (1, 7)


# names


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.3.mlp.up_proj.weight",
        "layers.3.mlp.up_proj.weight",
        "base_model.model.model.layers.3.mlp.up_proj.weight",
        "_orig_mod.model.layers.3.mlp.up_proj.weight",
        "module.model.layers.3.mlp.up_proj.weight",
        "language_model.model.layers.3.mlp.up_proj.weight",
        "model.language_model.layers.3.mlp.up_proj.weight",
    ],
)
def test_odd_names(name):
    assert plain_name(name) == "model.layers.3.mlp.up_proj.weight"


def test_a_folder_with_odd_names(make_model, bits):
    base = make_model(shard_size="10GB")
    state = load_file(base / "model.safetensors")
    save_file({f"base_model.model.{name}": tensor for name, tensor in state.items()}, base / "model.safetensors")
    for name, values in everything(open_checkpoint(base)).items():
        np.testing.assert_array_equal(values, bits(state[name]), err_msg=name)


# the hub


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A hub on this machine, which answers every request as it is told to."""
    answers = {}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            status, headers, body = answers.get(self.path.split("?")[0], (404, {"X-Error-Code": "RepoNotFound"}, b"{}"))
            self.send_response(status)
            for key, value in ({"Content-Length": str(len(body))} | headers).items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}"
    for module in ("constants", "file_download", "hf_api", "_snapshot_download"):
        monkeypatch.setattr(f"huggingface_hub.{module}.ENDPOINT", address, raising=False)
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", address, raising=False)
    template = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub._snapshot_download.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    yield answers
    server.shutdown()
    thread.join()
    server.server_close()


COMMIT = "0123456789abcdef0123456789abcdef01234567"


def serve(answers, folder, model):
    files = [file.name for file in folder.iterdir()]
    listing = json.dumps({"id": model, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]}).encode()
    for revision in ("main", COMMIT):
        answers[f"/api/models/{model}/revision/{revision}"] = (200, {"Content-Type": "application/json"}, listing)
    tree = [{"type": "file", "path": name, "size": (folder / name).stat().st_size, "oid": name} for name in files]
    answers[f"/api/models/{model}/tree/{COMMIT}"] = (
        200,
        {"Content-Type": "application/json"},
        json.dumps(tree).encode(),
    )
    for name in files:
        data = (folder / name).read_bytes()
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{name}"'}
        for revision in ("main", COMMIT):
            answers[f"/{model}/resolve/{revision}/{name}"] = (200, headers, data)


def test_a_hub_model_is_downloaded_and_its_commit_kept(hub, make_model, bits):
    base = make_model()
    (base / "model.gguf").write_bytes(b"not needed")
    serve(hub, base, "someone/tiny-gemma")
    checkpoint = open_source("someone/tiny-gemma")
    assert (checkpoint.name, checkpoint.revision) == ("someone/tiny-gemma", COMMIT)
    assert not (checkpoint.path / "model.gguf").exists()
    state = state_of(base)
    for name, values in everything(checkpoint).items():
        np.testing.assert_array_equal(values, bits(state[name]))


def test_an_adapter_of_the_hub(hub, make_model, make_adapter, peft_merge, assert_merged):
    base = make_model()
    adapter = make_adapter(base)
    serve(hub, adapter, "someone/pirate")
    model = merged_model(open_checkpoint(base), [AdapterSource("someone/pirate", 0.5)])
    assert [(item.name, item.revision) for item in model.adapters] == [("someone/pirate", COMMIT)]
    theirs = peft_merge(base, {adapter: 0.5})
    for name, info in model.weights.tensors.items():
        assert_merged(name, model.weights.read(name, 0, info.shape[0]), theirs[name])


def test_hub_answers(hub):
    model = "google/gemma-2-2b-it"
    hub[f"/api/models/{model}/revision/main"] = (403, {"X-Error-Code": "GatedRepo"}, b"{}")
    with pytest.raises(CheckpointError, match="gated") as error:
        open_source(model)
    assert f"https://huggingface.co/{model}" in error.value.hint
    hub["/api/models/a/b/revision/v9"] = (404, {"X-Error-Code": "RevisionNotFound"}, b"{}")
    with pytest.raises(CheckpointError, match="no model a/b at v9"):
        open_source("a/b", "v9")
    with pytest.raises(CheckpointError, match="no model no/such, or you do not have access"):
        open_source("no/such")


def test_offline(hub, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HostError, match="cannot be fetched from the hub"):
        open_source("google/gemma-2-2b-it")


def test_a_folder_has_no_revision(make_model):
    with pytest.raises(CheckpointError, match="not a hub model"):
        open_source(str(make_model()), "main")


@pytest.mark.parametrize("which", ["single file", "twice", "not in the index", "index of one file"])
def test_weights_of_two_saves_in_one_folder(make_model, which):
    """What transformers reads differs from what the index says, so no answer is the right one."""
    folder = make_model()
    shards = sorted(folder.glob("model-*.safetensors"))
    name = next(iter(load_file(shards[0])))
    if which == "single file":
        shutil.copy(shards[0], folder / "model.safetensors")
        match = "has weights twice"
    elif which == "twice":
        save_file({**load_file(shards[1]), name: load_file(shards[0])[name] * 2}, shards[1], {"format": "pt"})
        match = f"{name} is both in"
    elif which == "not in the index":
        save_file({**load_file(shards[1]), "lm_head.weight": torch.ones(3)}, shards[1], {"format": "pt"})
        match = "lm_head.weight, which the index does not name"
    else:
        merged = {key: value for file in shards for key, value in load_file(file).items()}
        save_file(merged, folder / "model.safetensors", {"format": "pt"})
        index = {"weight_map": dict.fromkeys(merged, "model.safetensors")}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        assert set(open_checkpoint(folder).weights.tensors) == set(merged)
        return
    with pytest.raises(CheckpointError, match=match):
        open_checkpoint(folder)


# a source that changes while it is read


def overwritten(path):
    """Other bytes, with size and time of change as they were."""
    state = path.stat()
    with path.open("r+b") as file:
        file.seek(-10, 2)
        file.write(b"0123456789")
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


def replaced(path):
    shutil.copy2(path, path.with_name("other"))
    path.with_name("other").replace(path)


def away_and_back(path):
    path.rename(path.with_name("other"))
    path.with_name("other").rename(path)


CHANGES = {
    "overwritten": overwritten,
    "replaced": replaced,
    "cut": lambda path: os.truncate(path, path.stat().st_size // 2),
    "longer": lambda path: os.truncate(path, path.stat().st_size + 1),
    "touched": lambda path: path.touch(),
    "away and back": away_and_back,
    "gone": lambda path: path.unlink(),
    "new": lambda path: path.write_text("{}"),
}


def change_at(monkeypatch, moment, path, change):
    """Change a file when the `moment`th block of a result is written."""
    calls = count(1)

    def announced(real):
        def write(*arguments):
            if next(calls) == moment:
                CHANGES[change](path)
            return real(*arguments)

        return write

    for owner, name in ((hf_folder, "_write"), (rkemu.Writer, "write_rows")):
        monkeypatch.setattr(owner, name, announced(getattr(owner, name)))


@pytest.mark.parametrize(
    ("command", "kind", "file", "change"),
    [
        *[("merge", "folder", "model-00002-of-00003.safetensors", change) for change in CHANGES if change != "new"],
        ("convert", "folder", "model-00003-of-00003.safetensors", "overwritten"),
        ("convert", "folder", "model-00003-of-00003.safetensors", "replaced"),
        ("convert", "folder", "config.json", "longer"),
        ("convert", "folder", "tokenizer.json", "replaced"),
        ("convert", "folder", "generation_config.json", "gone"),
        ("merge", "folder", "added_tokens.json", "new"),
        ("merge", "folder", "../lora/adapter_model.safetensors", "overwritten"),
        ("convert", "folder", "../lora/adapter_config.json", "touched"),
        ("merge", "bin", "pytorch_model-0.bin", "overwritten"),
        ("convert", "gguf", "model.gguf", "overwritten"),
        ("convert", "gguf", "model.gguf", "replaced"),
        ("convert", "nf4", "model.safetensors", "overwritten"),
        ("merge", "nf4", "model.safetensors", "cut"),
    ],
)
def test_a_source_that_changes_while_it_is_read(
    make_model, make_adapter, tmp_path, monkeypatch, capsys, command, kind, file, change
):
    if kind in ("nf4", "bin"):
        base = make_model(intermediate_size=128)
        lora = make_adapter(base)
        quantize(base, "nf4") if kind == "nf4" else as_bin(base, 1)
    else:
        base = shutil.copytree(demo.checkpoint(), tmp_path / "base")
        lora = shutil.copytree(demo.adapter(), tmp_path / "lora")
    path = (base / file).absolute()
    if kind == "gguf":
        base = path = tmp_path / file
        write_gguf(path, demo.checkpoint(), TYPES.F16)
    (tmp_path / "out").mkdir()
    change_at(monkeypatch, random.randint(1, 20), path, change)
    assert main([command, str(base), "--lora", str(lora), "-o", str(tmp_path / "out" / "made"), "-q"]) == 3
    said = capsys.readouterr().err
    # Which of the three depends on the moment.
    others = {"cut": "was truncated while it was read", "gone": f"{path.resolve()} cannot be read"}
    assert f"{path.resolve()} changed while it was read" in said or others.get(change, " changed ") in said
    assert list((tmp_path / "out").iterdir()) == []


# No reader leaves its tensor.


def as_gguf(base, kind):
    write_gguf(base.parent / "model.gguf", base, kind)
    return base.parent / "model.gguf"


READERS = {
    "safetensors": lambda base: base,
    "bin": lambda base: as_bin(base) and base,
    "nf4": lambda base: quantize(base, "nf4", nested=True) and base,
    "int8": lambda base: quantize(base, "int8") and base,
    "gguf, plain": lambda base: as_gguf(base, TYPES.F16),
    "gguf, quantized": lambda base: as_gguf(base, TYPES.Q8_0),
}


def outside(rows):
    """Blocks that are not within a tensor of so many rows, near its ends and far from them."""
    yield from [(rows, 1), (rows - 1, 2), (-1, 1), (-1, 2), (-rows, rows), (0, rows + 1), (rows + 1, 0), (1, -1)]
    yield from ((int(first), rows) for first in np.random.default_rng(0).integers(1, 1 << 40, 5))


@pytest.mark.parametrize("make", READERS.values(), ids=READERS)
def test_rows_beyond_a_tensor(make_model, make):
    base = make_model(num_hidden_layers=1, intermediate_size=128)
    weights = open_source(str(make(base))).weights
    for name, info in weights.tensors.items():
        end = info.shape[0]
        assert len(weights.read(name, end - 1, 1)) == 1
        assert len(weights.read(name, end, 0)) == 0
        for first, rows in outside(end):
            with pytest.raises(CheckpointError, match="cannot read rows"):
                weights.read(name, first, rows)


def test_rows_beyond_an_adapters_tensor(make_model, make_adapter):
    _, weights = open_tensor_files(make_adapter(make_model()), ADAPTER_FILES, AdapterError)
    for name, info in weights.tensors.items():
        for first, rows in outside(info.shape[0]):
            with pytest.raises(AdapterError, match="cannot read rows"):
                weights.read(name, first, rows)


# A head that is stored beside the embedding that config.json ties it to.


def add_head(base, head):
    state = state_of(base) | {"lm_head.weight": head}
    for file in base.glob("*.safetensors*"):
        file.unlink()
    save_file(
        {name: tensor.contiguous() for name, tensor in state.items()}, base / "model.safetensors", {"format": "pt"}
    )


def in_shards(base):
    """The same tensors in a file each, the head in a file before the embedding's."""
    state, index = state_of(base), {}
    (base / "model.safetensors").unlink()
    for at, name in enumerate(sorted(state), 1):
        index[name] = f"model-{at:05}-of-{len(state):05}.safetensors"
        save_file({name: state[name].contiguous()}, base / index[name], {"format": "pt"})
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return base


LAYOUTS = {
    "one file": lambda base: base,
    "shards": in_shards,
    "bin": lambda base: as_bin(base, 2) and base,
}


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("change", ["all", "first", "last", "none"])
def test_a_stored_head_of_a_tied_model(make_model, bits, layout, change):
    base = make_model()
    embedding = state_of(base)["model.embed_tokens.weight"]
    head = torch.randn_like(embedding) if change == "all" else embedding.clone()
    if change in ("first", "last"):
        head.view(-1)[0 if change == "first" else -1] += 1
    add_head(base, head)
    layout(base)
    checkpoint = open_checkpoint(base)
    theirs = AutoModelForCausalLM.from_pretrained(base)
    tied = theirs.lm_head.weight.data_ptr() == theirs.model.embed_tokens.weight.data_ptr()
    assert tied == (change == "none")
    assert (checkpoint.config.tie_word_embeddings, checkpoint.own_head) == (tied, not tied)
    assert any("that head is kept" in note for note in checkpoint.notes) == (not tied)
    model = merged_model(checkpoint, [])
    assert model.hf_config()["tie_word_embeddings"] == tied
    assert ("lm_head.weight" in model.weights.tensors) == (not tied)
    if not tied:
        mine = model.weights.read("lm_head.weight", 0, len(head))
        np.testing.assert_array_equal(mine, bits(theirs.lm_head.weight))


def test_a_stored_head_of_a_tied_quantized_model(make_model, bits):
    base = make_model(intermediate_size=128)
    head = torch.randn_like(state_of(base)["model.embed_tokens.weight"])
    add_head(base, head)
    quantize(base, "nf4", nested=True)
    checkpoint = open_checkpoint(base)
    assert checkpoint.own_head
    np.testing.assert_array_equal(checkpoint.weights.read("lm_head.weight", 0, len(head)), bits(head))


def test_the_head_of_a_gguf(make_model, tmp_path):
    untied = make_model(tie_word_embeddings=False)
    expected = write_gguf(tmp_path / "model.gguf", untied, TYPES.Q8_0)
    checkpoint = open_source(str(tmp_path / "model.gguf"))
    assert not checkpoint.config.tie_word_embeddings
    np.testing.assert_array_equal(checkpoint.weights.read("lm_head.weight", 0, 1024), expected["lm_head.weight"])


@pytest.mark.parametrize("rows", [1023, 1025])
def test_a_stored_head_of_another_size(make_model, rows):
    base = make_model()
    add_head(base, torch.zeros(rows, 64, dtype=torch.bfloat16))
    with pytest.raises(CheckpointError, match=rf"lm_head.weight has the shape \[{rows}, 64\]"):
        open_checkpoint(base)
