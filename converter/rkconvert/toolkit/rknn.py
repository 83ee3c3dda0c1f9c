"""An environment with rknn-toolkit2, the vendor's other converter, which is on PyPI: what tests/rknn measures with.

It is not RKLLM's toolkit, and no conversion uses it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from rkconvert.toolkit.environment import Environment, OnLine, Steps, find_python, make
from rkconvert.toolkit.interpreter import environments_folder

# The release whose answers are in rkconvert/compat/rknn.yaml.
RELEASE: Final = "2.5.0"
PYTHON: Final = "3.11"
_MARKER: Final = "rkedge-rknn.json"
# Packages that rknn-toolkit2 imports, with its own limits. It is installed without its list, which pins an old torch.
_PARTS: Final = (
    "torch==2.13.0",
    "numpy<=1.26.4",
    "onnx<=1.18.0",
    "onnxruntime",
    "protobuf<=4.25.4",
    "psutil",
    "ruamel.yaml",
    "scipy",
    "tqdm",
    "opencv-python-headless",
    "fast-histogram",
    "setuptools<81",
)
_NAME: Final = f"rknn-toolkit2 {RELEASE}"


def _folder() -> Path:
    return environments_folder() / f"rknn-{RELEASE}-py{PYTHON}"


def find_rknn() -> Path | None:
    """Return the interpreter of the environment that `setup_rknn` made, or None."""
    return _folder() / "bin" / "python" if (_folder() / _MARKER).is_file() else None


def setup_rknn(named: Path | None, on_line: OnLine, *, replace: bool = False) -> Path:
    """Create the environment and try it out; returns its interpreter. See `environment.setup` for what it raises."""

    def fill(steps: Steps) -> tuple[Path, dict[str, object]]:
        steps.install(*_PARTS, what="what rknn-toolkit2 needs")
        steps.install("--no-deps", f"rknn-toolkit2=={RELEASE}", what=_NAME)
        steps.imports("from rknn.api import RKNN; RKNN(verbose=False)", _NAME)
        return steps.environment.inner, {"rknn-toolkit2": RELEASE, "python": PYTHON, "parts": list(_PARTS)}

    return make(Environment(_folder(), _MARKER, _NAME, find_python(PYTHON, named)), fill, on_line, replace)
