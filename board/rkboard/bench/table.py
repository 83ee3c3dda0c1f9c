"""A result as Markdown, for a forum: the columns of llama-bench's table, with the expected figures beside them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from rkboard.bench.result import Bench, Line, Moment, Result
from rkboard.doctor.readings import mhz
from rkruntime.printable import one_line
from rkruntime.words import counted

_DIGITS: Final = {"t/s": 2, "ms": 1, "s": 2, "MiB": 0}
_MARK: Final = " *"


def markdown(result: Result) -> str:
    """Return the table with the facts above it and the notes below."""
    return "\n".join([*_facts(result), "", *_table(result), *_notes(result)])


def _facts(result: Result) -> Iterator[str]:
    board, bench, run = result.board, result.bench, result.runs[0]
    named = [
        board.name,
        board.soc if board.soc != board.name else "",
        f"{board.ram_gib:g} GiB" if board.ram_gib else "",
    ]
    if result.emulated:
        yield "Emulated: a PC computed this in place of an NPU. No speed here is a board's."
        yield ""
    else:
        driver = f"driver {board.driver or 'unknown'}"
        yield f"* board: {_plain(', '.join(filter(None, [*named, f'kernel {board.kernel}', driver])))}"
    lora = ", adapter beside the model" if run.lora == "runtime" else ""
    cores = counted(run.cores, "NPU core")
    yield f"* model: {_plain(f'{result.model.name}: {run.type}, {cores}, context {run.context:,}{lora}')}"
    made = f"model file by toolkit {run.release}, rkedge {result.rkedge}"
    yield f"* {_plain(f'librkllmrt {board.library}, {made}')}"
    if not result.emulated:
        yield f"* clocks before: {_plain(_clocks(bench.before))}"
        if _clocks(bench.after) != _clocks(bench.before):
            yield f"* clocks after: {_plain(_clocks(bench.after))}"
        if bench.hottest is not None:
            yield f"* temperature: {_hottest(bench.before)} before, {bench.hottest:.0f} degrees at most"


def _clocks(moment: Moment) -> str:
    return ", ".join(f"{one.name} {mhz(one.now)} ({one.governor or 'unknown'})" for one in moment.clocks) or "not known"


def _hottest(moment: Moment) -> str:
    return f"{max(moment.temperatures.values()):.0f} degrees" if moment.temperatures else "unknown"


def _table(result: Result) -> Iterator[str]:
    bench = result.bench
    titles = [_plain(title) for title in (bench.plan_title, bench.vendor_title) if title]
    yield f"| {' | '.join(['model', 'size', 'params', 'runtime', 'test', 'measured', *titles])} |"
    yield f"| {' | '.join(['---', '---:', '---:', '---', '---', '---:', *['---:'] * len(titles)])} |"
    run = result.runs[0]
    runtime = f"{'emulated ' if result.emulated else 'RKLLM '}{result.board.library}"
    same = [
        _plain(f"{bench.family} {bench.size} {run.type}"), _scaled(bench.file_bytes, 1 << 30, "GiB", 1 << 20, "MiB"),
        _scaled(bench.parameters, 10**9, "B", 10**6, "M"), _plain(runtime),
    ]  # fmt: skip
    for line in bench.lines:
        others = [(bench.plan_title, line.plan), (bench.vendor_title, line.vendor)]
        expected = [_figure(value, line) for title, value in others if title]
        mark = _MARK if bench.changes and not line.problem else ""
        yield f"| {' | '.join([*same, _plain(line.test), _measured(line) + mark, *expected])} |"


def _scaled(number: int, large: int, unit: str, small: int, lesser: str) -> str:
    return f"{number / large:.2f} {unit}" if number >= large else f"{number / small:.2f} {lesser}"


def _measured(line: Line) -> str:
    if line.problem:
        return "not measured"
    digits = _DIGITS[line.unit]
    shown = f"{line.mean:.{digits}f}"
    return f"{shown} ± {line.deviation:.{digits}f} {line.unit}" if len(line.values) > 1 else f"{shown} {line.unit}"


def _figure(value: float | None, line: Line) -> str:
    return "-" if value is None else f"{value:.{_DIGITS[line.unit]}f} {line.unit}"


def _notes(result: Result) -> Iterator[str]:
    bench = result.bench
    problems = [f"{line.test} was not measured: {line.problem}." for line in bench.lines if line.problem]
    marked = [f"* {text}." for text in bench.changes]
    notes = [*_of_the_table(bench), *bench.notes, *problems]
    if bench.error:
        notes.append(f"It ended early: {bench.error}")
    elif not bench.complete:
        notes.append("It was stopped: the rest was not measured.")
    if marked:
        yield ""
        yield r"\* The board was not steady, so these are figures of this run only:"
        yield ""
        yield from map(_plain_note, marked)
    for note in notes:
        yield ""
        yield _plain(note)


def _of_the_table(bench: Bench) -> Sequence[str]:
    repeated = f"Mean and standard deviation of {counted(bench.repetitions, 'run')}."
    if not bench.plan_title:
        return [repeated]
    return [f"{repeated} What was expected is for clocks at their maximum."]


def _plain_note(text: str) -> str:
    return f"* {_plain(text[2:])}"


def _plain(text: str) -> str:
    """Return text from outside as one line, with Markdown's special characters escaped."""
    return "".join(f"\\{letter}" if letter in "\\`*[]<>|!#" else letter for letter in one_line(text))
