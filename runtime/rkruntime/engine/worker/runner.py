"""One run in the worker: from the library's callbacks to records, and how the run ends.

A stop token ends the run on every release, even if the library knows only one EOS id. rkllm_abort is called for that
from another thread, because it may wait for the current step (rknn-llm issue 383); the callback waits a
moment for it, so that an rkllm_abort that only sets a flag never hits the next run.
"""

from __future__ import annotations

import ctypes
import os
import select
import threading
from collections.abc import Callable
from typing import Any, Final

from rkruntime.engine.worker import protocol
from rkruntime.errors import RKEdgeError, RunError, UnsupportedCallError
from rkruntime.library.binding import CONTINUE, PAUSE, Library, LoadedModel

_ABORT_WAIT: Final = 0.05
_SMALL: Final = select.PIPE_BUF - protocol.RECORD.size
_MODES: Final = {
    "generate": "RKLLM_INFER_GENERATE",
    "hidden": "RKLLM_INFER_GET_LAST_HIDDEN_LAYER",
    "logits": "RKLLM_INFER_GET_LOGITS",
}
_INPUTS: Final = {
    "tokens": "RKLLM_INPUT_TOKEN",
    "text": "RKLLM_INPUT_PROMPT",
    "embeddings": "RKLLM_INPUT_EMBED",
    "multimodal": "RKLLM_INPUT_MULTIMODAL",
}

Send = Callable[..., None]


class Runner:
    """Run prompts on one model, one at a time."""

    def __init__(self, library: Library, records: int, send: Send) -> None:
        self._library, self._records, self._send = library, records, send
        states = library.abi.enums["LLMCallState"]
        self._tokens = (states["RKLLM_RUN_NORMAL"], states["RKLLM_RUN_WAITING"])
        self._finish, self._error = states["RKLLM_RUN_FINISH"], states["RKLLM_RUN_ERROR"]
        self._hidden = states.get("RKLLM_RUN_GET_LAST_HIDDEN_LAYER", -1)
        self._can_pause = library.abi.functions and "perf" in dict(library.abi.structs["RKLLMResult"]._fields_)
        self._running = threading.Lock()
        self._run: int | None = None
        self._aborted = 0
        self._ended: list[str | None] = []
        self._paused = False  # whether the run before was paused
        self._model: LoadedModel | None = None

    def attach(self, model: LoadedModel) -> None:
        """Set the model whose result callback is `on_result`."""
        self._model = model

    @property
    def model(self) -> LoadedModel:
        """The attached model."""
        assert self._model is not None
        return self._model

    def run(self, header: dict[str, Any], data: list[memoryview]) -> list[dict[str, Any]]:
        """Execute a run; returns the contents of the last event of each batch.

        Raises:
            RunError: The library refused the run or reported an error.
            UnsupportedCallError: The release has no such field or mode.
        """
        self._begin(header)
        prompts = [self._input(prompt, data) for prompt in header["prompts"]]
        infer = self._infer(header)
        if self._mode != "generate" and not header["keep_history"]:
            self._forget_prompts()
        with self._running:
            if self._aborted == header["run"]:  # before it began
                self._ended = ["abort" for _ in self._ended]
                return self._results(header)
            self._run = header["run"]
        try:
            if header["asynchronous"]:
                self.model.run_async(prompts, infer)
                self._done.wait()
            else:
                self._run_here(prompts, infer)
        finally:
            with self._running:
                self._run = None
            if self._aborting is not None:
                self._aborting.join()
        self.model.raise_failure()
        if self._failed:
            raise RunError("The runtime reported an error during the run.")
        if not self._heard and None in self._ended:
            # Even an empty answer has an end, and a run whose end was lost has at least a token.
            raise RunError("rkllm_run returned 0, but the runtime reported neither a token nor an end.")
        self._check_prompt_was_read()
        return self._results(header)

    def _run_here(self, prompts: list[dict[str, Any]], infer: dict[str, Any]) -> None:
        try:
            self.model.run(prompts, infer)
        except RunError:
            # Whether a run ended by rkllm_abort counts as failed is unknown; the answer is whole if all batches ended.
            if self._failed or None in self._ended:
                raise

    def _forget_prompts(self) -> None:
        """Empty the KV cache: boards are reported to return no rows for tokens in it (rknn-llm issues 278, 453)."""
        if self.model.has_prompt_cache:
            self.model.release_prompt_cache()
        if "rkllm_clear_kv_cache" in self._library.abi.functions:
            self.model.clear_kv_cache()

    def _check_prompt_was_read(self) -> None:
        after_pause, self._paused = self._paused, "pause" in self._ended
        if after_pause and self._perf and self._perf["prefill_tokens"] == 0:
            raise RunError(
                "The runtime continued the paused run and did not read this prompt.",
                hint="Clear the cache after a pause, or use stop tokens instead of pause tokens.",
            )

    def _begin(self, header: dict[str, Any]) -> None:
        self._number = header["run"] & 0xFFFF
        self._mode = header["mode"]
        self._stops = frozenset(header["stop_tokens"])
        self._pauses = frozenset(header["pause_tokens"])
        if self._pauses and not self._can_pause:
            raise UnsupportedCallError("Pausing a run requires release 1.2.1 or later.")
        self._limit = header["limit"]
        self._counts = [0] * len(header["prompts"])
        self._single = self._mode == "generate" and len(self._counts) == 1
        self._ended = [None] * len(header["prompts"])
        self._aborting: threading.Thread | None = None
        self._done = threading.Event()
        self._failed = self._has_arrays = self._heard = self._finished = False
        self._perf: dict[str, float] | None = None

    def _input(self, prompt: dict[str, Any], data: list[memoryview]) -> dict[str, Any]:
        """Return the fields of RKLLMInput; arrays come from the command's data."""
        values: dict[str, Any] = {
            "input_type": self._library.enum("RKLLMInputType", _INPUTS[prompt["kind"]]),
            **_fill_arrays(prompt["input"], data),
        }
        # Releases without the field behave as for "user"; setting another role is an error there.
        if "role" in dict(self._library.abi.structs["RKLLMInput"]._fields_) or prompt["role"] != "user":
            values["role"] = prompt["role"]
        return values

    def _infer(self, header: dict[str, Any]) -> dict[str, Any]:
        """Return the fields of RKLLMInferParam."""
        make = self._library.make
        values: dict[str, Any] = {"mode": self._library.enum("RKLLMInferMode", _MODES[header["mode"]])}
        if header["lora"] is not None:
            values["lora_params"] = ctypes.pointer(make("RKLLMLoraParam", {"lora_adapter_name": header["lora"]}))
        if header["save_prompt_cache"] is not None:
            cache = {"save_prompt_cache": 1, "prompt_cache_path": header["save_prompt_cache"]}
            values["prompt_cache_params"] = ctypes.pointer(make("RKLLMPromptCacheParam", cache))
        if header["sampling"] is not None:
            values["sampling_params"] = ctypes.pointer(make("RKLLMSamplingParam", header["sampling"]))
        if header["keep_history"]:
            values["keep_history"] = 1
        # Older releases know only the limit of the load; `_count` ends their runs.
        limit = header["max_new_tokens"]
        if limit > 0 and "max_new_tokens" in dict(self._library.abi.structs["RKLLMInferParam"]._fields_):
            values["max_new_tokens"] = limit
        return values

    # The following methods run in the library's computing thread, during a run.

    def on_result(self, results: Any, state: int) -> int:
        """Handle a call of the library's result callback."""
        try:
            self._heard = True
            if state not in self._tokens:
                return self._on_state(results, state)
            if self._finished:
                self._check_goes_on()
            return self._on_token(results[0]) if self._single else self._on_results(results)
        except BaseException:  # whatever it is, ctypes only prints it, and the run must not pass for a good one
            self._failed = True
            raise

    def _on_state(self, results: Any, state: int) -> int:
        if state == self._hidden:
            return self._on_results(results)
        if state not in (self._finish, self._error):
            raise RunError(f"The runtime reported the state {state}, which this release does not have.")
        if state == self._finish:
            self._finished = True
            if self._mode == "hidden" and not self._has_arrays:  # some boards are reported to return them here
                self._on_results(results)
            self._perf = self._read_perf(results)
        self._failed = self._failed or state == self._error
        self._done.set()
        return CONTINUE

    def _check_goes_on(self) -> None:
        """Raise RunError if a token follows the end. The end is not known for batches and hidden states."""
        if self._ended == [None] and self._mode != "hidden":
            raise RunError("The runtime reported the end of the run, then more tokens.")

    def _on_token(self, result: Any) -> int:
        if self._ended[0] is not None:
            if self._ended[0] == "abort":  # the abort came too early for the library to notice
                self._end(0, "abort")
            return CONTINUE
        token = result.token_id
        if token in self._stops:
            return self._end(0, "stop")
        text = result.text or b""
        if len(text) > _SMALL:
            self._send(protocol.TOKEN, self._number, token, text)
            return self._count(0, token)
        # One small write per token, below PIPE_BUF, needs no lock.
        try:
            os.write(self._records, protocol.RECORD.pack(protocol.TOKEN, 0, self._number, token, len(text)) + text)
        except OSError:
            os._exit(0)
        return self._count(0, token)

    def _count(self, batch: int, token: int) -> int:
        self._counts[batch] += 1
        if self._counts[batch] >= self._limit > 0:
            return self._end(batch, "length")
        if token in self._pauses:
            self._ended[batch] = "pause"
            self._done.set()
            return PAUSE
        return CONTINUE

    def _on_results(self, results: Any) -> int:
        """Handle tokens of batches, and arrays, which are copied as they are valid only during the callback."""
        answer = CONTINUE
        for batch, ended in enumerate(self._ended):
            result = results[batch]
            if ended is not None:
                continue
            self._send_arrays(result, batch)
            token = result.token_id
            if self._mode == "hidden" or token < 0:
                continue
            if token in self._stops:
                answer = max(answer, self._end(batch, "stop"))
                continue
            self._send(protocol.TOKEN, self._number, token, result.text or b"", batch)
            answer = max(answer, self._count(batch, token))
        return answer

    def _send_arrays(self, result: Any, batch: int) -> None:
        if self._mode == "hidden":
            layer = result.last_hidden_layer
            pointer, rows, columns, kind = layer.hidden_states, layer.num_tokens, layer.embd_size, protocol.HIDDEN
        elif self._mode == "logits":
            logits = result.logits
            pointer, rows, columns, kind = logits.logits, logits.num_tokens, logits.vocab_size, protocol.LOGITS
        else:
            return
        if pointer and rows > 0 and columns > 0:
            if rows * columns * 4 > protocol.MAX_DATA:
                raise RunError(f"The runtime returned an array of {rows:,} x {columns:,} numbers, which is impossible.")
            address = ctypes.addressof(pointer.contents)
            self._has_arrays = True
            values = (ctypes.c_float * (rows * columns)).from_address(address)
            self._send(kind, self._number, columns, memoryview(values).cast("B"), batch)

    def _end(self, batch: int, reason: str) -> int:
        """End a batch: later tokens are not part of its answer. The run ends when all batches have ended."""
        self._ended[batch] = reason
        if None not in self._ended and self._aborting is None:
            self._aborting = threading.Thread(target=self._abort_quietly, daemon=True)
            self._aborting.start()
            self._aborting.join(_ABORT_WAIT)
        return CONTINUE

    def _abort_quietly(self) -> None:
        # A refused abort means that the run has ended by itself, or will end at its limit.
        try:
            self.model.abort()
        except RKEdgeError:
            return

    def _read_perf(self, results: Any) -> dict[str, float] | None:
        if not self._can_pause:
            return None
        perf = results[0].perf
        return {
            "prefill_ms": perf.prefill_time_ms,
            "prefill_tokens": perf.prefill_tokens,
            "generate_ms": perf.generate_time_ms,
            "generate_tokens": perf.generate_tokens,
            "memory_mb": perf.memory_usage_mb,
        }

    # The following methods are called from the thread that reads commands.

    def abort(self, run: int) -> None:
        """End a run early, if it is still in progress."""
        with self._running:
            self._aborted = run
            if self._run != run:
                return
            self._ended = [ended or "abort" for ended in self._ended]
            self._abort_quietly()

    def aborted_results(self, header: dict[str, Any]) -> list[dict[str, Any]]:
        """Return what `run` returns, for a run that an abort has ended within one of the program's callbacks."""
        self._ended = [ended or "abort" for ended in self._ended]
        return self._results(header)

    def _results(self, header: dict[str, Any]) -> list[dict[str, Any]]:
        results = []
        for prompt, ended, count in zip(header["prompts"], self._ended, self._counts, strict=True):
            tokens = self._prompt_tokens(prompt)
            reason = ended or self._reason(tokens, count)
            results.append({"reason": reason, "prompt_tokens": tokens, "generated": count, "perf": self._perf})
        return results

    def _prompt_tokens(self, prompt: dict[str, Any]) -> int:
        """Return the number of tokens in a prompt; for a text, the runtime's count, or 0 without one."""
        if prompt["n_tokens"] is not None:
            return int(prompt["n_tokens"])
        return max(0, int(self._perf["prefill_tokens"])) if self._perf else 0

    def _reason(self, prompt_tokens: int, count: int) -> str:
        """Say why the library ended the run: an EOS ("stop"), or the limit of the load or a full context ("length")."""
        param = self.model.param
        full = prompt_tokens + count >= param.max_context_len > 0
        return "length" if full or 0 < param.max_new_tokens <= count else "stop"


def _fill_arrays(values: dict[str, Any], data: list[memoryview]) -> dict[str, Any]:
    """Replace `{"array": part, "type": ctypes name}` by that part of the data."""
    filled: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict) and "array" in value:
            part = data[value["array"]]
            item: Any = {"int32": ctypes.c_int32, "float32": ctypes.c_float}[value["type"]]
            filled[name] = (item * (part.nbytes // 4)).from_buffer_copy(part)
        else:
            filled[name] = _fill_arrays(value, data) if isinstance(value, dict) else value
    return filled
