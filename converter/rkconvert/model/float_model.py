"""Logits of the float model, computed from its weights layer by layer: only blocks of a matrix are in memory at once.

The arithmetic is that of transformers' Gemma and Gemma 2 with eager attention, in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import numpy as np
from threadpoolctl import threadpool_limits

from rkconvert.model.family import EMBEDDING, FINAL_NORM, HEAD
from rkconvert.model.gemma import GemmaConfig
from rkconvert.tensors.formats import to_float32
from rkconvert.tensors.parallel import ordered_map
from rkconvert.tensors.weights import Weights, read_finite, read_float32, row_blocks

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Floats = NDArray[np.float32]


# Rows of attention's scores that are in memory at once: they are as long as the prompt.
_QUERIES: Final = 512


@dataclass(frozen=True)
class FloatModel:
    """A Gemma or Gemma 2 that is read from its weights whenever it computes.

    Attributes:
        advance: Called with the bytes of each block read.
    """

    weights: Weights
    config: GemmaConfig
    advance: Callable[[int], None] = lambda _: None

    def logits(self, prompts: Sequence[Sequence[int]], last: int) -> list[Floats]:
        """Return logits of the last positions of each prompt, [at most `last`, vocabulary]; the weights are read once.

        Raises:
            CheckpointError, AdapterError: Weights are NaN or infinite.
        """
        # One thread: more would only wait for each other where matrices are small, and could sum in another order.
        with threadpool_limits(1, user_api="blas"):
            return self._logits(prompts, last)

    def _logits(self, prompts: Sequence[Sequence[int]], last: int) -> list[Floats]:
        hidden = self._embedded(prompts)
        ends = np.cumsum([len(prompt) for prompt in prompts])
        for layer in range(self.config.num_hidden_layers):
            hidden = self._layer(f"model.layers.{layer}.", layer, hidden, ends[:-1])
        hidden = self._norm(FINAL_NORM, hidden)
        rows = [states[-last:] for states in np.split(hidden, ends[:-1])]
        logits = self._product(EMBEDDING if self.config.tie_word_embeddings else HEAD, np.vstack(rows))
        logits = _capped(logits, self.config.final_logit_softcapping)
        return np.split(logits, np.cumsum([len(states) for states in rows])[:-1])

    def _embedded(self, prompts: Sequence[Sequence[int]]) -> Floats:
        """Return the scaled embeddings of all prompts, one below the other."""
        dtype = self.weights.tensors[EMBEDDING].dtype
        ids, places = np.unique(np.concatenate([np.asarray(ids) for ids in prompts]), return_inverse=True)
        rows = [to_float32(read_finite(self.weights, EMBEDDING, int(index), 1), dtype) for index in ids]
        scaled: Floats = np.vstack(rows)[places] * np.float32(self.config.hidden_size**0.5)
        return scaled

    def _layer(self, name: str, layer: int, hidden: Floats, ends: NDArray[np.int64]) -> Floats:
        """Compute one layer for all prompts at once; only attention tells them apart."""
        # Gemma 2 has norms before and after; Gemma 1 names the one before the MLP after the attention that it follows.
        around = f"{name}pre_feedforward_layernorm.weight" in self.weights.tensors
        normed = self._norm(f"{name}input_layernorm.weight", hidden)
        heads = [self._product(f"{name}self_attn.{part}_proj.weight", normed) for part in "qkv"]
        mixed = [
            self._attention(layer, *parts) for parts in zip(*(np.split(head, ends) for head in heads), strict=True)
        ]
        out = self._product(f"{name}self_attn.o_proj.weight", np.vstack(mixed))
        between = f"{name}post_attention_layernorm.weight"
        hidden = hidden + (self._norm(between, out) if around else out)
        normed = self._norm(f"{name}pre_feedforward_layernorm.weight" if around else between, hidden)
        gate = _gelu(self._product(f"{name}mlp.gate_proj.weight", normed))
        gate *= self._product(f"{name}mlp.up_proj.weight", normed)
        out = self._product(f"{name}mlp.down_proj.weight", gate)
        return hidden + (self._norm(f"{name}post_feedforward_layernorm.weight", out) if around else out)

    def _attention(self, layer: int, query: Floats, key: Floats, value: Floats) -> Floats:
        """Return the attention of one prompt, [tokens, heads x width], from its three projections."""
        config, count = self.config, len(query)
        query, key, value = (part.reshape(count, -1, config.head_dim).swapaxes(0, 1) for part in (query, key, value))
        shared = config.num_attention_heads // config.num_key_value_heads
        query, key = _rotated(query, config.rope_theta), np.repeat(_rotated(key, config.rope_theta), shared, axis=0)
        window = config.sliding_window if config.sliding_layers[layer] else count
        value = np.repeat(value, shared, axis=0)
        parts = [self._mixed(query, key, value, window, start) for start in range(0, count, _QUERIES)]
        mixed: Floats = np.concatenate(parts, axis=1).swapaxes(0, 1).reshape(count, -1)
        return mixed

    def _mixed(self, query: Floats, key: Floats, value: Floats, window: int, start: int) -> Floats:
        """Return the attention of the next _QUERIES queries from `start` on."""
        config, part = self.config, query[:, start : start + _QUERIES]
        scores = part @ key.swapaxes(1, 2) * np.float32(config.query_pre_attn_scalar**-0.5)
        scores = _capped(scores, config.attn_logit_softcapping)
        back = np.arange(start, start + part.shape[1])[:, None] - np.arange(key.shape[1])
        scores = np.where((back < 0) | (back >= window), np.float32(-np.inf), scores)
        shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
        shares /= shares.sum(axis=-1, keepdims=True)
        mixed: Floats = shares @ value
        return mixed

    def _norm(self, name: str, hidden: Floats) -> Floats:
        self.advance(self.weights.tensors[name].nbytes)
        scale = 1 + read_float32(self.weights, name)
        spread = np.square(hidden).mean(axis=-1, keepdims=True) + np.float32(self.config.rms_norm_eps)
        normed: Floats = hidden / np.sqrt(spread) * scale
        return normed

    def _product(self, name: str, hidden: Floats) -> Floats:
        """Multiply `hidden` by the matrix, whose rows are outputs."""
        info, inputs = self.weights.tensors[name], self._inputs(hidden)

        def product(rows: tuple[int, int]) -> tuple[int, Floats]:
            block = read_finite(self.weights, name, *rows)
            return block.nbytes, self._times(inputs, to_float32(block, info.dtype))

        parts = []
        blocks = list(row_blocks(info.shape))
        # Starting threads for one block takes longer than a small model's product.
        for nbytes, part in ordered_map(product, blocks) if len(blocks) > 1 else map(product, blocks):
            parts.append(part)
            self.advance(nbytes)
        return np.hstack(parts)

    def _inputs(self, hidden: Floats) -> Floats:
        """Return the inputs of a matrix product; RoundedToo rounds a part of them."""
        return hidden

    def _times(self, inputs: Floats, block: Floats) -> Floats:
        """Return the product with a block of a matrix's rows."""
        product: Floats = inputs @ block.T
        return product


def _rotated(heads: Floats, theta: float) -> Floats:
    """Apply rotary embeddings to [heads, tokens, width], with the halves laid out as Hugging Face does."""
    count, width = heads.shape[1:]
    angles = np.arange(count)[:, None] * theta ** (-np.arange(0, width, 2) / width)
    angles = np.hstack([angles, angles])
    first, second = np.split(heads, 2, axis=-1)
    quarter = np.concatenate([-second, first], axis=-1)
    turned: Floats = heads * np.cos(angles).astype(np.float32) + quarter * np.sin(angles).astype(np.float32)
    return turned


def _capped(values: Floats, cap: float) -> Floats:
    return np.tanh(values / np.float32(cap)) * np.float32(cap) if cap else values


def _gelu(values: Floats) -> Floats:
    """Compute GELU, as approximated by tanh."""
    inner = np.float32((2 / np.pi) ** 0.5) * (values + np.float32(0.044715) * values**3)
    activated: Floats = np.float32(0.5) * values * (1 + np.tanh(inner))
    return activated
