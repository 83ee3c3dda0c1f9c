"""What board/requirements.txt lists is enough for a board: everything else is blocked here."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rkruntime.engine import LoadOptions

ROOT = Path(__file__).parents[3]
BLOCK = """
import importlib, pkgutil, sys
from importlib.abc import MetaPathFinder
allowed = set(sys.argv.pop(1).split(","))

class OnlyListed(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in allowed:
            raise ModuleNotFoundError(f"{name} is not on a board", name=name)

sys.meta_path.insert(0, OnlyListed())
"""
MODULES = {"Jinja2": "jinja2", "MarkupSafe": "markupsafe", "PyYAML": "yaml", "prometheus-client": "prometheus_client"}


def listed() -> set[str]:
    lines = (ROOT / "board" / "requirements.txt").read_text().splitlines()
    names = [line.partition(">=")[0] for line in lines if line and not line.startswith("#")]
    return {MODULES.get(name, name.replace("-", "_")) for name in names}


def on_a_board(code: str, *words: str) -> subprocess.CompletedProcess[str]:
    allowed = listed() | {"rkruntime", "rkboard", "_yaml"} | set(sys.stdlib_module_names)
    command = [sys.executable, "-c", BLOCK + code, ",".join(sorted(allowed)), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)


def test_every_module_of_the_runtime_is_imported() -> None:
    done = on_a_board(
        """
import rkruntime
for module in pkgutil.walk_packages(rkruntime.__path__, "rkruntime."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
"""
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["numpy", "torch", "rich", "huggingface_hub", "transformers"])
def test_the_block_blocks(name: str) -> None:
    done = on_a_board(f"import {name}")
    assert f"{name} is not on a board" in done.stderr


def test_a_model_answers_and_arrays_are_a_clear_error(options: Callable[..., LoadOptions]) -> None:
    given = options("1.2.3")
    done = on_a_board(
        """
from pathlib import Path
from rkruntime.engine import Engine, LoadOptions
from rkruntime.errors import HostError
from rkruntime.generation import Request
library, model = map(Path, sys.argv[1:])
with Engine.load(LoadOptions(library=library, model=model, max_context=64)) as engine:
    print(len(list(engine.generate(Request([2, 106, 451], max_new_tokens=3)))))
    sys.modules["numpy"] = None  # as where it is not installed
    try:
        engine.hidden_states(Request([2, 106]))
    except HostError as error:
        print(error.message, error.hint)
""",
        str(given.library),
        str(given.model),
    )
    assert done.returncode == 0, done.stderr
    tokens, error = done.stdout.splitlines()
    assert tokens == "4"
    assert "need numpy" in error
    assert "pip install numpy" in error
