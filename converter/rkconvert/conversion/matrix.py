"""Several conversions from one recipe: every combination of what its `matrix` lists.

All are checked before the first starts, models are opened once, and one failure does not stop the others.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any, Final

from rkconvert.conversion.convert import Job, Options, check, identify, make
from rkconvert.conversion.opened import OpenedModels
from rkconvert.output.bundle_folder import read_report
from rkconvert.output.work_folder import forget_kill
from rkconvert.progress import Reporter
from rkconvert.toolkit.options import PATIENCE
from rkruntime.bundle.manifest import Bundle, open_bundle
from rkruntime.errors import OutputError, RefusedError, RKEdgeError, UsageError
from rkruntime.files import write_error

KEY: Final = "matrix"
_MAX_CELLS: Final = 1000

Fail = Callable[[str], Exception]


@dataclass(frozen=True)
class Cell:
    """One conversion: a label of what it varies, and its options."""

    label: str
    options: Options


@dataclass(frozen=True)
class CellResult:
    """Outcome of a cell.

    Attributes:
        status: `made`, `there` (made by an earlier run), `refused` or `failed`.
        message: Reason why it was refused or failed.
        exit_code: Exit code of that error, else 0.
    """

    cell: str
    output: str
    status: str
    nbytes: int = 0
    seconds: float = 0.0
    message: str = ""
    exit_code: int = 0


def combinations(matrix: Any, fail: Fail) -> list[dict[str, Any]]:
    """Return every combination of a mapping from keys to lists of values, or of each mapping in a list.

    Raises:
        The exception that `fail` returns, for any other form.
    """
    grids = matrix if isinstance(matrix, list) else [matrix]
    if not grids:
        raise fail(f"{KEY} is an empty list, so there is nothing to convert")
    found: list[dict[str, Any]] = []
    for grid in grids:
        if not isinstance(grid, Mapping) or not grid:
            raise fail(f"{KEY} is {type(grid).__name__}; it must be a mapping from keys to lists, or a list of them")
        for key, values in grid.items():
            if not isinstance(values, list) or not values:
                raise fail(f"{KEY}.{key} is {type(values).__name__}; it must be a list of values for {key}")
        found += [dict(zip(grid, values, strict=True)) for values in product(*grid.values())]
        if len(found) > _MAX_CELLS:
            raise fail(f"{KEY} asks for more than {_MAX_CELLS} conversions")
    return found


def label_of(combination: Mapping[str, Any]) -> str:
    """Return a label such as `dtype=w8a8 lora=pirate`, with only the names of folders."""
    return " ".join(f"{key}={_short(value)}" for key, value in combination.items())


def _short(value: Any) -> str:
    if isinstance(value, list):
        return "+".join(map(_short, value)) or "none"
    return str(value).rstrip("/").rpartition("/")[2]


def distinct(cells: Sequence[Cell]) -> list[Cell]:
    """Return the same cells, with their labels added to folder names that would otherwise be equal."""
    counts = Counter(cell.options.output for cell in cells)
    found = []
    for cell in cells:
        output = cell.options.output
        if counts[output] > 1:
            output = output.with_name(f"{output.name}-{cell.label.replace(' ', '-').replace('=', '-')}")
        found.append(replace(cell, options=replace(cell.options, output=output)))
    twice = [output for output, count in Counter(cell.options.output for cell in found).items() if count > 1]
    if twice:
        raise UsageError(f"Two conversions of the matrix are the same: both would write {twice[0]}.")
    _refuse_same((cell.label, _deciding(cell.options)) for cell in found)
    return found


def _refuse_twice(jobs: Sequence[tuple[str, Job]]) -> None:
    """Refuse conversions that are the same once defaults are filled in: the model's own context, all cores."""
    _refuse_same(
        (
            label,
            replace(
                _deciding(job.options),
                max_context=job.spec.max_context,
                npu_cores=job.spec.npu_cores,
                release=job.spec.release,
            ),
        )
        for label, job in jobs
    )


def _refuse_same(labelled: Iterable[tuple[str, Options]]) -> None:
    labels: dict[Options, str] = {}
    for label, options in labelled:
        if (other := labels.setdefault(options, label)) != label:
            raise UsageError(f"Two conversions of the matrix are the same: {other} and {label}.")


def _deciding(options: Options) -> Options:
    """Return the options that determine the bundle: not the output folder, the patience or --force-dtype."""
    return replace(options, output=Path(), force_dtype=False, toolkit_patience=PATIENCE)


@contextmanager
def folders(cells: Sequence[Cell]) -> Iterator[None]:
    """Create the folders that the bundles go into; those created here and left empty are removed."""
    made = []
    for folder in {cell.options.output.parent for cell in cells}:
        # One level only: a longer missing path is more likely a mistake, which each cell's check reports.
        if not folder.exists() and folder.parent.is_dir():
            try:
                folder.mkdir()
            except OSError as error:
                raise write_error(folder, error) from error
            made.append(folder)
    try:
        yield
    finally:
        for folder in made:
            with suppress(OSError):
                folder.rmdir()


def run(cells: Sequence[Cell], reporter: Reporter, after: Callable[[Cell, Bundle], None]) -> list[CellResult]:
    """Check all cells, then convert those that passed; returns outcomes in the order of the cells.

    Args:
        after: Called with each bundle, also with one of an earlier run, which may have been stopped just before this
            call. If it raises, that cell counts as failed.
    """
    opened = OpenedModels()
    checked = [(cell, _checked(cell, reporter, opened)) for cell in cells]
    _refuse_twice([(cell.label, found) for cell, found in checked if isinstance(found, Job)])
    for cell, found in checked:
        if isinstance(found, CellResult):
            reporter.note(f"{cell.label}: {found.status}: {found.message}")
        elif isinstance(found, Bundle):
            reporter.note(f"{cell.label}: there")
    outcomes = []
    for at, (cell, found) in enumerate(checked, 1):
        if isinstance(found, Job):
            reporter.note(f"{at} of {len(checked)}: {cell.label}")
        if not isinstance(found, CellResult):
            found = _finished(cell, found, reporter, opened, after)
        outcomes.append(found)
    return outcomes


def exit_code(outcomes: Sequence[CellResult]) -> int:
    """Return the exit code of the first cell that failed, else of the first that was refused, else 0."""
    ordered = sorted(outcomes, key=lambda outcome: outcome.status != "failed")
    return next((outcome.exit_code for outcome in ordered if outcome.exit_code), 0)


def _checked(cell: Cell, reporter: Reporter, opened: OpenedModels) -> Job | Bundle | CellResult:
    output = cell.options.output
    try:
        if output.is_dir():
            forget_kill(output)
            return _existing(cell, reporter, opened)
        return check(cell.options, reporter, opened)
    except RKEdgeError as error:
        return _failure(cell, error)
    except OSError as error:
        return _failure(cell, write_error(output, error))


def _existing(cell: Cell, reporter: Reporter, opened: OpenedModels) -> Bundle:
    """Return the bundle of an earlier run. Raises OutputError if it was made from something else than asked for now."""
    bundle = open_bundle(cell.options.output)
    bundle.verify()
    found, asked = read_report(bundle.path, "convert").get("made_of"), identify(cell.options, opened, reporter)
    if found != asked:
        other = next((key for key in asked if not isinstance(found, dict) or found.get(key) != asked[key]), "report")
        raise OutputError(
            f"{bundle.path} already exists but was made from something else: its {other.replace('_', ' ')} differ.",
            hint="Remove it, or name another output folder.",
        )
    return bundle


def _finished(
    cell: Cell, found: Job | Bundle, reporter: Reporter, opened: OpenedModels, after: Callable[[Cell, Bundle], None]
) -> CellResult:
    started, there = time.monotonic(), isinstance(found, Bundle)
    try:
        bundle = found if isinstance(found, Bundle) else make(found, reporter, opened)
        after(cell, bundle)
    except RKEdgeError as error:
        reporter.note(f"{cell.label}: failed: {error.message}")
        return _failure(cell, error)
    except OSError as error:
        return _failure(cell, write_error(cell.options.output, error))
    return _success(cell, bundle, "there" if there else "made", 0.0 if there else time.monotonic() - started)


def _success(cell: Cell, bundle: Bundle, status: str, seconds: float) -> CellResult:
    nbytes = sum(record.size for record in bundle.manifest.files.values())
    return CellResult(cell.label, str(bundle.path), status, nbytes, round(seconds, 3))


def _failure(cell: Cell, error: RKEdgeError) -> CellResult:
    status = "refused" if isinstance(error, RefusedError) else "failed"
    output: Path = cell.options.output
    return CellResult(cell.label, str(output), status, message=error.message, exit_code=error.exit_code)
