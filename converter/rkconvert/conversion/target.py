"""Interface of the model file's makers: the emulator's (`emulated`) and the board's (`toolkit`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from rkconvert.output.bundle_folder import ModelFile
from rkconvert.progress import Reporter


class Target(Protocol):
    """A model file about to be made."""

    @property
    def needed_bytes(self) -> int:
        """Disk space that the work needs, in bytes."""
        ...

    @property
    def resumable(self) -> Sequence[str]:
        """Paths below the folder from which `write` resumes after a killed run."""
        ...

    def check(self) -> tuple[str, ...]:
        """Run every check that needs no work; returns notes for the user."""
        ...

    def write(self, folder: Path, reporter: Reporter) -> ModelFile:
        """Make the file in `folder`, with its companion files."""
        ...
