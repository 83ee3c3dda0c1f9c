"""The emulator's target: model.rkemu, with an adapter's file beside it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rkconvert.emulated.lora_file import write_emulator_lora
from rkconvert.emulated.model_file import tensor_specs, write_emulator_file
from rkconvert.output.bundle_folder import DONE, LORA_NOTE, ModelFile
from rkconvert.output.disk import room_for, spare
from rkconvert.progress import Reporter
from rkconvert.target import ModelSpec
from rkconvert.tensors.inputs import FileState
from rkruntime.abi import DEFAULT_RELEASE, EMULATED, check_release
from rkruntime.bundle.manifest import LORA
from rkruntime.bundle.rkemu import read_container
from rkruntime.checks.machine import boot_id

_FILE: Final = "model.rkemu"
_LORA_FILE: Final = f"{LORA}.rkemu"
_DONE_BYTES: Final = 4096


@dataclass(frozen=True)
class EmulatorTarget:
    """Makes the emulator's model file (a `rkconvert.target.Target`)."""

    release: str
    maker: None = None
    done: tuple[str, ...] = (DONE,)

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

    def resumable(self, spec: ModelSpec) -> tuple[str, ...]:
        """The files, once they are complete; a run that is killed before begins anew."""
        return (*_files(spec), DONE)

    def write(self, spec: ModelSpec, folder: Path, reporter: Reporter) -> ModelFile:
        """Write the file or files. Raises CheckpointError, AdapterError, ModelFileError: see `write_emulator_file`."""
        files = _files(spec)
        if not _finished(folder, files):
            with room_for(folder / DONE, _DONE_BYTES) as put:
                _write(spec, folder, reporter)
                put(json.dumps(_states(folder, files)).encode())
        if spec.lora is None:
            return ModelFile(_FILE, ())
        return ModelFile(_FILE, (LORA_NOTE.format(name=spec.lora.name, file=_LORA_FILE),))


def _files(spec: ModelSpec) -> tuple[str, ...]:
    return (_FILE, _LORA_FILE) if spec.lora else (_FILE,)


def _write(spec: ModelSpec, folder: Path, reporter: Reporter) -> None:
    verb = "merging and quantizing" if spec.model.adapters else "quantizing"
    with spare(folder), reporter.bar(verb, spec.model.nbytes) as advance:
        write_emulator_file(folder / _FILE, spec, advance)
        if spec.lora:
            fingerprint = read_container(folder / _FILE).fingerprint
            write_emulator_lora(folder / _LORA_FILE, spec.lora, spec.config.family, fingerprint)


def _states(folder: Path, files: Sequence[str]) -> dict[str, Any]:
    """What differs if these files were written to since, or the machine went down, which may lose what was written."""
    return {"boot": boot_id(), **{name: FileState.of(folder / name) for name in files}}


def _finished(folder: Path, files: Sequence[str]) -> bool:
    """Whether an earlier run of this very conversion wrote these files; if not, they are removed."""
    with suppress(OSError, ValueError, RecursionError):
        if (folder / DONE).read_text() == json.dumps(_states(folder, files)):
            return True
    for name in (*files, DONE):
        (folder / name).unlink(missing_ok=True)
    return False
