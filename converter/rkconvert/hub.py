"""Single files from the Hugging Face hub, and its many ways to say no."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

from rkruntime.errors import CheckpointError, HostError

_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def is_hub_id(text: str) -> bool:
    """Whether this could be a model on the hub, such as google/gemma-2-2b-it."""
    return _ID.fullmatch(text) is not None


def hub_file(model: str, name: str, revision: str | None = None) -> Path | None:
    """The path of a file of a model in the local cache, fetched if need be; None if the model has no such file.

    A file that is in the cache already is taken as it is: nothing is asked of the network.

    Raises:
        CheckpointError: there is no such model or revision, or its licence was not accepted.
        HostError: huggingface_hub is not installed, or the hub cannot be reached.
    """
    try:
        import huggingface_hub
        from huggingface_hub import errors
    except ImportError as error:
        raise HostError(
            f"{model} is no folder here, and to fetch it from the hub huggingface_hub is missing.",
            hint=f"pip install 'rkedge[convert]', or download {name} by hand and give that.",
        ) from error
    cached = huggingface_hub.try_to_load_from_cache(model, name, revision=revision)
    if isinstance(cached, str):
        return Path(cached)
    try:
        return Path(huggingface_hub.hf_hub_download(model, name, revision=revision))
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{model} is gated: its owner asks everybody to accept a licence first.",
            hint=f"Open https://huggingface.co/{model}, accept, then run `hf auth login`.",
        ) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise CheckpointError(
            f"The hub has no model {model}{f' at {revision}' if revision else ''}, or does not show it to you.",
            hint="Check the spelling; for a private model run `hf auth login`.",
        ) from error
    except errors.LocalEntryNotFoundError as error:
        raise _unreachable(model, name, error) from error
    except errors.EntryNotFoundError:
        return None
    except (errors.HfHubHTTPError, OSError, ValueError) as error:
        raise _unreachable(model, name, error) from error


def _unreachable(model: str, name: str, error: BaseException) -> HostError:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return HostError(
        f"{model} is no folder here, and its {name} cannot be fetched from the hub: {lines[0]}",
        hint="Check the network, or download the file on another machine and give that.",
    )
