"""A plain Hugging Face folder of merged weights, written shard by shard in one pass; finished shards survive a kill."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from rkconvert.progress import Advance
from rkconvert.tensors.memory_folder import Place, open_file
from rkconvert.tensors.processes import in_processes
from rkconvert.tensors.shards import parse_json
from rkconvert.tensors.weights import TensorInfo, Weights, read_finite, row_blocks
from rkruntime.files import atomic_file, set_aside

# Most bytes in a shard: small enough that a kill costs seconds, large enough that 27B has only a few dozen files.
SHARD_BYTES: Final = 2_000_000_000
# A smaller model has about as many shards, of at least as many bytes: each is written by one process, and those that
# are done first must not wait for long.
_SHARDS: Final = 16
_LEAST_BYTES: Final = 250_000_000
STATE: Final = "shards.json"


class Block(NamedTuple):
    """Rows of a tensor."""

    tensor: str
    first: int
    rows: int


@dataclass(frozen=True)
class ShardPlan:
    """A file to be written: its name and its tensors in order."""

    name: str
    tensors: Mapping[str, TensorInfo]

    @property
    def nbytes(self) -> int:
        """Size of the tensors, in bytes."""
        return sum(info.nbytes for info in self.tensors.values())

    def header(self) -> bytes:
        """Return the file's header, padded so that the data is aligned to 8 bytes."""
        entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name, info in self.tensors.items():
            entries[name] = {"dtype": info.dtype, "shape": list(info.shape), "data_offsets": [end, end + info.nbytes]}
            end += info.nbytes
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def blocks(self) -> Iterator[Block]:
        """Yield each block, in the order of the file."""
        for name, info in self.tensors.items():
            for first, count in row_blocks(info.shape):
                yield Block(name, first, count)


def plan_shards(tensors: Mapping[str, TensorInfo], limit: int) -> list[ShardPlan]:
    """Distribute tensors, in order, over files of at most `limit` bytes or one tensor."""
    groups: list[dict[str, TensorInfo]] = [{}]
    used = 0
    for name, info in tensors.items():
        if groups[-1] and used + info.nbytes > limit:
            groups.append({})
            used = 0
        groups[-1][name] = info
        used += info.nbytes
    if len(groups) == 1:
        return [ShardPlan("model.safetensors", groups[0])]
    return [
        ShardPlan(f"model-{at:05}-of-{len(groups):05}.safetensors", group) for at, group in enumerate(groups, start=1)
    ]


def _plans(weights: Weights, limit: int) -> list[ShardPlan]:
    nbytes = sum(info.nbytes for info in weights.tensors.values())
    return plan_shards(weights.tensors, min(limit, max(_LEAST_BYTES, nbytes // _SHARDS)))


def resumable(weights: Weights, limit: int = SHARD_BYTES) -> list[str]:
    """Return the files from which `write_weights` resumes after a killed run; it verifies each by checksum."""
    return [STATE, *(plan.name for plan in _plans(weights, limit))]


def write_weights(folder: Path, weights: Weights, advance: Advance, limit: int = SHARD_BYTES) -> None:
    """Write the shards and their index; shards that an earlier run finished here are verified by checksum.

    The list of what is finished stays, until `forget_shards`.

    Raises:
        CheckpointError, AdapterError: Weights are NaN or infinite.
    """
    plans = _plans(weights, limit)
    done = _read_state(folder)

    def write(plan: ShardPlan, step: Advance) -> int:
        path = folder / plan.name
        if path.is_file() and (kept := done.get(plan.name)) is not None and _checksum_file(path, plan, step) == kept:
            step(plan.nbytes)
            return kept
        partial = path.with_suffix(".partial")
        checksum = _write_shard(partial, plan, weights, step)
        partial.rename(path)
        return checksum

    with closing(in_processes(write, plans, advance, sum(plan.nbytes for plan in plans))) as written:
        for plan, checksum in written:
            done[plan.name] = checksum
            with atomic_file(folder / STATE) as state:
                state.write_text(json.dumps(done))
    if len(plans) > 1:
        index = {name: plan.name for plan in plans for name in plan.tensors}
        total = {"total_size": sum(plan.nbytes for plan in plans)}
        write_json(folder / "model.safetensors.index.json", {"metadata": total, "weight_map": index})


def forget_shards(folder: Path) -> None:
    """Remove the list of finished shards, once everything else is there: until then, the next run needs it."""
    (folder / STATE).unlink(missing_ok=True)


def check_finite(weights: Weights, advance: Advance) -> None:
    """Read all weights. Raises CheckpointError or AdapterError if some are NaN or infinite."""
    for name, info in weights.tensors.items():
        for first, count in row_blocks(info.shape):
            advance(read_finite(weights, name, first, count).nbytes)


def _read_state(folder: Path) -> dict[str, int]:
    """Return checksums of finished shards by name; empty if a crash left something else there."""
    try:
        state = parse_json((folder / STATE).read_bytes())
    except (OSError, ValueError):
        return {}
    return state if isinstance(state, dict) else {}


def _write_shard(path: Path, plan: ShardPlan, weights: Weights, step: Advance) -> int:
    """Write a shard; returns its checksum, the same that `_checksum_file` computes."""
    header = plan.header()
    checksum = _sum(header)
    with _whole(path) as file:
        set_aside(file.fileno(), len(header) + plan.nbytes)
        _write(file, memoryview(header))
        for block in plan.blocks():
            data = read_finite(weights, block.tensor, block.first, block.rows).reshape(-1).view(np.uint8).data
            _write(file, data)
            checksum = _add(checksum, _sum(data))
            step(len(data))
    return checksum


@contextmanager
def _whole(path: Path) -> Iterator[FileIO]:
    """Open a new file, and delete it if it is not written to its end: on a full disk, or when the run is stopped."""
    try:
        with path.open("wb", buffering=0) as file:
            yield file
    except BaseException:  # Ctrl-C, too: half a file is of use to nobody
        path.unlink(missing_ok=True)
        raise


def _write(file: FileIO, data: memoryview) -> None:
    while data:
        data = data[file.write(data) :]


def _sum(data: bytes | memoryview) -> int:
    """Return the sum of 64-bit words: ten times as fast as a CRC, and it detects a crash's lost pages and cut ends."""
    whole = len(data) // 8 * 8
    words = np.frombuffer(data[:whole], np.uint64)
    return int(np.add.reduce(words)) + int.from_bytes(data[whole:], "little")


def _add(checksum: int, block: int) -> int:
    """Extend a checksum by the sum of the next block."""
    return (checksum * 31 + block) % (1 << 64)


def _checksum_file(path: Path, plan: ShardPlan, step: Advance) -> int:
    header = plan.header()
    if path.stat().st_size != len(header) + plan.nbytes:
        return -1
    with path.open("rb") as file:
        checksum = _sum(file.read(len(header)))
        for block in plan.blocks():
            info = plan.tensors[block.tensor]
            checksum = _add(checksum, _sum(file.read(info.nbytes // info.shape[0] * block.rows)))
            step(0)  # nothing is done yet; but whoever stops the work need not wait for the whole shard
    return checksum


def copy_side_files(folder: Place, into: Path, names: Iterable[str]) -> None:
    """Copy whichever of these small files a model folder has; they may be in a subfolder."""
    for name in names:
        if (folder / name).is_file():
            (into / name).parent.mkdir(exist_ok=True)
            with open_file(folder / name) as source, (into / name).open("wb") as copy:
                shutil.copyfileobj(source, copy)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file in the layout of Hugging Face's libraries."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
