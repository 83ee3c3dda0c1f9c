"""Locate the files that are not Python: next to the packages in a checkout, inside rkruntime in a wheel."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import yaml

_INSTALLED = Path(__file__).resolve().parent / "resources"
_CHECKOUT = Path(__file__).resolve().parents[2]

_IN_CHECKOUT = {"emulator": "board/emulator", "configs": "configs", "board": "board"}


def resource(name: str) -> Path:
    """Return the folder of a resource (`emulator`: C++ sources; `configs`: recipes, board profiles, settings;
    `board`: a board's units, udev rules and requirements)."""
    installed = _INSTALLED / name
    return installed if installed.is_dir() else _CHECKOUT / _IN_CHECKOUT[name]


@cache
def table(name: str) -> Any:
    """Return the data in rkruntime/data/NAME.yaml, read once."""
    loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times faster with libyaml
    text = (Path(__file__).resolve().parent / "data" / f"{name}.yaml").read_text(encoding="utf-8")
    return yaml.load(text, Loader=loader)  # noqa: S506 - a safe loader
