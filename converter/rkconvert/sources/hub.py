"""Models and adapters on the Hugging Face hub, through huggingface_hub, and the hub's many errors."""

from __future__ import annotations

import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

from rkruntime.errors import CheckpointError, HostError
from rkruntime.packages import install

_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95}")
# Endings of misspelled file names; no id of a model on the hub has one of them.
_FILE_NAMES: Final = (".gguf", ".safetensors", ".bin", ".json", ".yaml", ".txt")
# Limit in seconds, as huggingface_hub itself waits forever. Commits of many files are known to take minutes.
_PATIENCE_S: Final = 300.0
# Files that a conversion reads. Weights in other formats (original/, *.pth, *.gguf) would double the download.
_FILES: Final = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model")


def is_hub_id(text: str) -> bool:
    """Whether this could be the id of a model on the hub, such as google/gemma-2-2b-it."""
    return _ID.fullmatch(text) is not None and not text.endswith(_FILE_NAMES)


def limit_waiting() -> None:
    """Let calls of huggingface_hub fail once the hub is silent for some minutes, if this release of it can."""
    from huggingface_hub.utils import get_session  # type: ignore[attr-defined]

    session = get_session()
    if hasattr(session, "timeout"):  # before 1.0 each call has its own timeout, or none
        session.timeout = _PATIENCE_S


def refuse_revision(model: str, revision: str | None) -> None:
    """Raise CheckpointError if a revision is given for something other than a hub model."""
    if revision and (Path(model).exists() or not is_hub_id(model)):
        raise CheckpointError(
            f"{model} is not a hub model, so it does not have a revision {revision}.", hint="Leave --revision out."
        )


def hub_file(model: str, name: str, revision: str | None = None) -> Path | None:
    """Return a model's file in the local cache, fetched if needed; None if the model has no such file.

    A file already in the cache is used without asking the network.

    Raises:
        CheckpointError: There is no such model or revision, or its license was not accepted.
        HostError: huggingface_hub is not installed, or the hub cannot be reached.
    """
    with _answers(model, name, revision):
        import huggingface_hub
        from huggingface_hub import errors

        cached = huggingface_hub.try_to_load_from_cache(model, name, revision=revision)
        if isinstance(cached, str):
            return Path(cached)
        try:
            return Path(
                huggingface_hub.hf_hub_download(model, name, revision=revision, local_files_only=not _is_reachable())
            )
        except errors.LocalEntryNotFoundError:
            raise
        except errors.EntryNotFoundError:
            return None


def download(model: str, revision: str | None = None, weights: str = "pytorch_model") -> tuple[Path, str]:
    """Return the folder of a whole model in the local cache, fetched if needed, and its commit.

    Args:
        weights: Prefix of older weight files' names (.bin), which are fetched if there are no others.

    Raises:
        CheckpointError: There is no such model or revision, or its license was not accepted.
        HostError: huggingface_hub is not installed, or neither the hub nor the cache has all of the model.
    """
    with _answers(model, "files", revision):
        import huggingface_hub

        local = not _is_reachable()
        fetch = partial(huggingface_hub.snapshot_download, model, revision=revision, local_files_only=local)
        folder = Path(fetch(allow_patterns=[*_FILES]))
        if not any(folder.glob("*.safetensors")):
            patterns = [*_FILES, f"{weights}*.bin"]
            folder = Path(fetch(allow_patterns=patterns))
    # The cache keeps each commit in a folder of that name.
    return folder, folder.name


def _is_reachable() -> bool:
    """Whether the hub's name resolves here, or is left to a proxy: huggingface_hub tries six times in half a minute."""
    # Imported here, because the clients of HTTP and TLS that come with it take time and memory.
    from urllib.request import getproxies

    from huggingface_hub import constants

    host = urlsplit(constants.ENDPOINT).hostname
    if constants.HF_HUB_OFFLINE or getproxies() or host is None:
        return True
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        return False
    return True


@contextmanager
def _answers(model: str, what: str, revision: str | None) -> Iterator[None]:
    """Translate huggingface_hub's errors."""
    try:
        from huggingface_hub import errors
        from huggingface_hub.utils import logging

        logging.set_verbosity_error()  # type: ignore[no-untyped-call]  # its retries and the reason are reported below
    except ImportError as error:
        raise HostError(
            f"{model} is not a local folder, and huggingface_hub, needed to fetch it from the hub, is missing.",
            hint=f"{install('huggingface_hub')}; or download the model and name its folder.",
        ) from error
    limit_waiting()
    try:
        yield
    except errors.GatedRepoError as error:
        raise CheckpointError(
            f"{model} is gated: its owner requires everyone to accept a licence first.",
            hint=f"Open https://huggingface.co/{model}, accept, then run `hf auth login`.",
        ) from error
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise CheckpointError(
            f"The hub has no model {model}{f' at {revision}' if revision else ''}, or you do not have access to it.",
            hint="Check the spelling; for a private model run `hf auth login`.",
        ) from error
    except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError, OSError, ValueError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        if not _is_reachable():
            lines = ["the name of its server is not known here, so there seems to be no network."]
        path = Path(model)
        here = f"{path.parent} has no {path.name}: check the spelling. " if path.parent.is_dir() else ""
        raise HostError(
            f"{model} is not a local folder, and its {what} cannot be fetched from the hub: {lines[0]}",
            hint=f"{here}Check the network (and HF_HUB_OFFLINE); fetched files are kept, so a second try continues.",
        ) from error
