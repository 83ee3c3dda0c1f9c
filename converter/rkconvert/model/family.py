"""Definition of a model family: its defaults, and its tensors' names in each kind of file."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Final

EMBEDDING: Final = "model.embed_tokens.weight"
FINAL_NORM: Final = "model.norm.weight"
HEAD: Final = "lm_head.weight"
# Names outside the layers, the same for all families.
_WHOLE_GGUF: Final = {"token_embd.weight": EMBEDDING, "output_norm.weight": FINAL_NORM, "output.weight": HEAD}
_WHOLE_RKEMU: Final = {EMBEDDING: "token_embd", FINAL_NORM: "output_norm", HEAD: "output"}
_LAYER: Final = re.compile(r"model\.layers\.(\d+)\.(.+)\.weight")
_GGUF_LAYER: Final = re.compile(r"blk\.(\d+)\.(\w+)\.weight")


@dataclass(frozen=True)
class Part:
    """A tensor that every layer has.

    Attributes:
        hf, gguf, rkemu: Its name within the layer in a Hugging Face checkpoint, a GGUF and an emulator's file.
        shape: Outermost dimension first: `hidden`, `inner` (the MLP's), `query` and `key` (heads times their size).
    """

    hf: str
    gguf: str
    rkemu: str
    shape: tuple[str, ...]


ATTENTION: Final = (
    Part("self_attn.q_proj", "attn_q", "attn_q", ("query", "hidden")),
    Part("self_attn.k_proj", "attn_k", "attn_k", ("key", "hidden")),
    Part("self_attn.v_proj", "attn_v", "attn_v", ("key", "hidden")),
    Part("self_attn.o_proj", "attn_output", "attn_o", ("hidden", "query")),
)
MLP: Final = (
    Part("mlp.gate_proj", "ffn_gate", "ffn_gate", ("inner", "hidden")),
    Part("mlp.up_proj", "ffn_up", "ffn_up", ("inner", "hidden")),
    Part("mlp.down_proj", "ffn_down", "ffn_down", ("hidden", "inner")),
)


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        model_type, architecture: As in config.json.
        defaults: Settings that config.json may omit, from transformers (save_pretrained writes only differences); the
            family does not have settings that are missing here.
        activations: Names of the family's own activation, by key of config.json.
        parts: Tensors of a layer.
    """

    model_type: str
    architecture: str
    defaults: Mapping[str, Any]
    activations: Mapping[str, tuple[str, ...]]
    parts: tuple[Part, ...]

    @cached_property
    def _from_gguf(self) -> Mapping[str, str]:
        return {part.gguf: part.hf for part in self.parts}

    @cached_property
    def _to_rkemu(self) -> Mapping[str, str]:
        return {part.hf: part.rkemu for part in self.parts}

    def from_gguf(self, name: str) -> str | None:
        """Return the Hugging Face name of a GGUF's tensor; None if the family does not have it."""
        match = _GGUF_LAYER.fullmatch(name)
        if match is None or match[2] not in self._from_gguf:
            return _WHOLE_GGUF.get(name)
        return f"model.layers.{match[1]}.{self._from_gguf[match[2]]}.weight"

    def to_rkemu(self, name: str) -> str:
        """Return the name of a Hugging Face tensor in a .rkemu file."""
        match = _LAYER.fullmatch(name)
        return _WHOLE_RKEMU[name] if match is None else f"blk.{match[1]}.{self._to_rkemu[match[2]]}"
