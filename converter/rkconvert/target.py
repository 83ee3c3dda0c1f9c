"""Interface of the targets that make model files (`emulated`, `toolkit`), and the record from which they make one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rkconvert.adapters.merged_model import MergedModel
from rkconvert.adapters.reader import Adapter
from rkconvert.model.chat_template import ChatTemplate
from rkconvert.model.gemma import GemmaConfig
from rkconvert.model.tokenizer import TokenizerTables
from rkconvert.output.bundle_folder import ModelFile
from rkconvert.progress import Reporter


@dataclass(frozen=True)
class ModelSpec:
    """A model file to be made.

    Attributes:
        model: Weights; without adapters if one becomes a separate file, `lora`.
        release: RKLLM release that the file is for.
        max_context: In tokens.
    """

    model: MergedModel
    lora: Adapter | None
    tokenizer: TokenizerTables
    template: ChatTemplate
    platform: str
    dtype: str
    release: str
    max_context: int
    npu_cores: int

    @property
    def config(self) -> GemmaConfig:
        """Settings of the model with its adapters."""
        return self.model.weights.config

    @property
    def adapters(self) -> tuple[Adapter, ...]:
        """All adapters: the merged ones, and the one that stays separate."""
        return (*self.model.adapters, *([self.lora] if self.lora else []))


class Target(Protocol):
    """A maker of model files for one RKLLM release."""

    @property
    def release(self) -> str:
        """The release that its files are for."""
        ...

    @property
    def maker(self) -> Mapping[str, Any] | None:
        """The program that makes the file, if it is not RKEdge: whatever determines its results, for reports."""
        ...

    def check(self, spec: ModelSpec) -> tuple[str, ...]:
        """Run every check that needs no work; returns notes for the user."""
        ...

    def needed_bytes(self, spec: ModelSpec) -> int:
        """Return the disk space that the work needs, in bytes."""
        ...

    def resumable(self, spec: ModelSpec) -> Sequence[str]:
        """Return paths below the folder from which `write` resumes after a killed run."""
        ...

    @property
    def done(self) -> Sequence[str]:
        """The outputs that `write` produces only after long work."""
        ...

    def write(self, spec: ModelSpec, folder: Path, reporter: Reporter) -> ModelFile:
        """Make the file in `folder`, with its companion files."""
        ...
