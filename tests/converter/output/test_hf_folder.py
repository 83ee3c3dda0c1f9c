"""Shards are written by several threads: the bytes of the safetensors library, and no write after the end."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from rkconvert.output import hf_folder
from rkconvert.output.hf_folder import write_weights
from rkconvert.tensors.weights import BLOCK_WEIGHTS, TensorInfo

ROWS = 40
SHAPES = {"a": (ROWS, BLOCK_WEIGHTS // 4), "norm": (7,), "b": (3, BLOCK_WEIGHTS * 2), "c": (ROWS, 333)}


class Random:
    """Tensors with the same values at each read; reading some rows takes longer."""

    def __init__(self) -> None:
        self.tensors = {name: TensorInfo("F32", shape) for name, shape in SHAPES.items()}
        self.values = {
            name: np.random.default_rng(len(name)).standard_normal(shape, np.float32) for name, shape in SHAPES.items()
        }

    def read(self, name: str, first: int, count: int) -> Any:
        time.sleep(0.001 * (first % 5))
        return self.values[name][first : first + count]


def test_shards_are_what_the_library_reads(tmp_path: Path) -> None:
    weights = Random()
    write_weights(tmp_path, weights, lambda _: None, BLOCK_WEIGHTS * 8)
    found = {}
    for path in sorted(tmp_path.glob("*.safetensors")):
        found |= load_file(path)
    assert found.keys() == SHAPES.keys()
    for name, value in weights.values.items():
        assert np.array_equal(found[name], value), name
    hf_folder.forget_shards(tmp_path)
    assert not (tmp_path / hf_folder.STATE).exists()


@pytest.mark.parametrize("failure", [OSError(28, "full"), KeyboardInterrupt()], ids=["disk", "interrupt"])
def test_no_thread_writes_after_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    """The number of a closed file may be that of another one, which must not get the weights."""
    before, open_files = threading.active_count(), os.listdir("/proc/self/fd")
    done: list[int] = []

    def advance(size: int) -> None:
        done.append(size)
        if len(done) == 3:
            raise failure

    with pytest.raises(type(failure)):
        write_weights(tmp_path, Random(), advance)
    assert threading.active_count() == before
    assert len(os.listdir("/proc/self/fd")) == len(open_files)
    assert not list(tmp_path.glob("*.safetensors"))
