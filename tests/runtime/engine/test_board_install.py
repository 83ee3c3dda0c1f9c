"""What board/requirements.txt lists is enough for a board: everything else is blocked here."""

from __future__ import annotations

import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from rkruntime import cli
from rkruntime.engine.engine import LoadOptions
from rkruntime.errors import HostError

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
MODULES = {
    "Jinja2": "jinja2",
    "markdown-it-py": "markdown_it",
    "MarkupSafe": "markupsafe",
    "PyYAML": "yaml",
    "prometheus-client": "prometheus_client",
}


def listed() -> set[str]:
    lines = (ROOT / "board" / "requirements.txt").read_text().splitlines()
    names = [line.partition(">=")[0] for line in lines if line and not line.startswith("#")]
    return {MODULES.get(name, name.replace("-", "_")) for name in names}


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_the_list_has_what_its_packages_ask_for_themselves(python: str) -> None:
    """They are installed with --no-deps. Only what tokenizers asks for is left out, which is what that is for."""
    environment = {"python_version": python, "python_full_version": f"{python}.0", "extra": ""}
    lines = (ROOT / "board" / "requirements.txt").read_text().splitlines()
    wanted = [Requirement(line) for line in lines if line and not line.startswith("#")]
    names = {canonicalize_name(one.name) for one in wanted if not one.marker or one.marker.evaluate(environment)}
    for name in names - {"tokenizers", "exceptiongroup"}:
        for text in importlib.metadata.requires(name) or []:
            asked = Requirement(text)
            if not asked.marker or asked.marker.evaluate(environment):
                assert canonicalize_name(asked.name) in names, (name, text)
    own = [Requirement(text) for text in importlib.metadata.requires("rkedge") or [] if "extra" not in text]
    assert {canonicalize_name(one.name) for one in own} - names == {"rich", "numpy", "threadpoolctl"}


def on_a_board(code: str, *words: str) -> subprocess.CompletedProcess[str]:
    allowed = listed() | {"rkruntime", "rkboard", "rkconvert", "_yaml"} | set(sys.stdlib_module_names)
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
from rkruntime.engine.engine import Engine, LoadOptions
from rkruntime.errors import HostError
from rkruntime.engine.generation import Request
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


# Each command with words that take it as far as it goes without a model, a board or a network.
LINES = {
    "demo": ["demo", "{tmp}/demo"],
    "plan": ["plan", "{tmp}/none"],
    "compat": ["compat", "{tmp}/none"],
    "convert": ["convert", "{tmp}/none"],
    "merge": ["merge", "{tmp}/none", "--lora", "{tmp}/none", "-o", "{tmp}/out"],
    "calibrate": ["calibrate", "{tmp}/none", "-o", "{tmp}/out.json"],
    "push": ["push", "{tmp}/none", "owner/name"],
    "toolkit": ["toolkit", "info"],
    "up": ["up", "{tmp}/none"],
    "down": ["down"],
    "list": ["list"],
    "rm": ["rm", "{tmp}/none"],
    "help": ["help", "run"],
    "chat": ["chat", "{tmp}/none"],
    "run": ["run", "{tmp}/none", "-p", "x"],
    "diagnose": ["diagnose", "{tmp}/none"],
    "emulator": ["emulator", "info"],
    "doctor": ["doctor", "--root", "{tmp}"],
    "deploy": ["deploy", "{tmp}/none", "board.invalid"],
    "rollback": ["rollback", "board.invalid", "--yes"],
    "undeploy": ["undeploy", "board.invalid", "--yes"],
    "status": ["status", "board.invalid"],
    "logs": ["logs", "board.invalid"],
    "fleet": ["fleet", "status", "{tmp}/none"],
    "top": ["top", "--root", "{tmp}", "--once"],
    "bench": ["bench", "{tmp}/none"],
    "clocks": ["clocks", "--root", "{tmp}"],
    "serve": ["serve", "--config", "{tmp}/none"],
    "attach": ["attach", "--socket", "{tmp}/socket"],
    "firstrun": ["firstrun", "{tmp}/none"],
    "visit": ["visit", "open", "none"],
    "inspect": ["inspect", "{tmp}/none"],
}


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_a_missing_package_is_named_with_the_command_that_installs_it(name: str, tmp_path: Path) -> None:
    done = on_a_board(
        """
from rkruntime.cli import main
helped = main([sys.argv[1], "--help"])
done = main(sys.argv[1:])
print("exit", helped, done)
""",
        *(word.format(tmp=tmp_path) for word in LINES[name]),
    )
    helped, ended = map(int, done.stdout.splitlines()[-1].split()[1:])
    assert "defect" not in done.stderr
    assert "Traceback" not in done.stderr
    missing = [line for line in done.stderr.splitlines() if line.endswith("is not installed.")]
    commands = re.findall(r"-m pip install .*(?:rich|numpy)[^ ]*'(?: |$)", done.stderr, re.MULTILINE)
    assert len(commands) == len(missing)
    assert helped == 0 or (helped == HostError.exit_code and missing)
    assert ended == HostError.exit_code or not missing or ended == 0
