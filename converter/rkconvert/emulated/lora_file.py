"""Write an adapter as a separate .rkemu file, for rkllm_load_lora on an emulated model."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from rkconvert.adapters.reader import Adapter
from rkconvert.adapters.updates import LowRank
from rkconvert.model.families import FAMILIES
from rkruntime.bundle import rkemu
from rkruntime.errors import AdapterError


def plain_pairs(adapter: Adapter) -> Mapping[str, LowRank]:
    """Return the two low-rank matrices for each weight that an adapter changes.

    Raises:
        AdapterError: It does more than add their products to the layers' matrices, all that a LoRA file can express.
    """
    pairs: dict[str, LowRank] = {}
    for name, update in adapter.updates.items():
        change = update.changes[0] if len(update.changes) == 1 and update.replacement is None else None
        if not isinstance(change, LowRank) or change.round_delta or not name.startswith("model.layers."):
            raise AdapterError(
                f"The adapter does more to {name} than add the product of two small matrices to a layer's matrix, which"
                " is all that an RKLLM LoRA file can express.",
                hint="Merge it: --lora-mode merge.",
            )
        pairs[name] = change
    return pairs


def write_emulator_lora(path: Path, adapter: Adapter, family: str, base_fingerprint: str) -> None:
    """Write an adapter's file; the emulator loads it only on the model with that fingerprint.

    Raises:
        AdapterError: See `plain_pairs`.
    """
    pairs = {FAMILIES[family].to_rkemu(name): pair for name, pair in plain_pairs(adapter).items()}
    # The file has one alpha, and the factor of a pair is alpha / its rank: if a pair's own factor differs, the second
    # matrix absorbs the difference.
    first = next(iter(pairs.values()))
    alpha = first.scaling * len(first.a)
    arrays = {}
    for name, pair in pairs.items():
        arrays[f"{name}.lora_a"] = pair.a
        arrays[f"{name}.lora_b"] = pair.b * np.float32(pair.scaling * len(pair.a) / alpha)
    metadata: dict[str, rkemu.Value] = {
        "general.kind": "adapter",
        "general.architecture": family,
        "general.name": adapter.name,
        "adapter.alpha": float(alpha),
        "adapter.base_fingerprint": base_fingerprint,
    }
    specs = [rkemu.TensorSpec(name, "float32", array.shape) for name, array in arrays.items()]
    with rkemu.Writer(path, metadata, specs) as writer:
        for name, array in arrays.items():
            writer.write(name, np.ascontiguousarray(array))
