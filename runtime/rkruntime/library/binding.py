"""The library's functions in Python, bound by table. For the worker process only: a wrong call crashes.

`Library` is the loaded file, `LoadedModel` an LLMHandle. Values of structures are given as mappings with the
header's own field names, so that a field which a release lacks is an error, never a shifted layout.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Final

from rkruntime.abi import LAYOUTS, RELEASES, Abi, abi_of, since
from rkruntime.errors import LibraryError, LoadError, RKEdgeError, RunError, UnsupportedCallError, UsageError

CONTINUE, PAUSE, RELEASE_OUTPUT = 0, 1, 2
"""What a result callback may return: 1 since 1.2.1, 2 since 1.3.0."""

# Values that every manual documents, in fields whose offsets differ between layouts.
_DOCUMENTED_DEFAULTS: Final = {
    "top_k": 40,
    "top_p": 0.9,
    "temperature": 0.8,
    "repeat_penalty": 1.1,
    "mirostat_tau": 5.0,
    "mirostat_eta": 0.1,
    "extend_param.enabled_cpus_num": 4,
    "extend_param.n_batch": 1,
}
_OVERSIZE: Final = 1024

ResultCallback = Callable[[Any, int], int]
"""Takes a pointer to one RKLLMResult per batch, and the state; returns CONTINUE, PAUSE or RELEASE_OUTPUT."""


def fill(target: Any, values: Mapping[str, Any]) -> Any:
    """Set fields of a structure by name. Strings become UTF-8, mappings fill nested structures, None is skipped.

    Raises:
        UnsupportedCallError: The layout has no such field; the message names the release that added it.
        UsageError: A string contains a NUL character.
    """
    kind = type(target)
    for name, value in values.items():
        if value is None:
            continue
        if not hasattr(kind, name):
            raise UnsupportedCallError(_missing_field(kind.__name__, name))
        if isinstance(value, Mapping):
            fill(getattr(target, name), value)
        else:
            setattr(target, name, text(value) if isinstance(value, str) else value)
    return target


def _missing_field(struct: str, name: str) -> str:
    try:
        return f"{struct}.{name} requires release {since(f'{struct}.{name}')} or later; the loaded one lacks it."
    except (KeyError, StopIteration):
        return f"No release has a field {struct}.{name}."


def text(value: str) -> bytes:
    """Encode a string for C. Raises UsageError for a NUL character, which would truncate it."""
    if "\0" in value:
        raise UsageError("A text for the runtime contains a NUL character.", hint="Remove the character U+0000.")
    return value.encode("utf-8", "surrogateescape")


class Library:
    """A loaded librkllmrt.so, with every function of its layout bound to argument and result types.

    Raises:
        LibraryError: It cannot be loaded, or lacks a function of its release.
    """

    def __init__(self, path: Path, version: str) -> None:
        self.path, self.version = path, version
        self.abi: Abi = abi_of(version)
        try:
            dll = ctypes.CDLL(str(path))
        except OSError as error:
            raise LibraryError(
                f"{path} cannot be loaded: {error}.",
                hint="Install what it needs, or put it next to it: sudo apt install libgomp1; libomp.so comes with the"
                " vendor's toolchain.",
            ) from error
        self._functions: dict[str, Any] = {}
        for name, prototype in self.abi.functions.items():
            try:
                function = dll[name]
            except AttributeError as error:
                raise LibraryError(f"{path} does not export {name}, which is part of release {version}.") from error
            function.restype, function.argtypes = prototype.restype, list(prototype.argtypes)
            self._functions[name] = function
        self._default_param = self._functions["rkllm_createDefaultParam"]

    def function(self, name: str) -> Any:
        """Return a bound function. Raises UnsupportedCallError if the release does not have it."""
        if name not in self._functions:
            raise UnsupportedCallError(
                f"{name} requires release {since(name)} or later; this library is {self.version}.",
                hint=f"Use librkllmrt.so {since(name)} or newer.",
            )
        return self._functions[name]

    def make(self, struct: str, values: Mapping[str, Any]) -> Any:
        """Make a structure with the given fields set and all others zero."""
        if struct not in self.abi.structs:
            raise UnsupportedCallError(f"Release {self.version} has no {struct}.")
        return fill(self.abi.structs[struct](), values)

    def enum(self, name: str, value: str) -> int:
        """Return the value of an enum constant, by its name in the header."""
        if value not in self.abi.enums[name]:
            raise UnsupportedCallError(f"Release {self.version} has no {value}.")
        return self.abi.enums[name][value]

    def default_param(self) -> Any:
        """Return RKLLMParam as filled in by the library.

        A wrong layout shows here at the latest: the documented defaults then stand where another layout has them. The
        call gets an oversized buffer, so that a library that writes more than expected does no harm.

        Raises:
            LibraryError: The values fit another layout better.
        """

        class Oversized(ctypes.Structure):
            _fields_ = [("bytes", ctypes.c_ubyte * _OVERSIZE)]

        self._default_param.restype = Oversized
        raw = bytes(self._default_param().bytes)
        scores = {layout: _defaults_found(LAYOUTS[layout][0], raw) for layout in LAYOUTS if _callable(layout)}
        best = max(scores, key=lambda layout: scores[layout])
        if scores[best] > scores[self.abi.layout]:
            raise LibraryError(
                f"{self.path} does not have the layout of release {self.version}: its default parameters are where "
                f"releases {', '.join(LAYOUTS[best])} have them.",
                hint="Omit --release, or pass one of those releases.",
            )
        return self.abi.structs["RKLLMParam"].from_buffer_copy(raw)


def _callable(layout: str) -> bool:
    return not RELEASES[LAYOUTS[layout][0]].refused


def _defaults_found(version: str, raw: bytes) -> int:
    """Count the documented defaults that are where a release has them."""
    param = abi_of(version).structs["RKLLMParam"].from_buffer_copy(raw)
    found = 0
    for path, expected in _DOCUMENTED_DEFAULTS.items():
        value: Any = param
        for name in path.split("."):
            value = getattr(value, name, None)
        found += value is not None and abs(value - expected) < 1e-6
    return found


class LoadedModel:
    """A loaded model. `close()` may be called twice; afterwards every call is an error.

    Args:
        params: Fields of RKLLMParam that differ from the library's defaults; `extend_param` is itself a mapping.
        on_result: Called during runs, in the computing thread.
        tokenizer: For models without a tokenizer (since 1.3.0): takes the text's bytes, returns ids.
        embed: For models without an embedding table (since 1.3.0): takes ids, returns float32 bytes.

    Raises:
        LoadError: rkllm_init failed.
        UnsupportedCallError: The release has no such field or callback.
    """

    def __init__(
        self,
        library: Library,
        params: Mapping[str, Any],
        on_result: ResultCallback,
        *,
        tokenizer: Callable[[bytes], Sequence[int]] | None = None,
        embed: Callable[[list[int]], bytes] | None = None,
    ) -> None:
        self.library = library
        self._on_result, self._tokenizer, self._embed = on_result, tokenizer, embed
        self.failure: BaseException | None = None
        self.has_prompt_cache = False
        self._kept: list[Any] = []
        self.param = fill(library.default_param(), params)
        self.batches = max(1, getattr(self.param.extend_param, "n_batch", 1))
        self._result_callback = library.abi.callbacks["LLMResultCallback"](self._result)
        self._handle: ctypes.c_void_p | None = None
        handle = ctypes.c_void_p()
        callback = self._callbacks()
        code = library.function("rkllm_init")(ctypes.byref(handle), ctypes.byref(self.param), callback)
        if code != 0 or not handle.value:
            raise LoadError(
                f"rkllm_init returned {code}"
                + ("" if handle.value else " and no handle")
                + ": the model is not loaded."
            )
        self._handle = handle

    def _callbacks(self) -> Any:
        """Return the third argument of rkllm_init: a function before 1.3.0, a structure of three since."""
        abi = self.library.abi
        if "RKLLMCallback" not in abi.structs:
            if self._tokenizer or self._embed:
                raise UnsupportedCallError("Tokenizer and embedding callbacks require release 1.3.0 or later.")
            return self._result_callback
        values = {"result_callback": self._result_callback}
        if self._tokenizer:
            values["tokenizer_callback"] = abi.callbacks["LLMTokenizerCallback"](self._tokenize)
        if self._embed:
            values["embed_callback"] = abi.callbacks["LLMGetEmbedCallback"](self._embed_tokens)
        callbacks = self.library.make("RKLLMCallback", values)
        self._kept.append((callbacks, values))
        return ctypes.byref(callbacks)

    # An exception must not pass through C, so callbacks keep it in `failure`, to be raised after the run.

    def _result(self, result: Any, _userdata: Any, state: int) -> int:
        try:
            return self._on_result(result, state)
        except BaseException as error:  # C cannot handle it; `raise_failure` raises it.
            self.failure = self.failure or error
            return CONTINUE

    def _tokenize(self, _userdata: Any, content: bytes, size: int, tokens: Any, room: int) -> int:
        try:
            assert self._tokenizer is not None
            ids = self._tokenizer(content[:size])
            if len(ids) > room:
                return -1
            ctypes.memmove(tokens, (ctypes.c_int32 * len(ids))(*ids), len(ids) * 4)
            return len(ids)
        except BaseException as error:  # C cannot handle it; `raise_failure` raises it.
            self.failure = self.failure or error
            return -1

    def _embed_tokens(self, _userdata: Any, tokens: Any, count: int, embed: int, size: int) -> int:
        try:
            assert self._embed is not None
            data = self._embed(tokens[:count])
            if len(data) != size:
                raise UsageError(f"The embedding callback returned {len(data):,} bytes; the runtime needs {size:,}.")
            ctypes.memmove(embed, data, size)
            return 0
        except BaseException as error:  # C cannot handle it; `raise_failure` raises it.
            self.failure = self.failure or error
            return -1

    def call(self, name: str, *args: Any) -> None:
        """Call a function with the handle. Raises RunError if it does not return 0."""
        function = self.library.function(name)
        if self._handle is None:
            raise RunError("The model is closed.")
        code = function(self._handle, *args)
        if code != 0:
            raise RunError(f"{name} returned {code}.")

    def run(self, prompt: Mapping[str, Any] | Sequence[Mapping[str, Any]], infer: Mapping[str, Any]) -> None:
        """Run a prompt to its end. `prompt` holds the fields of RKLLMInput, once per batch."""
        self._run("rkllm_run", prompt, infer)

    def run_async(self, prompt: Mapping[str, Any] | Sequence[Mapping[str, Any]], infer: Mapping[str, Any]) -> None:
        """Start a run; a callback with the state FINISH or ERROR ends it. Inputs are kept until the next run."""
        self._run("rkllm_run_async", prompt, infer)

    def _run(
        self, name: str, prompt: Mapping[str, Any] | Sequence[Mapping[str, Any]], infer: Mapping[str, Any]
    ) -> None:
        prompts = [prompt] if isinstance(prompt, Mapping) else list(prompt)
        if len(prompts) != self.batches:
            raise UsageError(f"The model was loaded for {self.batches} prompts at once, but got {len(prompts)}.")
        inputs = (self.library.abi.structs["RKLLMInput"] * len(prompts))()
        for target, values in zip(inputs, prompts, strict=True):
            fill(target, values)
        options = self.library.make("RKLLMInferParam", infer)
        self._running_with = (inputs, options, prompts, infer)
        self.failure = None
        try:
            self.call(name, inputs, ctypes.byref(options), None)
        except RunError:
            self.raise_failure()  # the library gave up because a callback failed
            raise

    def raise_failure(self) -> None:
        """Raise the exception that a callback raised during the last run, if any."""
        failure, self.failure = self.failure, None
        if failure is not None:
            raise failure if isinstance(failure, RKEdgeError) else RunError(f"A callback failed: {failure!r}.")

    def abort(self) -> None:
        """Abort the current run; call it from another thread."""
        self.call("rkllm_abort")

    def is_running(self) -> bool:
        """Whether a run is in progress: 1 = running in every release (rknn-llm issue 502), despite older headers."""
        function = self.library.function("rkllm_is_running")
        return self._handle is not None and function(self._handle) == 1

    def load_lora(self, name: str, path: str, scale: float = 1.0) -> None:
        """Load an adapter file for runs that name it."""
        values = {"lora_adapter_path": path, "lora_adapter_name": name, "scale": scale}
        self.call("rkllm_load_lora", ctypes.byref(self.library.make("RKLLMLoraAdapter", values)))

    def load_prompt_cache(self, path: str) -> None:
        """Restore the KV cache from a file that a run saved."""
        self.call("rkllm_load_prompt_cache", text(path))
        self.has_prompt_cache = True

    def release_prompt_cache(self) -> None:
        """Release the prompt cache that load_prompt_cache restored."""
        self.call("rkllm_release_prompt_cache")
        self.has_prompt_cache = False

    def clear_kv_cache(self, keep_system_prompt: bool = False, ranges: Sequence[tuple[int, int]] | None = None) -> None:
        """Empty the KV cache, or remove positions [start, end) of each batch (since 1.2.1, while paused)."""
        if len(self.library.function("rkllm_clear_kv_cache").argtypes) == 2:
            if ranges is not None:
                raise UnsupportedCallError("Clearing ranges of the KV cache requires release 1.2.1 or later.")
            self.call("rkllm_clear_kv_cache", int(keep_system_prompt))
        elif ranges is None:
            self.call("rkllm_clear_kv_cache", int(keep_system_prompt), None, None)
        else:
            if len(ranges) != self.batches:
                raise UsageError(f"Expected one range per batch: {self.batches}, not {len(ranges)}.")
            positions = ctypes.c_int * self.batches
            starts, ends = positions(*(start for start, _ in ranges)), positions(*(end for _, end in ranges))
            self.call("rkllm_clear_kv_cache", int(keep_system_prompt), starts, ends)

    def kv_cache_sizes(self) -> list[int]:
        """Return the number of positions in the KV cache, per batch (since 1.2.1)."""
        sizes = (ctypes.c_int * self.batches)()
        self.call("rkllm_get_kv_cache_size", sizes)
        return list(sizes)

    def set_chat_template(self, system: str, prefix: str, postfix: str) -> None:
        """Set what the runtime puts around text prompts (since 1.2.0); clears the KV cache (rknn-llm issue 377)."""
        self.call("rkllm_set_chat_template", text(system), text(prefix), text(postfix))

    def set_function_tools(self, system: str, tools: str, response_tag: str) -> None:
        """Set the tools for text prompts (since 1.2.1): `tools` is a JSON array in OpenAI's format."""
        self.call("rkllm_set_function_tools", text(system), text(tools), text(response_tag))

    def set_cross_attention(self, values: Mapping[str, Any]) -> None:
        """Set the encoder state for models with cross attention (since 1.2.1); buffers are kept until the next call."""
        self.library.function("rkllm_set_cross_attn_params")
        params = self.library.make("RKLLMCrossAttnParam", values)
        self.call("rkllm_set_cross_attn_params", ctypes.byref(params))
        self._cross_attention = (params, values)

    def close(self) -> None:
        """Destroy the model; later calls do nothing."""
        handle, self._handle = self._handle, None
        if handle is not None:
            self.library.function("rkllm_destroy")(handle)

    def __enter__(self) -> LoadedModel:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
