"""One measurement from the load to the result, which keeps what was measured if it ends early."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any, Final

from rkboard.bench import result as files
from rkboard.bench.expected import Expected, Figures, expected_of
from rkboard.bench.measure import Bench, Line, spread
from rkboard.bench.watch import Moment, Watch
from rkboard.bench.workload import VENDOR_PROMPT, Workload, workload
from rkboard.doctor.report import summary
from rkboard.doctor.visit import glance
from rkruntime.bundle.manifest import Bundle
from rkruntime.checks import machine
from rkruntime.errors import RKEdgeError
from rkruntime.evidence import SCHEMA, ResultBoard, ResultModel, Run
from rkruntime.model import Model
from rkruntime.schema import build
from rkruntime.words import counted

_MIB: Final = 1 << 20
_NOTHING: Final = Expected(Figures(), Figures())


@dataclass(frozen=True)
class Wanted:
    """The numbers of tokens in and out, the depths, and how often each test is repeated."""

    prompts: Sequence[int]
    news: Sequence[int]
    depths: Sequence[int]
    repetitions: int


@dataclass
class Session:
    """Measures a loaded model.

    Attributes:
        error: The error that ended the measurement early, including a stop by the user.
        complete: Whether all tests were run.
    """

    bundle: Bundle
    model: Model
    wanted: Wanted
    watch: Watch = field(default_factory=Watch)
    lines: list[Line] = field(default_factory=list)
    error: RKEdgeError | None = None
    complete: bool = False
    peak: int = 0

    def __post_init__(self) -> None:
        asked, context = self.wanted, self.model.engine.info.max_context
        self.work: Workload = workload(asked.prompts, asked.news, asked.depths, context)
        # An emulated figure must not be compared with a board's.
        self.expected = _NOTHING if self.model.engine.info.emulated else expected_of(self.bundle)
        self.digest = expected_of(self.bundle).digest

    def run(self, show: Callable[[Line], None]) -> None:
        """Measure, and call `show` with each line. An error of the model is kept in `error`; Ctrl-C is raised."""
        with self.watch:
            try:
                bench = Bench(self.model)
                bench.warm_up()
                for test in self.work.tests:
                    self.lines.append(line := Line(test))
                    bench.measure(line, self.wanted.repetitions)
                    show(line)
                self.complete = True
            except RKEdgeError as error:
                self.error = error
            finally:
                self.peak = self.model.engine.peak_memory or self.peak

    @property
    def memory_mb(self) -> float:
        """The peak memory of the process in MiB, by the library's own figure if it gives one; 0 if unknown."""
        own = [one.memory_mb for line in self.lines for one in line.samples if one.memory_mb]
        return max(own) if own else self.peak / _MIB

    def result(self) -> files.Result:
        """Return what was measured so far."""
        info, made = self.model.engine.info, self.bundle.manifest
        return files.Result(
            schema=SCHEMA,
            made=time.strftime("%Y-%m-%d"),
            rkedge=version("rkedge"),
            emulated=info.emulated,
            model=ResultModel(made.name[:200], self.digest),
            board=self._board(),
            runs=(self._run(),),
            bench=files.Bench(
                schema="rkedge-bench/1",
                repetitions=self.wanted.repetitions,
                family=made.family,
                size=made.size,
                parameters=made.parameters,
                file_bytes=made.files[made.model_file].size,
                plan_title=self.expected.plan.title,
                vendor_title=self.expected.vendor.title,
                lines=tuple(self._lines()),
                notes=tuple(note[:500] for note in [*self.work.notes, *self._notes()]),
                changes=tuple(text[:500] for text in self.watch.changes),
                before=_moment(self.watch.before),
                after=_moment(self.watch.after),
                hottest=self.watch.hottest,
                complete=self.complete,
                error=self.error.message[:500] if self.error else "",
            ),
        )

    def _board(self) -> ResultBoard:
        info, board = self.model.engine.info, glance()
        known, memory = summary(board), machine.memory(board.root)
        library = info.runtime_version or info.release
        if info.emulated:
            return ResultBoard("", self.bundle.manifest.platform, "", "", library)
        name = str(known["model"] or known["soc"] or "")
        gib = round(memory.total / (1 << 30), 1) if memory else 0.0
        driver = info.driver_version or board.driver.version or ""
        return ResultBoard(name[:200], board.platform or "", board.release[:200], driver[:200], library[:200], gib)

    def _run(self) -> Run:
        info, made = self.model.engine.info, self.bundle.manifest
        own = next((line for line in self.lines if line.test.kind == "vendor" and line.samples), None)
        steady = f" {'; '.join(self.watch.changes)}."[:300] if self.watch.changes else ""
        measured = f"rkedge bench, {counted(len(own.samples), 'run')} of 128 tokens in and 64 out." if own else ""
        return Run(
            type=made.dtype,
            release=made.toolkit_version,
            cores=info.npu_cores or made.npu_cores,
            context=info.max_context,
            lora="runtime" if self.bundle.lora else "merged",
            status="works",
            says=(measured or "It loads.") + steady,
            tokens_per_s=round(spread(own.speeds)[0], 3) if own else 0.0,
            first_token_ms=round(spread(own.first_ms)[0], 2) if own else 0.0,
            memory_mb=round(self.memory_mb, 1),
            file_sha256=made.files[made.model_file].sha256,
        )

    def _lines(self) -> list[files.Line]:
        plan, vendor = self.expected.plan, self.expected.vendor
        found = []
        for line in self.lines:
            test = line.test
            found.append(_line(test.name, "t/s", line.speeds, plan.of(test), vendor.of(test), line.problem))
            if test.kind == "vendor" and not line.problem:
                found.append(
                    _line(f"first token after {VENDOR_PROMPT}", "ms", line.first_ms, plan.ttft_ms, vendor.ttft_ms)
                )
        memory = [self.memory_mb] if self.memory_mb else []
        found.append(_line("load", "s", [self.model.engine.info.load_seconds]))
        if memory:
            found.append(_line("memory, peak of the process", "MiB", memory, plan.memory_mb, vendor.memory_mb))
        return found

    def _notes(self) -> list[str]:
        info, made = self.model.engine.info, self.bundle.manifest
        notes = [] if info.emulated or self.expected.plan.title else ["The bundle has no plan to compare with."]
        if info.release != made.toolkit_version:
            notes.append(f"The library is of {info.release}, the model file was made with {made.toolkit_version}.")
        if any(one.runs > 1 for line in self.lines for one in line.samples):
            notes.append("The library ended answers early: the tokens of several runs were added up.")
        if not self.digest:
            notes.append("The bundle does not say which model it is: convert it again for `rkedge compat`.")
        return notes


def _line(
    name: str, unit: Any, values: Sequence[float], plan: float | None = None, vendor: float | None = None,
    problem: str = "",
) -> files.Line:  # fmt: skip
    if not values:
        return files.Line(name, unit, problem=problem[:500] or "it was stopped before")
    average, deviation = spread(values)
    rounded = tuple(round(value, 4) for value in values)
    return files.Line(name, unit, rounded, round(average, 4), round(deviation, 4), plan, vendor)


def _moment(moment: Moment) -> files.Moment:
    data = moment.as_dict()
    return build(files.Moment, data, ValueError)
