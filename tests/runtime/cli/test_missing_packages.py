"""Each package that rkedge can need, missing: the error names it and the command that installs it, in children too."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shlex
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
from rkruntime.packages import import_failed, install

# The module to hide, what pip is to install for it, and a command that cannot do without.
NEEDS = {
    "rich": ("rich", "plan {checkpoint}"),
    "yaml": ("PyYAML", "inspect {bundle}"),
    "numpy": ("numpy", "convert {checkpoint} -o {tmp}/out"),
    "packaging": ("packaging", "run {bundle} -p x"),
    "tokenizers": ("tokenizers", "run {bundle} -p x"),
    "jinja2": ("Jinja2", "chat {bundle}"),
    "threadpoolctl": ("threadpoolctl", "merge {checkpoint} --lora {adapter} -o {tmp}/out"),
    "starlette": ("starlette", "serve {bundle} --host 0.0.0.0 --port 0 --socket {tmp}/socket"),
    "uvicorn": ("uvicorn", "serve {bundle} --host 0.0.0.0 --port 0 --socket {tmp}/socket"),
    "prometheus_client": ("prometheus-client", "serve {bundle} --host 0.0.0.0 --port 0 --socket {tmp}/socket"),
    "torch": ("torch==2.13.0", "calibrate {checkpoint} --targets model -o {tmp}/out.json"),
    "transformers": ("transformers", "calibrate {checkpoint} --targets model -o {tmp}/out.json"),
    "huggingface_hub": ("huggingface_hub", "convert owner/name -o {tmp}/out"),
    "rkboard": ("--force-reinstall", "run {bundle} -p x"),
}


def canonical(package: str) -> str:
    return re.sub("[-_]+", "-", package).lower()


def assert_no_package_of_ours(text: str) -> None:
    assert re.findall(r"pip install [^\n`]*(?<![\w./-])rkedge(?![\w./*-])[^\n`]*", text) == []


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
    found = re.search(r"-m pip install '?([\w.=-]+)", done.stderr)
    assert found, done.stderr
    assert canonical(found[1]) == canonical(wanted)
    assert_no_package_of_ours(done.stderr)


def test_gguf(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is imported for a file whose header is read already."""
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(HostError) as caught:
        GgufWeights([GgufFile(Path("model.gguf"), {}, {}, 0)], "gemma2")
    assert "pip install 'gguf>=" in caught.value.hint


def test_torch_and_transformers_are_installed_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the versions that rkedge needs: a bare torch brings gigabytes of CUDA."""
    assert re.search(r"pip install torch==[\d.]+ 'transformers\S+'$", install("torch", "transformers"))


def test_what_a_board_leaves_out_is_one_command_and_not_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = importlib.metadata.distribution

    def distribution(name: str) -> importlib.metadata.Distribution:
        if name in ("rich", "numpy", "threadpoolctl"):
            raise importlib.metadata.PackageNotFoundError(name)
        return installed(name)

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)
    hint = import_failed(ModuleNotFoundError("No module named 'rich'", name="rich")).hint
    words = {re.split("[>=]", word)[0] for word in shlex.split(hint.partition("pip install ")[2])}
    assert words == {"rich", "numpy", "threadpoolctl"}


@pytest.mark.parametrize("name", ["huggingface_hub", "huggingface-hub", "Huggingface.Hub"])
def test_names_are_compared_as_indexes_do(name: str) -> None:
    assert "huggingface" in install(name)
    assert ">=" in install(name)


def test_without_metadata_the_package_alone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", missing)
    assert install("torch").endswith("pip install torch")


def test_no_text_of_ours_installs_rkedge_from_an_index() -> None:
    """No index has it, so anybody may register the name there."""
    root = Path(__file__).parents[3]
    folders = [root / name for name in ("runtime", "converter", "board", "configs", "docs")]
    files = [root / "README.md", *(path for folder in folders for path in folder.rglob("*"))]
    texts = [path for path in files if path.suffix in (".py", ".md", ".txt", ".yaml", ".service")]
    assert len(texts) > 200
    for path in texts:
        assert_no_package_of_ours(path.read_text())


def test_every_dependency_is_tried() -> None:
    """Others cannot be missed: click comes first of all, no module of ours imports peft, rich brings markdown-it-py."""
    packages = {"yaml": "pyyaml", "prometheus_client": "prometheus-client", "huggingface_hub": "huggingface-hub"}
    declared = importlib.metadata.requires("rkedge") or []
    names = {re.match(r"[\w-]+", text)[0].lower() for text in declared if "extra == 'dev'" not in text}  # type: ignore[index]
    assert names - {packages.get(module, module) for module in [*NEEDS, "gguf"]} == {"click", "peft", "markdown-it-py"}
