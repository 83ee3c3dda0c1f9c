"""Run tests on a loaded model and time them: from the request to the first token, and from there to the last one.

Prompts are numbers (1 2 3 ...), followed by a question with a long answer where decoding is measured. If the library
ends that answer early, it is asked again, and the tokens of several runs are added up.

Since 1.2.0 the library keeps the KV cache and reads only the new part of a prompt; since 1.2.1 it also says how long
that was. So a test at a depth first has the tokens of that depth read, without measuring; the rest of its prompt then
differs from what the cache may still hold, so that all of it is read.
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

# Tokens: a library may read the last token of the previous answer once more.
_LEEWAY: Final = 4
_WARM: Final = 8
_NUMBERS: Final = 6000
_QUESTION: Final = "Count from 1 to 1000. Write every number."
# The most runs that are added up to one, and the fewest tokens in a run that is worth repeating.
_MOST_RUNS: Final = 32
_FEWEST: Final = 2


@dataclass(frozen=True)
class Sample:
    """One run. Times are taken here, in seconds; `read` and `memory_mb` are the library's figures, if it gives them.

    Attributes:
        first_s: The time from the request to the first token.
        decode_s: The time from the first token to the last one.
        made: The number of tokens after the first one.
        runs: The number of the library's runs that were added up.
    """

    first_s: float
    decode_s: float
    made: int
    read: int | None = None
    memory_mb: float | None = None
    runs: int = 1


@dataclass
class Line:
    """A test with its runs. `problem`: why it could not be measured."""

    test: Row
    samples: list[Sample] = field(default_factory=list)
    problem: str = ""

    @property
    def speeds(self) -> list[float]:
        """The tokens/s of each run."""
        if self.test.kind == "pp":
            return [(one.read or self.test.tokens) / one.first_s for one in self.samples]
        return [one.made / one.decode_s for one in self.samples]

    @property
    def first_ms(self) -> list[float]:
        """The milliseconds to the first token of each run."""
        return [one.first_s * 1000 for one in self.samples]


def spread(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and the sample standard deviation, which is 0 for a single value."""
    return mean(values), stdev(values) if len(values) > 1 else 0.0


class Bench:
    """Measures on a model that is used for nothing else meanwhile."""

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
        """Run once without measuring: the first run after a load may be slower."""
        self._run(self._ask(VENDOR_PROMPT, 0), _WARM)

    def measure(self, line: Line, repetitions: int) -> None:
        """Add the runs of a test to its line one by one, so that an interruption keeps those made."""
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
            self._run(before, 1)  # so that the KV cache ends there
        after = self._other(before, test.tokens - (0 if test.depth else 1), number)
        return self._run([*before, *after], 1)

    def _ask(self, length: int, number: int) -> list[int]:
        """Return a prompt of this length that ends in the question; longer if the question alone is."""
        before = self._prompt(max(1, length - len(self._question)), number)
        return [*before, *self._question]

    def _answer(self, prompt: Sequence[int], wanted: int) -> Sample:
        """Run until so many tokens were made after the first one, in several runs if necessary."""
        first = sample = self._run(prompt, wanted + 1)
        made, seconds, runs = first.made, first.decode_s, 1
        while made < wanted and sample.made >= _FEWEST and runs < _MOST_RUNS:
            sample = self._run(prompt, wanted - made + 1)
            made, seconds, runs = made + sample.made, seconds + sample.decode_s, runs + 1
        return replace(first, made=made, decode_s=seconds, runs=runs)

    def _prompt(self, length: int, number: int) -> list[int]:
        return [self._bos, *self._after(number * START, length - 1)]

    def _after(self, begin: int, length: int) -> list[int]:
        """Return `length` tokens of the numbers from `begin` on, starting over at their end."""
        at = begin % len(self._stream)
        found = self._stream[at : at + length]
        while len(found) < length:
            found += self._stream[: length - len(found)]
        return found

    def _other(self, before: Sequence[int], length: int, number: int) -> list[int]:
        """Return tokens that differ at once from the usual continuation of `before`, which the cache may hold."""
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
        """Return why a run is not what should have been measured; empty if it is."""
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
