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
from typing import Annotated, Any, Final, Literal

from rkconvert.compat.case import MOST_CONTEXT, Case
from rkconvert.compat.cells import AS_FAST, Cell, Evidence, Level, LoraMode, Status
from rkconvert.rules.quantized_types import known_types
from rkconvert.tensors.shards import read_json
from rkruntime.abi import CALLABLE
from rkruntime.checks.types import types_by_soc
from rkruntime.errors import InputError, InvalidResultError
from rkruntime.files import atomic_file, read_error
from rkruntime.probes import FAILED, QUESTIONS, is_harmful
from rkruntime.resources import resource
from rkruntime.schema import Between, Length, build
from rkruntime.versions import Version, version
from rkruntime.words import counted

SCHEMA: Final = "rkedge-compat/1"
_MOST_BYTES: Final = 1 << 20
_MOST_FILES: Final = 1000
_MOST_RUNS: Final = 1000
_MOST_LINES: Final = 40
_MOST_PROBES: Final = 100
_LONGEST_NAME: Final = 200
# Of one file, about runs that are in no cell.
_MOST_NOTES: Final = 5
_ANSWERS: Final = (Status.WORKS.value, Status.SLOWER.value)
MOST_RAM_GIB: Final = 4096
# The target of bundles for a stand-in, and the name of the board that is none.
EMULATOR: Final = "emulator"
# Of the line that the emulator prints at each load.
_EMULATOR_S: Final = "emulator: no NPU is used"
_BAD_SELFTESTS: Final = ("template", "end", "garbage", "degraded", FAILED)
_SHA256: Final = re.compile(r"[0-9a-f]{64}")

_Name = Annotated[str, Length(_LONGEST_NAME)]
_Line = Annotated[str, Length(500)]
_Count = Annotated[int, Between(0, 1 << 40)]
_Figure = Annotated[float, Between(0, 1e12)]


@dataclass(frozen=True)
class ResultModel:
    """The model: `digest` is Case.digest, which knows it by its shape."""

    name: _Name
    digest: _Name


@dataclass(frozen=True)
class ResultBoard:
    """The board as it was during the run."""

    name: _Name
    soc: _Name
    kernel: _Name
    driver: _Name
    library: _Name
    ram_gib: Annotated[float, Between(0, MOST_RAM_GIB)] = 0.0


@dataclass(frozen=True)
class Probe:
    """What the library did when it was asked one of `rkruntime.probes.QUESTIONS`; empty if that was not decided."""

    name: _Name
    result: _Name
    says: _Line


@dataclass(frozen=True)
class Run:
    """One cell that was tried.

    Attributes:
        release: Of the toolkit that made the file.
        status: As in `Status`.
        says: What happened, in a sentence.
        tokens_per_s, first_token_ms, memory_mb: 0 if not measured; memory in MiB.
        file_sha256: Of the model file.
        selftest: The verdict of the bundle's self-test.
        clocks: In Hz, during a run, by the device's or the CPU policy's name.
    """

    type: _Name
    release: _Name
    cores: Annotated[int, Between(1, 16)]
    context: Annotated[int, Between(1, MOST_CONTEXT)]
    lora: Literal["merged", "runtime"]
    status: Literal["works", "works but slower", "refused by the toolkit", "fails at load", "wrong answers"]
    says: _Line
    log: tuple[_Line, ...] = ()
    tokens_per_s: _Figure = 0.0
    first_token_ms: _Figure = 0.0
    memory_mb: _Figure = 0.0
    file_sha256: _Name = ""
    selftest: _Name = ""
    probes: tuple[Probe, ...] = ()
    clocks: dict[str, _Count] = field(default_factory=dict)


@dataclass(frozen=True)
class Result:
    """A result file.

    Attributes:
        emulated: The board was the emulator, so that nothing in it is a board's.
        bench: The table of `rkedge bench`, which has more than the runs; nothing here reads it.
    """

    schema: Literal["rkedge-compat/1"]
    made: _Name
    rkedge: _Name
    emulated: bool
    model: ResultModel
    board: ResultBoard
    runs: tuple[Run, ...]
    bench: dict[str, Any] = field(default_factory=dict)


def read_result(path: Path) -> Result:
    """Read a file. Raises InvalidResultError if it is anything else."""
    return _result(path, read_json(path, InvalidResultError, _MOST_BYTES))


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
        and all(len(name) <= _LONGEST_NAME for name in run.clocks)
    )


def _misnamed(result: Result) -> Iterator[str]:
    """What no cell has, so that it would be passed over: a typing error, most likely."""
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
    """The release that a text begins with; None if it begins with none."""
    try:
        return version(text)
    except ValueError:
        return None


def write_result(result: Result, path: Path) -> None:
    """Write a file that `read_result` reads.

    Raises:
        InvalidResultError: It would not; nothing is written.
        OutputError, HostError: It cannot be written.
    """
    text = json.dumps(asdict(result), indent=1, ensure_ascii=False)
    _result(path, json.loads(text))
    with atomic_file(path) as partial:
        partial.write_text(text + "\n", encoding="utf-8")


def shipped_folder() -> Path:
    """Where the results that come with RKEdge are."""
    return resource("configs") / "compat"


class Results:
    """The results of several folders, read once."""

    def __init__(self, folders: Sequence[Path]) -> None:
        """Raises InvalidResultError for a file that is not a result, InputError for a folder that cannot be read."""
        self._found = [(path, read_result(path)) for folder in folders for path in _files(folder)]
        # The fastest run of any type, of the same model on the same board, in cells that are else the same.
        self._fastest: dict[tuple[str, ResultBoard, Cell], Run] = {}
        for _, result in self._found:
            for run in result.runs if not result.emulated else ():
                best = self._fastest.get(_beside(result, run))
                if run.status in _ANSWERS and (best is None or run.tokens_per_s > best.tokens_per_s):
                    self._fastest[_beside(result, run)] = run

    def __call__(self, case: Case, cell: Cell) -> Iterator[Evidence]:
        """Each run of this model in this cell."""
        for path, result in self._found:
            if result.model.digest != case.digest or result.board.soc != cell.soc:
                continue
            for run in result.runs:
                if _cell(result, run) == cell and not _mixed(result, run):
                    yield _evidence(path, result, run, self._fastest.get(_beside(result, run)))

    def left_out(
        self, case: Case, cells: Collection[Cell], named: Mapping[str, Collection[Any]] | None = None
    ) -> Iterator[str]:
        """What is in none of these cells of the model, for a person who named these folders.

        Args:
            named: Values that person asked for, by the field of Cell: nobody misses a run that has another one.
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
    """What runs have in common whose speeds can be compared."""
    return result.model.digest, result.board, replace(_cell(result, run), type="")


def _usual(release: str) -> str:
    """A release as RKEdge writes it: 1.2.3 for 1.2.3.0."""
    return next((known for known in CALLABLE if version(known) == release_of(release)), release)


def _mixed(result: Result, run: Run) -> bool:
    """Whether the runtime is known to be of another release than the toolkit that made the file."""
    library = result.board.library
    return bool(library) and release_of(library) != release_of(run.release)


def _evidence(path: Path, result: Result, run: Run, fastest: Run | None) -> Evidence:
    """A run that only works is slower beside a faster one."""
    level, status = Level.EMULATED if result.emulated else Level.BOARD, Status(run.status)
    speed = f" {run.tokens_per_s:.2f} tokens/s." if run.tokens_per_s else ""
    if status is Status.WORKS and fastest and 0 < run.tokens_per_s < AS_FAST * fastest.tokens_per_s:
        status = Status.SLOWER
        speed = f"{speed[:-1]}, against {fastest.tokens_per_s:.2f} with {fastest.type} on this board."
    bad = [f"{probe.name} {probe.result}" for probe in run.probes if _is_harmful(probe)]
    probes = f" Probes: {', '.join(bad)}." if bad else ""
    # The emulator knows nothing of a board's RAM and speed: that it loads a model is half of an answer.
    says = f"{run.says}{speed}{probes}"
    return Evidence(status, level, says, _where(path, result), partial=result.emulated, log=run.log)


def _where(path: Path, result: Result) -> str:
    board = result.board
    ram = f"{board.ram_gib:g} GiB" if board.ram_gib else ""
    named = (("", board.name), ("", ram), ("driver ", board.driver), ("runtime ", board.library), ("", result.made))
    return f"{path.name}: {', '.join(f'{what}{value}' for what, value in named if value)}"


def _is_harmful(probe: Probe) -> bool:
    """A name or a result that is not known is not shown."""
    return probe.name in QUESTIONS and is_harmful(probe.name, probe.result)
