"""Hashes that are computed beside other work: the same as hashlib's, no longer than wanted, and with their failures."""

from __future__ import annotations

import hashlib
import os
import threading
from contextlib import closing

import pytest

from rkconvert.tensors.hashes_ahead import HashesAhead
from rkruntime.errors import CheckpointError


def of_hashing():
    return [thread for thread in threading.enumerate() if thread.name.startswith("hashing")]


def test_they_are_those_of_hashlib(tmp_path):
    contents = {"empty": b"", "small": b"abc", "large": os.urandom(3_000_001)}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    seen = []
    with closing(HashesAhead(tmp_path / name for name in contents)) as ahead:
        for name, content in contents.items():
            assert tmp_path / name in ahead
            assert ahead.of(tmp_path / name, seen.append) == hashlib.sha256(content).hexdigest()
        assert ahead.left([tmp_path / name for name in contents]) == 0
    assert sum(seen) <= 3_000_004
    assert of_hashing() == []


def test_nothing_is_read_after_the_end(tmp_path):
    """A sparse file that would take minutes."""
    with (tmp_path / "huge").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(KeyboardInterrupt), closing(HashesAhead([tmp_path / "huge", tmp_path / "next"])) as ahead:
        assert ahead.left([tmp_path / "huge"]) > 1 << 39
        raise KeyboardInterrupt
    assert of_hashing() == []


def test_a_file_that_cannot_be_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with closing(HashesAhead([tmp_path / "gone", tmp_path / "pipe"])) as ahead:
        assert ahead.left([tmp_path / "gone"]) == 0
        for name in ("gone", "pipe"):
            with pytest.raises(CheckpointError, match=name):
                ahead.of(tmp_path / name, kind=CheckpointError)
