"""Results of runs on boards: files of the schema rkedge-compat/1, which anybody can add to configs/compat/.

A file may come from anybody, so everything in it is checked and bounded, and nothing in it is a path.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import date, timedelta
from itertools import chain
from pathlib import Path
from typing import Any, Final

from rkconvert.compat.case import Case
from rkconvert.compat.cells import AS_FAST, Cell, Evidence, Level, LoraMode, Status
from rkconvert.rules.quantized_types import known_types
from rkconvert.tensors.shards import read_json
from rkruntime.abi import CALLABLE
from rkruntime.checks.types import types_by_soc
from rkruntime.errors import InputError, InvalidResultError
from rkruntime.evidence import LONGEST_NAME, MOST_BYTES, Probe, Record, ResultBoard, Run
from rkruntime.files import atomic_file, read_error
from rkruntime.probes import FAILED, QUESTIONS, is_harmful
from rkruntime.resources import resource
from rkruntime.schema import build
from rkruntime.versions import Version, version
from rkruntime.words import counted

_MOST_FILES: Final = 1000
_MOST_RUNS: Final = 1000
_MOST_LINES: Final = 40
_MOST_PROBES: Final = 100
# Most notes on one file about runs that are in no cell; the rest is counted.
_MOST_NOTES: Final = 5
_ANSWERS: Final = (Status.WORKS.value, Status.SLOWER.value)
# The target of bundles made for the emulator, and the name of its board.
EMULATOR: Final = "emulator"
# Of the line that the emulator prints at each load.
_EMULATOR_S: Final = "emulator: no NPU is used"
_BAD_SELFTESTS: Final = ("template", "end", "garbage", "degraded", FAILED)
_SHA256: Final = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class Result(Record):
    """A result file; `bench` is the table of `rkedge bench`, which has more than the runs and is not read here."""

    bench: dict[str, Any] = field(default_factory=dict)


def read_result(path: Path) -> Result:
    """Read a result file. Raises InvalidResultError if it is not one."""
    return _result(path, read_json(path, InvalidResultError, MOST_BYTES))


def _result(path: Path, data: Mapping[str, Any]) -> Result:
    def fail(what: str) -> InputError:
        return InvalidResultError(f"{path}: {what}.", hint="docs/compat.md describes these files.")

    result = build(Result, data, fail)
    if len(result.runs) > _MOST_RUNS or not all(map(_bounded, result.runs)):
        raise fail(
            f"it may have {_MOST_RUNS:,} runs, each with {_MOST_LINES} lines of log, {_MOST_PROBES} probes and clocks"
        )
    if wrong := next(chain(_misnamed(result), _contradictions(result)), ""):
        raise fail(wrong)
    return result


def _bounded(run: Run) -> bool:
    return (
        len(run.log) <= _MOST_LINES
        and max(len(run.probes), len(run.clocks)) <= _MOST_PROBES
        and all(len(name) <= LONGEST_NAME for name in run.clocks)
    )


def _misnamed(result: Result) -> Iterator[str]:
    """Yield values that no cell has, most likely typing errors: such a run would be silently passed over."""
    socs = types_by_soc()[0]
    if result.board.soc not in socs:
        yield f"board.soc is {result.board.soc!r}; there are {', '.join(socs)}"
    if result.board.library and release_of(result.board.library) is None:
        yield f"board.library is {result.board.library!r}; it must be a release such as 1.2.3, or empty"
    for number, run in enumerate(result.runs):
        if run.type not in known_types():
            yield f"runs[{number}].type is {run.type!r}; there are {', '.join(known_types())}"
        if release_of(run.release) is None:
            yield f"runs[{number}].release is {run.release!r}; it must be a release such as 1.2.3"


def _contradictions(result: Result) -> Iterator[str]:
    """What shows that a file is not what it says: edited by hand, or a PC's."""
    try:
        early = date.fromisoformat(result.made) <= date.today() + timedelta(days=1)  # of another time zone
    except ValueError:
        yield f"made is {result.made!r}; it must be a date such as 2026-01-31"
    else:
        if not early:
            yield f"made is {result.made}, which is yet to come"
    emulated = result.board.name == EMULATOR or any(_EMULATOR_S in line for run in result.runs for line in run.log)
    if emulated and not result.emulated:
        yield '"emulated" is false, but its board or its log is the emulator\'s'
    for number, run in enumerate(result.runs):
        answered = run.tokens_per_s or run.first_token_ms or run.selftest or any(item.result for item in run.probes)
        if answered and not Status(run.status).loads:
            yield f"runs[{number}].status is {run.status!r}, but the run has answers or their speed"
        if run.status in _ANSWERS and run.selftest in _BAD_SELFTESTS:
            yield f"runs[{number}].status is {run.status!r}, but its selftest is {run.selftest!r}"
        if run.file_sha256 and not _SHA256.fullmatch(run.file_sha256):
            yield f"runs[{number}].file_sha256 is {run.file_sha256[:80]!r}; it must have 64 hexadecimal digits"


def release_of(text: str) -> Version | None:
    """Return the release that a text begins with, or None."""
    try:
        return version(text)
    except ValueError:
        return None


def write_result(result: Result, path: Path) -> None:
    """Write a file that `read_result` reads.

    Raises:
        InvalidResultError: `read_result` would refuse it; nothing is written.
        OutputError, HostError: The file cannot be written.
    """
    text = json.dumps(asdict(result), indent=1, ensure_ascii=False)
    _result(path, json.loads(text))
    with atomic_file(path) as partial:
        partial.write_text(text + "\n", encoding="utf-8")


def shipped_folder() -> Path:
    """Return the folder of the results that come with RKEdge."""
    return resource("configs") / "compat"


class Results:
    """The results of several folders, read once."""

    def __init__(self, folders: Sequence[Path]) -> None:
        """Read every file. Raises InvalidResultError for one that is not a result, or a folder that cannot be read."""
        self._found = [(path, read_result(path)) for folder in folders for path in _files(folder)]
        # The fastest run of any type, of the same model on the same board, in otherwise equal cells.
        self._fastest: dict[tuple[str, ResultBoard, Cell], Run] = {}
        for _, result in self._found:
            for run in result.runs if not result.emulated else ():
                best = self._fastest.get(_beside(result, run))
                if run.status in _ANSWERS and (best is None or run.tokens_per_s > best.tokens_per_s):
                    self._fastest[_beside(result, run)] = run

    def __call__(self, case: Case, cell: Cell) -> Iterator[Evidence]:
        """Yield evidence for each run of this model in this cell."""
        for path, result in self._found:
            if result.model.digest != case.digest or result.board.soc != cell.soc:
                continue
            for run in result.runs:
                if _cell(result, run) == cell and not _mixed(result, run):
                    yield _evidence(path, result, run, self._fastest.get(_beside(result, run)))

    def left_out(
        self, case: Case, cells: Collection[Cell], named: Mapping[str, Collection[Any]] | None = None
    ) -> Iterator[str]:
        """Yield notes on results that are in none of these cells of the model, for the user who named the folders.

        Args:
            named: Values that the user asked for, by field of Cell: runs with other values are not missed.
        """
        for path, result in self._found:
            if result.model.digest != case.digest:
                yield f"{path.name} is about another model: {result.model.name}, digest {result.model.digest}"
                continue
            if mixed := sum(_mixed(result, run) for run in result.runs):
                yield (
                    f"{path.name}: {counted(mixed, 'run')} with another release of the runtime than of the toolkit;"
                    " a cell is about one release of both"
                )
            known = {cell.asked for cell in cells}
            every = dict.fromkeys(_cell(result, run) for run in result.runs if not _mixed(result, run))
            missed = (
                cell for cell in every if all(getattr(cell, name) in values for name, values in (named or {}).items())
            )
            others = [cell.asked for cell in missed if cell.asked not in known]
            for words in others[:_MOST_NOTES]:
                yield f"{path.name} has a run that is in no cell which is asked for: that would be {words}"
            if len(others) > _MOST_NOTES:
                yield f"{path.name} has {len(others) - _MOST_NOTES:,} more of these"


def _files(folder: Path) -> list[Path]:
    try:
        found = sorted(path for path in folder.iterdir() if path.suffix == ".json")
    except OSError as error:
        raise read_error(folder, error, InvalidResultError) from error
    if len(found) > _MOST_FILES:
        raise InvalidResultError(f"{folder} has {len(found):,} results; the limit is {_MOST_FILES:,}.")
    return found


def _cell(result: Result, run: Run) -> Cell:
    lora: LoraMode = run.lora
    return Cell(result.board.soc, _usual(run.release), run.type, run.cores, run.context, lora)


def _beside(result: Result, run: Run) -> tuple[str, ResultBoard, Cell]:
    """Return what runs must have in common for their speeds to be comparable."""
    return result.model.digest, result.board, replace(_cell(result, run), type="")


def _usual(release: str) -> str:
    """Return a release as RKEdge writes it: 1.2.3 for 1.2.3.0."""
    return next((known for known in CALLABLE if version(known) == release_of(release)), release)


def _mixed(result: Result, run: Run) -> bool:
    """Whether the runtime is known to be of another release than the toolkit that made the file."""
    library = result.board.library
    return bool(library) and release_of(library) != release_of(run.release)


def _evidence(path: Path, result: Result, run: Run, fastest: Run | None) -> Evidence:
    """Return a run as evidence; one that works counts as slower beside a much faster one."""
    level, status = Level.EMULATED if result.emulated else Level.BOARD, Status(run.status)
    speed = f" {run.tokens_per_s:.2f} tokens/s." if run.tokens_per_s else ""
    if status is Status.WORKS and fastest and 0 < run.tokens_per_s < AS_FAST * fastest.tokens_per_s:
        status = Status.SLOWER
        speed = f"{speed[:-1]}, against {fastest.tokens_per_s:.2f} with {fastest.type} on this board."
    bad = [f"{probe.name} {probe.result}" for probe in run.probes if _is_harmful(probe)]
    probes = f" Probes: {', '.join(bad)}." if bad else ""
    # The emulator knows nothing of a board's RAM and speed: that it loads a model is half an answer.
    says = f"{run.says}{speed}{probes}"
    return Evidence(status, level, says, _where(path, result), partial=result.emulated, log=run.log)


def _where(path: Path, result: Result) -> str:
    board = result.board
    ram = f"{board.ram_gib:g} GiB" if board.ram_gib else ""
    named = (("", board.name), ("", ram), ("driver ", board.driver), ("runtime ", board.library), ("", result.made))
    return f"{path.name}: {', '.join(f'{what}{value}' for what, value in named if value)}"


def _is_harmful(probe: Probe) -> bool:
    """Whether a probe's result makes answers worse; unknown probes are ignored."""
    return probe.name in QUESTIONS and is_harmful(probe.name, probe.result)
