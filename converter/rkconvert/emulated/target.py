"""The emulator's target: model.rkemu, with an adapter's file beside it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rkconvert.adapters.merged_model import MergedModel
from rkconvert.adapters.reader import Adapter
from rkconvert.emulated.lora_file import write_emulator_lora
from rkconvert.emulated.model_file import EmulatorModel, tensor_specs, write_emulator_file
from rkconvert.output.bundle_folder import LORA_NOTE, ModelFile
from rkconvert.progress import Reporter
from rkruntime.bundle.manifest import LORA
from rkruntime.bundle.rkemu import read_container

_FILE: Final = "model.rkemu"
_LORA_FILE: Final = f"{LORA}.rkemu"


@dataclass(frozen=True)
class EmulatedModel:
    """The target that makes the emulator's model file (a `rkconvert.conversion.target.Target`).

    Attributes:
        described: Contents of the file besides the weights.
        model: Weights; without adapters if one becomes a separate file, `lora`.
    """

    described: EmulatorModel
    model: MergedModel
    lora: Adapter | None
    resumable: tuple[str, ...] = ()

    @property
    def needed_bytes(self) -> int:
        """Size of the file, in bytes."""
        return sum(spec.nbytes for spec in tensor_specs(self.described))

    def check(self) -> tuple[str, ...]:
        """Raise RefusedError if the type's group size does not divide a row."""
        tensor_specs(self.described)
        return ()

    def write(self, folder: Path, reporter: Reporter) -> ModelFile:
        """Write the file or files. Raises CheckpointError, AdapterError, ModelFileError: see `write_emulator_file`."""
        verb = "merging and quantizing" if self.model.adapters else "quantizing"
        with reporter.bar(verb, self.model.nbytes) as advance:
            write_emulator_file(folder / _FILE, self.described, self.model.weights, advance)
        if self.lora is None:
            return ModelFile(_FILE, ())
        fingerprint = read_container(folder / _FILE).fingerprint
        write_emulator_lora(folder / _LORA_FILE, self.lora, self.model.weights.config.family, fingerprint)
        return ModelFile(_FILE, (LORA_NOTE.format(name=self.lora.name, file=_LORA_FILE),))
