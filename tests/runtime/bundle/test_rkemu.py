"""The container: what was written is read, and no byte changes unseen."""

import contextlib
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rkruntime.bundle.rkemu import ALIGNMENT, PAGE, TensorSpec, Writer, read_container
from rkruntime.errors import ModelFileError

METADATA = {"general.kind": "model", "a": 1, "b": -2.5, "c": [1, 2, 3], "leer": "", "text": "▁ü"}
SPECS = [
    TensorSpec("w", "int8", (6, 5)),
    TensorSpec("w.scale", "float32", (6, 1)),
    TensorSpec("none", "uint32", (0, 3)),
]


def write(path: Path, **options: bool) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    arrays = {
        "w": rng.integers(-127, 128, (6, 5), dtype=np.int8),
        "w.scale": rng.random((6, 1), dtype=np.float32),
        "none": np.zeros((0, 3), np.uint32),
    }
    with Writer(path, METADATA, SPECS, **options) as writer:
        if not options:
            writer.write_rows("w", 0, arrays["w"][:4])
            writer.write("w.scale", arrays["w.scale"])
            writer.write_rows("w", 4, arrays["w"][4:])
            writer.write("none", arrays["none"])
    return arrays


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "m.rkemu"
    arrays = write(path)
    container = read_container(path)
    assert container.metadata == METADATA
    for name, array in arrays.items():
        np.testing.assert_array_equal(container.read(name), array)
        assert container.tensors[name].offset % ALIGNMENT == 0
    data = path.read_bytes()
    assert len(data) == container.file_size
    assert struct.unpack_from("<Q", data, 40)[0] % PAGE == 0
    assert f"{struct.unpack_from('<I', data, 56)[0]:08x}" == container.fingerprint


def test_blocks_give_the_checksum_of_the_whole(tmp_path: Path) -> None:
    arrays = write(tmp_path / "m")
    assert read_container(tmp_path / "m").tensors["w"].crc32 == zlib.crc32(arrays["w"].tobytes())


def test_sizes_only_has_the_directory_and_no_data(tmp_path: Path) -> None:
    write(tmp_path / "m", sizes_only=True)
    container = read_container(tmp_path / "m")
    assert container.sizes_only
    assert container.tensors["w"].spec.nbytes == 30
    assert container.file_size == PAGE


def test_a_missing_tensor_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no data for 1"), Writer(tmp_path / "m", {}, SPECS[:1]):
        pass
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize("array", [np.zeros((6, 4), np.int8), np.zeros((7, 5), np.int8), np.zeros((6, 5), np.uint8)])
def test_a_wrong_shape_or_dtype_is_refused(tmp_path: Path, array: np.ndarray) -> None:
    with pytest.raises(ValueError, match="does not fit"), Writer(tmp_path / "m", {}, SPECS[:1]) as writer:
        writer.write("w", array)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(at=st.integers(0), bit=st.integers(0, 7))
def test_no_flipped_bit_goes_unseen(tmp_path: Path, at: int, bit: int) -> None:
    path = tmp_path / "m"
    arrays = write(path)
    data = bytearray(path.read_bytes())
    at %= len(data)
    data[at] ^= 1 << bit
    path.write_bytes(data)
    try:
        container = read_container(path)
        for name, array in arrays.items():
            np.testing.assert_array_equal(container.read(name), array)
        assert container.metadata == METADATA
        # only padding may change without a word
        inside = [(e.offset, e.offset + e.spec.nbytes) for e in container.tensors.values()]
        sections = 64 + sum(struct.unpack_from("<QQ", data, 24))
        assert at >= sections
        assert not any(start <= at < end for start, end in inside)
    except ModelFileError:
        pass


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=100)
@given(size=st.integers(0, 5000))
def test_a_cut_file_is_a_clear_error(tmp_path: Path, size: int) -> None:
    path = tmp_path / "m"
    write(path)
    data = path.read_bytes()
    size %= len(data)
    path.write_bytes(data[:size])
    with pytest.raises(ModelFileError):
        read_container(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=200)
@given(
    sections=st.binary(max_size=200),
    metadata_size=st.integers(0, 200),
    counts=st.tuples(st.integers(0, 99), st.integers(0, 99)),
)
def test_hostile_sections_with_right_checksums(
    tmp_path: Path, sections: bytes, metadata_size: int, counts: tuple[int, int]
) -> None:
    metadata_size = min(metadata_size, len(sections))
    head = struct.pack(
        "<8sIIQQQQIII", b"RKEMU\r\n\x1a", 1, 0, 64 + len(sections), metadata_size, len(sections) - metadata_size,
        PAGE, *counts, zlib.crc32(sections),
    )  # fmt: skip
    path = tmp_path / "m"
    path.write_bytes(head + struct.pack("<I", zlib.crc32(head)) + sections)
    # what can be read is fine; anything else must be this error and no other
    with contextlib.suppress(ModelFileError):
        read_container(path)
