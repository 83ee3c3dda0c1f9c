"""A client of the C API, for every layout."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from ctypes import (
    POINTER,
    Structure,
    Union,
    c_bool,
    c_char_p,
    c_float,
    c_int,
    c_int8,
    c_int32,
    c_size_t,
    c_uint8,
    c_uint32,
    c_void_p,
)
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rkruntime.abi import RELEASES

# A release of each layout.
LAYOUTS = {"1.1.4": 3, "1.2.0": 4, "1.2.1b1": 5, "1.2.3": 6, "1.3.0": 7}
every_layout = pytest.mark.parametrize("release", LAYOUTS)
EOS, END_OF_TURN = 1, 5
NORMAL, WAITING, FINISH, ERROR, LAST_HIDDEN = range(5)
PROMPT, TOKEN, EMBED, MULTIMODAL = range(4)
GENERATE, HIDDEN, LOGITS = range(3)


def _struct(name: str, fields: Sequence[tuple[Any, ...] | None]) -> type[Structure]:
    return type(name, (Structure,), {"_fields_": [entry for entry in fields if entry]})


class _Array(Structure):
    _fields_ = (("data", c_void_p), ("count", c_size_t))


class _Rows(Structure):
    _fields_ = (("data", POINTER(c_float)), ("width", c_int), ("count", c_int))

    def numpy(self) -> Any:
        return np.ctypeslib.as_array(self.data, (self.count, self.width)).copy() if self.data else None


SAMPLING_FIELDS = (
    ("top_k", c_int32),
    ("top_p", c_float),
    ("temperature", c_float),
    ("repeat_penalty", c_float),
    ("frequency_penalty", c_float),
    ("presence_penalty", c_float),
    ("mirostat", c_int32),
    ("mirostat_tau", c_float),
    ("mirostat_eta", c_float),
)


class Layout:
    """The structures of one layout (3 to 7)."""

    def __init__(self, number: int) -> None:
        def since(first: int, *entry: Any) -> tuple[Any, ...] | None:
            return entry if number >= first else None

        def before(end: int, *entry: Any) -> tuple[Any, ...] | None:
            return entry if number < end else None

        self.number = number
        self.Extend = _struct(
            "RKLLMExtendParam",
            [
                ("base_domain_id", c_int32),
                since(4, "embed_flash", c_int8),
                since(4, "enabled_cpus_num", c_int8),
                since(4, "enabled_cpus_mask", c_uint32),
                since(6, "n_batch", c_uint8),
                since(6, "use_cross_attn", c_int8),
                ("reserved", c_uint8 * {3: 112, 4: 106, 5: 106}.get(number, 104)),
            ],
        )
        self.Param = _struct(
            "RKLLMParam",
            [
                ("model_path", c_char_p),
                ("max_context_len", c_int32),
                ("max_new_tokens", c_int32),
                SAMPLING_FIELDS[0],
                since(4, "n_keep", c_int32),
                *SAMPLING_FIELDS[1:],
                ("skip_special_token", c_bool),
                since(7, "ignore_eos_token", c_bool),
                ("is_async", c_bool),
                *(before(7, name, c_char_p) for name in ("img_start", "img_end", "img_content")),
                ("extend_param", self.Extend),
            ],
        )
        union = type(
            "RKLLMInputUnion",
            (Union,),
            {
                "_fields_": [
                    ("prompt", c_char_p),
                    ("array", _Array),
                    ("room", c_void_p * {3: 3, 4: 3, 7: 18}.get(number, 6)),
                ]
            },
        )
        self.Input = _struct(
            "RKLLMInput",
            [since(6, "role", c_char_p), since(6, "enable_thinking", c_bool), ("input_type", c_int), ("value", union)],
        )
        self.Sampling = _struct("RKLLMSamplingParam", SAMPLING_FIELDS)
        self.Lora = _struct("RKLLMLoraParam", [("name", c_char_p)])
        self.LoraAdapter = _struct("RKLLMLoraAdapter", [("path", c_char_p), ("name", c_char_p), ("scale", c_float)])
        self.Cache = _struct("RKLLMPromptCacheParam", [("save", c_int), ("path", c_char_p)])
        self.Infer = _struct(
            "RKLLMInferParam",
            [
                ("mode", c_int),
                ("lora", POINTER(self.Lora)),
                ("cache", POINTER(self.Cache)),
                since(7, "sampling", POINTER(self.Sampling)),
                since(4, "keep_history", c_int),
                since(7, "max_new_tokens", c_int32),
            ],
        )
        perf = _struct(
            "RKLLMPerfStat",
            [
                ("prefill_time_ms", c_float),
                ("prefill_tokens", c_int),
                ("generate_time_ms", c_float),
                ("generate_tokens", c_int),
                ("memory_usage_mb", c_float),
            ],
        )
        self.Result = _struct(
            "RKLLMResult",
            [
                ("text", c_char_p),
                ("token_id", c_int32),
                ("hidden", _Rows),
                since(4, "logits", _Rows),
                since(6, "perf", perf),
            ],
        )
        returns = c_int if number >= 6 else None
        self.ResultCallback = ctypes.CFUNCTYPE(returns, POINTER(self.Result), c_void_p, c_int)
        self.TokenizerCallback = ctypes.CFUNCTYPE(c_int, c_void_p, c_void_p, c_int32, POINTER(c_int32), c_int32)
        self.EmbedCallback = ctypes.CFUNCTYPE(
            c_int, c_void_p, POINTER(c_int32), ctypes.c_uint64, c_void_p, ctypes.c_uint64
        )
        self.Callbacks = _struct(
            "RKLLMCallback",
            [
                ("result", self.ResultCallback),
                ("result_userdata", c_void_p),
                ("tokenizer", self.TokenizerCallback),
                ("tokenizer_userdata", c_void_p),
                ("embed", self.EmbedCallback),
                ("embed_userdata", c_void_p),
            ],
        )


@dataclass
class Event:
    """One callback, of one batch."""

    state: int
    text: bytes | None
    token: int
    hidden: Any = None
    logits: Any = None
    perf: Any = None


@dataclass
class Client:
    """A loaded model, called through ctypes as any Python client would."""

    library: Path
    model: Path
    release: str
    n_batch: int = 1
    params: dict[str, Any] = field(default_factory=dict)
    tokenizer: Callable[[bytes], list[int]] | None = None
    embedding: Any = None

    def __post_init__(self) -> None:
        self.layout = layout = Layout(int(RELEASES[self.release].layout.removeprefix("L")))
        self.lib = ctypes.CDLL(str(self.library))
        self.lib.rkllm_createDefaultParam.restype = layout.Param
        self.events: list[list[Event]] = []
        self.on_event: Callable[[Event], int] = lambda event: 0
        self.handle = c_void_p()
        self.param = self.lib.rkllm_createDefaultParam()
        values = {"max_context_len": 256, "max_new_tokens": 8, "top_k": 1} | self.params
        for name, value in values.items():
            setattr(self.param.extend_param if hasattr(self.param.extend_param, name) else self.param, name, value)
        self.param.model_path = str(self.model).encode()
        if layout.number >= 6:
            self.param.extend_param.n_batch = self.n_batch
        self._callback = layout.ResultCallback(self._on_result)
        self._callbacks = layout.Callbacks(result=self._callback)
        if self.tokenizer:
            self._callbacks.tokenizer = layout.TokenizerCallback(self._on_tokenize)
        if self.embedding is not None:
            self._callbacks.embed = layout.EmbedCallback(self._on_embed)
        init = ctypes.byref(self._callbacks) if layout.number >= 7 else self._callback
        self.status = self.lib.rkllm_init(ctypes.byref(self.handle), ctypes.byref(self.param), init)

    def _on_result(self, results: Any, userdata: Any, state: int) -> int:
        batch = []
        for i in range(self.n_batch):
            result = results[i]
            logits = result.logits.numpy() if self.layout.number >= 4 else None
            perf = result.perf if self.layout.number >= 6 else None
            batch.append(Event(state, result.text, result.token_id, result.hidden.numpy(), logits, perf))
        self.events.append(batch)
        return self.on_event(batch[0])

    def _on_tokenize(self, userdata: Any, text: int, size: int, tokens: Any, room: int) -> int:
        assert self.tokenizer
        ids = self.tokenizer(ctypes.string_at(text, size))
        if len(ids) > room:
            return -1
        for i, token in enumerate(ids):
            tokens[i] = token
        return len(ids)

    def _on_embed(self, userdata: Any, tokens: Any, count: int, rows: int, size: int) -> int:
        found = np.ascontiguousarray(self.embedding[list(tokens[:count])], np.float32)
        if found.nbytes != size:
            return 1
        ctypes.memmove(rows, found.ctypes.data, size)
        return 0

    def input(self, prompt: Any) -> Any:
        """A prompt as the API takes it: str or bytes is text, a list is token ids, an array is embedding rows."""
        made = self.layout.Input()
        if isinstance(prompt, str | bytes):
            made.input_type = PROMPT
            made.value.prompt = prompt.encode() if isinstance(prompt, str) else prompt
            return made
        floats = isinstance(prompt, np.ndarray) and prompt.ndim == 2
        array = np.ascontiguousarray(prompt, np.float32 if floats else np.int32)
        made.input_type = EMBED if floats else TOKEN
        made.value.array = _Array(array.ctypes.data, len(array))
        made.keep = array
        return made

    def infer(self, mode: int = GENERATE, lora: str | None = None, save: Path | None = None, **fields: Any) -> Any:
        made = self.layout.Infer(mode=mode)
        if lora is not None:
            made.lora = ctypes.pointer(self.layout.Lora(lora.encode()))
        if save is not None:
            made.cache = ctypes.pointer(self.layout.Cache(1, str(save).encode()))
        sampling = fields.pop("sampling", None)
        if sampling is not None:
            made.sampling = ctypes.pointer(self.layout.Sampling(**sampling))
        for name, value in fields.items():
            setattr(made, name, value)
        return made

    def call(self, function: str, prompts: Sequence[Any], infer: Any) -> int:
        inputs = [self.input(prompt) for prompt in prompts]
        self.events = []
        self._alive = inputs
        array = (self.layout.Input * len(inputs))(*inputs)
        return int(getattr(self.lib, function)(self.handle, array, ctypes.byref(infer), None))

    def run(self, prompt: Any, **infer: Any) -> int:
        """rkllm_run of one batch; its callbacks are in `events`."""
        return self.call("rkllm_run", [prompt], self.infer(**infer))

    def answer(self, prompt: Any, **infer: Any) -> list[int]:
        """The generated ids of a run that ends well."""
        assert self.run(prompt, **infer) == 0
        return self.tokens()

    def tokens(self, batch: int = 0) -> list[int]:
        return [event[batch].token for event in self.events if event[batch].state in (NORMAL, WAITING)]

    @property
    def states(self) -> list[int]:
        return [batch[0].state for batch in self.events]

    @property
    def last(self) -> Event:
        return self.events[-1][0]

    def clear(self, keep_system: int = 0, start: int | None = None, end: int | None = None) -> int:
        if self.layout.number < 6:
            return int(self.lib.rkllm_clear_kv_cache(self.handle, keep_system))
        ranges = [None if value is None else ctypes.byref(c_int(value)) for value in (start, end)]
        return int(self.lib.rkllm_clear_kv_cache(self.handle, keep_system, *ranges))

    def cache_size(self) -> int:
        sizes = (c_int * self.n_batch)()
        assert self.lib.rkllm_get_kv_cache_size(self.handle, sizes) == 0
        return sizes[0]

    def destroy(self) -> int:
        return int(self.lib.rkllm_destroy(self.handle))


def wait_idle(client: Any) -> None:
    for _ in range(2000):
        if client.lib.rkllm_is_running(client.handle) == 0:
            return
        time.sleep(0.005)
    raise AssertionError("the run does not end")
