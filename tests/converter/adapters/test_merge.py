"""Merges against peft's merge_and_unload, bit by bit but for the rounding of sums."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from rkconvert import demo
from rkconvert.adapters.merge import MergedWeights
from rkconvert.adapters.reader import open_adapter
from rkconvert.sources.checkpoint import open_checkpoint
from rkconvert.tensors.weights import row_blocks
from rkruntime.errors import AdapterError


def merged(base, adapters):
    """All tensors of our merge, read in small blocks."""
    checkpoint = open_checkpoint(base)
    opened = [open_adapter(path, checkpoint.config.tensors(), weight) for path, weight in adapters.items()]
    weights = MergedWeights(checkpoint.weights, checkpoint.config, opened)
    return {
        name: np.concatenate([weights.read(name, *block) for block in row_blocks(info.shape, 1000)])
        for name, info in weights.tensors.items()
    }


@pytest.fixture
def assert_same(assert_merged):
    def check(mine, theirs):
        for name, values in mine.items():
            assert_merged(name, values, theirs[name])

    return check


def test_the_demo_models_merge_is_pefts(peft_merge, assert_same):
    theirs = peft_merge(demo.checkpoint(), {demo.adapter(): 1.0})
    mine = merged(demo.checkpoint(), {demo.adapter(): 1.0})
    assert_same(mine, theirs)
    base = merged(demo.checkpoint(), {})
    assert any((mine[name] != base[name]).any() for name in mine)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("adapter_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_formats(make_model, make_adapter, peft_merge, assert_same, dtype, adapter_dtype):
    base = make_model(dtype=dtype)
    adapter = make_adapter(base, dtype=adapter_dtype)
    assert_same(merged(base, {adapter: 1.0}), peft_merge(base, {adapter: 1.0}))


SETTINGS = {
    "rank 1": {"r": 1},
    "rank 48, factor not a power of two": {"r": 48, "lora_alpha": 37},
    "rsLoRA": {"use_rslora": True},
    "rank and alpha by pattern": {
        "rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 8},
        "alpha_pattern": {"q_proj": 5, "^model.layers.2.self_attn.o_proj": 1},
    },
    "modules as a list": {"target_modules": ["q_proj", "down_proj"]},
    "modules as a regular expression": {"target_modules": r".*\.(1|2)\..*(k|v)_proj"},
    "some layers": {"target_modules": ["v_proj"], "layers_to_transform": [0, 2]},
    "fan_in_fan_out, which peft drops for linear layers": {"fan_in_fan_out": True, "target_modules": ["q_proj"]},
    "bias, of which Gemma has none": {"bias": "lora_only"},
    "gaussian beginning": {"init_lora_weights": "gaussian"},
    "orthogonal beginning": {"init_lora_weights": "orthogonal"},
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_settings(make_model, make_adapter, peft_merge, assert_same, settings):
    base = make_model()
    adapter = make_adapter(base, **settings)
    assert_same(merged(base, {adapter: 1.0}), peft_merge(base, {adapter: 1.0}))


WHOLE = {
    "norms trained as a whole": {"modules_to_save": ["input_layernorm"]},
    "embedding trained as a whole, which unties the head": {"modules_to_save": ["embed_tokens"]},
    "head trained as a whole, which unties the embedding": {"modules_to_save": ["lm_head"]},
    "both trained as wholes": {"modules_to_save": ["embed_tokens", "lm_head"]},
    "both trained as one": {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    "single tokens": {"trainable_token_indices": [3, 900, 7]},
    "single tokens by module": {"trainable_token_indices": {"embed_tokens": [5, 1023]}},
}


@pytest.mark.parametrize("settings", WHOLE.values(), ids=WHOLE)
@pytest.mark.parametrize("grow_to", [0, 1040], ids=["", "grown"])
def test_embeddings_and_whole_modules(make_model, make_adapter, peft_merge, assert_same, settings, grow_to):
    base = make_model()

    def prepare(model):
        if grow_to:
            torch.manual_seed(5)
            model.resize_token_embeddings(grow_to, mean_resizing=False)

    adapter = make_adapter(base, prepare=prepare, target_modules=["q_proj"], **settings)
    mine, theirs = merged(base, {adapter: 1.0}), peft_merge(base, {adapter: 1.0}, grow_to)
    assert_same(mine, theirs)
    tied = "lm_head.weight" not in mine
    assert tied == torch.equal(theirs["lm_head.weight"], theirs["model.embed_tokens.weight"])


def test_a_token_named_twice(make_model, make_adapter, peft_merge, assert_same, edit_json):
    base = make_model()
    adapter = make_adapter(base, target_modules=["q_proj"], trainable_token_indices=[5, 6])
    tensors = load_file(adapter / "adapter_model.safetensors")
    [rows] = [tensor for name, tensor in tensors.items() if "trainable_tokens_delta" in name]
    rows[1] = rows[0]
    save_file(tensors, adapter / "adapter_model.safetensors")
    edit_json(adapter / "adapter_config.json", trainable_token_indices=[5, 5])
    assert_same(merged(base, {adapter: 1.0}), peft_merge(base, {adapter: 1.0}))


def test_growth_alone(make_model, make_adapter, peft_merge, assert_same):
    base = make_model()
    adapter = make_adapter(base, prepare=lambda model: model.resize_token_embeddings(1100, mean_resizing=False))
    mine = merged(base, {adapter: 1.0})
    assert mine["model.embed_tokens.weight"].shape == (1100, 64)
    assert_same(mine, peft_merge(base, {adapter: 1.0}, 1100))


@pytest.fixture
def untied(tmp_path):
    """The same model with a head of its own, which peft advises to make before such adapters are merged."""

    def copy(base):
        model = AutoModelForCausalLM.from_pretrained(base)
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
        model.save_pretrained(tmp_path / "untied")
        return tmp_path / "untied"

    return copy


@pytest.mark.parametrize("targets", [["embed_tokens"], ["lm_head"], ["embed_tokens", "lm_head", "q_proj"]])
def test_lora_on_tied_embeddings_unties_them(make_model, make_adapter, untied, peft_merge, assert_same, targets):
    # On the tied base peft's merge would add each update to both sides, and give another model than it trained.
    base = make_model()
    adapter = make_adapter(base, target_modules=targets)
    assert_same(merged(base, {adapter: 1.0}), peft_merge(untied(base), {adapter: 1.0}))


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, 0.3)])
def test_several_adapters(make_model, make_adapter, peft_merge, assert_same, weights):
    base = make_model()
    first = make_adapter(base, "first", seed=1, target_modules=["q_proj", "up_proj"])
    second = make_adapter(base, "second", seed=2, r=6, target_modules=["q_proj", "down_proj"])
    both = dict(zip((first, second), weights, strict=True))
    assert_same(merged(base, both), peft_merge(base, both))


def test_mica(make_model, make_adapter, peft_merge, assert_same):
    base = make_model()
    adapter = make_adapter(base, init_lora_weights="mica")
    assert_same(merged(base, {adapter: 1.0}), peft_merge(base, {adapter: 1.0}))


def test_dora_is_at_most_one_step_away(make_model, make_adapter, peft_merge, bits):
    # The norms of rows are summed in another order than torch's, see updates.Dora.
    base = make_model()
    adapter = make_adapter(base, use_dora=True)
    mine, theirs = merged(base, {adapter: 1.0}), peft_merge(base, {adapter: 1.0})
    steps = [mine[name].astype(np.int32) - bits(theirs[name]) for name in mine]
    assert max(int(np.abs(step).max()) for step in steps) <= 1
    assert sum(np.count_nonzero(step) for step in steps) < 1e-3 * sum(step.size for step in steps)


def test_a_model_with_a_head_of_its_own(make_model, make_adapter, peft_merge, assert_same):
    base = make_model(tie_word_embeddings=False)
    adapter = make_adapter(base, target_modules=["lm_head", "q_proj"])
    assert_same(merged(base, {adapter: 1.0}), peft_merge(base, {adapter: 1.0}))


def test_gemma_1(make_model, make_adapter, peft_merge, assert_same):
    base = make_model(family="gemma")
    adapter = make_adapter(base)
    assert_same(merged(base, {adapter: 1.0}), peft_merge(base, {adapter: 1.0}))


def test_lora_on_what_another_adapter_replaced_is_refused_in_either_order(tmp_path):
    base = demo.checkpoint()
    for name, options in (
        ("whole", {"target_modules": ["q_proj"], "modules_to_save": ["gate_proj"]}),
        ("lora", {"target_modules": ["gate_proj"]}),
    ):
        model = get_peft_model(
            AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=2, init_lora_weights=False, **options)
        )
        with torch.no_grad():
            for key, tensor in model.named_parameters():
                if "modules_to_save" in key:
                    tensor.add_(0.05)
        model.save_pretrained(tmp_path / name)
    for order in (("whole", "lora"), ("lora", "whole")):
        with pytest.raises(AdapterError, match="gate_proj"):
            merged(base, {tmp_path / name: 1.0 for name in order})
