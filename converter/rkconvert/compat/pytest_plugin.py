"""The options and fixtures of `pytest --pyargs rkconvert.compat -p rkconvert.compat.pytest_plugin --bundle BUNDLE`.

The plugin has to be named with -p: pytest reads no options from a package that --pyargs names, and an entry point
would be loaded in every run of pytest on the machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from rkconvert.compat.board import Visit, bundles_of
from rkconvert.compat.cells import Cell
from rkconvert.compat.tried import case_of, cell_of, written
from rkruntime.bundle.manifest import Bundle
from rkruntime.engine.open import PROVIDERS, RuntimeOptions, SamplingOptions
from rkruntime.errors import LibraryError, RKEdgeError
from rkruntime.model import Model, open_model
from rkruntime.printable import one_line
from rkruntime.probes import QUESTIONS
from rkruntime.remote import words_of_text
from rkruntime.visit.steps import LOAD, SELFTEST, SPEED, results

_BUNDLES = pytest.StashKey[list[Bundle]]()
_TRIED = pytest.StashKey[dict[Path, Any]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options."""
    group = parser.getgroup("rkedge", "RKEdge: bundles on boards")
    group.addoption("--bundle", action="append", default=[], metavar="DIR", help="a bundle, or a folder of bundles")
    group.addoption("--board", metavar="USER@HOST", help="try them on this board, over ssh; default: on this machine")
    group.addoption("--remote-command", default="rkedge", metavar="COMMAND", help="start rkedge on the board so")
    group.addoption("--library", metavar="PATH", help="load this librkllmrt.so, of the board or of this machine")
    group.addoption("--risky", action="store_true", help="also ask what is reported to have crashed a board")
    group.addoption("--results", type=Path, metavar="DIR", help="keep the board's result files in this folder")


def pytest_configure(config: pytest.Config) -> None:
    """Find the bundles, and prepare to keep their results: each bundle is tried once."""
    config.stash[_TRIED] = {}
    config.stash[_BUNDLES] = [] if config.option.help else _bundles(config)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Make a test for each bundle, or for each pair of a bundle and a probe."""
    if "bundle" not in metafunc.fixturenames:
        return
    bundles = metafunc.config.stash[_BUNDLES]
    metafunc.parametrize("bundle", bundles, ids=[_id(cell_of(bundle)) for bundle in bundles], scope="session")
    if "probe" in metafunc.fixturenames:
        metafunc.parametrize("probe", _probes(metafunc.config))


def _id(cell: Cell) -> str:
    return f"{cell.type}-{cell.soc}-{cell.release}-{cell.cores}-{cell.context}-{cell.lora}"


def _bundles(config: pytest.Config) -> list[Bundle]:
    found: list[Bundle] = []
    if not config.getoption("--bundle"):
        raise pytest.UsageError("say which bundle to try: --bundle DIR")
    for name in config.getoption("--bundle"):
        try:
            bundles = bundles_of(Path(name))
        except RKEdgeError as error:
            raise pytest.UsageError(one_line(error.message)) from error
        if not bundles:
            raise pytest.UsageError(f"{name} is neither a bundle nor a folder of bundles")
        found += bundles
    return found


def _probes(config: pytest.Config) -> list[str]:
    return [name for name, question in QUESTIONS.items() if config.getoption("--risky") or not question.risky]


@pytest.fixture
def tried(bundle: Bundle, request: pytest.FixtureRequest) -> Mapping[str, Any]:
    """The results of a bundle's steps, by name; what cannot be tried fails each test in the same words."""
    known = request.config.stash[_TRIED]
    if bundle.path not in known:
        try:
            known[bundle.path] = _try(bundle, request.config)
        except RKEdgeError as error:
            known[bundle.path] = error
    found = known[bundle.path]
    if isinstance(found, LibraryError) and bundle.manifest.target not in PROVIDERS:
        pytest.skip(f"{found.message} Name a board with --board, or run this on one.")
    if isinstance(found, RKEdgeError):
        pytest.fail(f"{found.message} {found.hint}", pytrace=False)
    return found  # type: ignore[no-any-return]


def _try(bundle: Bundle, config: pytest.Config) -> Mapping[str, Any]:
    steps = [LOAD, SPEED, SELFTEST, *_probes(config)]
    library, board = config.getoption("--library"), config.getoption("--board")
    if board is not None:
        program = words_of_text(config.getoption("--remote-command"), "--remote-command")
        journal = Visit(board, bundle, program, steps, ["--library", library] if library else [], _silent).results()
        folder: Path | None = config.getoption("--results")
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
            written(journal, bundle, case_of(bundle), folder)
        else:
            journal.forget()
        return journal.results

    def load() -> Model:
        options = RuntimeOptions(library=Path(library) if library else None)
        return open_model(bundle, options, SamplingOptions(temperature=0))

    return {step: result for step, result in results(load, steps) if result is not None}


def _silent(line: str) -> None:
    """Drop a line of progress: in a test nobody watches."""
