"""A loaded model: the worker process from outside. What can go wrong in the library arrives here as a typed error."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import threading
import time
from array import array
from collections.abc import AsyncGenerator, Callable, Generator, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Final, cast

from rkruntime.engine.generation import ArrayEvent, Event, Finished, HiddenStates, Logits, Request, Token
from rkruntime.engine.loading import LoadOptions, Lora, ModelInfo, check_readable, checked, environment_of, info_of
from rkruntime.engine.worker import protocol
from rkruntime.engine.worker.decode import add_log, array_of, error_of, finished_of, json_of, whole
from rkruntime.engine.worker.encode import run_command
from rkruntime.engine.worker.events import AsyncRecords
from rkruntime.engine.worker.exchange import Exchange
from rkruntime.engine.worker.process import WorkerProcess
from rkruntime.engine.worker.protocol import Record
from rkruntime.errors import (
    ContextFullError,
    HostError,
    RKEdgeError,
    RunError,
    UsageError,
    WorkerError,
    WorkerProtocolError,
)
from rkruntime.library.identify import Identity, identify

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

__all__ = ["Engine", "LoadOptions", "Lora", "ModelInfo"]

_SHOWN_LINES: Final = 40
# Where the library does not say how many tokens its context holds: more than any release takes.
_LONGEST_CONTEXT: Final = 1 << 15


class Engine:
    """A model in a worker process. Use it as a context manager, or call `close()`.

    One run at a time; `abort()` may be called from any thread, all else from one at a time.
    """

    info: ModelInfo

    def __init__(self, options: LoadOptions, on_log: Callable[[str], None] | None = None) -> None:
        self._identity: Identity = identify(options.library, options.abi)
        check_readable(options.model)
        self.options, self._findings = checked(options, self._identity)
        self._number = 0
        self._active: int | None = None
        self._abandoned = False
        asked = {protocol.TOKENIZE: options.tokenizer, protocol.EMBED: options.embed}
        self._questions = [kind for kind, callback in asked.items() if callback is not None]
        self._gone: WorkerError | None = None
        self._closed = True
        self._sending = threading.Lock()
        self._worker = WorkerProcess(options.interpreter, environment_of(options), on_log)
        self._closed = False
        try:
            with options.stop.ending(self._worker.process.terminate):
                self.info = self._load()
        except BaseException as error:  # The worker ends with it, after Ctrl-C too.
            self._end()
            if isinstance(error, RKEdgeError):
                self._explain(error)
            raise

    @classmethod
    def load(cls, options: LoadOptions, on_log: Callable[[str], None] | None = None) -> Engine:
        """Start a worker and load a model.

        Args:
            on_log: gets each line that the library prints.

        Raises:
            LibraryError: the library must not be called, or cannot be loaded.
            ModelFileError: there is no such model file.
            RefusedError: preflight knows that this will not work.
            LoadError: the library refused the model; also if it returned 0 and logged errors.
            UnsupportedCallError: an option that the release does not have.
            HostError: the worker cannot be started.
            WorkerError: the library crashed, ended its process, or gave no sign within `load_timeout`.
        """
        return cls(options, on_log)

    # Loading and ending

    def _load(self) -> ModelInfo:
        release = self._identity.release
        assert release is not None
        started = time.perf_counter()
        self._begin(
            {
                "call": "load",
                "library": str(self.options.library.resolve()),
                "machine": self._identity.machine,
                "version": release.version,
                "params": self.options.params(),
                "loras": [item.as_dict() for item in self.options.loras],
                "tokenizer": self.options.tokenizer is not None,
                "embed": self.options.embed is not None,
            }
        )
        reply = self._reply(self.options.load_timeout)
        seconds = time.perf_counter() - started
        self._worker.drain_log()
        return info_of(self._identity, whole(reply), seconds, self._findings, list(self._worker.log))

    def close(self) -> None:
        """Unload the model and end the worker; may be called twice. A worker that does not exit in time is killed."""
        if self._closed:
            return
        if self._gone is None:
            with contextlib.suppress(RKEdgeError):
                self._settle(self.options.close_timeout)
                self._begin({"call": "close"})
                self._worker.end(self.options.close_timeout)
        self._end()

    def _end(self) -> None:
        """Nothing of the worker survives this."""
        self._closed = True
        self._worker.end(grace=0)
        with self._sending:
            self._worker.close_pipes()

    @property
    def alive(self) -> bool:
        """Whether there is a worker. Once there is none, every call raises what became of it."""
        return not self._closed

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):  # an interpreter that ends, or a caller that forgot
            self._end()

    @property
    def log(self) -> tuple[str, ...]:
        """The last lines that the library printed."""
        if not self._closed:
            self._worker.drain_log()
        return tuple(self._worker.log)

    # Commands and records

    def _check(self) -> None:
        if self._gone is not None:
            raise type(self._gone)(
                f"The worker is gone: {self._gone.message}", hint="Load the model again.", details=self._gone.details
            )
        if self._closed:
            raise RunError("The model is closed.", hint="Load it again.")

    def _send(self, header: dict[str, Any], data: Sequence[bytes | memoryview] = ()) -> None:
        with self._sending:
            self._worker.send(header, data)

    def _begin(self, header: dict[str, Any], data: Sequence[bytes | memoryview] = (), **expected: Any) -> None:
        """Send a command with a number of its own; `expected` says what may come back (see Exchange)."""
        self._number += 1
        self._worker.expect(Exchange(self._number, questions=self._questions, **expected))
        self._send({**header, "run": self._number}, data)

    def _next(self, timeout: float, deadline: float) -> Record:
        """The next record; the library's questions are answered on the way, and do not count as activity."""
        while True:
            record = self._worker.next_record(timeout, deadline)
            if record.kind < protocol.TOKENIZE or not self._answered(record):
                return record

    def _answered(self, record: Record) -> bool:
        """Answer a call of the tokenizer or embedding callback; False if the record is something else."""
        if record.kind < protocol.TOKENIZE:
            return False
        try:
            ok, answer = True, self._ask(record)
        except Exception as error:  # It is the caller's function, and the worker waits for an answer.
            ok, answer = False, f"{type(error).__name__}: {error}".encode()
        self._send({"call": "answer", "ok": ok}, [answer])
        return True

    def _ask(self, record: Record) -> bytes:
        if record.kind == protocol.TOKENIZE:
            assert self.options.tokenizer is not None
            return array("i", self.options.tokenizer(record.data.decode())).tobytes()
        import numpy as np

        assert self.options.embed is not None
        ids = array("i", record.data).tolist()
        return np.ascontiguousarray(self.options.embed(ids), dtype=np.float32).tobytes()

    def _reply(self, timeout: float) -> Any:
        record = self._next(timeout, time.monotonic() + timeout)
        if record.kind == protocol.ERROR:
            raise error_of(record)
        return json_of(record)

    def _explain(self, error: RKEdgeError) -> None:
        """Add the last log lines and what they say went wrong."""
        if not self._closed:
            self._worker.drain_log()
        if isinstance(error, WorkerError):
            self._gone = self._gone or error
        add_log(error, list(self._worker.log)[-_SHOWN_LINES:])

    @contextlib.contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except RKEdgeError as error:
            self._explain(error)
            if self._gone is not None:
                self._end()
            raise

    def _call(self, method: str, *args: Any) -> Any:
        """Call a method of binding.Model in the worker."""
        return self._command({"call": "call", "method": method, "args": list(args)})

    def _command(self, header: dict[str, Any], data: Sequence[bytes | memoryview] = ()) -> Any:
        with self._explained():
            self._check_free()
            self._begin(header, data)
            return self._reply(self.options.token_timeout)

    # Runs

    def generate(self, request: Request) -> Generator[Event, None, None]:
        """Run a prompt: tokens as they arrive, Finished last. Closing the iterator early aborts the run.

        A worker that is lost while the iterator is closed is reported by the next call.

        Raises:
            ContextFullError: the prompt alone fills the context.
            UnsupportedCallError: the release cannot do it.
            RunError: the library refused or reported an error; the model stays loaded.
            WorkerError: the worker is gone.
        """
        with contextlib.closing(self._events([request], "generate")) as events:
            for _, event in events:
                yield event  # type: ignore[misc]  # arrays come in other modes only

    def generate_batch(self, requests: Sequence[Request]) -> Generator[tuple[int, Event], None, None]:
        """Run `n_batch` prompts at once (1.2.1 on): the prompt's number with each event, one Finished for each."""
        with contextlib.closing(self._events(requests, "generate")) as events:
            for batch, event in events:
                yield batch, cast(Event, event)

    def generate_arrays(self, request: Request, mode: str) -> Generator[ArrayEvent, None, None]:
        """A run with `mode` "logits" or "hidden": arrays between the tokens. See Logits and HiddenStates."""
        if mode not in ("logits", "hidden"):
            raise UsageError(f"There is no mode {mode!r}: it is 'logits' or 'hidden'.")
        _need_numpy()
        with contextlib.closing(self._events([request], mode)) as events:
            for _, event in events:
                yield event

    def logits(self, request: Request) -> NDArray[np.float32]:
        """Logits of every token of a prompt, [tokens, vocabulary] (1.2.0 on)."""
        return self._first_array(request, "logits")

    def hidden_states(self, request: Request) -> NDArray[np.float32]:
        """The last layer's output for every token of a prompt, [tokens, hidden size]."""
        return self._first_array(request, "hidden")

    def _first_array(self, request: Request, mode: str) -> NDArray[np.float32]:
        _need_numpy()
        with contextlib.closing(self._events([request], mode)) as events:
            for _, event in events:
                if isinstance(event, (Logits, HiddenStates)):
                    return event.values
        raise RunError(f"The run ended and the library gave no {mode}.")

    def _check_free(self) -> None:
        """Raise the error of a worker that is gone, or RunError if a run is going on that somebody still reads."""
        self._check()
        if self._abandoned:
            self._settle(self.options.token_timeout)
        if self._active is not None:
            raise RunError("A run is going on already: one at a time.", hint="Wait for its end, or abort it.")

    def _start(self, requests: Sequence[Request], mode: str) -> None:
        self._check_free()
        for request in requests:
            self._check_room(request)
        header, data = run_command(requests, mode, self.info.release, self.options)
        self._worker.drain_log()
        self._worker.alarm = ""
        limits = {
            "batches": self.options.n_batch,
            "most_tokens": requests[0].max_new_tokens if requests[0].max_new_tokens > 0 else -1,
            # What a release gives rows for, the prompt or more, is its own affair; not more than there is room for.
            "most_rows": self.info.max_context or _LONGEST_CONTEXT,
        }
        self._active, self._abandoned = self._number + 1, False
        self._begin(header, data, mode=mode, **limits)

    def _check_room(self, request: Request) -> None:
        if 0 < self.info.max_context <= len(request.tokens):
            raise ContextFullError(
                f"The prompt has {len(request.tokens):,} tokens, and the context holds {self.info.max_context:,} with "
                "the answer.",
                details={"prompt_tokens": len(request.tokens), "max_context": self.info.max_context},
            )

    def _events(self, requests: Sequence[Request], mode: str) -> Generator[tuple[int, ArrayEvent], None, None]:
        with self._explained():
            self._start(requests, mode)
            timeout = self.options.token_timeout
            try:
                while self._active is not None:
                    record = self._next(timeout, time.monotonic() + timeout)
                    if record.kind == protocol.TOKEN and not self._worker.alarm:
                        yield record.batch, Token(record.value, record.data)
                    else:
                        yield record.batch, self._event(record)
            except GeneratorExit:
                self._settle_quietly()
                raise
            except WorkerProtocolError:
                self._worker.end(grace=0)  # nothing more is asked of it
                raise
            finally:
                self._settle(timeout)

    def _event(self, record: Record) -> ArrayEvent:
        """The event of a record that is not a token's. Raises the error that the worker sent, or the log."""
        self._worker.drain_log()
        if record.kind == protocol.ERROR:
            self._active = None
            error = error_of(record)
            # The log tells more than "it returned -1", whichever of the two is read first.
            if not (self._worker.alarm and type(error) is RunError):
                raise error
        if record.kind == protocol.FINISHED and record.batch == self.options.n_batch - 1:
            self._active = None
        if self._worker.alarm:
            raise RunError(f"The run failed; the runtime logged: {self._worker.alarm}")
        if record.kind in (protocol.LOGITS, protocol.HIDDEN):
            return array_of(record)
        return finished_of(record)

    def _settle(self, timeout: float) -> None:
        """End a run whose events nobody wants any more, and wait for its end, so that the next one starts clean."""
        run = self._active
        if run is None or self._closed or self._worker.ended:
            return
        # A Ctrl-C in here leaves the rest to the next run.
        self._abandoned = True
        self._send({"call": "abort", "run": run})
        deadline = time.monotonic() + timeout
        while self._active is not None:
            self._drop(self._next(timeout, deadline))
        self._abandoned = False

    def _settle_quietly(self) -> None:
        """`_settle` for an iterator that is closed, or collected as garbage: the next call tells what failed."""
        with contextlib.suppress(WorkerError), self._explained():
            self._settle(self.options.token_timeout)

    def _drop(self, record: Record) -> None:
        if record.kind in (protocol.FINISHED, protocol.ERROR):
            try:
                self._event(record)
            except WorkerError:
                raise
            except RKEdgeError:
                return

    def abort(self) -> None:
        """End the run that is going on, from any thread: its iterator gives Finished with ABORT. Nothing otherwise."""
        run = self._active
        if run is not None and self._gone is None and not self._closed:
            # A worker that is gone by now is the iterator's to report.
            with contextlib.suppress(WorkerError, OSError):
                self._send({"call": "abort", "run": run})

    @property
    def running(self) -> bool:
        """Whether a run is going on."""
        return self._active is not None

    def is_running(self) -> bool:
        """`running`, and without a run what rkllm_is_running says (1 = running in every release)."""
        return self._active is not None or bool(self._command({"call": "is_running"}))

    # asyncio

    async def agenerate(self, request: Request, gather: float = 0.0) -> AsyncGenerator[Event, None]:
        """`generate` for asyncio: nothing here blocks the loop while the library computes.

        Args:
            gather: seconds for which tokens that follow others closely may wait for each other, to save CPU time; the
                first one, and each that comes later than that after the one before, comes at once.
        """
        self._check()
        timeout = self.options.token_timeout
        with self._explained():
            records = AsyncRecords(self._worker, self._answered, gather)
            try:
                if self._abandoned:
                    await self._settle_async(records)
                self._start([request], "generate")
                try:
                    while self._active is not None:
                        record = records.waiting() or await records.next(timeout, time.monotonic() + timeout)
                        if record.kind == protocol.TOKEN and not self._worker.alarm:
                            yield Token(record.value, record.data)
                        else:
                            yield cast(Finished, self._event(record))
                except WorkerProtocolError:
                    self._worker.end(grace=0)  # nothing more is asked of it
                    raise
                finally:
                    await self._settle_async(records)
            finally:
                records.close()

    async def _settle_async(self, records: AsyncRecords) -> None:
        run, timeout = self._active, self.options.token_timeout
        if run is None or self._closed or self._worker.ended:
            return
        # A second cancellation leaves the rest to the next run.
        self._abandoned = True
        self._send({"call": "abort", "run": run})
        deadline = time.monotonic() + timeout
        while self._active is not None:
            self._drop(await records.next(timeout, deadline))
        self._abandoned = False

    # The rest of the API

    def clear_cache(self, *, keep_system_prompt: bool = False, ranges: Sequence[tuple[int, int]] | None = None) -> None:
        """Empty the KV cache (1.2.0 on), or take out positions [start, end) of each batch while paused (1.2.1 on)."""
        self._call("clear_kv_cache", keep_system_prompt, ranges)

    def cache_sizes(self) -> list[int]:
        """Positions in the KV cache, per batch (1.2.1 on)."""
        sizes = self._call("kv_cache_sizes")
        return [whole(size) for size in (sizes if isinstance(sizes, list) else [sizes])]

    def load_lora(self, lora: Lora) -> None:
        """Load an adapter, for requests that name it. Unloading one is not offered by any release."""
        self._call("load_lora", *lora.as_dict().values())

    def load_prompt_cache(self, path: Path) -> None:
        """Take the KV cache from a file that a run saved; the next run reuses what its prompt shares with it."""
        self._call("load_prompt_cache", str(path.resolve()))

    def release_prompt_cache(self) -> None:
        """Drop what load_prompt_cache took."""
        self._call("release_prompt_cache")

    def set_chat_template(self, system: str, prefix: str, postfix: str) -> None:
        """Texts around a TextPrompt (1.2.0 on); other prompts are used as given. Clears the KV cache."""
        self._call("set_chat_template", system, prefix, postfix)

    def set_function_tools(self, system: str, tools: Sequence[dict[str, Any]], response_tag: str) -> None:
        """Tools for a TextPrompt (1.2.1 on), in the OpenAI form."""
        self._call("set_function_tools", system, json.dumps(list(tools), ensure_ascii=False), response_tag)

    def set_cross_attention(
        self,
        k: NDArray[np.float32],
        v: NDArray[np.float32],
        mask: NDArray[np.float32],
        positions: NDArray[np.int32],
    ) -> None:
        """Encoder state for a model loaded with `use_cross_attention` (1.2.1 on); `positions` has one per token.

        Shapes are the model's: [layers, tokens, kv heads x head size] for k and v, [tokens] for mask and positions.
        """
        import numpy as np

        parts = [np.ascontiguousarray(values, dtype=np.float32) for values in (k, v, mask)]
        parts.append(np.ascontiguousarray(positions, dtype=np.int32))
        header = {"call": "set_cross_attention", "num_tokens": int(parts[3].size)}
        self._command(header, [part.data.cast("B") for part in parts])


def _need_numpy() -> None:
    """Raise HostError where numpy is missing: a board's installation leaves it out."""
    if importlib.util.find_spec("numpy") is None:
        raise HostError("Arrays need numpy, which is not installed here.", hint="Install it: pip install numpy")
