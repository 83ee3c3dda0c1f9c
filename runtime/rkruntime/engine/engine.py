"""A loaded model, running in a worker process. Whatever goes wrong in the library arrives here as a typed error."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import threading
import time
from collections.abc import AsyncGenerator, Callable, Generator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, cast

from rkruntime.checks.preflight import Finding
from rkruntime.engine.connection import WorkerConnection
from rkruntime.engine.generation import ArrayEvent, Event, HiddenStates, Logits, Request
from rkruntime.engine.loading import (
    LoadOptions,
    Lora,
    ModelInfo,
    Position,
    check_prompt_cache,
    check_readable,
    checked,
    info_of,
)
from rkruntime.engine.reading import Reading, load_limit, peak_bytes
from rkruntime.engine.runs import Runs
from rkruntime.engine.worker.decode import sizes_of, whole
from rkruntime.engine.worker.encode import method
from rkruntime.errors import HostError, RKEdgeError, RunError, UsageError
from rkruntime.files import AnyPath, as_path
from rkruntime.library.identify import Identity, identify
from rkruntime.schema import check_value
from rkruntime.stop import Stop

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Engine", "LoadOptions", "Lora", "ModelInfo"]


# Seconds that `close` gives a library whose aborted run nobody waited for.
_HURRY: Final = 1.0


class Engine:
    """A model in a worker process. Use it as a context manager, or call `close()`.

    One run at a time; `abort()` and `close()` may be called from any thread, everything else from one thread at a time.
    A fork of this process must not use it.
    """

    def __init__(
        self,
        options: LoadOptions,
        on_log: Callable[[str], None] | None = None,
        progress: Callable[[str], None] | None = None,
    ) -> None:
        check_value("options", LoadOptions, options)
        identity = identify(options.library, options.release)
        check_readable(Path(options.model))
        self.options, findings = checked(options, identity)
        self._closing = threading.RLock()
        self._connection = WorkerConnection(self.options, on_log)
        try:
            with options.stop.ending(self._connection.worker.process.terminate):
                started = time.perf_counter()
                reply = self._load(identity, progress)
                seconds = time.perf_counter() - started
            self.info: ModelInfo = info_of(identity, whole(reply), seconds, findings, list(self.log))
        except BaseException as error:  # The worker must not outlive the failed load, not even after Ctrl-C.
            self._connection.end()
            if isinstance(error, RKEdgeError):
                self._connection.explain(error)
                error.details |= {"release": identity.version, "emulated": identity.emulated}
            raise
        self._runs = Runs(self._connection, self.options, self.info)

    @classmethod
    def load(
        cls,
        options: LoadOptions,
        on_log: Callable[[str], None] | None = None,
        progress: Callable[[str], None] | None = None,
    ) -> Engine:
        """Start a worker and load a model.

        Args:
            on_log: Called with each line that the library prints.
            progress: Called with lines such as `reading 9.5 GB, 34 %`.

        Raises:
            LibraryError: The library must not be called, or cannot be loaded.
            ModelFileError: There is no such model file.
            RefusedError: Preflight knows that this will not work.
            LoadError: The library refused the model, or returned 0 but logged errors.
            UnsupportedCallError: The release does not have an option.
            HostError: The worker cannot be started.
            WorkerError: The library crashed, ended its process, or did not respond within `load_timeout`.
        """
        return cls(options, on_log, progress)

    def _load(self, identity: Identity, progress: Callable[[str], None] | None) -> Any:
        assert identity.release is not None
        self._connection.begin(
            {
                "call": "load",
                "library": str(Path(self.options.library).resolve()),
                "machine": identity.machine,
                "version": identity.release.version,
                "params": self.options.params(identity.release.version),
                "loras": [item.as_dict() for item in self.options.loras],
                "tokenizer": self.options.tokenizer is not None,
                "embed": self.options.embed is not None,
            }
        )
        size = Path(self.options.model).stat().st_size
        reading = Reading(self._connection.worker.process.pid, size, progress)
        limit = load_limit(self.options.load_timeout, size)
        return self._connection.reply(limit, lambda seconds, end: (seconds, max(end, reading.more_time())))

    def close(self) -> None:
        """Unload the model and end the worker; may be called twice. A worker that does not exit in time is killed.

        A run that another thread reads ends there with a RunError. In a fork, only the fork's pipes are closed.
        """
        if not self._connection.worker.owner.here:  # a fork: the lock may be held by a thread it does not have
            if not self._connection.closed:
                self._connection.end()
            return
        with self._closing:
            if self._connection.closed:
                return
            self._connection.closing = True
            try:
                if self._connection.gone is None:
                    # RuntimeError: this is a signal's handler that interrupted this thread while it waited for a token.
                    with contextlib.suppress(RKEdgeError, RuntimeError):
                        self._runs.abort()
                        patience = _HURRY if self._runs.given_up else self.options.close_timeout
                        with self._connection.last_turn(patience):
                            self._runs.finish(patience)
                            self._connection.close()
            finally:
                self._connection.end()

    def kill(self) -> None:
        """Kill the worker at once, from any thread; another thread's wait ends with a RunError. Then call `close`.

        Raises RunError in a fork.
        """
        self._connection.worker.owner.check()
        self._connection.closing = True
        self._connection.worker.process.terminate()

    @property
    def findings(self) -> tuple[Finding, ...]:
        """Findings of preflight, then those that runs have shown about the library."""
        return (*self.info.findings, *self._runs.observed.findings)

    @property
    def alive(self) -> bool:
        """Whether the worker lives. Once it does not, every call raises the reason."""
        self._look()
        connection = self._connection
        return not (connection.closing or connection.closed) and connection.gone is None

    @property
    def lost(self) -> bool:
        """Whether the worker is gone, as far as is known. Unlike `alive`, this never waits for what is left of it."""
        connection = self._connection
        unused = not (self.running or connection.closed)
        return connection.gone is not None or (unused and connection.worker.exited)

    def check(self) -> None:
        """Raise WorkerError, the reason why the worker is gone, or RunError for a model that was closed."""
        self._look()
        self._connection.check()

    def _look(self) -> None:
        if not self.running:  # the reader of a run notices it, after the records that are still in the pipe
            self._connection.look()

    @property
    def peak_memory(self) -> int:
        """Peak resident memory of the worker so far, in bytes; 0 if the kernel does not report it."""
        return peak_bytes(self._connection.worker.process.pid)

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def log(self) -> tuple[str, ...]:
        """The last lines that the library printed."""
        return self._connection.log

    # Runs

    def generate(self, request: Request, stop: Stop | None = None) -> Generator[Event, None, None]:
        """Run a prompt: yields tokens as they arrive, then Finished. Closing the iterator early aborts the run.

        If the worker is lost while the iterator is being closed, the next call reports it.

        Args:
            stop: Lets another thread abort the run, even before it begins.

        Raises:
            ContextFullError: The prompt alone fills the context.
            UnsupportedCallError: The release cannot do it.
            RunError: The library refused the run or reported an error; the model stays loaded.
            WorkerError: The worker is gone.
        """
        events = self._runs.events([request], "generate", stop)
        try:
            for _, event in events:
                yield event  # type: ignore[misc]  # arrays only come in other modes
        finally:
            events.close()

    def generate_batch(self, requests: Sequence[Request]) -> Generator[tuple[int, Event], None, None]:
        """Run `n_batch` prompts at once (since 1.2.1): yields events with the prompt's number, one Finished each."""
        events = self._runs.events(requests, "generate")
        try:
            for batch, event in events:
                yield batch, cast(Event, event)
        finally:
            events.close()

    def generate_arrays(self, request: Request, mode: str) -> Generator[ArrayEvent, None, None]:
        """Run with `mode` "logits" or "hidden": yields arrays between the tokens. See Logits and HiddenStates."""
        if mode not in ["logits", "hidden"]:
            raise UsageError(f"There is no mode {mode!r}; use 'logits' or 'hidden'.")
        _need_numpy()
        events = self._runs.events([request], mode)
        try:
            for _, event in events:
                yield event
        finally:
            events.close()

    def logits(self, request: Request) -> NDArray[np.float32]:
        """Return logits for every token of a prompt, float32 [tokens, vocabulary] (since 1.2.0)."""
        return self._first_array(request, "logits")

    def hidden_states(self, request: Request) -> NDArray[np.float32]:
        """Return the last layer's output for every token of a prompt, float32 [tokens, hidden size]."""
        return self._first_array(request, "hidden")

    def _first_array(self, request: Request, mode: str) -> NDArray[np.float32]:
        _need_numpy()
        known = self._runs.observed.wraps
        try:
            return self._array_of_run(request, mode)
        except RunError:
            if known or not self._runs.observed.wraps:
                raise
            return self._array_of_run(request, mode)  # with an empty template

    def _array_of_run(self, request: Request, mode: str) -> NDArray[np.float32]:
        events = self._runs.events([request], mode)
        try:
            for _, event in events:
                if isinstance(event, (Logits, HiddenStates)):
                    return event.values
        finally:
            events.close()
        raise RunError(f"The run ended, but the library returned no {mode}.")

    def abort(self) -> None:
        """Abort the current run, if any, from any thread: its iterator then yields Finished with ABORT.

        A worker that does not end the run in time (`abort_timeout`) is killed; the iterator raises WorkerHungError.
        """
        self._runs.abort()

    @property
    def running(self) -> bool:
        """Whether a run is in progress."""
        return self._runs.active is not None

    def is_running(self) -> bool:
        """Whether a run is in progress; without one of ours, according to rkllm_is_running (1 in every release)."""
        return self.running or bool(self._command({"call": "is_running"}))

    def agenerate(self, request: Request) -> AsyncGenerator[Event, None]:
        """Like `generate`, for asyncio: never blocks the loop while the library computes."""
        return cast("AsyncGenerator[Event, None]", self._runs.events_async(request))

    async def deliver(self, request: Request, take: Callable[[list[Event]], bool]) -> None:
        """Like `agenerate` with less CPU time: the loop calls `take` with new events and wakes no task.

        Args:
            take: Called with one event, or several that have come at once. Returns whether it wants more; if not,
                or if it raises, the run is aborted.
        """
        check_value("take", Callable[..., object], take)
        await self._runs.deliver(request, cast("Callable[[list[ArrayEvent]], bool]", take))

    # The rest of the API

    def _call(self, name: str, *args: Any) -> Any:
        """Call a method of binding.LoadedModel in the worker."""
        return self._command(method(name, *args))

    def _command(self, header: dict[str, Any], data: Sequence[bytes | memoryview] = ()) -> Any:
        with self._connection.explained():
            self._runs.check_free()
            with self._connection.turn():
                self._runs.check_free()
                return self._connection.ask(header, self.options.token_timeout, data)

    def clear_cache(self, *, keep_system_prompt: bool = False, ranges: Sequence[tuple[int, int]] | None = None) -> None:
        """Empty the KV cache (since 1.2.0), or cut positions [start, end) of each batch while paused (since 1.2.1)."""
        check_value("keep_system_prompt", bool, keep_system_prompt)
        check_value("ranges", Sequence[tuple[Position, Position]] | None, ranges)
        self._call("clear_kv_cache", keep_system_prompt, ranges)

    def cache_sizes(self) -> list[int]:
        """Return the number of positions in the KV cache, per batch (since 1.2.1)."""
        return sizes_of(self._call("kv_cache_sizes"))

    def load_lora(self, lora: Lora) -> None:
        """Load an adapter for requests that name it. No release can unload one."""
        check_value("lora", Lora, lora)
        self._call("load_lora", *lora.as_dict().values())

    def load_prompt_cache(self, path: AnyPath) -> None:
        """Restore the KV cache from a file that a run saved; the next run reuses the common prefix."""
        file = as_path("path", path).resolve()
        check_prompt_cache(file, saved=True)
        self._call("load_prompt_cache", str(file))

    def release_prompt_cache(self) -> None:
        """Release the prompt cache that load_prompt_cache restored."""
        self._call("release_prompt_cache")

    def set_chat_template(self, system: str, prefix: str, postfix: str) -> None:
        """Set the texts around a TextPrompt (since 1.2.0). Clears the KV cache.

        Token ids are to be used as given: if the runtime wraps them as well, a run with token ids sets empty texts.
        """
        _check_texts(system=system, prefix=prefix, postfix=postfix)
        self._runs.observed.template_set()
        self._call("set_chat_template", system, prefix, postfix)

    def set_function_tools(self, system: str, tools: Sequence[dict[str, Any]], response_tag: str) -> None:
        """Set the tools for a TextPrompt (since 1.2.1), in OpenAI's format."""
        _check_texts(system=system, response_tag=response_tag)
        check_value("tools", Sequence[dict[str, object]], tools)
        try:
            plain = json.dumps(list(tools), ensure_ascii=False)
        except (TypeError, ValueError, RecursionError) as error:
            raise UsageError(f"tools cannot be written as JSON: {error}.") from error
        self._call("set_function_tools", system, plain, response_tag)

    def set_cross_attention(
        self,
        k: NDArray[np.float32],
        v: NDArray[np.float32],
        mask: NDArray[np.float32],
        positions: NDArray[np.int32],
    ) -> None:
        """Set the encoder state for a model loaded with `use_cross_attention` (since 1.2.1); one position per token.

        Shapes are the model's: [layers, tokens, kv heads x head size] for k and v, [tokens] for mask and positions.
        """
        import numpy as np

        parts = [np.ascontiguousarray(values, dtype=np.float32) for values in (k, v, mask)]
        parts.append(np.ascontiguousarray(positions, dtype=np.int32))
        header = {"call": "set_cross_attention", "num_tokens": int(parts[3].size)}
        self._command(header, [part.data.cast("B") for part in parts])


def _check_texts(**texts: object) -> None:
    for name, text in texts.items():
        check_value(name, str, text)


def _need_numpy() -> None:
    """Raise HostError if numpy is missing: a board's installation leaves it out."""
    if importlib.util.find_spec("numpy") is None:
        raise HostError("Arrays need numpy, which is not installed here.", hint="Install it: pip install numpy")
