""".bin files, against torch, and those of a stranger."""

from __future__ import annotations

import pickle
import zipfile

import numpy as np
import pytest
import torch
from tests.converter.sources.other_formats import as_bin, everything

from rkconvert.sources.checkpoint import open_checkpoint
from rkruntime.errors import CheckpointError


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_bin_files(make_model, bits, dtype):
    base = make_model(dtype=dtype)
    state = as_bin(base)
    for name, values in everything(open_checkpoint(base)).items():
        np.testing.assert_array_equal(values, bits(state[name]), err_msg=name)


def test_bin_file_with_views_and_parameters(make_model, bits):
    base = make_model()
    state = as_bin(base, 1)
    big = torch.cat([state["model.norm.weight"], state["model.layers.0.input_layernorm.weight"]])
    half = len(big) // 2
    state["model.norm.weight"] = big[:half]
    state["model.layers.0.input_layernorm.weight"] = torch.nn.Parameter(big[half:])
    torch.save(state, base / "pytorch_model-0.bin")
    for name, values in everything(open_checkpoint(base)).items():
        np.testing.assert_array_equal(values, bits(state[name]), err_msg=name)


def test_bin_file_with_tensors_that_are_not_contiguous(make_model, bits):
    base = make_model()
    state = as_bin(base, 1)
    names = [name for name in state if state[name].ndim == 2][:4]
    first, second, third, fourth = names
    vector = "model.norm.weight"
    state[first] = state[first].t().contiguous().t()
    state[second] = torch.cat([state[second], state[second]], dim=1)[:, : state[second].shape[1]]
    state[third] = torch.stack([state[third], state[third]], dim=2)[:, :, 1]
    state[fourth] = state[fourth][:1].expand(state[fourth].shape)
    state[vector] = torch.ones(1, dtype=state[vector].dtype).expand(state[vector].shape)
    assert not any(state[name].is_contiguous() for name in (*names, vector))
    torch.save(state, base / "pytorch_model-0.bin")
    for name, values in everything(open_checkpoint(base)).items():
        np.testing.assert_array_equal(values, bits(state[name].contiguous()), err_msg=name)


def test_strides_of_a_stranger(make_model):
    base = make_model()
    state = as_bin(base, 1)
    name = "model.norm.weight"
    size = state[name].numel()
    for tensor, words in (
        (torch.as_strided(torch.ones(1), (1 << 15, 1 << 15), (0, 0)), "too large to rearrange"),
        (torch.ones(2).expand(size, 2), "model.norm.weight"),
    ):
        torch.save(state | {name: tensor}, base / "pytorch_model-0.bin")
        with pytest.raises(CheckpointError, match=words):
            open_checkpoint(base)


class Evil:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


def test_code_in_a_pickle_is_not_run(make_model, tmp_path):
    base = make_model()
    state = as_bin(base, 1)
    torch.save(state | {"model.norm.weight": Evil(tmp_path / "ran")}, base / "pytorch_model-0.bin")
    with pytest.raises(CheckpointError, match=r"asks for (io|_io|builtins)\.open, which no weights need"):
        open_checkpoint(base)
    assert not (tmp_path / "ran").exists()


def test_a_pickle_alone_and_a_cut_archive_are_refused(make_model, tmp_path):
    base = make_model()
    as_bin(base, 1)
    file = base / "pytorch_model-0.bin"
    whole = file.read_bytes()
    file.write_bytes(pickle.dumps(Evil(tmp_path / "ran")))
    with pytest.raises(CheckpointError, match=r"not a \.bin file of torch 1\.6"):
        open_checkpoint(base)
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match="or is truncated"):
        open_checkpoint(base)
    assert not (tmp_path / "ran").exists()


def test_a_bin_file_that_points_beyond_its_storage(make_model):
    base = make_model()
    as_bin(base, 1)
    source, target = base / "pytorch_model-0.bin", base / "changed.bin"
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w") as new:
        for info in old.infolist():
            data = old.read(info)
            new.writestr(info, data[:16] if info.filename.endswith("data/3") else data)
    target.replace(source)
    with pytest.raises(CheckpointError, match="larger than its storage"):
        open_checkpoint(base)
