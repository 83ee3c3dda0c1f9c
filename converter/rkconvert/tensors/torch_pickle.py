"""Unpickle the description of tensors in a .bin file without running its code, and with bounded work.

The unpickler accepts only the few names with which torch describes tensors. Before it starts, the opcodes are walked
through once: a few hundred bytes could otherwise ask for gigabytes or for years of hashing.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any, Final

from rkconvert.tensors.formats import STORAGE

# Limit in bytes; Gemma's largest pickle has some 100 kB.
MAX_PICKLE: Final = 4 << 20
# Limit on opcodes; a tensor needs about 25.
_MAX_OPCODES: Final = 1 << 18
# Limit on values in everything that is built; those inside a tuple count again wherever it is used again.
_MAX_VALUES: Final = 1 << 22
# Limit on BUILD opcodes. An OrderedDict has one if it has attributes, as the state_dict of a module does.
_MAX_BUILDS: Final = 64
# Limit on a tensor's dimensions, as in torch.
_MAX_DIMENSIONS: Final = 64
_MAX_INDEX: Final = 1 << 63

_STORAGES: Final = {
    "DoubleStorage": "F64",
    "FloatStorage": "F32",
    "HalfStorage": "F16",
    "BFloat16Storage": "BF16",
    "LongStorage": "I64",
    "IntStorage": "I32",
    "ShortStorage": "I16",
    "CharStorage": "I8",
    "ByteStorage": "U8",
    "BoolStorage": "BOOL",
}
# Opcodes that torch.save writes, with protocols 2 to 5.
_NAMES: Final = """
    PROTO FRAME STOP MARK GLOBAL STACK_GLOBAL REDUCE BUILD BINPERSID MEMOIZE BINPUT LONG_BINPUT BINGET LONG_BINGET NONE
    NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 BINFLOAT BINUNICODE SHORT_BINUNICODE EMPTY_TUPLE TUPLE TUPLE1 TUPLE2
    TUPLE3 EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS
"""
_OPCODES: Final = frozenset(_NAMES.split())


# Compared and hashed by identity, as their contents come from the file.
@dataclass(frozen=True, eq=False)
class Storage:
    """A persistent id: a block of memory in the archive."""

    dtype: str
    key: str


@dataclass(frozen=True, eq=False)
class Tensor:
    """A view of a storage; offset and stride in elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


def unpickle(data: bytes) -> Any:
    """Return what a data.pkl contains, with `Tensor`s.

    Raises:
        Exception: Any, if it is damaged or contains more than tensors; nothing of it was run.
    """
    _check(data)
    return _Unpickler(io.BytesIO(data)).load()


def _check(data: bytes) -> None:
    """Raise an exception for opcodes that no state_dict needs, and for more work than any can need."""
    # Number of values in each object on the stack; None is a mark, and 0 a name.
    stack: list[int | None] = []
    memo: dict[int, int | None] = {}
    values = builds = 0
    argument: Any
    for count, (opcode, argument, _) in enumerate(pickletools.genops(data)):
        name = opcode.name
        if name not in _OPCODES:
            raise pickle.UnpicklingError(f"it has the opcode {name}, which no weights need")
        if name == "MEMOIZE":
            memo[len(memo)] = stack[-1]
        elif name.endswith("BINPUT"):
            if argument > count:
                raise pickle.UnpicklingError(f"it has the memo index {argument:,}")
            memo[argument] = stack[-1]
        elif name.endswith("BINGET"):
            stack.append(memo[argument])
        elif name == "MARK":
            stack.append(None)
        elif name not in ("PROTO", "FRAME", "STOP"):
            target, items = _pop(stack, opcode)
            values += sum(items) + 1
            builds += name == "BUILD"
            if name == "BUILD" and not target:
                raise pickle.UnpicklingError("it changes what a name stands for")
            stack.append(0 if name.endswith("GLOBAL") else target + sum(items) + 1)
        if count > _MAX_OPCODES or values > _MAX_VALUES or builds > _MAX_BUILDS:
            raise pickle.UnpicklingError("it describes more than any weights need")


def _pop(stack: list[int | None], opcode: pickletools.OpcodeInfo) -> tuple[int, list[int]]:
    """Pop an opcode's operands; return the sizes of the container that it fills, or 0, and of the other objects."""
    before = opcode.stack_before
    if pickletools.markobject in before:
        start = len(stack) - 1 - stack[::-1].index(None)
        items, wanted = stack[start + 1 :], before.index(pickletools.markobject)
        del stack[start:]
    else:
        items, wanted = [], len(before)
    taken = [stack.pop() for _ in range(wanted)][::-1] + items
    if None in taken:
        raise pickle.UnpicklingError("it takes a mark for a value")
    sizes = [size for size in taken if size is not None]
    fills = opcode.name in ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "BUILD")
    return (sizes[0], sizes[1:]) if fills else (0, sizes)


def _index(value: Any) -> int:
    if type(value) is not int or not -_MAX_INDEX <= value < _MAX_INDEX:
        raise pickle.UnpicklingError("it has a tensor with an impossible shape, strides or offset")
    return value


def _indices(values: Any) -> tuple[int, ...]:
    if not isinstance(values, tuple) or len(values) > _MAX_DIMENSIONS:
        raise pickle.UnpicklingError("it has a tensor with an impossible shape or strides")
    return tuple(map(_index, values))


def _rebuild_tensor(
    storage: Any, offset: Any, shape: Any, stride: Any, _requires_grad: Any = False, hooks: Any = None, more: Any = None
) -> Tensor:
    if not isinstance(storage, Storage):
        raise pickle.UnpicklingError("it has a tensor without a storage")
    # Such as {"neg": True}: the values in the storage have the other sign.
    if hooks or more:
        raise pickle.UnpicklingError("it has a tensor with hooks, or one that is stored negated or conjugated")
    return Tensor(storage, _index(offset), _indices(shape), _indices(stride))


def _rebuild_parameter(data: Any, _requires_grad: Any = False, hooks: Any = None) -> Any:
    if hooks:
        raise pickle.UnpicklingError("it has a parameter with hooks")
    return data


def _ordered_dict() -> OrderedDict[Any, Any]:
    """Return an empty OrderedDict: making one from a list again and again would be unbounded work."""
    return OrderedDict()


class _Unpickler(pickle.Unpickler):
    """Accepts torch's names for tensors, and no others."""

    _NAMES: Final = {
        ("torch._utils", "_rebuild_tensor_v2"): _rebuild_tensor,
        ("torch._utils", "_rebuild_parameter"): _rebuild_parameter,
        ("collections", "OrderedDict"): _ordered_dict,
        **{("torch", name): dtype for name, dtype in _STORAGES.items()},
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._NAMES[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"it asks for {module[:80]}.{name[:80]}, which no weights need") from None

    def persistent_load(self, pid: Any) -> Storage:
        if isinstance(pid, tuple) and len(pid) == 5:
            kind, dtype, key, _device, _count = pid
            if kind == "storage" and isinstance(dtype, str) and dtype in STORAGE and isinstance(key, str):
                return Storage(dtype, key)
        raise pickle.UnpicklingError("it asks for a storage of an unknown kind")
