"""Folders of safetensors: odd names, two saves, rows beyond a tensor, heads beside the embedding they are tied to."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tests.converter.sources.other_formats import TYPES, as_bin, as_gguf, everything, quantize, state_of, write_gguf
from transformers import AutoModelForCausalLM

from rkconvert.adapters.merged_model import merged_model
from rkconvert.sources.checkpoint import open_checkpoint
from rkconvert.sources.names import plain_name
from rkconvert.sources.open import open_source
from rkconvert.tensors.tensor_files import ADAPTER_FILES, open_tensor_files
from rkruntime.errors import AdapterError, CheckpointError


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


def test_weights_under_a_name_of_their_own(make_model, edit_json):
    """transformers loads the file that config.json names, and leaves the name out of what it saves."""
    folder = make_model(shard_size="10GB")
    state = load_file(folder / "model.safetensors")
    save_file({name: tensor * 2 for name, tensor in state.items()}, folder / "other.safetensors", {"format": "pt"})
    edit_json(folder / "config.json", transformers_weights="other.safetensors")
    norm = AutoModelForCausalLM.from_pretrained(folder).state_dict()["model.norm.weight"]
    assert torch.equal(norm, state["model.norm.weight"] * 2)
    with pytest.raises(CheckpointError, match=r"weights are in other.safetensors"):
        open_checkpoint(folder)
    edit_json(folder / "config.json", transformers_weights="model.safetensors")
    assert "transformers_weights" not in merged_model(open_checkpoint(folder), []).hf_config()


def test_shards_whose_index_is_named(make_model, edit_json):
    folder = make_model()
    edit_json(folder / "config.json", transformers_weights="model.safetensors.index.json")
    assert open_checkpoint(folder).weights.tensors
    edit_json(folder / "config.json", transformers_weights=sorted(folder.glob("model-*"))[0].name)
    with pytest.raises(CheckpointError, match="transformers_weights"):
        open_checkpoint(folder)


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


def test_settings_and_tokenizers_for_other_releases(make_model, edit_json):
    """transformers reads the file for its release in place of config.json or tokenizer.json."""
    folder = make_model()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.4.0.0.json").write_text(json.dumps({**config, "query_pre_attn_scalar": 99}))
    edit_json(folder / "config.json", configuration_files=["config.4.0.0.json"])
    assert AutoModelForCausalLM.from_pretrained(folder).config.query_pre_attn_scalar == 99
    with pytest.raises(CheckpointError, match=r"configuration_files: .*config\.4\.0\.0\.json"):
        open_checkpoint(folder)
    edit_json(folder / "config.json", configuration_files=[])
    (folder / "tokenizer_config.json").write_text(json.dumps({"fast_tokenizer_files": ["tokenizer.4.0.0.json"]}))
    with pytest.raises(CheckpointError, match=r"fast_tokenizer_files: .*tokenizer\.4\.0\.0\.json"):
        merged_model(open_checkpoint(folder), [])


def test_settings_for_single_layers(make_model, edit_json):
    folder = make_model()
    edit_json(folder / "config.json", per_layer_config={"0": {"rms_norm_eps": 0.5}})
    with pytest.raises(CheckpointError, match="per_layer_config"):
        open_checkpoint(folder)
