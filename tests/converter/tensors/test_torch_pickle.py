"""What a .bin file's pickle can ask for: only tensors, with bounded work, and as torch itself reads them."""

from __future__ import annotations

import io
import pickle
import pickletools
import random
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from rkconvert.tensors.torch_file import TorchFile
from rkconvert.tensors.torch_pickle import unpickle
from rkruntime.errors import CheckpointError

PAIR = b"q\x01h\x01\x86"  # a tuple of the same object twice, without DUP


def archive(path: Path, data: bytes, order: bytes = b"little", compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as file:
        file.writestr("archive/data.pkl", data)
        file.writestr("archive/byteorder", order)
    return path


@pytest.mark.parametrize(
    "data",
    [
        b"\x80\x02})" + b"2\x86" * 60 + b"K\x01s.",
        b"\x80\x02})" + PAIR * 60 + b"K\x01s.",
        b"\x80\x02(X\x07\x00\x00\x00storageX\x01\x00\x00\x00z]" + PAIR * 27 + b"X\x03\x00\x00\x00cpuK\x01tQ.",
        b"\x80\x02}r" + (1 << 26).to_bytes(4, "little") + b".",
        b"\x80\x02(" + b"]" * (1 << 20) + b"t.",
        b"\x80\x02ccollections\nOrderedDict\n]\x85R.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}X\x01\x00\x00\x00aK\x01s\x86b.",
        b"\x80\x02(" + b"\x8aO" + b"\x7f" * 79 + b"t.",
        b"(lp0\n.",
        b"",
    ],
)
def test_bombs_are_refused(tmp_path: Path, data: bytes) -> None:
    with pytest.raises(CheckpointError):
        TorchFile(archive(tmp_path / "x.bin", data), CheckpointError)


def test_a_compressed_description_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="uncompressed"):
        TorchFile(archive(tmp_path / "x.bin", b"\x80\x02}.", compression=zipfile.ZIP_DEFLATED), CheckpointError)


@pytest.mark.parametrize("order", [b"big", b"", b"x" * 10_000])
def test_another_byte_order_is_refused(tmp_path: Path, order: bytes) -> None:
    with pytest.raises(CheckpointError, match="little-endian"):
        TorchFile(archive(tmp_path / "x.bin", b"\x80\x02}.", order), CheckpointError)


def test_a_negated_tensor_is_refused(tmp_path: Path) -> None:
    torch.save({"w": torch._neg_view(torch.ones(3))}, tmp_path / "x.bin")
    with pytest.raises(CheckpointError, match="negated"):
        TorchFile(tmp_path / "x.bin", CheckpointError)


def saved(value: Any, protocol: int) -> bytes:
    memory = io.BytesIO()
    torch.save(value, memory, pickle_protocol=protocol)
    with zipfile.ZipFile(memory) as file:
        return file.read(next(name for name in file.namelist() if name.endswith("data.pkl")))


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_module_with_its_metadata(protocol: int) -> None:
    module = torch.nn.Sequential(*(torch.nn.Linear(3, 3) for _ in range(200)))
    found = unpickle(saved(module.state_dict(), protocol))
    assert {name: tensor.shape for name, tensor in found.items()} == {
        name: tuple(tensor.shape) for name, tensor in module.state_dict().items()
    }


def test_random_pickles_end_with_an_exception_or_a_value() -> None:
    rng = random.Random(7)
    whole = saved(torch.nn.Linear(2, 2).state_dict(), 2)
    codes = [opcode.code.encode("latin-1") for opcode in pickletools.opcodes]
    for _ in range(3000):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 6)):
            at = rng.randrange(2, len(data))
            data[at : at + rng.randint(0, 3)] = rng.choice(codes) * rng.randint(1, 3) + rng.randbytes(rng.randint(0, 2))
        try:
            unpickle(bytes(data))
        except Exception as error:
            assert not isinstance(error, MemoryError), pickle.dumps(bytes(data))
