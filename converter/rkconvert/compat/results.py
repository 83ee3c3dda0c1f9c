"""Results of runs on boards: files of the schema rkedge-compat/1, which anybody can add to configs/compat/.

A file may come from anybody, so everything in it is checked and bounded, and nothing in it is a path.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from rkconvert.compat.case import Case
from rkconvert.compat.cells import Cell, Evidence, Level, LoraMode, Status
from rkconvert.tensors.shards import read_json
from rkruntime.errors import InputError, InvalidResultError
from rkruntime.files import read_error
from rkruntime.resources import resource
from rkruntime.schema import Between, Length, build

SCHEMA: Final = "rkedge-compat/1"
_MOST_BYTES: Final = 1 << 20
_MOST_FILES: Final = 1000
_MOST_RUNS: Final = 1000
_MOST_LINES: Final = 40

_Name = Annotated[str, Length(200)]
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
class Run:
    """One cell that was tried.

    Attributes:
        release: Of the toolkit that made the file.
        status: As in `Status`.
        says: What happened, in a sentence.
        tokens_per_s, first_token_ms, memory_mb: 0 if not measured; memory in MiB.
        file_sha256: Of the model file.
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

    def fail(what: str) -> InputError:
        return InvalidResultError(f"{path}: {what}.", hint="docs/compat.md describes these files.")

    result = build(Result, read_json(path, InvalidResultError, _MOST_BYTES), fail)
    if len(result.runs) > _MOST_RUNS or any(len(run.log) > _MOST_LINES for run in result.runs):
        raise fail(f"it may have {_MOST_RUNS:,} runs, each with {_MOST_LINES} lines of log")
    return result


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
    return Evidence(Status(run.status), level, f"{run.says}{speed}", where, log=run.log)
