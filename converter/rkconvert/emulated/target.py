"""The emulator's target: model.rkemu, with an adapter's file beside it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from rkconvert.emulated.lora_file import write_emulator_lora
from rkconvert.emulated.model_file import tensor_specs, write_emulator_file
from rkconvert.output.bundle_folder import LORA_NOTE, ModelFile
from rkconvert.output.disk import spare
from rkconvert.progress import Reporter
from rkconvert.target import ModelSpec
from rkruntime.abi import DEFAULT_RELEASE, EMULATED, check_release
from rkruntime.bundle.manifest import LORA
from rkruntime.bundle.rkemu import read_container

_FILE: Final = "model.rkemu"
_LORA_FILE: Final = f"{LORA}.rkemu"


@dataclass(frozen=True)
class EmulatorTarget:
    """Makes the emulator's model file (a `rkconvert.target.Target`)."""

    release: str
    maker: None = None
    done: tuple[str, ...] = ()

    @classmethod
    def of(cls, release: str | None) -> EmulatorTarget:
        """Return the target for a release, or the default one. Raises UsageError if the emulator does not have it."""
        return cls(check_release(release or DEFAULT_RELEASE, EMULATED, "The emulator").version)

    def check(self, spec: ModelSpec) -> tuple[str, ...]:
        """Raise RefusedError if the type's group size does not divide a row."""
        tensor_specs(spec)
        return ()

    def needed_bytes(self, spec: ModelSpec) -> int:
        """Return the size of the file, in bytes."""
        return sum(tensor.nbytes for tensor in tensor_specs(spec))

    def resumable(self, _: ModelSpec) -> tuple[str, ...]:
        """Return no names: a killed run starts over."""
        return ()

    def write(self, spec: ModelSpec, folder: Path, reporter: Reporter) -> ModelFile:
        """Write the file or files. Raises CheckpointError, AdapterError, ModelFileError: see `write_emulator_file`."""
        verb = "merging and quantizing" if spec.model.adapters else "quantizing"
        with spare(folder), reporter.bar(verb, spec.model.nbytes) as advance:
            write_emulator_file(folder / _FILE, spec, advance)
        if spec.lora is None:
            return ModelFile(_FILE, ())
        fingerprint = read_container(folder / _FILE).fingerprint
        write_emulator_lora(folder / _LORA_FILE, spec.lora, spec.config.family, fingerprint)
        return ModelFile(_FILE, (LORA_NOTE.format(name=spec.lora.name, file=_LORA_FILE),))
