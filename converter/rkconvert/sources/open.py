"""Open a model from a folder, the hub or a GGUF file."""

from __future__ import annotations

from pathlib import Path

from rkconvert.sources.checkpoint import Checkpoint, open_checkpoint
from rkconvert.sources.hub import download, is_hub_id, refuse_revision


def open_source(model: str, revision: str | None = None) -> Checkpoint:
    """Open the model that the user names.

    Args:
        model: Folder in Hugging Face layout, a .gguf file, or a hub id such as `google/gemma-2-2b-it`.
        revision: Branch, tag or commit of a hub model.

    Raises:
        CheckpointError: The model is none of these, or cannot be used.
        HostError: A required package is not installed, or the hub cannot be reached.
    """
    path = Path(model)
    refuse_revision(model, revision)
    if path.is_file() and path.suffix == ".gguf":
        from rkconvert.sources.gguf_model import open_gguf

        return open_gguf(path)
    if path.exists() or not is_hub_id(model):
        return open_checkpoint(path)
    folder, commit = download(model, revision)
    return open_checkpoint(folder, name=model, revision=commit)
