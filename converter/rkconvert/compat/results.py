"""Results of runs on boards: files of the schema rkedge-compat/1, which anybody can add to configs/compat/.

A file may come from anybody, so everything in it is checked and bounded, and nothing in it is a path.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Final, Literal

from rkconvert.compat.case import Case
from rkconvert.compat.cells import Cell, Evidence, Level, LoraMode, Status
from rkconvert.tensors.shards import read_json
from rkruntime.errors import InputError, InvalidResultError
from rkruntime.files import atomic_file, read_error
from rkruntime.probes import QUESTIONS, is_harmful
from rkruntime.resources import resource
from rkruntime.schema import Between, Length, build

SCHEMA: Final = "rkedge-compat/1"
_MOST_BYTES: Final = 1 << 20
_MOST_FILES: Final = 1000
_MOST_RUNS: Final = 1000
_MOST_LINES: Final = 40
_MOST_PROBES: Final = 100
_LONGEST_NAME: Final = 200

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
    ram_gib: Annotated[float, Between(0, 4096)] = 0.0


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
    context: Annotated[int, Between(1, 1 << 20)]
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
    """A result file. `emulated`: the board was the emulator, so that nothing in it is a board's."""

    schema: Literal["rkedge-compat/1"]
    made: _Name
    rkedge: _Name
    emulated: bool
    model: ResultModel
    board: ResultBoard
    runs: tuple[Run, ...]


def read_result(path: Path) -> Result:
    """Read a file. Raises InvalidResultError if it is anything else."""

    def fail(what: str) -> InputError:
        return InvalidResultError(f"{path}: {what}.", hint="docs/compat.md describes these files.")

    result = build(Result, read_json(path, InvalidResultError, _MOST_BYTES), fail)
    if len(result.runs) > _MOST_RUNS or not all(map(_bounded, result.runs)):
        raise fail(
            f"it may have {_MOST_RUNS:,} runs, each with {_MOST_LINES} lines of log, {_MOST_PROBES} probes and clocks"
        )
    return result


def _bounded(run: Run) -> bool:
    return (
        len(run.log) <= _MOST_LINES
        and max(len(run.probes), len(run.clocks)) <= _MOST_PROBES
        and all(len(name) <= _LONGEST_NAME for name in run.clocks)
    )


def write_result(result: Result, path: Path) -> None:
    """Write a file that `read_result` reads. Raises OutputError or HostError if it cannot be written."""
    with atomic_file(path) as partial:
        partial.write_text(json.dumps(asdict(result), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def shipped_folder() -> Path:
    """Where the results that come with RKEdge are."""
    return resource("configs") / "compat"


class Results:
    """The results of several folders, read once."""

    def __init__(self, folders: Sequence[Path]) -> None:
        """Raises InvalidResultError for a file that is not a result, InputError for a folder that cannot be read."""
        self._found = [(path, read_result(path)) for folder in folders for path in _files(folder)]

    def __call__(self, case: Case, cell: Cell) -> Iterator[Evidence]:
        """Each run of this model in this cell."""
        for path, result in self._found:
            if result.model.digest != case.digest or result.board.soc != cell.soc:
                continue
            for run in result.runs:
                if _cell(result, run) == cell:
                    yield _evidence(path, result, run)


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
    return Cell(result.board.soc, run.release, run.type, run.cores, run.context, lora)


def _evidence(path: Path, result: Result, run: Run) -> Evidence:
    board = result.board
    level = Level.EMULATED if result.emulated else Level.BOARD
    speed = f" {run.tokens_per_s:.2f} tokens/s." if run.tokens_per_s else ""
    where = f"{path.name}: {board.name}, driver {board.driver}, runtime {board.library}, {result.made}"
    bad = [f"{probe.name} {probe.result}" for probe in run.probes if _is_harmful(probe)]
    probes = f" Probes: {', '.join(bad)}." if bad else ""
    return Evidence(Status(run.status), level, f"{run.says}{speed}{probes}", where, log=run.log)


def _is_harmful(probe: Probe) -> bool:
    """A name or a result that is not known is not shown."""
    return probe.name in QUESTIONS and is_harmful(probe.name, probe.result)
