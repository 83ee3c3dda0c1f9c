"""bitsandbytes checkpoints, against bitsandbytes; other quantizers are named."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from bitsandbytes import functional
from bitsandbytes import utils as bnb_utils
from safetensors.torch import load_file, save_file
from tests.converter.sources.other_formats import everything, quantize

from rkconvert.adapters.merged_model import AdapterSource, merged_model
from rkconvert.sources.checkpoint import open_checkpoint
from rkconvert.tensors.formats import to_float32
from rkruntime.errors import CheckpointError


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("kind", "nested"), [("nf4", False), ("nf4", True), ("fp4", False), ("fp4", True), ("int8", False)]
)
def test_bitsandbytes(make_model, bits, kind, nested, dtype):
    # Rows of whole blocks, as every real model has: for others bitsandbytes' CPU kernel (0.50.2) takes wrong scales.
    base = make_model(intermediate_size=128)
    expected = quantize(base, kind, nested, dtype)
    checkpoint = open_checkpoint(base)
    for name, values in everything(checkpoint).items():
        # Some of its kernels, by processor, give a negative zero for fp4's; only the sign of that may differ.
        theirs, kind = bits(expected[name]), checkpoint.weights.tensors[name].dtype
        np.testing.assert_array_equal(to_float32(values, kind), to_float32(theirs, kind), err_msg=name)
    assert "bitsandbytes" in checkpoint.notes[0]


def test_an_adapter_on_a_quantized_base(make_model, make_adapter, peft_merge, assert_merged, tmp_path):
    base = make_model(intermediate_size=128)
    adapter = make_adapter(base)
    floats = tmp_path / "floats"
    shutil.copytree(base, floats)
    for file in floats.glob("*.safetensors*"):
        file.unlink()
    save_file(quantize(base, "nf4", nested=True), floats / "model.safetensors")
    mine, theirs = (
        merged_model(open_checkpoint(base), [AdapterSource(str(adapter))]),
        peft_merge(floats, {adapter: 1.0}),
    )
    for name, info in mine.weights.tensors.items():
        assert_merged(name, mine.weights.read(name, 0, info.shape[0]), theirs[name])


def test_scales_that_do_not_fit(make_model):
    base = make_model()
    quantize(base, "nf4")
    state = load_file(base / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    for changed, match in (
        ({f"{name}.absmax": state[f"{name}.absmax"][:-1]}, "bytes and scales of its shape"),
        ({f"{name}.quant_map": state[f"{name}.quant_map"] * float("nan")}, "not finite"),
        ({f"{name}.quant_state.bitsandbytes__nf4": torch.zeros(3, dtype=torch.uint8)}, "does not describe"),
    ):
        save_file(state | changed, base / "model.safetensors")
        with pytest.raises(CheckpointError, match=match):
            open_checkpoint(base)
    save_file({key: value for key, value in state.items() if key != f"{name}.absmax"}, base / "model.safetensors")
    with pytest.raises(CheckpointError, match="no usable scales"):
        open_checkpoint(base)


@pytest.mark.parametrize(("kind", "other"), [("nf4", "fp4"), ("fp4", "nf4")])
def test_numbers_of_another_type(make_model, kind, other):
    """bitsandbytes computes with those of the type, whatever the file's quant_map says."""
    base = make_model()
    quantize(base, kind)
    state = load_file(base / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    packed = state[name].reshape(-1, 1)
    saved = {key.removeprefix(f"{name}."): value for key, value in state.items() if key.startswith(f"{name}.")}
    values = [functional.get_4bit_type(other, device="cpu"), functional.get_4bit_type(kind, device="cpu") * 1.001]
    results = [
        functional.dequantize_4bit(packed, functional.QuantState.from_dict({**saved, "quant_map": code}, "cpu"))
        for code in (saved["quant_map"], *values)
    ]
    assert all(torch.equal(results[0], result) for result in results[1:])
    for code in values:
        save_file(state | {f"{name}.quant_map": code}, base / "model.safetensors")
        with pytest.raises(CheckpointError, match=f"other than that of its type {kind}"):
            open_checkpoint(base)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"nested_offset": 10**400}, "not described"),
        ({"nested_offset": 1e39}, "not described"),
        ({"nested_offset": float("nan")}, "not described"),
        ({"nested_blocksize": True}, "not described"),
        ({"quant_type": "fp4"}, "of the type 'fp4'"),
        ("[" * 100_000, "does not describe"),
        ('{"blocksize": 64, "blocksize": 128}', "does not describe"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_state_that_cannot_be(make_model, change, match):
    """bitsandbytes computes with the type in the state; a state that is no state is a defect of the file."""
    base = make_model()
    quantize(base, "nf4", nested=True)
    tensors = load_file(base / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight.quant_state.bitsandbytes__nf4"
    state = json.loads(tensors[name].numpy().tobytes())
    text = change if isinstance(change, str) else json.dumps(state | change)
    save_file(tensors | {name: torch.tensor(list(text.encode()), dtype=torch.uint8)}, base / "model.safetensors")
    with pytest.raises(CheckpointError, match=match):
        open_checkpoint(base)


def test_two_states_of_one_matrix(make_model):
    base = make_model()
    quantize(base, "nf4")
    tensors = load_file(base / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight.quant_state.bitsandbytes__"
    save_file(tensors | {f"{name}fp4": tensors[f"{name}nf4"].clone()}, base / "model.safetensors")
    with pytest.raises(CheckpointError, match="described 2 times"):
        open_checkpoint(base)


ORDERS = bnb_utils.LINEAR_8BIT_WEIGHTS_FORMAT_MAPPING


@pytest.mark.parametrize("order", [*ORDERS, "of another kind"])
@pytest.mark.parametrize("as_text", [False, True])
def test_an_int8_matrix_in_the_order_of_a_gpus_tiles(make_model, order, as_text):
    base = make_model()
    quantize(base, "int8")
    state = load_file(base / "model.safetensors")
    key = "model.layers.1.mlp.up_proj.weight_format"
    if as_text:
        (base / "model.safetensors").unlink()
        torch.save(state | {key: order}, base / "pytorch_model.bin")
    else:
        save_file(state | {key: torch.tensor(ORDERS.get(order, 9), dtype=torch.uint8)}, base / "model.safetensors")
    if order == "row":
        open_checkpoint(base)
        return
    with pytest.raises(CheckpointError, match="is not stored row by row") as caught:
        open_checkpoint(base)
    assert "original" in caught.value.hint


def test_other_quantizers_are_named(make_model, edit_json):
    base = make_model()
    edit_json(base / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    with pytest.raises(CheckpointError, match="already quantized by gptq"):
        open_checkpoint(base)
