"""GGUF models in several files, as gguf's own writer splits them, and parts that do not belong together."""

from __future__ import annotations

import os
import shutil

import gguf
import numpy as np
import pytest
from tests.converter.sources.other_formats import TYPES, everything, state_of, write_gguf

from rkconvert.sources.open import open_source
from rkconvert.tensors.formats import to_float32
from rkruntime.errors import CheckpointError


@pytest.fixture
def parts(make_model, tmp_path):
    """A model with a head of its own in three parts, by gguf's own writer; their paths and values."""
    base = make_model(hidden_size=64, intermediate_size=96, tie_word_embeddings=False)
    expected = write_gguf(tmp_path / "model.gguf", base, TYPES.Q8_0, split_max_tensors=-(-len(state_of(base)) // 3))
    paths = [tmp_path / f"model-0000{at}-of-00003.gguf" for at in (1, 2, 3)]
    assert all(path.is_file() for path in paths)
    return paths, expected


def test_gguf_in_parts(parts):
    paths, expected = parts
    checkpoint = open_source(str(paths[0]))
    assert checkpoint.name == "model"
    assert not checkpoint.config.tie_word_embeddings
    assert {*checkpoint.inputs.weights} == {*paths}
    for name, values in everything(checkpoint).items():
        floats = to_float32(values, checkpoint.weights.tensors[name].dtype)
        np.testing.assert_array_equal(floats, expected[name], err_msg=name)
    os.utime(paths[2], (1, 1))
    with pytest.raises(CheckpointError, match=r"00003-of-00003\.gguf changed"):
        checkpoint.inputs.check()


def edited(path, **values):
    """The file with other values of numbers in its header, found by gguf's own reader."""
    with path.open("r+b") as file:
        for name, value in values.items():
            reader = gguf.GGUFReader(path, "r")
            field = reader.fields[name.replace("_", ".")]
            offset, form = int(field.offset + sum(len(part.tobytes()) for part in field.parts[:-1])), field.parts[-1]
            del reader
            file.seek(offset)
            file.write(np.array([value], form.dtype).tobytes())


def one_part_again(paths):
    shutil.copy(paths[1], paths[2])
    edited(paths[2], split_no=2)


def a_part_of_another_model(paths):
    other = paths[0].parent / "other"
    other.mkdir()
    writer = gguf.GGUFWriter(other / "x.gguf", "gemma2")
    writer.add_uint16("split.no", 1)
    writer.add_uint16("split.count", 3)
    writer.add_int32("split.tensors.count", 5)
    writer.add_tensor("blk.0.attn_norm.weight", np.ones(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    (other / "x.gguf").replace(paths[1])


def in_another_order(paths):
    paths[1].rename(paths[0].parent / "kept")
    paths[2].rename(paths[1])
    (paths[0].parent / "kept").rename(paths[2])


PARTS = {
    "missing": (lambda paths: paths[1].unlink(), "model-00002-of-00003.gguf is not beside it"),
    "a folder": (lambda paths: (paths[1].unlink(), paths[1].mkdir()), "is not beside it"),
    "cut": (lambda paths: os.truncate(paths[2], paths[2].stat().st_size - 33), "is cut"),
    "empty": (lambda paths: os.truncate(paths[2], 0), "not a GGUF file"),
    "another model": (a_part_of_another_model, "not part 2 of the model"),
    "another order": (in_another_order, "its split.no is 2, not 1"),
    "one twice": (one_part_again, "is in 2 parts"),
    "wrong count": (lambda paths: edited(paths[0], split_tensors_count=4), "not part 2 .* split.tensors.count"),
    "all wrong": (lambda paths: [edited(path, split_tensors_count=4) for path in paths], "the first part says 4"),
    "fewer parts": (lambda paths: edited(paths[0], split_count=2), "does not end with -00001-of-00002.gguf"),
    "more parts": (lambda paths: edited(paths[0], split_count=4), "does not end with -00001-of-00004.gguf"),
    "another name": (lambda paths: shutil.copy(paths[0], paths[0].with_name("x.gguf")), "x.gguf says that it is part"),
    "the second": (lambda paths: None, "is part 2 of 3 of a model"),
    "whole beside parts": (lambda paths: write_gguf_part(paths[1]), "does not say that it is a part"),
}


def write_gguf_part(path):
    writer = gguf.GGUFWriter(path, "gemma2")
    writer.add_tensor("blk.0.attn_norm.weight", np.ones(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("what", PARTS)
def test_gguf_parts_that_do_not_fit_together(parts, what):
    paths, _ = parts
    change, words = PARTS[what]
    change(paths)
    named = {"another name": paths[0].with_name("x.gguf"), "the second": paths[1]}.get(what, paths[0])
    with pytest.raises(CheckpointError, match=words) as caught:
        open_source(str(named))
    if what == "the second":
        assert str(paths[0]) in caught.value.hint
    assert caught.value.hint or what in ("cut", "empty")
