"""Map tensor names that other tools use to Hugging Face's own."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, Final

from rkconvert.tensors.weights import TensorInfo, Weights
from rkruntime.errors import CheckpointError

if TYPE_CHECKING:
    from numpy.typing import NDArray

# From peft's wrapper, torch.compile, DataParallel and text parts of multimodal models; or no prefix at all.
_PREFIX: Final = re.compile(r"((base_model|_orig_mod|module|language_model|text_model|model)\.)+")
_PARTS: Final = re.compile(r"(layers\.\d+|embed_tokens|norm)\..+")


def plain_name(name: str) -> str:
    """Return `model.layers.0...` for `base_model.model.model.layers.0...` or `layers.0...`."""
    bare = _PREFIX.sub("", name, count=1) if _PREFIX.match(name) else name
    return f"model.{bare}" if _PARTS.fullmatch(bare) else bare


class Renamed:
    """Weights under plain names; only the names change."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._names: dict[str, str] = {}
        for name in weights.tensors:
            plain = plain_name(name)
            if plain in self._names:
                raise CheckpointError(
                    f"The checkpoint has the tensors {self._names[plain]} and {name}: the folder contains two models."
                )
            self._names[plain] = name

    @property
    def as_stored(self) -> bool:
        """Whether no name changes."""
        return all(plain == name for plain, name in self._names.items())

    @cached_property
    def tensors(self) -> Mapping[str, TensorInfo]:
        """Every tensor by its plain name."""
        return {plain: self._weights.tensors[name] for plain, name in self._names.items()}

    def read(self, name: str, first: int, count: int) -> NDArray[Any]:
        """Return rows of a tensor, as stored."""
        return self._weights.read(self._names[name], first, count)
