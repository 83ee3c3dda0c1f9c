"""Each package that rkedge can need, missing: the error names it and the command that installs it, in children too."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rkconvert.demo import adapter, checkpoint
from rkconvert.sources.gguf_file import GgufFile
from rkconvert.sources.gguf_model import GgufWeights
from rkruntime import cli
from rkruntime.errors import HostError

# The module to hide, what pip is to install for it, and a command that cannot do without.
NEEDS = {
    "rich": ("rkedge", "plan {checkpoint}"),
    "yaml": ("rkedge", "inspect {bundle}"),
    "numpy": ("rkedge", "convert {checkpoint} -o {tmp}/out"),
    "packaging": ("rkedge", "run {bundle} -p x"),
    "tokenizers": ("rkedge", "run {bundle} -p x"),
    "jinja2": ("rkedge", "chat {bundle}"),
    "threadpoolctl": ("rkedge", "merge {checkpoint} --lora {adapter} -o {tmp}/out"),
    "starlette": ("rkedge[serve]", "serve {bundle} --host 0.0.0.0 --port 0 --socket {tmp}/socket"),
    "uvicorn": ("rkedge[serve]", "serve {bundle} --host 0.0.0.0 --port 0 --socket {tmp}/socket"),
    "prometheus_client": ("rkedge[serve]", "serve {bundle} --host 0.0.0.0 --port 0 --socket {tmp}/socket"),
    "torch": ("rkedge[convert]", "calibrate {checkpoint} --targets model -o {tmp}/out.json"),
    "transformers": ("rkedge[convert]", "calibrate {checkpoint} --targets model -o {tmp}/out.json"),
    "huggingface_hub": ("rkedge[convert]", "convert owner/name -o {tmp}/out"),
    "rkboard": ("rkedge", "run {bundle} -p x"),
}


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "demo"
    assert cli.main(["convert", str(checkpoint()), "-q", "-o", str(folder)]) == 0
    return folder


@pytest.fixture
def without(tmp_path: Path, bundle: Path) -> Callable[[str, str], subprocess.CompletedProcess[str]]:
    """Runs a command in a process that finds, in the place of a module, one that is not there."""

    def run(module: str, line: str) -> subprocess.CompletedProcess[str]:
        (tmp_path / "hidden").mkdir()
        text = f"raise ModuleNotFoundError(\"No module named '{module}'\", name='{module}')\n"
        (tmp_path / "hidden" / f"{module}.py").write_text(text)
        names = {"checkpoint": checkpoint(), "adapter": adapter(), "bundle": bundle, "tmp": tmp_path}
        # A .pth file or an editable install puts its folders behind those of PYTHONPATH.
        environment = {**os.environ, "PYTHONPATH": str(tmp_path / "hidden"), "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "rkruntime.cli", *line.format(**names).split()]
        return subprocess.run(
            command, env=environment, input="Hi\n", capture_output=True, text=True, check=False, timeout=100
        )

    return run


@pytest.mark.parametrize("module", list(NEEDS))
def test_a_missing_package_is_one_command_away(
    module: str, without: Callable[[str, str], subprocess.CompletedProcess[str]]
) -> None:
    wanted, line = NEEDS[module]
    done = without(module, line)
    assert done.returncode == 5 or line.startswith("chat"), done.stderr
    assert "defect" not in done.stderr
    assert "Traceback" not in done.stderr
    found = re.search(
        r"-m pip install (?:--force-reinstall )?'?(rkedge(?:\[\w+\])?)'?(?:;|$)", done.stderr, re.MULTILINE
    )
    assert found, done.stderr
    assert found[1] == wanted


def test_gguf(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is imported for a file whose header is read already."""
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(HostError) as caught:
        GgufWeights([GgufFile(Path("model.gguf"), {}, {}, 0)], "gemma2")
    assert "pip install 'rkedge[convert]'" in caught.value.hint


def test_every_dependency_is_tried() -> None:
    """Of the others none can be missed: click is imported first of all, peft by no module of ours."""
    packages = {"yaml": "pyyaml", "prometheus_client": "prometheus-client", "huggingface_hub": "huggingface-hub"}
    declared = importlib.metadata.requires("rkedge") or []
    names = {re.match(r"[\w-]+", text)[0].lower() for text in declared if "extra == 'dev'" not in text}  # type: ignore[index]
    assert names - {packages.get(module, module) for module in [*NEEDS, "gguf"]} == {"click", "peft"}
