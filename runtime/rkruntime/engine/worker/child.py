"""The worker's side: execute commands on one model, and report its tokens.

The main thread loads and runs; another reads commands, so that an abort arrives while the library computes. When
the parent is gone, the process exits.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import queue
import resource
import select
import signal
import threading
from array import array
from pathlib import Path
from typing import Any, Final, NoReturn

from rkruntime.engine.worker import protocol
from rkruntime.engine.worker.runner import Runner
from rkruntime.errors import RKEdgeError, RunError
from rkruntime.library.binding import Library, LoadedModel
from rkruntime.library.identify import check_machine

_IMMEDIATE: Final = frozenset({"abort", "is_running", "answer"})


class Worker:
    """Commands in, records out."""

    def __init__(self, commands: int, records: int) -> None:
        self._commands, self._records = commands, records
        self._todo: queue.SimpleQueue[tuple[dict[str, Any], list[memoryview]]] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[tuple[int, bool, bytes]] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._model: LoadedModel | None = None
        self._runner: Runner | None = None
        self._number = self._aborted = 0
        self._unanswered = 0  # number of the run that was aborted while a callback waited for its answer

    def serve(self) -> NoReturn:
        """Execute commands until the parent sends `close` or is gone."""
        threading.Thread(target=self._read, daemon=True).start()
        while True:
            header, data = self._todo.get()
            self._number = header["run"]
            self._answer(header["call"], header, data)
            if header["call"] == "close":
                os._exit(0)

    def _read(self) -> None:
        try:
            while True:
                header, data = protocol.read_command(self._commands)
                if header["call"] in _IMMEDIATE:
                    self._immediate(header, data)
                else:
                    self._todo.put((header, data))
        except EOFError:
            os._exit(0)

    def _immediate(self, header: dict[str, Any], data: list[memoryview]) -> None:
        call = header["call"]
        if call == "answer":
            self._answers.put((header["run"], header["ok"], bytes(data[0])))
        elif call == "abort" and self._runner is not None:
            self._aborted = header["run"]
            self._answers.put((header["run"] & 0xFFFF, False, _NO_ANSWER))  # the parent may not answer any more
            self._runner.abort(header["run"])
        elif call == "is_running":
            self._answer(call, header, data)

    def _answer(self, call: str, header: dict[str, Any], data: list[memoryview]) -> None:
        """Execute one command and send the outcome; for a run, one record per batch."""
        kind = protocol.FINISHED if call == "run" else protocol.REPLY
        results: list[Any]
        try:
            result = getattr(self, f"_do_{call}")(header, data)
            results = result if kind == protocol.FINISHED else [result]
        except RKEdgeError as error:
            kind, results = protocol.ERROR, [error.as_dict()]
        except Exception as error:
            kind, results = protocol.ERROR, [RunError(f"The worker failed in {call}: {error!r}.").as_dict()]
        _LIBC.fflush(None)
        for batch, result in enumerate(results):
            self.send(kind, header["run"], 0, json.dumps(result).encode(), batch)

    def send(self, kind: int, run: int, value: int, data: bytes | memoryview, batch: int = 0) -> None:
        """Write a whole record of any size."""
        with self._lock:
            size = memoryview(data).nbytes
            head = protocol.RECORD.pack(kind, batch, run & 0xFFFF, value, size)
            # In one write if possible: a token's record, written without the lock, must not come in between.
            parts = [head + bytes(data)] if len(head) + size <= select.PIPE_BUF else [head, data]
            try:
                protocol.write_all(self._records, *parts)
            except OSError:
                os._exit(0)

    @property
    def model(self) -> LoadedModel:
        """The loaded model."""
        if self._model is None:
            raise RunError("No model is loaded.")
        return self._model

    # Commands. Each returns the contents of the reply, as JSON types.

    def _do_load(self, header: dict[str, Any], _data: list[memoryview]) -> int:
        _raise_open_files()
        path = Path(header["library"])
        check_machine(path, header["machine"])
        library = Library(path, header["version"])
        runner = Runner(library, self._records, self.send)
        self._model = LoadedModel(
            library,
            header["params"],
            runner.on_result,
            tokenizer=self._ask_tokens if header["tokenizer"] else None,
            embed=self._ask_embeddings if header["embed"] else None,
        )
        self._runner = runner
        runner.attach(self._model)
        for lora in header["loras"]:
            self._model.load_lora(lora["name"], lora["path"], lora["scale"])
        return max(0, int(self._model.param.max_context_len))

    def _do_run(self, header: dict[str, Any], data: list[memoryview]) -> list[dict[str, Any]]:
        assert self._runner is not None
        try:
            return self._runner.run(header, data)
        except RunError:
            if self._unanswered != header["run"]:
                raise
            return self._runner.aborted_results(header)

    def _do_is_running(self, _header: dict[str, Any], _data: list[memoryview]) -> bool:
        return self.model.is_running()

    def _do_call(self, header: dict[str, Any], _data: list[memoryview]) -> Any:
        return getattr(self.model, header["method"])(*header["args"])

    def _do_set_cross_attention(self, header: dict[str, Any], data: list[memoryview]) -> None:
        k, v, mask = ((ctypes.c_float * (part.nbytes // 4)).from_buffer_copy(part) for part in data[:3])
        positions = (ctypes.c_int32 * (data[3].nbytes // 4)).from_buffer_copy(data[3])
        self.model.set_cross_attention(
            {
                "encoder_k_cache": k,
                "encoder_v_cache": v,
                "encoder_mask": mask,
                "encoder_pos": positions,
                "num_tokens": header["num_tokens"],
            }
        )

    def _do_fence(self, _header: dict[str, Any], _data: list[memoryview]) -> None:
        """Do nothing: the reply says that the run before is over."""

    def _do_close(self, _header: dict[str, Any], _data: list[memoryview]) -> None:
        if self._model is not None:
            self._model.close()

    # Callbacks of 1.3.0 for models without tokenizer or embeddings: the parent answers them.

    def _ask(self, kind: int, data: bytes) -> bytes:
        if self._aborted == self._number:
            self._unanswered = self._number
            raise RunError(_NO_ANSWER.decode())
        self.send(kind, self._number, 0, data)
        while (answered := self._answers.get())[0] != self._number & 0xFFFF:
            continue  # an answer that came too late
        _, ok, answer = answered
        if not ok:
            self._unanswered = self._aborted
            raise RunError(answer.decode())
        return answer

    def _ask_tokens(self, text: bytes) -> list[int]:
        return memoryview(self._ask(protocol.TOKENIZE, text)).cast("i").tolist()

    def _ask_embeddings(self, ids: list[int]) -> bytes:
        return self._ask(protocol.EMBED, array("i", ids).tobytes())


# oom_score_adj, at most 1000. NPU buffers do not count as this process's memory, so the kernel would kill another one.
_OOM_SCORE: Final = 500
_LIBC: Final = ctypes.CDLL(None)
_NO_ANSWER: Final = b"The run was aborted."


def _raise_open_files() -> None:
    """Raise the limit of open files: each NPU buffer needs one, 1024 are too few (rknn-llm issues 17, 26, 47, 62)."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _die_first() -> None:
    """Have the kernel kill this process when memory runs out, not the parent that reports it."""
    path = Path("/proc/self/oom_score_adj")
    with contextlib.suppress(OSError, ValueError):  # without /proc, the score stays as it is
        if int(path.read_text()) < _OOM_SCORE:
            path.write_text(str(_OOM_SCORE))


def _write_lines_at_once() -> None:
    """Make C's stdout unbuffered: it is a pipe here, and a crash would lose the buffered lines."""
    _LIBC.setvbuf(ctypes.c_void_p.in_dll(_LIBC, "stdout"), None, 1, 0)


def main(commands: int, records: int) -> NoReturn:
    """Serve a parent over two inherited descriptors."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for fd in (commands, records):
        os.set_inheritable(fd, False)
    _die_first()
    _write_lines_at_once()
    Worker(commands, records).serve()
