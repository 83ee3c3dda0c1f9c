"""Checkpoints saved by bitsandbytes (NF4, FP4, int8), dequantized exactly as bitsandbytes does, but without it.

Layouts (bitsandbytes 0.50, functional.QuantState and nn.Linear8bitLt): a 4-bit weight is a column of bytes, first
element in the high half, with a scale for each block of 64 elements, which may itself be stored in 8 bits; an int8
weight has a scale for each row. Values are multiplied in float32 and rounded once to the format that the model was
loaded in.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from rkconvert.tensors.formats import from_float32
from rkconvert.tensors.shards import parse_json
from rkconvert.tensors.weights import TensorInfo, Weights
from rkruntime.errors import CheckpointError
from rkruntime.words import counted

if TYPE_CHECKING:
    from numpy.typing import NDArray

_STATE: Final = ".quant_state.bitsandbytes__"
_SIDES: Final = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", ".SCB", ".weight_format")
# The 16 numbers of each 4-bit type, by which bitsandbytes computes whatever a file's quant_map says
# (https://github.com/bitsandbytes-foundation/bitsandbytes, functional.get_4bit_type).
_CODES: Final = {
    "nf4": (
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
        0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ),
    "fp4": (
        0.0, 0.0052083334885537624, 0.6666666865348816, 1.0, 0.3333333432674408, 0.5, 0.1666666716337204, 0.25,
        0.0, -0.0052083334885537624, -0.6666666865348816, -1.0, -0.3333333432674408, -0.5, -0.1666666716337204, -0.25,
    ),
}  # fmt: skip
_FORMATS: Final = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
# Orders of an int8 matrix's bytes, as `weight_format` numbers them (bitsandbytes/utils.py).
_ORDERS: Final = ("row", "col32", "col_turing", "col_ampere")
_LARGEST: Final = float(np.finfo(np.float32).max)
# 1/127, as in int8_vectorwise_dequant.
_INT8_STEP: Final = np.float32(7.874015718698502e-3)


def is_bitsandbytes(config: Mapping[str, Any]) -> bool:
    """Whether config.json says that bitsandbytes quantized the model."""
    settings = config.get("quantization_config")
    return isinstance(settings, dict) and settings.get("quant_method", "bitsandbytes") == "bitsandbytes"


@dataclass(frozen=True)
class _Scales:
    """Scales of blocks, by the name of their tensor; stored in 8 bits if `code` is given."""

    name: str
    code: NDArray[np.float32] | None = None
    outer: NDArray[np.float32] | None = None
    outer_block: int = 1
    offset: float = 0.0

    def read(self, weights: Weights, first: int, count: int) -> NDArray[np.float32]:
        values = weights.read(self.name, first, count)
        if self.code is None or self.outer is None:
            return values
        outer = self.outer[np.arange(first, first + count) // self.outer_block]
        scales: NDArray[np.float32] = self.code[values] * outer + np.float32(self.offset)
        return scales


@dataclass(frozen=True)
class _FourBit:
    """A 4-bit matrix: location and layout of its bytes."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    block: int
    code: NDArray[np.float32]
    scales: _Scales

    def rows(self, weights: Weights, first: int, count: int) -> NDArray[Any]:
        width = math.prod(self.shape[1:])
        start, end = first * width, (first + count) * width
        # Whole bytes: a row may start in the middle of one.
        packed = weights.read(self.name, start // 2, (end + 1) // 2 - start // 2).reshape(-1)
        indices = np.stack([packed >> 4, packed & 15], axis=1).reshape(-1)[start % 2 :][: end - start]
        lowest = start // self.block
        scales = self.scales.read(weights, lowest, (end - 1) // self.block + 1 - lowest)
        values = self.code[indices] * scales[np.arange(start, end) // self.block - lowest]
        return from_float32(values, self.dtype).reshape(count, *self.shape[1:])


@dataclass(frozen=True)
class _EightBit:
    """An int8 matrix with a scale for each row."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    scales: NDArray[np.float32]

    def rows(self, weights: Weights, first: int, count: int) -> NDArray[Any]:
        values = weights.read(self.name, first, count) * self.scales[first : first + count, None] * _INT8_STEP
        return from_float32(values, self.dtype)


class Dequantized:
    """A bitsandbytes checkpoint's weights as floats.

    Raises:
        CheckpointError: A matrix lacks its scales, or they do not fit.
    """

    def __init__(self, weights: Weights, config: Mapping[str, Any]) -> None:
        self._weights = weights
        self._dtype = _FORMATS.get(str(config.get("dtype") or config.get("torch_dtype")), "F16")
        self._packed: dict[str, _FourBit | _EightBit] = {}
        self.tensors: dict[str, TensorInfo] = {}
        found = weights.tensors
        for name, info in found.items():
            if name.endswith(_SIDES) or _STATE in name:
                continue
            states = [other for other in found if other.startswith(f"{name}{_STATE}")]
            if len(states) > 1:
                raise CheckpointError(f"The 4-bit tensor {name} is described {len(states)} times.")
            if states:
                self._packed[name] = self._four_bit(name, states[0])
            elif info.dtype == "I8":
                self._packed[name] = self._eight_bit(name)
            packed = self._packed.get(name)
            self.tensors[name] = TensorInfo(packed.dtype, packed.shape) if packed else info

    def read(self, name: str, first: int, count: int) -> NDArray[Any]:
        """Return rows of a tensor, dequantized."""
        # A row of 4-bit numbers can end inside a byte, so the bytes' own bounds are not enough.
        self.tensors[name].require_rows(first, count, name)
        packed = self._packed.get(name)
        return packed.rows(self._weights, first, count) if packed else self._weights.read(name, first, count)

    def _side(self, name: str) -> NDArray[Any]:
        info = self._weights.tensors.get(name)
        if info is None or len(info.shape) != 1:
            raise CheckpointError(f"The quantized checkpoint lacks {name}, without which its weights cannot be read.")
        return self._weights.read(name, 0, info.shape[0])

    def _floats(self, name: str) -> NDArray[np.float32]:
        values = self._side(name)
        if values.dtype != np.float32 or not np.isfinite(values).all():
            raise CheckpointError(f"{name} of the quantized checkpoint is not finite float32.")
        return values

    def _four_bit(self, name: str, state_name: str) -> _FourBit:
        try:
            state = parse_json(self._side(state_name).tobytes())
            kind, dtype = state["quant_type"], _FORMATS[state["dtype"]]
            shape, block = tuple(state["shape"]), state["blocksize"]
            sizes = [*shape, block]
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{state_name} does not describe a 4-bit tensor.") from error
        if f"{name}{_STATE}{kind}" != state_name:
            raise CheckpointError(f"{state_name} says that it is of the type {str(kind)[:40]!r}.")
        if not shape or any(type(size) is not int or size < 1 for size in sizes):
            raise CheckpointError(f"{state_name} does not describe a 4-bit tensor: shape {shape}, block {block}.")
        scales, blocks = self._scales(name, state), self._weights.tensors[f"{name}.absmax"].shape
        code, size = self._floats(f"{name}.quant_map"), math.prod(shape)
        info = self._weights.tensors[name]
        if info.dtype in ("F16", "BF16", "F32"):
            raise CheckpointError(
                f"The 4-bit tensor {name} is stored as {info.dtype} (bnb_4bit_quant_storage), which is not supported.",
                hint="Save the model again with bnb_4bit_quant_storage=torch.uint8, or use the base and the adapter.",
            )
        if len(code) != 16 or blocks != (-(-size // block),) or info.dtype != "U8" or info.size != -(-size // 2):
            raise CheckpointError(f"The 4-bit tensor {name} does not have the bytes and scales of its shape {shape}.")
        if kind not in _CODES or not np.array_equal(code, np.array(_CODES[kind], np.float32)):
            raise CheckpointError(
                f"The 4-bit tensor {name} has a quant_map other than that of its type {str(kind)[:40]}, by which"
                " bitsandbytes computes: one of the two is wrong.",
                hint="Start from the original 16-bit checkpoint, or download the file again.",
            )
        return _FourBit(name, dtype, shape, block, code, scales)

    def _scales(self, name: str, state: Mapping[str, Any]) -> _Scales:
        """Read scales: floats, or 8-bit values in blocks of 256 around an offset (double quantization)."""
        absmax = f"{name}.absmax"
        info = self._weights.tensors.get(absmax)
        nested = "nested_offset" in state
        if info is None or len(info.shape) != 1 or info.dtype != ("U8" if nested else "F32"):
            raise CheckpointError(f"The quantized checkpoint has no usable scales {absmax}.")
        if not nested:
            return _Scales(absmax)
        outer, code = self._floats(f"{name}.nested_absmax"), self._floats(f"{name}.nested_quant_map")
        block, offset = state.get("nested_blocksize"), state["nested_offset"]
        # Written so that NaN is refused, too.
        fits = type(offset) in (float, int) and -_LARGEST <= offset <= _LARGEST
        if type(block) is not int or block < 1 or not fits:
            raise CheckpointError(f"The double-quantized scales of {name} are not described.")
        if len(outer) != -(-info.shape[0] // block) or len(code) != 256:
            raise CheckpointError(f"The double-quantized scales of {name} do not fit together.")
        return _Scales(absmax, code, outer, block, float(offset))

    def _eight_bit(self, name: str) -> _EightBit:
        shape = self._weights.tensors[name].shape
        self._check_order(name)
        scales = self._floats(name.removesuffix("weight") + "SCB")
        if len(shape) != 2 or len(scales) != shape[0]:
            raise CheckpointError(
                f"The int8 tensor {name} {list(shape)} has {counted(len(scales), 'scale')}; it needs one per row."
            )
        return _EightBit(name, self._dtype, shape, scales)

    def _check_order(self, name: str) -> None:
        """Raise CheckpointError for an int8 matrix in the order of a GPU's tiles, which bitsandbytes refuses too."""
        key = name.removesuffix("weight") + "weight_format"
        info = self._weights.tensors.get(key)
        if info is None:
            return
        order = int(self._weights.read(key, 0, 1).item()) if info.size == 1 and info.dtype == "U8" else -1
        if order != 0:
            found = _ORDERS[order] if 0 < order < len(_ORDERS) else "unknown to bitsandbytes"
            raise CheckpointError(
                f"The int8 tensor {name} is not stored row by row: its weight_format is {found}.",
                hint="Start from the original 16-bit checkpoint.",
            )
