"""The files that a conversion reads: the state of each before it was read, and whether that has changed."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Final, NamedTuple

from rkconvert.tensors.memory_folder import Place
from rkruntime.errors import InputError
from rkruntime.files import read_error, sha256_file

# Two kernel ticks: file systems keep time in ticks (10 ms at most), so a second change within one leaves no trace.
_TICK_NS: Final = 20_000_000
_TRIES: Final = 5
# Files of a tokenizer and its chat template; they belong together.
_TOKENIZER_FILES: Final = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
)
# Folder in which transformers keeps further chat templates, each as NAME.jinja.
_TEMPLATES: Final = "additional_chat_templates"
# Further files that determine a result, besides the weights: settings and indices of models and adapters.
_SETTINGS: Final = (
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
    "adapter_model.safetensors.index.json",
    "adapter_model.bin.index.json",
)


def templates(folder: Place) -> dict[str, Place]:
    """Find named chat templates besides chat_template.jinja; transformers uses the one called default in its place."""
    found = folder / _TEMPLATES
    # A model that is one file has no such folder.
    paths = sorted(found.glob("*.jinja")) if isinstance(found, Path) else []
    return {path.name.removesuffix(".jinja"): path for path in paths}


def tokenizer_files(folder: Place) -> list[str]:
    """Return possible files of the tokenizer and its chat templates, relative to the folder; most may be missing."""
    return [*_TOKENIZER_FILES, *(f"{_TEMPLATES}/{path.name}" for path in templates(folder).values())]


class FileState(NamedTuple):
    """State of a file that differs after any change to its bytes. Only the kernel sets `ctime_ns`."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int
    device: int

    @classmethod
    def of(cls, file: Path | int) -> FileState | None:
        """Return the state of a path or an open descriptor; None if it is not a regular file."""
        try:
            found = file.stat() if isinstance(file, Path) else os.fstat(file)
        except OSError:
            return None
        if not stat.S_ISREG(found.st_mode):
            return None
        return cls(found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino, found.st_dev)


States = Mapping[Path, FileState | None]


def states_of(files: Iterable[Path]) -> dict[Path, FileState | None]:
    """Return the states of files about to be read, to detect later changes."""
    files = list(files)
    for _ in range(_TRIES):
        found = {file: FileState.of(file) for file in files}
        newest = max((state.ctime_ns for state in found.values() if state), default=0)
        if not 0 <= time.time_ns() - newest < _TICK_NS:
            break
        time.sleep(_TICK_NS / 1e9)
    return found


def folder_states(folder: Path) -> dict[Path, FileState | None]:
    """Return the states of all files in a folder, which may be missing, and of its chat templates."""
    try:
        return states_of([*sorted(folder.iterdir()), *(Path(str(path)) for path in templates(folder).values())])
    except OSError:
        return {}


def changed(path: Path, then: FileState | None, now: FileState | None, kind: type[InputError]) -> InputError:
    """Return the error for a file whose state has changed."""
    if then is None or now is None:
        what = "appeared" if now else "vanished"
    elif (then.inode, then.device) != (now.inode, now.device):
        what = "was replaced by another file"
    elif then.size != now.size:
        what = f"went from {then.size:,} to {now.size:,} bytes"
    else:
        what = "was written to or touched"
    return kind(
        f"{path} changed while it was read: it {what}.",
        hint="Wait until whatever writes it has finished, then run the same command again. Nothing was kept.",
    )


@dataclass(frozen=True)
class Inputs:
    """Files of one model, adapter or option, with their states before they were read.

    Attributes:
        kind: Class of the error if one has changed.
        weights: Files too large to hash before the work.
        small: All others that may be read; None for a missing one.
    """

    kind: type[InputError]
    weights: States
    small: States

    def check(self) -> None:
        """Raise an error of `kind` if a file has changed: what was read may then be old or new."""
        for path, then in {**self.weights, **self.small}.items():
            now = FileState.of(path)
            if now != then:
                raise changed(path, then, now, self.kind)

    @classmethod
    def of_folder(cls, kind: type[InputError], folder: Path, before: States, weights: Iterable[Path]) -> Inputs:
        """Return the inputs of a model's or adapter's folder, given its `folder_states` from before it was opened.

        Raises:
            InputError: (of class `kind`) One that may be left out is there, but is not a file.
        """
        names = [*_SETTINGS, *tokenizer_files(folder)]
        small = {path: before.get(path) for path in (folder / name for name in names)}
        # What is read without it is another model's: a template, the tokens that end an answer.
        missing = (path for path, state in small.items() if state is None and os.path.lexists(path))
        if unread := next((path for path in missing if FileState.of(path) is None), None):
            raise kind(
                f"{unread} is not a file: it is a folder, or a link to a file that is missing.",
                hint="Download the model again, or copy it with `cp -RL`, which copies what links lead to.",
            )
        return cls(kind, {file: before.get(file) for file in weights}, small)

    @cached_property
    def digests(self) -> list[tuple[str, str]]:
        """Name and SHA-256 of each small file that exists."""
        try:
            return [(path.name, sha256_file(path)) for path, state in self.small.items() if state]
        except OSError as error:
            raise read_error(error.filename, error, self.kind) from error

    def identity(self) -> dict[str, Any]:
        """Return values that identify these files, without reading the weights."""
        return {
            "weights": [[str(path.resolve()), state] for path, state in self.weights.items()],
            "small": self.digests,
        }
