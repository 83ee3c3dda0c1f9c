"""Decode what the worker sent: errors, arrays, and how a run ended."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any, Final

from rkruntime.checks import machine
from rkruntime.engine.generation import Finished, FinishReason, HiddenStates, Logits, Perf
from rkruntime.engine.worker import protocol
from rkruntime.engine.worker.exchange import lie
from rkruntime.engine.worker.protocol import Record
from rkruntime.errors import (
    LibraryError,
    LoadError,
    ModelError,
    RKEdgeError,
    RunError,
    UnsupportedCallError,
    UsageError,
)

# The errors that binding and runner raise, by name.
_ERRORS: Final = {kind.__name__: kind for kind in (LibraryError, LoadError, RunError, UnsupportedCallError, UsageError)}


def json_of(record: Record) -> Any:
    """Parse the JSON of a record. Raises WorkerProtocolError if it is not JSON."""
    try:
        return json.loads(record.data)
    except (ValueError, RecursionError):
        raise lie("a record that is not JSON") from None


def sizes_of(value: Any) -> list[int]:
    """Check the reply of binding.LoadedModel.kv_cache_sizes."""
    return [whole(size) for size in (value if isinstance(value, list) else [value])]


def whole(value: Any) -> int:
    """Return `value` if it is a count. Raises WorkerProtocolError if it is not."""
    if type(value) is int and 0 <= value < 1 << 31:
        return value
    raise lie(f"{str(value)[:80]!r} instead of a count")


def error_of(record: Record) -> RKEdgeError:
    """Return the error in an ERROR record, as an instance of the class it names."""
    plain = json_of(record)
    try:
        kind, message, hint = _ERRORS[plain["error"]], plain["message"], plain["hint"]
    except (KeyError, TypeError):
        raise lie("an unknown error") from None
    if not isinstance(message, str) or not isinstance(hint, str):
        raise lie("an error without a message")
    return kind(message, hint=hint)


def add_log(
    error: RKEdgeError, lines: Sequence[str], recent: Sequence[str], *, loading: bool, ran_out: bool | None
) -> None:
    """Add the last lines of the library's log to an error, and a diagnosis.

    Args:
        recent: Lines of the load and of the failed command; lines in between are about something else.
        loading: Whether the model was still being loaded.
        ran_out: Whether the kernel killed a process for lack of memory meanwhile; None if unknown.
    """
    error.details.setdefault("log", list(lines))
    if isinstance(error, ModelError):
        from rkruntime.checks.diagnosis import diagnose

        # The line that a shell would have printed below the log, such as "Segmentation fault": a rule may need it.
        ending = [error.details["description"]] if "description" in error.details else []
        killed = error.details.get("signal") == "SIGKILL" and not ran_out
        # Anybody may have killed it, but a load takes memory.
        likely = ending if killed and loading and ran_out is None else []
        ending = [] if killed else ending
        if error.message.startswith("rkllm_load_lora "):
            # If an adapter cannot be read, the log says "model"; this line tells the two apart.
            ending.append("rkllm_load_lora failed")
        found = diagnose("\n".join([*recent, *ending]), context={"library": "librkllmrt"})
        if killed:
            error.hint = _killed_hint(ran_out)
        if likely and not found.explained:
            context = {"library": "librkllmrt", "stage": "load", "signal": "SIGKILL"}
            found = replace(diagnose("\n".join([*lines, *likely]), context=context), confidence="low")
        error.details.setdefault("diagnosis", found.as_dict())
        if found.explained:
            step = f" First: {found.next_steps[0]}" if found.next_steps else ""
            error.hint = f"Diagnosis ({found.confidence} confidence): {found.title}.{step}"


def _killed_hint(ran_out: bool | None) -> str:
    memory = machine.memory()
    free = f" {memory.available / 1e9:.1f} GB of memory are available now." if memory else ""
    if ran_out is None:
        return f"Something killed it: look for 'Out of memory' in dmesg.{free}"
    return f"The kernel did not kill it for lack of memory; a person, a service manager or earlyoom may have.{free}"


def array_of(record: Record) -> Logits | HiddenStates:
    """Return the array in a LOGITS or HIDDEN record, float32 [rows, columns]."""
    import numpy as np

    values = np.frombuffer(record.data, np.float32).reshape(-1, record.value)
    return Logits(values) if record.kind == protocol.LOGITS else HiddenStates(values)


def finished_of(record: Record) -> Finished:
    """Return the end of a run from a FINISHED record. Raises WorkerProtocolError."""
    plain = json_of(record)
    try:
        reason, perf = FinishReason(plain["reason"]), plain["perf"]
        return Finished(reason, whole(plain["prompt_tokens"]), whole(plain["generated"]), _perf(perf))
    except (KeyError, TypeError, ValueError):
        raise lie("the end of a run without a reason or figures") from None


def _perf(plain: Any) -> Perf | None:
    """Return the runtime's figures, None if they are implausible: a library may leave the structure uninitialized."""
    if plain is None:
        return None
    values = [plain[field.name] for field in fields(Perf)]
    return Perf(*values) if all(type(value) in (int, float) and abs(value) < 1e15 for value in values) else None
