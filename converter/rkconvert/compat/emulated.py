"""What the emulator's model of NPU memory says: a file of the model's sizes, really loaded, and its log."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

from rkconvert.compat.case import Case
from rkconvert.compat.cells import Cell, Evidence, Level, Status
from rkconvert.emulated.model_file import write_sizes_only
from rkconvert.model.gemma import GemmaConfig, parse_config
from rkconvert.plan.prediction import nearest
from rkconvert.rules.quantized_types import accepted, cores
from rkconvert.tensors.shards import read_json
from rkruntime.abi import EMULATED
from rkruntime.checks.diagnosis import diagnose
from rkruntime.engine.engine import Engine
from rkruntime.engine.loading import LoadOptions
from rkruntime.engine.open import provided_library
from rkruntime.errors import CheckpointError, InputError, LoadError, RefusedError
from rkruntime.files import atomic_file
from rkruntime.folders import own_folder
from rkruntime.schema import build

_SOURCE: Final = "docs/emulator.md, NPU memory: rules that reported sizes imply; not measured on a board"
_SOC: Final = "rk3588"
_KEPT_LINES: Final = 12
# The class of a failure that is about NPU memory; any other one would be a fault of the file or of the emulator.
_NO_ROOM: Final = "npu-address-space-exhausted"


@dataclass(frozen=True)
class _Outcome:
    """Whether a file was loaded, what that showed, and if it failed the last lines of the log."""

    loads: bool
    says: str
    log: tuple[str, ...] = ()


class EmulatedLoads:
    """Loads of one model in the emulator. Their outcomes are kept in the user's cache folder.

    Args:
        progress: Called with lines while the emulator is built, and before each load.
    """

    def __init__(self, case: Case, progress: Callable[[str], None]) -> None:
        self._case = case
        self._progress = progress
        self._libraries: dict[str, Path] = {}

    @cached_property
    def _config(self) -> GemmaConfig | None:
        """The model's configuration; None if the emulator does not compute it."""
        try:
            return parse_config(self._case.source.config)
        except CheckpointError:
            return None

    def __call__(self, case: Case, cell: Cell) -> Iterator[Evidence]:
        """Load the cell's model, without an adapter.

        Raises:
            HostError: The emulator cannot be built here.
            LoadError: A load failed for another reason than lack of NPU memory.
        """
        if (
            self._config is None
            or cell.lora != "merged"
            or cell.soc != _SOC
            or not cell.type.startswith("w8a8")
            or cell.type not in accepted(cell.soc, cell.release)
            or cell.context > case.shape.max_position_embeddings
            or cell.cores > cores(_SOC, cell.release)
        ):
            return
        outcome = self._remembered(cell)
        if outcome is not None:
            status = Status.WORKS if outcome.loads else Status.FAILS
            release = nearest(EMULATED, cell.release)
            other = "" if release == cell.release else f" With the emulator of {release}."
            yield Evidence(status, Level.EMULATED, f"{outcome.says}{other}", _SOURCE, partial=True, log=outcome.log)

    def _remembered(self, cell: Cell) -> _Outcome | None:
        """Return the outcome of an earlier load of the same sizes in the same emulator, or load them now."""
        library = self._library(cell.release)
        key = "\0".join([str(library), self._case.digest, cell.type, str(cell.context), str(cell.cores)])
        path = own_folder("cache") / "compat" / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.json"
        with suppress(InputError):
            return build(_Outcome, read_json(path, InputError), InputError)
        outcome = self._load(library, cell)
        if outcome is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as partial:
                partial.write_text(json.dumps(asdict(outcome)), encoding="utf-8")
        return outcome

    def _library(self, release: str) -> Path:
        emulated = nearest(EMULATED, release)
        if emulated not in self._libraries:
            self._libraries[emulated] = provided_library("emulator", emulated, self._progress)
        return self._libraries[emulated]

    def _load(self, library: Path, cell: Cell) -> _Outcome | None:
        assert self._config is not None
        with tempfile.TemporaryDirectory(prefix="rkedge-compat-") as folder:
            model, state = Path(folder) / "sizes.rkemu", Path(folder) / "npu"
            try:
                write_sizes_only(model, self._config, cell.type, cell.context, cell.cores)
            except RefusedError:  # a group size that does not divide this model's rows
                return None
            self._progress(f"loading {cell.type} of {cell.release} in the emulator")
            options = LoadOptions(
                library,
                model,
                max_context=cell.context,
                environment={"RKEMU_NPU_STATE": str(state), "RKEMU_FAULT": "", "RKEMU_GUESS": "", "RKEMU_DRIVER": ""},
            )
            try:
                with Engine.load(options):
                    return _Outcome(True, _placed(state))
            except LoadError as error:
                diagnosis = diagnose("\n".join(error.log))
                if diagnosis.class_ != _NO_ROOM:
                    raise
                log = (line.replace(f"{folder}/", "") for line in error.log[-_KEPT_LINES:])
                return _Outcome(False, f"{diagnosis.title}.", tuple(log))


def _placed(state: Path) -> str:
    """Say how much lies in how many domains, from the emulator's record of NPU memory."""
    rows = [line.split() for line in state.read_text("utf-8").splitlines()[1:-1]]
    domains = {int(row[3]) for row in rows}
    held = sum(int(row[4]) for row in rows)
    return f"It loads: {held / 1e9:.1f} GB in {len(domains)} of 16 domains of NPU memory."
