"""Run tests on a loaded model, and time them: from the request to the first token, and from there to the last one.

Prompts are numbers (1 2 3 ...), and where an answer is measured, a question whose answer is long. A library that ends
it early is asked again: tokens of several runs then add up to those that were wanted.

The library keeps what it has read and reads only what is new, since 1.2.0; since 1.2.1 it also says how much that was.
So a test at a depth first has that depth read, without measuring, and what follows goes on in another way, so that it
is read whole.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from statistics import mean, stdev
from typing import Final

from rkboard.bench.workload import START, VENDOR_PROMPT, Row
from rkruntime.abi import since, within
from rkruntime.engine.generation import Finished, Request, Token
from rkruntime.errors import BundleError
from rkruntime.model import Model
from rkruntime.text.template import Message
from rkruntime.words import counted

# A library may read a token of the answer before once more.
_LEEWAY: Final = 4
_WARM: Final = 8
_NUMBERS: Final = 6000
_QUESTION: Final = "Count from 1 to 1000. Write every number."
# Runs that may add up to one, and the fewest tokens in one of them.
_MOST_RUNS: Final = 32
_FEWEST: Final = 2


@dataclass(frozen=True)
class Sample:
    """One run. Times are ours, in seconds; `read` and `memory_mb` are the library's, where it says them.

    Attributes:
        first_s: From the request to the first token.
        decode_s: From there to the last one.
        made: Tokens after the first one.
        runs: How many of the library's these are.
    """

    first_s: float
    decode_s: float
    made: int
    read: int | None = None
    memory_mb: float | None = None
    runs: int = 1


@dataclass
class Line:
    """A test with its runs; `problem`: why there are none."""

    test: Row
    samples: list[Sample] = field(default_factory=list)
    problem: str = ""

    @property
    def speeds(self) -> list[float]:
        """Tokens per second of each run."""
        if self.test.kind == "pp":
            return [(one.read or self.test.tokens) / one.first_s for one in self.samples]
        return [one.made / one.decode_s for one in self.samples]

    @property
    def first_ms(self) -> list[float]:
        """Milliseconds to the first token of each run."""
        return [one.first_s * 1000 for one in self.samples]


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; the latter is 0 for one value."""
    return mean(values), stdev(values) if len(values) > 1 else 0.0


class Bench:
    """Measures on a model that does nothing else meanwhile."""

    def __init__(self, model: Model) -> None:
        self._engine, release = model.engine, model.engine.info.release
        self._bos = model.bundle.manifest.bos_token_id
        text = " ".join(map(str, range(1, _NUMBERS)))
        self._stream = model.prompts.encode(text, 1 << 20)
        asked, _ = model.prompts.prompt([Message("user", _QUESTION)], 1 << 20)
        self._question = asked[asked[:1] == [self._bos] :]
        self._clears = within(release, since("rkllm_clear_kv_cache"), "")
        if len(set(self._stream)) < 2:
            raise BundleError("The tokenizer has one token for all numbers: there is nothing to measure with.")

    def warm_up(self) -> None:
        """A run that nobody measures: the first one after a load may be slower."""
        self._run(self._ask(VENDOR_PROMPT, 0), _WARM)

    def measure(self, line: Line, repetitions: int) -> None:
        """Add runs to a line, each as soon as it has been made."""
        if line.test.kind != "pp" and 0 < line.test.depth <= len(self._question):
            line.problem = f"the question that is answered has {len(self._question)} tokens itself"
            return
        for number in range(repetitions):
            sample = self._sample(line.test, number + 1)
            line.problem = self._problem(line.test, sample)
            if line.problem:
                return
            line.samples.append(sample)

    def _sample(self, test: Row, number: int) -> Sample:
        if (test.depth == 0 or test.kind == "vendor") and self._clears:
            self._engine.clear_cache()
        if test.kind != "pp":
            return self._answer(self._ask(test.depth, number), test.tokens)
        before = [self._bos]
        if test.depth:
            before = self._prompt(test.depth, 0)
            self._run(before, 1)  # so that the cache ends there
        after = self._other(before, test.tokens - (0 if test.depth else 1), number)
        return self._run([*before, *after], 1)

    def _ask(self, length: int, number: int) -> list[int]:
        """A prompt of this length, if the question is not longer, that ends in it."""
        before = self._prompt(max(1, length - len(self._question)), number)
        return [*before, *self._question]

    def _answer(self, prompt: Sequence[int], wanted: int) -> Sample:
        """A run that makes so many tokens after its first one, or several."""
        first = sample = self._run(prompt, wanted + 1)
        made, seconds, runs = first.made, first.decode_s, 1
        while made < wanted and sample.made >= _FEWEST and runs < _MOST_RUNS:
            sample = self._run(prompt, wanted - made + 1)
            made, seconds, runs = made + sample.made, seconds + sample.decode_s, runs + 1
        return replace(first, made=made, decode_s=seconds, runs=runs)

    def _prompt(self, length: int, number: int) -> list[int]:
        return [self._bos, *self._after(number * START, length - 1)]

    def _after(self, begin: int, length: int) -> list[int]:
        """So many tokens of the numbers, from this one on, and from the start again if need be."""
        at = begin % len(self._stream)
        found = self._stream[at : at + length]
        while len(found) < length:
            found += self._stream[: length - len(found)]
        return found

    def _other(self, before: Sequence[int], length: int, number: int) -> list[int]:
        """Tokens that do not go on as `before` does: that would be in the cache."""
        usual = self._after(len(before) - 1, 1)[0]
        begin = number * START + len(before)
        while self._after(begin, 1)[0] == usual:
            begin += 1
        return self._after(begin, length)

    def _run(self, tokens: Sequence[int], new: int) -> Sample:
        times: list[float] = []
        end = None
        started = time.perf_counter()
        with closing(self._engine.generate(Request(tokens, max_new_tokens=new))) as events:
            for event in events:
                if isinstance(event, Token):
                    times.append(time.perf_counter())
                elif isinstance(event, Finished):
                    end = event
        perf = end.perf if end else None
        if not times:
            return Sample(0.0, 0.0, 0)
        return Sample(
            times[0] - started, times[-1] - times[0], len(times) - 1,
            perf.prefill_tokens if perf else None, perf.memory_mb if perf else None,
        )  # fmt: skip

    def _problem(self, test: Row, sample: Sample) -> str:
        """Why a run is not what was to be measured; empty if it is."""
        if sample.first_s <= 0:
            return "the library ended the answer before its first token"
        if test.kind != "pp":
            short = sample.made < test.tokens or sample.decode_s <= 0
            return f"the library ended {counted(sample.runs, 'answer')} after {sample.made:,} tokens" if short else ""
        if test.depth == 0 and sample.read is None:
            return ""
        if sample.read is None:
            return "this release does not say how many tokens it has read, which may be more than those"
        if not test.tokens - _LEEWAY <= sample.read <= test.tokens + _LEEWAY:
            return f"the library says that it has read {sample.read:,} tokens"
        return ""
