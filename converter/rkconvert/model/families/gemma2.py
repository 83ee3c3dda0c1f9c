"""Gemma 2: four norms per layer, soft caps, and a sliding window in every other layer."""

from __future__ import annotations

from typing import Final

from rkconvert.model.family import ATTENTION, MLP, Family, Part

# Defaults are those of transformers' Gemma2Config.
FAMILY: Final = Family(
    model_type="gemma2",
    architecture="Gemma2ForCausalLM",
    defaults={
        "vocab_size": 256000,
        "hidden_size": 2304,
        "intermediate_size": 9216,
        "num_hidden_layers": 26,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "tie_word_embeddings": True,
        "bos_token_id": 2,
        "eos_token_id": 1,
    },
    activations={"hidden_activation": ("gelu_pytorch_tanh",)},
    parts=(
        *ATTENTION,
        *MLP,
        Part("input_layernorm", "attn_norm", "attn_norm", ("hidden",)),
        Part("post_attention_layernorm", "post_attention_norm", "attn_post_norm", ("hidden",)),
        Part("pre_feedforward_layernorm", "ffn_norm", "ffn_norm", ("hidden",)),
        Part("post_feedforward_layernorm", "post_ffw_norm", "ffn_post_norm", ("hidden",)),
    ),
)
