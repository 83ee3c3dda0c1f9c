"""Run rkllm-toolkit under the interpreter that has it: one JSON job on standard input, JSON events out.

    PYTHON -I -u worker.py EVENTS        EVENTS: an open file descriptor, or -

A separate program, not a module of RKEdge: it needs only Python 3.8, for the vendor's oldest wheels, and its standard
library. Everything that the toolkit prints goes to standard output and error, apart from the events. With - it prints
what is installed to standard output, and imports none of it.
"""

from __future__ import annotations

import array
import importlib
import inspect
import json
import os
import platform
import signal
import sys
import threading
import time
import traceback
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

if TYPE_CHECKING:
    from collections.abc import Callable

SCHEMA = "rkedge-toolkit-job/2"
DISTRIBUTIONS = ("rkllm-toolkit", "rkllm_toolkit")
# Packages whose versions help to explain an environment that does not work.
PARTS = (
    *("torch", "transformers", "tokenizers", "sentencepiece", "peft", "accelerate", "numpy", "setuptools"),
    *("auto_gptq", "datasets"),
)
METHODS = ("load_huggingface", "build", "export_rkllm")
CALL_KEYS = {"stage", "method", "arguments"}
LOGITS_KEYS = {"prompts", "last", "path"}


class JobError(Exception):
    """A failure with its kind, as `failure` events name it."""

    def __init__(self, kind: str, stage: str, message: str, trace: str = "") -> None:
        super().__init__(message)
        self.kind, self.stage, self.message, self.trace = kind, stage, message, trace


class Events:
    """Lines of JSON on a descriptor that no program started from here inherits."""

    def __init__(self, descriptor: int) -> None:
        os.set_inheritable(descriptor, False)
        self._file: BinaryIO = os.fdopen(descriptor, "wb", buffering=0)

    def send(self, event: str, **values: Any) -> None:
        """Write one event completely."""
        line = memoryview(json.dumps({"event": event, **values}).encode() + b"\n")
        while line:
            line = line[self._file.write(line) :]


def installed_version(name: str) -> str:
    """Return the version of a distribution, empty if there is none."""
    try:
        return metadata.version(name) or ""
    except metadata.PackageNotFoundError:
        return ""


def probe() -> dict[str, Any]:
    """Return what is installed here, from the packages' metadata; none of their code runs."""
    version = next((found for found in map(installed_version, DISTRIBUTIONS) if found), "")
    return {
        "python": platform.python_version(),
        "executable": sys.executable,
        "machine": platform.machine(),
        "libc": platform.libc_ver()[0],
        "toolkit": version,
        "parts": {name: installed_version(name) for name in PARTS},
    }


def read_job(line: bytes) -> tuple[list[dict[str, Any]], dict[str, Any] | None]:
    """Parse a job: its calls, and which logits to write. Raises JobError if it does not match the schema exactly."""
    try:
        job = json.loads(line)
        calls, logits = job["calls"], job["logits"]
        if set(job) != {"schema", "calls", "logits"} or job["schema"] != SCHEMA or not calls:
            raise ValueError(SCHEMA)
        if logits is not None and set(logits) != LOGITS_KEYS:
            raise ValueError(logits)
        for call in calls:
            if set(call) != CALL_KEYS or call["method"] not in METHODS or not isinstance(call["arguments"], dict):
                raise ValueError(call)
        return list(calls), logits
    except (ValueError, TypeError, KeyError) as error:
        raise JobError("job", "", "The job is not of the form " + SCHEMA + ": " + str(error)) from error


def guarded(kind: str, stage: str, work: Callable[[], Any]) -> Any:
    """Run `work`; whatever it raises becomes a JobError, even an exit, which the toolkit is known to do."""
    try:
        return work()
    except JobError:
        raise
    except SystemExit as error:
        raise JobError("exit", stage, "The toolkit ended the program with exit(" + repr(error.code) + ").") from error
    except Exception as error:  # The toolkit is closed source, and may raise anything.
        text = type(error).__name__ + ": " + str(error)
        raise JobError(kind, stage, text, traceback.format_exc()[-8000:]) from error


def import_toolkit() -> Any:
    """Import the class RKLLM."""
    from rkllm.api import RKLLM  # type: ignore[import-not-found]

    return RKLLM()


def check_arguments(toolkit: Any, calls: list[dict[str, Any]]) -> None:
    """Compare every call with the methods' signatures, if available, before an hour of work instead of after it."""
    for call in calls:
        method = getattr(toolkit, call["method"], None)
        if method is None:
            raise JobError("argument", call["stage"], "The installed RKLLM has no method " + call["method"] + ".")
        try:
            signature = inspect.signature(method)
        except (TypeError, ValueError):
            continue  # A compiled method may have no signature.
        try:
            signature.bind(**call["arguments"])
        except TypeError as error:
            shown = call["method"] + str(signature)
            raise JobError("argument", call["stage"], str(error) + "; the installed method is " + shown) from error


def convert(calls: list[dict[str, Any]], logits: dict[str, Any] | None, events: Events) -> None:
    """Import the toolkit, make the calls in order, and then write logits if that is asked for.

    Logits come last: whatever goes wrong with them, the file is there, unless the parent is killed.
    """
    toolkit = timed(events, "import", partial(guarded, "import", "import", import_toolkit))
    check_arguments(toolkit, calls)
    for call in calls:
        timed(events, call["stage"], partial(run_call, toolkit, call))
    if logits is not None:
        timed(events, "verify", partial(guarded, "exception", "verify", partial(write_logits, toolkit, logits)))


def run_call(toolkit: Any, call: dict[str, Any]) -> None:
    """Make one call; anything but 0 is a failure, as the toolkit returns -1 and prints why."""
    method = getattr(toolkit, call["method"])
    returned = guarded("exception", call["stage"], partial(method, **call["arguments"]))
    if returned != 0 or isinstance(returned, bool):
        raise JobError("returned", call["stage"], call["method"] + " returned " + repr(returned) + ".")


def write_logits(toolkit: Any, wanted: dict[str, Any]) -> None:
    """Write the logits of the last positions of each prompt as float32, one row after the other."""
    torch = importlib.import_module("torch")
    with Path(wanted["path"]).open("wb") as file:
        for prompt in wanted["prompts"]:
            found = toolkit.get_logits({"input_ids": torch.tensor([prompt])})
            if found is None:
                raise JobError("returned", "verify", "get_logits returned None.")
            shape = tuple(found.shape)
            if len(shape) != 3 or shape[:2] != (1, len(prompt)):
                raise JobError("returned", "verify", "get_logits returned the shape " + repr(shape) + ".")
            for row in found[0][-wanted["last"] :]:
                # This works for any type, on any device, and without numpy.
                array.array("f", row.tolist()).tofile(file)


def timed(events: Events, stage: str, work: Callable[[], Any]) -> Any:
    """Run `work` between its two events."""
    events.send("stage", stage=stage)
    start = time.monotonic()
    result = work()
    events.send("stage_done", stage=stage, seconds=round(time.monotonic() - start, 3))
    return result


def read_line(descriptor: int) -> bytes:
    """Read up to the end of the first line or of the input."""
    line = b""
    while not line.endswith(b"\n"):
        data = os.read(descriptor, 1 << 16)
        if not data:
            break
        line += data
    return line


def end_with_parent(descriptor: int) -> None:
    """Wait until the other end of standard input is closed, which means the parent died; kill this process group."""
    while os.read(descriptor, 1 << 16):
        pass
    if os.getpgid(0) == os.getpid():
        os.killpg(os.getpid(), signal.SIGKILL)
    os._exit(1)


def main() -> int:
    """Probe or convert; the exit code is 0 only if the last event is `done` or the probe's answer."""
    if sys.argv[1:] == ["-"]:
        print(json.dumps(probe()))  # noqa: T201 - this is the answer
        return 0
    events = Events(int(sys.argv[1]))
    # The toolkit may prompt: it gets no answer, and never the parent's pipe.
    stdin = os.dup(0)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    try:
        line = read_line(stdin)
        threading.Thread(target=end_with_parent, args=(stdin,), daemon=True).start()
        events.send("started", python=platform.python_version(), pid=os.getpid())
        convert(*read_job(line), events)
    except JobError as error:
        events.send("failure", kind=error.kind, stage=error.stage, message=error.message, trace=error.trace)
        return 1
    events.send("done")
    return 0


if __name__ == "__main__":
    sys.exit(main())
