"""A C++ header that asserts each size and offset of a layout, from the same declarations as the runtime's binding.

The declarations are held against what was measured on the vendor's headers (tests/runtime/abi).
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any, Final

from rkruntime.abi import abi_of
from rkruntime.abi.declarations import UNNAMED

HEADER: Final = "abi_check.h"


def header(release: str) -> str:
    """The text of `abi_check.h` for a release."""
    lines = [f"// Made from rkruntime.abi for {release}.", "#pragma once", "#include <cstddef>"]
    for name, made in abi_of(release).structs.items():
        if name not in UNNAMED:
            lines.append(f'static_assert(sizeof({name}) == {ctypes.sizeof(made)}, "{name} has another size");')
            for field, offset in _offsets(made):
                lines.append(f'static_assert(offsetof({name}, {field}) == {offset}, "{name}.{field} is elsewhere");')
    return "\n".join(lines) + "\n"


def _offsets(made: Any, start: int = 0) -> Iterator[tuple[str, int]]:
    """Members as C++ names them, with their offsets in bytes."""
    for name, kind, *_ in made._fields_:
        offset = start + getattr(made, name).offset
        if name in made._anonymous_:
            yield from _offsets(kind, offset)
        elif kind.__name__ in UNNAMED:
            yield from ((f"{name}.{field}", at) for field, at in _offsets(kind, offset))
        else:
            yield name, offset
