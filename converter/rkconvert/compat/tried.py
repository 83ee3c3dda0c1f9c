"""What a visit has shown, as a result file of the schema that configs/compat has."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rkconvert.compat.board import is_emulated
from rkconvert.compat.case import CONFIG_REPORT, Case
from rkconvert.compat.cells import Cell, Status
from rkconvert.compat.journal import Journal
from rkconvert.compat.results import EMULATOR, Result, write_result
from rkconvert.output.bundle_folder import REPORT, read_report
from rkconvert.plan.source import ModelSource, read_source
from rkruntime.bundle.manifest import Bundle
from rkruntime.errors import BundleError, UsageError
from rkruntime.evidence import SCHEMA, Probe, ResultBoard, ResultModel, Run
from rkruntime.printable import one_line
from rkruntime.probes import QUESTIONS
from rkruntime.visit.steps import LOAD, SELFTEST, SPEED


def case_of(bundle: Bundle, model: str | None = None, revision: str | None = None) -> Case:
    """Return the model of a bundle, by the bundle's own record or by what `model` names.

    Raises:
        BundleError: The bundle has no such record, and `model` is None.
        UsageError: The bundle is not of that model.
        CheckpointError, HostError: The model cannot be read.
    """
    made = bundle.manifest
    if model is None:
        config = read_report(bundle.path, CONFIG_REPORT)
        if not config:
            raise BundleError(
                f"{bundle.path} does not say which model it is of: {REPORT}/{CONFIG_REPORT}.json is missing.",
                hint="Name its checkpoint, and the bundle with --bundle; or convert it again.",
            )
        return Case.of(ModelSource(made.source.name, config))
    case = Case.of(read_source(model, revision))
    if case.shape.parameters != made.parameters:
        raise UsageError(
            f"{bundle.path} has {made.parameters:,} weights; {model} has {case.shape.parameters:,}.",
            hint="Name the checkpoint that the bundle was made from.",
        )
    return case


def cell_of(bundle: Bundle) -> Cell:
    """Return the cell that a bundle was made for."""
    made = bundle.manifest
    lora = "runtime" if bundle.lora else "merged"
    return Cell(made.platform, made.toolkit_version, made.dtype, made.npu_cores, made.max_context, lora)  # type: ignore[arg-type]


def result_of(journal: Journal, bundle: Bundle, case: Case) -> Result:
    """Return the result of a finished visit. An emulated one has no speed and no memory: they would be a PC's."""
    load = journal.results[LOAD]
    emulated = is_emulated(load, bundle)
    return Result(
        schema=SCHEMA,
        made=date.today().isoformat(),
        rkedge=version("rkedge"),
        emulated=emulated,
        model=ResultModel(one_line(case.source.name)[:200], case.digest),
        board=_board(load, bundle, emulated=emulated),
        runs=(_run(journal.results, bundle, emulated=emulated),),
    )


def _board(load: Mapping[str, Any], bundle: Bundle, *, emulated: bool) -> ResultBoard:
    return ResultBoard(
        name=EMULATOR if emulated else load.get("board", ""),
        soc=bundle.manifest.platform,  # a board with another SoC has no result, and some do not name theirs
        kernel=load.get("kernel", ""),
        driver=load.get("driver") or load.get("driver_seen", ""),
        library=load.get("library", ""),
        ram_gib=0.0 if emulated else float(load.get("ram_gib", 0)),
    )


def _run(results: Mapping[str, Any], bundle: Bundle, *, emulated: bool) -> Run:
    made, load = bundle.manifest, results[LOAD]
    speed, selftest = ({} if emulated else results.get(SPEED, {})), results.get(SELFTEST, {})
    cell = cell_of(bundle)
    status = Status.WORKS if load["loads"] else Status.FAILS
    if load["loads"] and selftest.get("right") is False:
        status = Status.WRONG
    says = " ".join(filter(None, [load["says"], selftest.get("says", "")]))
    return Run(
        type=cell.type,
        release=cell.release,
        cores=cell.cores,
        context=int(load.get("context") or cell.context),
        lora=cell.lora,
        status=status.value,  # type: ignore[arg-type]
        says=says[:500],
        log=tuple(load.get("log", ())),
        tokens_per_s=float(speed.get("tokens_per_s", 0)),
        first_token_ms=float(speed.get("first_token_ms", 0)),
        memory_mb=float(speed.get("memory_mb", 0)),
        file_sha256=made.files[made.model_file].sha256,
        selftest=selftest.get("result", ""),
        probes=tuple(
            Probe(name, found.get("result", ""), found["says"]) for name, found in results.items() if name in QUESTIONS
        ),
        clocks=dict(speed.get("clocks", {})),
    )


def file_name(journal: Journal, bundle: Bundle) -> str:
    """Return the result's file name: the same for the same visit, so that one cut off while writing leaves one file."""
    made = bundle.manifest
    return f"{made.family}-{made.size}-{made.platform}-{made.dtype}-{made.toolkit_version}-{journal.id}.json"


def written(journal: Journal, bundle: Bundle, case: Case, folder: Path) -> Path:
    """Write the result, and forget the visit. Raises OutputError or HostError if it cannot be written."""
    path = folder / file_name(journal, bundle)
    write_result(result_of(journal, bundle, case), path)
    journal.forget()
    return path
