"""What the library on a board really does where reports of boards disagree: a few short runs answer one question each.

RKEdge is written to be right either way, so no answer here is an error. Nothing is asked that takes minutes.
"""

from __future__ import annotations

import grp
import os
import platform
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Final, NamedTuple

from rkruntime.abi import since, within
from rkruntime.checks import machine
from rkruntime.engine.generation import Finished, FinishReason, Request, Token
from rkruntime.errors import HostError, RKEdgeError, UnsupportedCallError
from rkruntime.model import Model
from rkruntime.words import counted

SCHEMA: Final = "rkedge-first-run/1"
_PROMPT: Final = "Name three rivers."
_SHORT: Final = 16
# Long enough for the answer of a small model to end.
_LONG: Final = 160
_KEPT_LINES: Final = 40


@dataclass(frozen=True)
class Observation:
    """What one question was answered with: a sentence, and the figures behind it."""

    says: str
    facts: Mapping[str, Any] = field(default_factory=dict)


class _Run(NamedTuple):
    ids: list[int]
    end: Finished

    @property
    def read(self) -> int | None:
        """Tokens that the library says it prefilled."""
        return int(self.end.perf.prefill_tokens) if self.end.perf else None

    @property
    def facts(self) -> dict[str, Any]:
        return {"last_ids": self.ids[-8:], "end": asdict(self.end)}


def _silence(trial: Trial) -> str:
    """Why there is no figure of what was read."""
    if within(trial.model.engine.info.release, since("RKLLMResult.perf"), ""):
        return "this run did not say how many tokens it has read"
    return "this release does not say how many tokens it has read"


class Trial:
    """A model to try things with; one that is lost is opened again."""

    def __init__(self, load: Callable[[], Model]) -> None:
        self._load = load
        self._model: Model | None = None

    @property
    def model(self) -> Model:
        """Raises RKEdgeError if it cannot be loaded."""
        if self._model is None or not self._model.engine.alive:
            self.close()
            self._model = self._load()
        return self._model

    def request(self, **changes: Any) -> Request:
        """The question that is always asked, greedily as far as the release allows."""
        return replace(self.model.request(_PROMPT, max_new_tokens=_SHORT), **changes)

    def run(self, request: Request) -> _Run:
        """One run from its first token to its last."""
        *tokens, end = self.model.engine.generate(request)
        assert isinstance(end, Finished)
        return _Run([token.token_id for token in tokens if isinstance(token, Token)], end)

    def close(self) -> None:
        """Unload it."""
        if self._model is not None:
            self._model.close()
            self._model = None


def _template(trial: Trial) -> Observation:
    run = trial.run(trial.request())  # the first of a fresh model: nothing is in its cache
    sent = run.end.prompt_tokens
    if run.read is None:
        return Observation(f"{_silence(trial).capitalize()}.", run.facts)
    if run.read > sent:
        return Observation(f"It read {run.read} tokens of a prompt of {sent}: it adds its own template.", run.facts)
    return Observation(f"It read {run.read} tokens of a prompt of {sent}: it adds nothing.", run.facts)


def _reuse(trial: Trial) -> Observation:
    request = trial.request()
    first, again = trial.run(request), trial.run(request)
    same = f"It gives {_same(first.ids == again.ids)}"
    facts = {"first": first.facts, "again": again.facts}
    if again.read is None:
        return Observation(f"{same}; {_silence(trial)}.", facts)
    kept = max(0, again.end.prompt_tokens - again.read)
    return Observation(f"{same}; {counted(kept, 'token')} of {again.end.prompt_tokens} came from the cache.", facts)


def _end(trial: Trial) -> Observation:
    request = trial.request(stop_tokens=frozenset(), max_new_tokens=_LONG)
    run = trial.run(request)
    stops = trial.model.stop_tokens
    shown = next((number for number in run.ids if number in stops), None)
    facts = {**run.facts, "stop_ids": sorted(stops)}
    if run.end.reason is FinishReason.LENGTH and shown is not None:
        return Observation(f"It does not end at token {shown}, which it passes on: RKEdge ends answers there.", facts)
    if run.end.reason is FinishReason.LENGTH:
        return Observation(f"No answer ended within {counted(len(run.ids), 'token')}.", facts)
    if shown is not None:
        return Observation(f"It ends by itself, and passes token {shown} on before.", facts)
    return Observation("It ends by itself, and does not pass the last token on.", facts)


def _abort(trial: Trial) -> Observation:
    request = trial.request()
    expected = trial.run(request).ids
    events = trial.model.engine.generate(request)
    next(events)
    events.close()
    after = trial.run(request)
    return Observation(f"The next run gives {_same(after.ids == expected)}.", after.facts)


def _hidden(trial: Trial) -> Observation:
    return _rows(trial, trial.model.engine.hidden_states)


def _logits(trial: Trial) -> Observation:
    found = _rows(trial, trial.model.engine.logits)
    likeliest = int(trial.model.engine.logits(trial.request())[-1].argmax())
    chosen = trial.run(trial.request(max_new_tokens=1)).ids
    fits = "the answer begins with the likeliest token" if chosen == [likeliest] else "the answer begins otherwise"
    return Observation(
        f"{found.says} By the last one, {fits}.", {**found.facts, "likeliest": likeliest, "chosen": chosen}
    )


def _rows(trial: Trial, arrays: Callable[[Request], Any]) -> Observation:
    request = trial.request()
    rows = [len(arrays(request)) for _ in range(2)]
    whole = all(count == request.length for count in rows)
    says = "a row for each token, also the second time" if whole else f"{rows} rows for {request.length} tokens"
    return Observation(f"It returns {says}.", {"rows": rows, "prompt_tokens": request.length})


def _history(trial: Trial) -> Observation:
    engine = trial.model.engine
    request = trial.request(keep_history=True, max_new_tokens=4)
    engine.clear_cache()
    sizes = []
    for _ in range(2):
        trial.run(request)
        sizes.append(engine.cache_sizes()[0])
    engine.clear_cache()
    return Observation(f"The cache holds {sizes[0]} tokens after one turn and {sizes[1]} after two.", {"sizes": sizes})


def _pause(trial: Trial) -> Observation:
    request = trial.request(max_new_tokens=8)
    expected = trial.run(request).ids
    paused = trial.run(replace(request, pause_tokens=frozenset(expected[:3][-1:])))
    if paused.end.reason is not FinishReason.PAUSE:
        return Observation("Not answered: the run did not pause.", {"expected": expected, **paused.facts})
    after = trial.run(request)
    trial.model.engine.clear_cache()
    again = trial.run(request)
    read = _silence(trial).capitalize() if after.read is None else f"It read {counted(after.read, 'token')}"
    says = f"{read} of a prompt of {after.end.prompt_tokens}"
    return Observation(f"{says}; once the cache is cleared, {_same(again.ids == expected)}.", after.facts)


def _prompt_cache(trial: Trial) -> Observation:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prompt.cache"
        expected = trial.run(trial.request(save_prompt_cache=path)).ids
        size = path.stat().st_size if path.exists() else 0
        trial.close()
        trial.run(trial.request(max_new_tokens=1))  # shows whether the template must be emptied
        trial.model.engine.load_prompt_cache(path)
        after = trial.run(trial.request())
    read = "" if after.read is None else f", with {counted(after.read, 'token')} read"
    says = f"With this file of {size:,} bytes, another load gives {_same(after.ids == expected)}{read}."
    return Observation(says, {"size": size, **after.facts})


def _same(same: bool) -> str:
    return "the same answer" if same else "ANOTHER answer"


class OpenQuestion(NamedTuple):
    """A question about the library. One that is `risky` is reported to have crashed a board."""

    text: str
    answer: Callable[[Trial], Observation]
    risky: bool = False


# In this order: the first run of a fresh model answers the first one.
QUESTIONS: Final[Mapping[str, OpenQuestion]] = {
    "template": OpenQuestion("Does it put its chat template around token ids?", _template),
    "reuse": OpenQuestion("Does it reuse what is in its cache?", _reuse),
    "end": OpenQuestion("Does it end an answer by itself, and is the end token passed on?", _end),
    "abort": OpenQuestion("Does a run end when it is aborted, and is the next one right?", _abort),
    "hidden": OpenQuestion("Which rows have hidden states?", _hidden),
    "logits": OpenQuestion("Which rows have logits?", _logits),
    "history": OpenQuestion("How full is the cache in a continued conversation?", _history),
    "pause": OpenQuestion("Does the run after a paused one read its prompt?", _pause, risky=True),
    "prompt-cache": OpenQuestion("Does a prompt cache file work?", _prompt_cache, risky=True),
}


def answer(name: str, trial: Trial) -> Observation:
    """Try one of QUESTIONS. A failure is an answer, too: `facts` has the error."""
    try:
        return QUESTIONS[name].answer(trial)
    except UnsupportedCallError as error:
        return Observation(f"Not with this release: {error.message}")
    except HostError as error:  # a missing package
        return Observation(f"Not asked: {error.message}")
    except RKEdgeError as error:
        return Observation(f"It FAILED: {error.message}", {"error": error.as_dict()})


def report_of(model: Model) -> dict[str, Any]:
    """What was loaded, as JSON types."""
    info = asdict(model.engine.info)
    info["log"] = info["log"][-_KEPT_LINES:]
    return info


def machine_report(root: Path = machine.ROOT) -> dict[str, Any]:
    """What this machine has, as JSON types; what cannot be read is None or empty. Neither host nor user is named."""
    memory = machine.memory(root)
    return {
        "board": list(machine.compatible(root)),
        "soc": machine.soc(root),
        "kernel": platform.release(),
        "system": _system(),
        "machine": platform.machine(),
        "libc": " ".join(platform.libc_ver()),
        "python": platform.python_version(),
        "driver": asdict(machine.driver(root)),
        "memory": memory and asdict(memory),
        "nodes": {str(node): os.access(node, os.R_OK | os.W_OK) for node in machine.npu_nodes(root)},
        "dma_heaps": sorted(heap.name for heap in (root / "dev/dma_heap").glob("*")),
        "groups": _groups(),
        "most_open_files": machine.most_open_files(),
        "cores": asdict(machine.cores(root=root)),
    }


def _system() -> str:
    with suppress(OSError):
        return platform.freedesktop_os_release().get("PRETTY_NAME", "")
    return ""


def _groups() -> list[str]:
    """Those of this process that may have to do with the NPU."""
    known = {"root", "video", "render", "rkedge"}
    found = set()
    for number in os.getgroups():
        with suppress(KeyError):
            found.add(grp.getgrgid(number).gr_name)
    return sorted(found & known)
