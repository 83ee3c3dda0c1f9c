"""Try out a bundle step by step: load, speed, self-test, probes. Results are JSON types."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Final

from rkruntime.checks import machine
from rkruntime.checks.diagnosis import NONE, UNEXPLAINED, is_machine
from rkruntime.checks.failures import CONFIDENCES
from rkruntime.engine.generation import Finished, Token
from rkruntime.errors import BundleError, ContextFullError, LoadError, ModelError, RKEdgeError, UsageError, WorkerError
from rkruntime.firstrun import machine_report
from rkruntime.folders import home, own_folder
from rkruntime.model import Model
from rkruntime.probes import FAILED, QUESTIONS, Trial, answer
from rkruntime.selftest import run_selftest

LOAD: Final = "load"
SPEED: Final = "speed"
SELFTEST: Final = "selftest"
# The question that needs the first run of a fresh model: once a run has shown that the library adds its template, the
# template is empty.
FIRST: Final = next(iter(QUESTIONS))
# The order in which steps are done, in whatever order they are asked for.
STEPS: Final = tuple(dict.fromkeys((LOAD, FIRST, SPEED, SELFTEST, *QUESTIONS)))
# Verdicts of the self-test that are not a fault of the answers.
_RIGHT: Final = ("same", "undecided")
_LONG_ANSWER: Final = "Count from 1 to 100, one number on each line."
_MOST_TOKENS: Final = 64
# The class of a load for which the machine has too little free memory.
_RAM: Final = "host-ram-at-load"
_MOST_LINES: Final = 40
_MOST_TEXT: Final = 500

Result = Mapping[str, Any]


def results(load: Callable[[], Model], steps: Sequence[str]) -> Iterator[tuple[str, Result | None]]:
    """Do steps in the order of STEPS; yields each step's name with None as it begins, and again with its result.

    The model is loaded whatever the steps are. A load that fails is a result, and the last one.

    Raises:
        UsageError: There is no such step.
        RKEdgeError: The bundle, the library or the machine is at fault, not the model, as far as the log shows.
    """
    if unknown := [step for step in steps if step not in STEPS]:
        raise UsageError(f"There is no step {unknown[0][:80]!r}.")
    trial = Trial(load)
    try:
        yield LOAD, None
        loaded = _load(trial)
        yield LOAD, loaded
        if not loaded["loads"]:
            return
        for step in (step for step in STEPS if step in steps and step != LOAD):
            yield step, None
            yield step, _tried(step, trial)
    finally:
        trial.close()


def _tried(step: str, trial: Trial) -> Result:
    if step in QUESTIONS:
        found = answer(step, trial)
        return {"result": found.result, "says": _short(found.says)}
    try:
        return _speed(trial) if step == SPEED else _selftest(trial)
    except ModelError as error:
        return {"result": FAILED, "right": False, "says": _short(error.message)}
    except RKEdgeError as error:  # the machine's fault, which decides nothing about the model
        return {"result": "", "says": _short(error.message)}


def _load(trial: Trial) -> Result:
    try:
        model = trial.model
    except (LoadError, WorkerError) as error:
        if _is_elsewhere(error):
            raise
        return {
            **_machine(),
            "loads": False,
            "says": _short(_told(error)),
            "log": _lines(error.log),
            "library": error.details.get("release", ""),
            "emulated": error.details.get("emulated", False),
        }
    info = model.engine.info
    return {
        **_machine(),
        "loads": True,
        "says": f"It was loaded in {info.load_seconds:.1f} s.",
        "log": _lines(info.log),
        "library": info.runtime_version or info.release,
        "driver_seen": info.driver_version,
        "emulated": info.emulated,
        "context": info.max_context,
    }


def _is_elsewhere(error: ModelError) -> bool:
    """Whether a load failed for a reason that says nothing about the model, such as a device that may not be opened."""
    found = error.details.get("diagnosis", {"class": UNEXPLAINED, "confidence": NONE})
    sure = found["confidence"] in CONFIDENCES[:-1]
    if error.details.get("emulated"):  # RAM, and whatever the log does not tell, are the PC's
        return not sure or is_machine(found) or found["class"] == _RAM
    killed = error.details.get("signal") == "SIGKILL"  # the diagnosis says by whom if memory ran out
    return is_machine(found) or (killed and not sure)


def _told(error: ModelError) -> str:
    found = error.details.get("diagnosis")
    if not found or found["confidence"] not in CONFIDENCES:
        return error.message
    return f"{error.message} Diagnosis ({found['confidence']} confidence): {found['title']}."


def _machine() -> Result:
    """Return facts about this machine that name neither host nor user."""
    found = machine_report()
    memory = found["memory"]
    return {
        "board": str(next(iter(found["board"]), "")),
        "soc": machine.platform_of(found["soc"]) or "",
        "kernel": found["kernel"],
        "driver": found["driver"]["version"] or "",
        "ram_gib": round(memory["total"] / (1 << 30), 1) if memory else 0.0,
    }


def _speed(trial: Trial) -> Result:
    """Measure the time to the first token and the rate of later ones, and take the library's own figure for memory."""
    model = trial.model
    request = model.request(_LONG_ANSWER, max_new_tokens=_MOST_TOKENS)
    trial.run(request)  # the first run of a load may be slower
    trial.empty()
    began, times, end = time.monotonic(), [], None
    for event in model.engine.generate(request):
        if isinstance(event, Token):
            times.append(time.monotonic())
        elif isinstance(event, Finished):
            end = event
    clocks = machine.clocks()
    if len(times) < 2:
        return {"result": "", "says": "The answer was too short to measure.", "clocks": clocks}
    rate = (len(times) - 1) / max(times[-1] - times[0], 1e-6)
    first = 1000 * (times[0] - began)
    memory = end.perf.memory_mb if end and end.perf else 0.0
    prompt = end.prompt_tokens if end else 0
    return {
        "result": "measured",
        "says": f"First of {len(times)} tokens after a prompt of {prompt}.",
        "first_token_ms": round(first, 1),
        "tokens_per_s": round(rate, 2),
        "memory_mb": round(float(memory), 1),
        "clocks": clocks,
    }


def _selftest(trial: Trial) -> Result:
    try:
        found = run_selftest(trial.model)
    except (BundleError, ContextFullError) as error:  # without a self-test, or with too small a context
        return {"result": "", "says": _short(error.message)}
    problem = found.problems[0] if found.problems else None
    says = problem.message if problem else "Its answers are the float model's, as far as rounding lets one tell."
    return {"result": found.verdict, "right": found.verdict in _RIGHT, "says": _short(says)}


def _short(text: str) -> str:
    """Return a text without the names of the user's folders, as the file it is for may be published."""
    for own, shown in ((str(own_folder("cache")), "~/.cache/rkedge"), (str(home()), "~")):
        text = text.replace(own, shown) if len(own) > 1 else text
    return text[:_MOST_TEXT]


def _lines(lines: Sequence[str]) -> list[str]:
    return [_short(line) for line in lines[-_MOST_LINES:]]
