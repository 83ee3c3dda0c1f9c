"""Sizes read from config.json against the models that transformers builds from the same file."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import AutoConfig, AutoModelForCausalLM

from rkconvert.model.shapes import MODEL_TYPES, parse_shape
from rkconvert.plan.prediction import vendor_rows
from rkruntime.cli import main
from rkruntime.errors import CheckpointError

# Those of the table that transformers itself can build; the others come with code of their own.
BUILT_IN = ["gemma", "gemma2", "gemma3_text", "llama", "mistral", "phi3", "qwen2", "qwen3", "smollm3"]
ARCHITECTURES = {"gemma": "GemmaForCausalLM", "gemma2": "Gemma2ForCausalLM"}


def config_of(model_type: str, **changes: Any) -> dict[str, Any]:
    names = {"architectures": [ARCHITECTURES[model_type]]} if model_type in ARCHITECTURES else {}
    sizes = {
        "vocab_size": 512,
        "hidden_size": 96,
        "intermediate_size": 160,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
    }
    return {"model_type": model_type, **names, **sizes, **changes}


def built(config: dict[str, Any]) -> torch.nn.Module:
    plain = {key: value for key, value in config.items() if key not in ("model_type", "architectures")}
    plain |= {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1}  # Phi-3's own are beyond a small vocabulary
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(config["model_type"], **plain))


@pytest.mark.parametrize("model_type", BUILT_IN)
@settings(max_examples=6)
@given(
    layers=st.integers(1, 4),
    kv_heads=st.sampled_from([1, 2, 3, 6]),
    inner=st.sampled_from([96, 200]),
    tied=st.booleans(),
)
def test_parameters_equal_those_that_transformers_builds(model_type, layers, kv_heads, inner, tied):
    config = config_of(
        model_type,
        num_hidden_layers=layers,
        num_key_value_heads=kv_heads,
        intermediate_size=inner,
        tie_word_embeddings=tied,
    )
    shape = parse_shape(config)
    model = built(config)
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert shape.kv_width == 2 * kv_heads * 16
    layer = model.get_submodule("model.layers.0")
    assert shape.layer_weights == sum(p.numel() for p in layer.parameters() if p.ndim == 2)


@pytest.mark.parametrize("model_type", ["gemma3_text", "llama", "qwen3"])
def test_biases_are_counted_where_the_config_has_them(model_type):
    config = config_of(model_type, attention_bias=True)
    assert parse_shape(config).parameters == sum(p.numel() for p in built(config).parameters())


@pytest.mark.parametrize("model_type", BUILT_IN)
def test_a_size_left_out_is_named(model_type):
    config = config_of(model_type)
    del config["hidden_size"]
    if model_type in ("gemma", "gemma2"):
        assert parse_shape(config).hidden_size in (2304, 3072)  # transformers' default
        return
    with pytest.raises(CheckpointError, match="hidden_size"):
        parse_shape(config)


OPTIONAL = ("num_key_value_heads", "head_dim", "max_position_embeddings", "vocab_size", "num_attention_heads")


@pytest.mark.parametrize("model_type", sorted(BUILT_IN))
@settings(max_examples=25)
@given(omitted=st.sets(st.sampled_from(OPTIONAL)))
def test_what_a_config_leaves_out_is_as_in_transformers(model_type, omitted):
    """Or it is refused. Vision models leave out what equals their class's defaults, down to the number of heads."""
    sizes = config_of(model_type, hidden_size=256, num_attention_heads=32, num_key_value_heads=8)
    config = {key: value for key, value in sizes.items() if key not in omitted}
    try:
        shape = parse_shape(config)
    except CheckpointError as error:
        assert any(key in error.message for key in omitted)
        return
    model = built(config)
    assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert shape.max_position_embeddings == model.config.max_position_embeddings


@pytest.mark.parametrize("model_type", ["qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text"])
def test_what_the_text_part_of_a_model_with_pictures_leaves_out(model_type):
    sizes = {"hidden_size": 4096, "intermediate_size": 512, "num_hidden_layers": 2, "num_attention_heads": 32}
    theirs = AutoConfig.for_model(model_type, **sizes)
    shape = parse_shape({"model_type": "any", "text_config": {"model_type": model_type, **sizes}})
    assert shape.vocab_size == theirs.vocab_size
    assert shape.max_position_embeddings == theirs.max_position_embeddings
    head_dim = getattr(theirs, "head_dim", None) or 4096 // 32
    assert shape.kv_width == 2 * theirs.num_key_value_heads * head_dim


def test_gemma_3_without_the_sizes_that_are_its_classs_own():
    """The text parts of the sizes 12B and 4B: all that differs from Gemma3TextConfig."""
    large = {"hidden_size": 3840, "intermediate_size": 15360, "num_attention_heads": 16, "num_hidden_layers": 48}
    small = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}
    for sizes in ({**large, "num_key_value_heads": 8}, small):
        shape = parse_shape({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text", **sizes}})
        model = built({"model_type": "gemma3_text", **sizes})
        assert shape.parameters == sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("model", "billions"),
    [
        ("Qwen2 0.5B", 0.494),
        ("TinyLLAMA 1.1B", 1.100),
        ("Qwen2.5 1.5B", 1.544),
        ("Gemma2 2B", 2.614),
        ("Phi3 3.8B", 3.821),
        ("Qwen3 0.6B", 0.596),
        ("ChatGLM3 6B", 6.244),
    ],
)
def test_the_vendors_models_have_the_published_number_of_weights(model, billions):
    shape = next(row.shape for row in vendor_rows() if row.model == model)
    assert shape.parameters / 1e9 == pytest.approx(billions, abs=0.0006)


def test_latent_attention():
    """MiniCPM3-4B by its public config.json has 4.07 billion weights."""
    config = {
        "model_type": "minicpm3", "hidden_size": 2560, "num_hidden_layers": 62, "intermediate_size": 6400,
        "num_attention_heads": 40, "num_key_value_heads": 40, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32,
        "q_lora_rank": 768, "kv_lora_rank": 256, "vocab_size": 73448, "max_position_embeddings": 32768,
    }  # fmt: skip
    shape = parse_shape(config)
    assert shape.parameters / 1e9 == pytest.approx(4.07, abs=0.01)
    assert shape.kv_width == 40 * (96 + 64)


def test_the_language_part_of_a_model_with_pictures():
    nested = {"model_type": "qwen3_vl", "text_config": config_of("qwen3_vl_text"), "tie_word_embeddings": True}
    shape = parse_shape(nested)
    assert shape.tied
    assert "language part" in shape.notes[0]
    assert shape.layer == parse_shape(config_of("qwen3")).layer


def test_an_unknown_type_with_the_usual_names_is_read_with_a_note():
    shape = parse_shape(config_of("somebodys_llama"))
    assert shape.parameters == parse_shape(config_of("llama")).parameters
    assert "somebodys_llama" in shape.notes[0]


@pytest.mark.parametrize(
    "config",
    [
        config_of("mixtral", num_local_experts=8),
        config_of("qwen3_next", layer_types=["linear_attention", "full_attention", "full_attention"]),
        config_of("gemma3n_text", hidden_size_per_layer_input=256),
        {"model_type": "rwkv7", "hidden_size": 2048, "num_hidden_layers": 24, "vocab_size": 65536},
        {"model_type": "gpt2", "n_embd": 768},
        {},
        config_of("llama", hidden_size="4096"),
        config_of("llama", num_hidden_layers=0),
        config_of("llama", num_hidden_layers=1 << 40),
        config_of("llama", num_attention_heads=5, num_key_value_heads=2),
        config_of("llama", num_hidden_layers=True),
        config_of("gemma2", sliding_window="wide"),
        {"text_config": {"model_type": "llama"}},
    ],
)
def test_what_is_no_plain_decoder_is_refused(config):
    with pytest.raises(CheckpointError):
        parse_shape(config)


def test_every_family_can_be_parsed():
    for model_type, family in MODEL_TYPES.items():
        config = config_of(model_type)
        renamed = {family.keys.get(key, key): value for key, value in config.items()}
        shape = parse_shape(renamed)
        assert shape.num_hidden_layers == 3
        assert shape.hidden_size == 96


KEYS = {key for family in MODEL_TYPES.values() for key in family.keys.values()} | {*config_of("gemma2")} | {
    "attention_bias", "mlp_bias", "bias", "add_qkv_bias", "attn_logit_softcapping", "bos_token_id", "dtype",
    "eos_token_id", "final_logit_softcapping", "hidden_act", "hidden_activation", "kv_lora_rank", "layer_types",
    "num_local_experts", "q_lora_rank", "qk_nope_head_dim", "quantization_config", "query_pre_attn_scalar",
    "rms_norm_eps", "rope_parameters", "rope_scaling", "rope_theta", "sliding_window", "text_config",
    "tie_word_embeddings", "torch_dtype", "v_head_dim",
}  # fmt: skip
WRONG = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8) | st.just("full_attention"),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(sorted(KEYS)), inner, max_size=3),
    max_leaves=4,
)


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    model_type=st.sampled_from([*BUILT_IN, "chatglm", "minicpm3", "telechat", "unheard-of"]),
    changes=st.dictionaries(st.sampled_from(sorted(KEYS)), WRONG, min_size=1, max_size=2),
)
@example(model_type="llama", changes={"layer_types": 5})
@example(model_type="llama", changes={"layer_types": "full_attention"})
@example(model_type="qwen3", changes={"layer_types": [5, None]})
@example(model_type="gemma2", changes={"layer_types": [[]] * 3})
@example(model_type="gemma2", changes={"tie_word_embeddings": []})
def test_damage_to_a_config_is_no_defect_of_the_plan(tmp_path, capsys, model_type, changes):
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**config_of(model_type), **changes}))
    code = main(["plan", str(path)])
    said = capsys.readouterr()
    assert code in (0, 2, CheckpointError.exit_code), said.err
    assert "defect" not in said.err
    assert "l, l" not in said.err  # a text is no list of letters


def test_language_parts_within_each_other_end():
    config: dict[str, Any] = {}
    for _ in range(5000):
        config = {"text_config": config}
    with pytest.raises(CheckpointError):
        parse_shape(config)
