"""What the worker sent, as the parent's own words: errors, arrays, and how a run ended."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import cast

from rkruntime import errors
from rkruntime.errors import ModelError, RKEdgeError, RunError
from rkruntime.generation import Finished, FinishReason, HiddenStates, Logits, Perf
from rkruntime.worker import protocol
from rkruntime.worker.protocol import Record


def error_of(record: Record) -> RKEdgeError:
    """The error of an ERROR record, as the class of its name."""
    plain = json.loads(record.data)
    kind = getattr(errors, str(plain["error"]), RunError)
    return cast(RKEdgeError, kind(plain["message"], hint=plain["hint"], details=plain["details"]))


def add_log(error: RKEdgeError, lines: Sequence[str]) -> None:
    """Add the last lines of the library's log to an error, and what they say went wrong."""
    error.details.setdefault("log", list(lines))
    if isinstance(error, ModelError):
        from rkruntime.diagnosis import diagnose

        # What a shell would have printed under the log; a rule may need it.
        ending = [error.details["description"]] if "description" in error.details else []
        found = diagnose("\n".join([*lines, *ending]), context={"library": "librkllmrt"})
        error.details.setdefault("diagnosis", found.as_dict())


def array_of(record: Record) -> Logits | HiddenStates:
    """The array of a LOGITS or HIDDEN record, float32 [rows, columns]."""
    import numpy as np

    values = np.frombuffer(record.data, np.float32).reshape(-1, record.value)
    return Logits(values) if record.kind == protocol.LOGITS else HiddenStates(values)


def finished_of(record: Record) -> Finished:
    """The end of a run from a FINISHED record."""
    plain = json.loads(record.data)
    perf = Perf(**plain["perf"]) if plain["perf"] else None
    return Finished(FinishReason(plain["reason"]), plain["prompt_tokens"], plain["generated"], perf)
