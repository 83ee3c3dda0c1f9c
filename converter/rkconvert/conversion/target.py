"""What a conversion needs of what makes the model file: the emulator's (`emulated`) and a board's (`toolkit`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from rkconvert.output.bundle_folder import ModelFile
from rkconvert.progress import Reporter


class Target(Protocol):
    """A model file that is about to be made."""

    @property
    def needed_bytes(self) -> int:
        """Room that the work takes on the disk."""
        ...

    @property
    def resumable(self) -> Sequence[str]:
        """What `write` takes up where a run was killed, below the folder."""
        ...

    def check(self) -> tuple[str, ...]:
        """Every check that needs no work; what a person should know."""
        ...

    def write(self, folder: Path, reporter: Reporter) -> ModelFile:
        """Make the file in `folder`, and what belongs to it."""
        ...
