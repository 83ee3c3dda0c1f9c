"""Gemma 1: two norms per layer; the one before the MLP is named after the attention that it follows."""

from __future__ import annotations

from typing import Final

from rkconvert.model.family import ATTENTION, MLP, Family, Part

# Defaults are those of transformers' GemmaConfig.
FAMILY: Final = Family(
    model_type="gemma",
    architecture="GemmaForCausalLM",
    defaults={
        "vocab_size": 256000,
        "hidden_size": 3072,
        "intermediate_size": 24576,
        "num_hidden_layers": 28,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "head_dim": 256,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "bos_token_id": 2,
        "eos_token_id": 1,
    },
    # transformers 5 reads hidden_act, where Google's "gelu" means the approximation; transformers 4 read
    # hidden_activation.
    activations={"hidden_activation": ("gelu_pytorch_tanh",), "hidden_act": ("gelu_pytorch_tanh", "gelu")},
    parts=(
        *ATTENTION,
        *MLP,
        Part("input_layernorm", "attn_norm", "attn_norm", ("hidden",)),
        Part("post_attention_layernorm", "ffn_norm", "ffn_norm", ("hidden",)),
    ),
)
