"""Models and adapters on the Hugging Face hub, through huggingface_hub, and the hub's many errors."""

from __future__ import annotations

import math
import re
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from rkruntime.errors import CheckpointError, HostError, RKEdgeError
from rkruntime.packages import install

_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9_][\w.-]{0,95}")
# Endings of misspelled file names; no id of a model on the hub has one of them.
_FILE_NAMES: Final = (".gguf", ".safetensors", ".bin", ".json", ".yaml", ".txt")
# Limit in seconds, as huggingface_hub itself waits forever. Commits of many files are known to take minutes.
_PATIENCE_S: Final = 300.0
# The description of a model with thousands of files has a few megabytes.
_MOST_ANSWER: Final = 64 << 20
# What comes compressed all the same may be a thousand times as large in memory.
_MOST_PACKED: Final = 512 << 10
# The hub takes no larger files; of those whose size it does not say, tokenizers are the largest.
_MOST_FILE: Final = 1 << 40
_MOST_UNSTATED: Final = 1 << 30
# Files that a conversion reads. Weights in other formats (original/, *.pth, *.gguf) would double the download.
_FILES: Final = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model")


def is_hub_id(text: str) -> bool:
    """Whether this could be the id of a model on the hub, such as google/gemma-2-2b-it."""
    return _ID.fullmatch(text) is not None and not text.endswith(_FILE_NAMES)


def _bounded(stream: Any, kind: type[Any], most: int, seconds: float) -> Any:
    """A stream of this kind that ends with an error where an honest hub's would have ended long before."""

    class Bounded(kind):  # type: ignore[misc]
        def __iter__(self) -> Iterator[bytes]:
            size, until = 0, time.monotonic() + seconds
            for data in stream:
                size += len(data)
                if size > most or time.monotonic() > until:
                    raise OSError("its answer does not end.")
                yield data

        def close(self) -> None:
            stream.close()

    return Bounded()


def _bound(response: Any) -> None:
    """Called with each answer before its body is read."""
    stated = response.headers.get("Content-Length", "").isdigit()
    packed = response.headers.get("Content-Encoding", "identity") != "identity"
    path = response.url.path
    # Files go to the disk, from wherever the hub says that they are; what else it answers is read into memory.
    is_file = response.request.method == "GET" and ("/resolve" in path or "/api/" not in path)
    if is_file and response.status_code < 400:
        most, seconds = (_MOST_FILE if stated else _MOST_UNSTATED), math.inf
    else:
        most, seconds = (_MOST_PACKED if packed else _MOST_ANSWER), _PATIENCE_S
    # httpx, or what its successors are called: it takes its own kind of stream only.
    client = import_module(type(response).__module__.partition(".")[0])
    response.stream = _bounded(response.stream, client.SyncByteStream, most, seconds)


def _ask_plainly(request: Any) -> None:
    """Ask for answers that are not compressed: what those become in memory has no bound."""
    request.headers["Accept-Encoding"] = "identity"


def limit_answers() -> None:
    """Let calls of huggingface_hub fail once the hub is silent for some minutes, or its answer has no end.

    Releases before 1.0 have other sessions, and stay as they are.
    """
    from huggingface_hub.utils import get_session  # type: ignore[attr-defined]

    session = get_session()
    if not hasattr(session, "timeout"):
        return
    session.timeout = _PATIENCE_S
    hooks = session.event_hooks
    if _bound not in hooks["response"]:
        session.event_hooks = {
            "request": [*hooks["request"], _ask_plainly],
            "response": [_bound, *hooks["response"]],
        }


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
    limit_answers()
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
    except RKEdgeError:
        raise
    except Exception as error:  # its HTTP client has its own errors, and was a different one before 1.0
        lines = str(error).strip().splitlines() or [type(error).__name__]
        if not _is_reachable():
            lines = ["the name of its server is not known here, so there seems to be no network."]
        path = Path(model)
        here = f"{path.parent} has no {path.name}: check the spelling. " if path.parent.is_dir() else ""
        raise HostError(
            f"{model} is not a local folder, and its {what} cannot be fetched from the hub: {lines[0]}",
            hint=f"{here}Check the network (and HF_HUB_OFFLINE); fetched files are kept, so a second try continues.",
        ) from error
