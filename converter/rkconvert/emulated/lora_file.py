"""Write an adapter as a separate .rkemu file, for rkllm_load_lora on an emulated model."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from rkconvert.adapters.reader import Adapter
from rkconvert.adapters.separate import separate_lora
from rkconvert.model.families import FAMILIES
from rkruntime.bundle import rkemu


def write_emulator_lora(path: Path, adapter: Adapter, family: str, base_fingerprint: str) -> None:
    """Write an adapter's file; the emulator loads it only on the model with that fingerprint.

    Raises:
        AdapterError: See `separate_lora`.
    """
    lora = separate_lora(adapter)
    arrays = {}
    for name, (a, b) in lora.pairs.items():
        prefix = FAMILIES[family].to_rkemu(name)
        arrays[f"{prefix}.lora_a"], arrays[f"{prefix}.lora_b"] = a, b
    metadata: dict[str, rkemu.Value] = {
        "general.kind": "adapter",
        "general.architecture": family,
        "general.name": adapter.name,
        "adapter.alpha": float(lora.alpha),
        "adapter.base_fingerprint": base_fingerprint,
    }
    specs = [rkemu.TensorSpec(name, "float32", array.shape) for name, array in arrays.items()]
    with rkemu.Writer(path, metadata, specs) as writer:
        for name, array in arrays.items():
            writer.write(name, np.ascontiguousarray(array))
