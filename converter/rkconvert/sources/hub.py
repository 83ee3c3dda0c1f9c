"""Models and adapters of the Hugging Face hub, through huggingface_hub, kept in its cache."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from rkruntime.errors import CheckpointError, HostError

_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}")
# What a conversion reads. Weights in other formats (original/, *.pth, *.gguf) would double the download.
_FILES: Final = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]


def is_hub_id(text: str) -> bool:
    """Whether a text has the form `owner/name`."""
    return _ID.fullmatch(text) is not None


def download(model: str, revision: str | None = None, weights: str = "pytorch_model") -> tuple[Path, str]:
    """The folder of a hub model in the local cache, downloaded where needed, and its commit.

    Args:
        weights: what the names of older weight files (.bin) begin with; they are fetched if there are no others.

    Raises:
        CheckpointError: there is no such model or revision, or it must be asked for first.
        HostError: huggingface_hub is not installed, or neither the hub nor the cache has the model.
    """
    try:
        from huggingface_hub import errors as hub
        from huggingface_hub import snapshot_download
    except ImportError as error:
        raise HostError(
            f"{model} is no folder here, and the package that downloads models is not installed.",
            hint="Install it with `pip install 'rkedge[convert]'`, or give a folder.",
        ) from error
    at = f"{model} @ {revision}" if revision else model
    try:
        folder = Path(snapshot_download(model, revision=revision, allow_patterns=_FILES))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(model, revision=revision, allow_patterns=[*_FILES, f"{weights}*.bin"]))
    except hub.GatedRepoError as error:
        raise CheckpointError(
            f"{model} is gated: its owner gives access to those who accept the licence.",
            hint=f"Open https://huggingface.co/{model}, accept the terms, then run `hf auth login` with a read token.",
        ) from error
    except hub.RevisionNotFoundError as error:
        raise CheckpointError(
            f"The hub has no revision {revision!r} of {model}.", hint="Try --revision main."
        ) from error
    except hub.RepositoryNotFoundError as error:
        raise CheckpointError(
            f"The hub shows no model {model}: it does not exist, or it is private.",
            hint="Check the spelling; for a private model run `hf auth login` first.",
        ) from error
    except hub.LocalEntryNotFoundError as error:
        raise HostError(
            f"The hub cannot be reached, and the local cache does not hold all of {at}.",
            hint=f"Go online once (and unset HF_HUB_OFFLINE), or copy the files here: hf download {model}",
        ) from error
    except (hub.HfHubHTTPError, OSError) as error:
        raise HostError(f"Downloading {at} failed: {error}.", hint="Try again; finished files are kept.") from error
    # The cache keeps each commit in a folder of its name.
    return folder, folder.name
