"""The plain bytes of a .rkllm file, as public studies describe them."""

import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rkruntime.bundle.rkllm_file import MAGIC, RkllmFile, read_rkllm
from rkruntime.errors import ModelFileError


def rkllm(tensors: int = 3, keys: int = 5, body: bytes = b"\x5a" * 4096, tail: bytes = b"") -> bytes:
    return struct.pack("<4sIQQ", MAGIC, 3, tensors, keys) + body + tail


@pytest.mark.parametrize(
    ("tail", "version"),
    [
        (b"rkllm-toolkit version: 1.3.1", "1.3.1"),
        (b"rkllm-toolkit version: 1.2.1b1\n", "1.2.1b1"),
        (b"rkllm-toolkit version: 1.3.1\0\0", "1.3.1"),
        (b"", ""),
        (b"rkllm-toolkit version: 1.3.1 and more", ""),
        (b"rkllm-toolkit version: \xff\xfe", ""),
    ],
)
def test_what_is_plain_is_read(tmp_path: Path, tail: bytes, version: str) -> None:
    path = tmp_path / "model.rkllm"
    path.write_bytes(rkllm(tail=tail))
    assert read_rkllm(path) == RkllmFile(path, 24 + 4096 + len(tail), 3, 3, 5, version)


def test_the_magic_is_the_one_that_a_board_accepts() -> None:
    assert MAGIC == b"\xda\xee\xb3\x36"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "is empty"),
        (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        (b"GGUF\x03\0\0\0" + bytes(64), "llama.cpp"),
        (b"RKNN" + bytes(64), "librknnrt"),
        (b"RKEMU\r\n\x1a" + bytes(64), "emulator"),
        (b"<!DOCTYPE html>", "web page"),
        (b"\0\1\2\3" + bytes(64), "begins with 00 01 02 03"),
        (MAGIC + bytes(5), "ends inside its header"),
        (rkllm(tensors=1 << 40), "cannot hold"),
        (rkllm(keys=300), "truncated or damaged"),
    ],
)
def test_anything_else_is_named(tmp_path: Path, content: bytes, words: str) -> None:
    path = tmp_path / "model.rkllm"
    path.write_bytes(content)
    with pytest.raises(ModelFileError, match=words):
        read_rkllm(path)


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="No such file"):
        read_rkllm(tmp_path / "no.rkllm")


@given(st.binary(max_size=600))
def test_any_bytes_are_read_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "any.rkllm"
    path.write_bytes(content)
    try:
        found = read_rkllm(path)
    except ModelFileError:
        return
    assert content.startswith(MAGIC)
    assert found.size == len(content)
