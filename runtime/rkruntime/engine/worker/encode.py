"""Encode a request as a command for the worker: names and numbers in the header, arrays next to it."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rkruntime.abi import abi_of, within
from rkruntime.engine.generation import EmbeddingPrompt, ImagePrompt, Request, Sampling, TextPrompt
from rkruntime.engine.loading import LoadOptions
from rkruntime.errors import UnsupportedCallError, UsageError

Data = list[bytes | memoryview]

# First release in which a run can have its own sampling and limit.
PER_RUN_SAMPLING = "1.3.0"


def run_command(
    requests: Sequence[Request], mode: str, version: str, options: LoadOptions
) -> tuple[dict[str, Any], Data]:
    """Return header and data of a run; the first request holds the settings of all.

    Raises:
        UsageError: A request is invalid.
        UnsupportedCallError: The release does not support a request.
    """
    first, data = requests[0], Data()
    for other in requests[1:]:
        if _settings(other) != _settings(first):
            raise UsageError("All prompts of a batch share their settings; only the prompts differ.")
    return {
        "call": "run",
        "mode": mode,
        "asynchronous": options.asynchronous,
        "prompts": [_prompt(request, version, data) for request in requests],
        "max_new_tokens": first.max_new_tokens,
        "stop_tokens": sorted(first.stop_tokens),
        "pause_tokens": sorted(first.pause_tokens),
        "sampling": _sampling(first.sampling, version, options),
        "keep_history": first.keep_history,
        "lora": options.lora if first.lora is None else first.lora,
        "save_prompt_cache": None if first.save_prompt_cache is None else str(first.save_prompt_cache),
    }, data


def method(name: str, *args: Any) -> dict[str, Any]:
    """Return the header of a command that calls a method of binding.LoadedModel."""
    return {"call": "call", "method": name, "args": list(args)}


def _settings(request: Request) -> tuple[Any, ...]:
    return (
        request.max_new_tokens,
        request.stop_tokens,
        request.pause_tokens,
        request.sampling,
        request.keep_history,
        request.lora,
        request.save_prompt_cache,
    )


def _sampling(sampling: Sampling | None, version: str, options: LoadOptions) -> dict[str, Any] | None:
    if sampling is None or sampling == options.sampling:
        return None
    if not within(version, PER_RUN_SAMPLING, ""):
        raise UnsupportedCallError(
            f"Sampling per run requires release {PER_RUN_SAMPLING} or later; this library is {version}.",
            hint=f"Load the model with these settings, or use librkllmrt.so {PER_RUN_SAMPLING}.",
        )
    return asdict(sampling)


def _prompt(request: Request, version: str, data: Data) -> dict[str, Any]:
    prompt = request.prompt
    if prompt is None:
        ids = _ids(request.tokens)
        tokens = {"input_ids": _add(data, ids.tobytes(), "int32"), "n_tokens": len(ids)}
        return _described("tokens", {"token_input": tokens}, len(ids))
    if request.tokens:
        raise UsageError("A request takes token ids or another prompt, not both.")
    if isinstance(prompt, TextPrompt):
        thinking = {"enable_thinking": True} if prompt.enable_thinking else {}
        return _described("text", {"prompt_input": prompt.text, **thinking}, None, prompt.role)
    if isinstance(prompt, EmbeddingPrompt):
        values, shape = _float_rows(prompt.values, 2)
        rows = {"embed": _add(data, values, "float32"), "n_tokens": shape[0]}
        return _described("embeddings", {"embed_input": rows}, shape[0])
    return _described("multimodal", {"multimodal_input": _images(prompt, version, data)}, None)


def _described(kind: str, values: dict[str, Any], n_tokens: int | None, role: str = "user") -> dict[str, Any]:
    return {"kind": kind, "input": values, "n_tokens": n_tokens, "role": role}


def _ids(tokens: Sequence[int]) -> array[int]:
    if not tokens:
        raise UsageError("The prompt is empty.")
    try:
        ids = array("i", tokens)
    except (OverflowError, TypeError) as error:
        raise UsageError(f"A prompt must be a list of token ids: {error}.") from error
    if min(ids) < 0:
        raise UsageError(f"Token ids must be 0 or more; this prompt contains {min(ids)}.")
    return ids


def _images(prompt: ImagePrompt, version: str, data: Data) -> dict[str, Any]:
    values, shape = _float_rows(prompt.images, 3)
    image: dict[str, Any] = {"image_embed": _add(data, values, "float32"), "n_image_tokens": shape[1]}
    fields = {name for name, _ in abi_of(version).structs["RKLLMMultiModalInput"]._fields_}
    if fields.isdisjoint({"image", "n_image"}) and shape[0] != 1:
        raise UnsupportedCallError(f"Several images per prompt require release 1.2.1b1 or later; this is {version}.")
    if not fields.isdisjoint({"image", "n_image"}):
        image |= {"n_image": shape[0], "image_width": prompt.width, "image_height": prompt.height}
    if "image" not in fields:
        if prompt.markers:
            raise UnsupportedCallError(
                f"Image markers per run require release 1.3.0 or later; this is {version}.",
                hint="Pass them when loading the model.",
            )
        return {"prompt": prompt.text, **image}
    markers = zip(("image_start", "image_end", "image_content"), prompt.markers or (), strict=False)
    return {"prompt": prompt.text, "image": {**image, **dict(markers)}}


def _add(data: Data, part: bytes | memoryview, kind: str) -> dict[str, Any]:
    data.append(part)
    return {"array": len(data) - 1, "type": kind}


def _float_rows(values: Any, dimensions: int) -> tuple[memoryview, tuple[int, ...]]:
    import numpy as np

    rows = np.ascontiguousarray(values, dtype=np.float32)
    if rows.ndim != dimensions or 0 in rows.shape:
        raise UsageError(f"Embeddings must have {dimensions} dimensions; these have the shape {rows.shape}.")
    return rows.data.cast("B"), rows.shape
