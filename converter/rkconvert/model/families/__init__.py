"""The families that can be converted, one module each, by model_type."""

from __future__ import annotations

from importlib import import_module
from pkgutil import iter_modules
from typing import Final

from rkconvert.model.family import Family

# The newest first, as messages list them.
FAMILIES: Final[dict[str, Family]] = {
    found.name: import_module(f"{__name__}.{found.name}").FAMILY
    for found in sorted(iter_modules(__path__), key=lambda found: found.name, reverse=True)
}
