"""GGUF files, against the gguf package that wrote them."""

from __future__ import annotations

import json
import random
import tempfile
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
from tests.converter.sources.other_formats import TYPES, everything, write_gguf
from tokenizers import Tokenizer

from rkconvert import demo
from rkconvert.adapters.chat import read_chat
from rkconvert.adapters.merged_model import merged_model
from rkconvert.sources import gguf_model
from rkconvert.sources.checkpoint import open_checkpoint
from rkconvert.sources.gguf_file import read_gguf
from rkconvert.sources.gguf_tokenizer import tokenizer_json
from rkconvert.sources.open import open_source
from rkconvert.tensors.formats import to_float32
from rkconvert.tensors.weights import read_finite
from rkruntime.bundle import rkemu
from rkruntime.cli import main
from rkruntime.errors import CheckpointError


@pytest.mark.parametrize("family", ["gemma2", "gemma"])
@pytest.mark.parametrize("kind", [TYPES.F32, TYPES.F16, TYPES.BF16, TYPES.Q8_0, TYPES.Q5_1, TYPES.Q4_0])
def test_gguf(make_model, tmp_path, family, kind):
    base = make_model(family=family, hidden_size=64, intermediate_size=96)
    path = tmp_path / "model.gguf"
    expected = write_gguf(path, base, kind, family)
    checkpoint = open_source(str(path))
    assert checkpoint.name == "model"
    assert checkpoint.config == open_checkpoint(base).config
    assert bool(checkpoint.notes) == (kind in (TYPES.Q5_1, TYPES.Q4_0))
    for name, values in everything(checkpoint).items():
        floats = to_float32(values, checkpoint.weights.tensors[name].dtype)
        np.testing.assert_array_equal(floats, expected[name], err_msg=name)


def can_make(kind):
    try:
        gguf.quants.quantize(np.ones((1, 256), np.float32), kind)
    except NotImplementedError:
        return False
    return True


def can_read(kind):
    try:
        gguf.quants.dequantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][1]), np.uint8), kind)
    except NotImplementedError:
        return False
    return True


ONLY_LLAMA_CPP = [kind for kind in TYPES if can_read(kind) and not can_make(kind)]


@pytest.mark.parametrize("kind", ONLY_LLAMA_CPP, ids=lambda kind: kind.name)
def test_gguf_of_types_that_only_llama_cpp_writes(make_model, tmp_path, kind, monkeypatch):
    # gguf reads these types and cannot make them, so the bytes are random: any bytes are a matrix.
    base = make_model(hidden_size=256, intermediate_size=256, num_hidden_layers=1, num_attention_heads=16)
    rng = np.random.default_rng(int(kind))
    block, size = gguf.GGML_QUANT_SIZES[kind]

    def random(values, _):
        found = rng.integers(0, 256, (*values.shape[:-1], values.shape[-1] // block, size)).astype(np.uint8)
        # Every half-precision scale in a block would be random too; keep their exponents small.
        found &= 0x3F
        return found.reshape(*values.shape[:-1], -1)

    monkeypatch.setattr(gguf.quants, "quantize", random)
    expected = write_gguf(tmp_path / "model.gguf", base, kind)
    checkpoint = open_source(str(tmp_path / "model.gguf"))
    assert kind.name in checkpoint.notes[0]
    for name, values in everything(checkpoint).items():
        np.testing.assert_array_equal(values, expected[name], err_msg=name)


def test_scales_that_are_not_finite_are_refused_in_our_words(make_model, tmp_path, monkeypatch):
    """Not in numpy's: warnings fail a test."""
    base = make_model(hidden_size=64, intermediate_size=96)
    quantize = gguf.quants.quantize

    def damaged(values, kind):
        found = quantize(values, kind)
        found[..., :2] = np.frombuffer(np.float16(np.inf).tobytes(), np.uint8)
        return found

    with monkeypatch.context() as patch, np.errstate(all="ignore"):
        patch.setattr(gguf.quants, "quantize", damaged)
        write_gguf(tmp_path / "model.gguf", base, TYPES.Q5_0)
    weights = open_source(str(tmp_path / "model.gguf")).weights
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        read_finite(weights, "model.layers.0.mlp.up_proj.weight", 0, 1)


@pytest.mark.parametrize("kind", [TYPES.Q8_K, TYPES.Q8_1, TYPES.I8, TYPES.F64, TYPES.Q1_0], ids=lambda kind: kind.name)
def test_gguf_of_types_that_the_package_cannot_read(make_model, tmp_path, kind):
    base = make_model(hidden_size=256, intermediate_size=256, num_hidden_layers=1, num_attention_heads=16)
    path = tmp_path / "model.gguf"
    write_gguf(path, base, TYPES.Q8_0)
    data = bytearray(path.read_bytes())
    name = b"token_embd.weight"
    at = data.index(name) + len(name) + 4 + 2 * 8
    assert data[at] == TYPES.Q8_0
    data[at] = kind
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match=r"cannot dequantize|ends at byte|overlaps"):
        open_source(str(path))


def test_gguf_tokenizer(make_model, tmp_path):
    write_gguf(tmp_path / "demo.gguf", demo.checkpoint(), TYPES.F16)
    checkpoint = open_source(str(tmp_path / "demo.gguf"))
    mine, theirs = (
        Tokenizer.from_buffer((path / "tokenizer.json").read_bytes()) for path in (checkpoint.path, demo.checkpoint())
    )
    for row in demo.questions():
        for text in (row.question, row.answer, row.pirate, "new words: Übermut, 12 ≠ 13 \n\n 🙂"):
            assert mine.decode(mine.encode(text).ids) == text
            assert mine.encode(text).ids == theirs.encode(text).ids
    assert (checkpoint.path / "chat_template.jinja").read_bytes().decode() == demo.tokenizer.CHAT_TEMPLATE


def test_a_gguf_leaves_nothing_among_the_temporary_files(tmp_path, monkeypatch):
    """Nor while it works: what is never written needs no removal after a kill."""
    write_gguf(tmp_path / "demo.gguf", demo.checkpoint(), TYPES.F16)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    real = rkemu.Writer.write_rows

    def write(*arguments):
        assert list((tmp_path / "temporary").iterdir()) == []
        return real(*arguments)

    monkeypatch.setattr(rkemu.Writer, "write_rows", write)
    assert main(["convert", str(tmp_path / "demo.gguf"), "-o", str(tmp_path / "made"), "-q"]) == 0
    assert (tmp_path / "made" / "tokenizer.json").is_file()


RUNS = [" " * count for count in range(2, 9)]


def tokenizer_with_runs_of_spaces():
    """The demo's, with runs of spaces as Gemma's own tokenizer.json has them, in the place of unused tokens."""
    content = json.loads((demo.checkpoint() / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    for at, run in enumerate(RUNS):
        marks = run.replace(" ", "▁")
        vocab[marks] = vocab.pop(f"<unused{at}>")
        token = next(token for token in content["added_tokens"] if token["content"] == f"<unused{at}>")
        token |= {"content": marks, "special": False}
    pairs = [["▁" * left, "▁" * (length - left)] for length in range(2, 9) for left in range(1, length)]
    content["model"]["merges"] = (
        sorted(pairs, key=lambda pair: (-len(pair[0]), -len(pair[1]))) + content["model"]["merges"]
    )
    return content


@pytest.mark.parametrize(("as_stored", "kind"), [("▁", 4), (" ", 4), ("▁", 1)], ids=["marks", "spaces", "normal"])
def test_gguf_runs_of_spaces(tmp_path, as_stored, kind):
    """Converters stored Gemma's runs of spaces in three ways; each is the original's tokenizer."""
    original = tokenizer_with_runs_of_spaces()
    vocab = sorted(original["model"]["vocab"], key=original["model"]["vocab"].__getitem__)
    special = {token["content"] for token in original["added_tokens"]}
    runs = {run.replace(" ", "▁") for run in RUNS}
    kinds = [kind if text in runs else 3 if text in special else 6 if text.startswith("<0x") else 1 for text in vocab]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.tokens": [text.replace("▁", as_stored) if text in runs else text for text in vocab],
        "tokenizer.ggml.scores": [0.0 if text in runs else -float(at) for at, text in enumerate(vocab)],
        "tokenizer.ggml.token_type": kinds,
    }
    made = tokenizer_json(SimpleNamespace(path=tmp_path / "x.gguf", metadata=metadata))
    mine, theirs = (Tokenizer.from_str(json.dumps(content)) for content in (made, original))
    assert len(theirs.encode("    return").ids) < len(theirs.encode("return").ids) + 2
    rng = random.Random(1)
    pieces = [*RUNS, " ", " " * 20, "return", "What", "\n", "\t", ".", "🙂", "<start_of_turn>", "é"]
    for _ in range(500):
        text = "".join(rng.choices(pieces, k=rng.randint(1, 8)))
        assert mine.encode(text).ids == theirs.encode(text).ids, repr(text)
        assert mine.decode(mine.encode(text).ids) == theirs.decode(theirs.encode(text).ids)


def test_gguf_of_the_27b_scales_its_queries_otherwise(make_model, tmp_path, monkeypatch):
    base = make_model(num_hidden_layers=2)
    write_gguf(tmp_path / "model.gguf", base, TYPES.F16)
    monkeypatch.setattr("rkconvert.sources.gguf_model._LAYERS_27B", 2)
    assert open_source(str(tmp_path / "model.gguf")).config.query_pre_attn_scalar == 64 // 4


@pytest.mark.parametrize(
    "more",
    [
        lambda writer: (
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR), writer.add_rope_scaling_factor(4.0)
        ),
        lambda writer: writer.add_rope_scaling_type(gguf.RopeScalingType.YARN),
        lambda writer: writer.add_float32("gemma2.rope.scale_linear", 4.0),
        lambda writer: writer.add_tensor("rope_freqs.weight", np.full(8, 2, np.float32)),
        lambda writer: writer.add_rope_dimension_count(8),
        lambda writer: writer.add_attention_scale(0.5),
        lambda writer: writer.add_causal_attention(False),
        lambda writer: writer.add_float32("gemma2.rope.freq_base_swa", 123.0),
        lambda writer: writer.add_rope_scaling_attn_factors(2.0),
        lambda writer: writer.add_float32("gemma2.rope.scaling.alpha", 2.0),
        lambda writer: writer.add_uint32("gemma2.rope.dimension_count_swa", 4),
        lambda writer: writer.add_uint32("gemma2.attention.key_length_swa", 4),
        lambda writer: writer.add_uint32("gemma2.attention.value_length_swa", 4),
        lambda writer: writer.add_sliding_window_pattern(3),
        lambda writer: writer.add_expert_used_count(1),
    ],
)  # fmt: skip
def test_a_gguf_that_asks_for_another_computation_is_refused(make_model, tmp_path, more):
    write_gguf(tmp_path / "model.gguf", make_model(), TYPES.F16, more=more)
    with pytest.raises(CheckpointError, match="Gemma 1 and 2"):
        open_source(str(tmp_path / "model.gguf"))


def test_keys_that_change_nothing_are_accepted(make_model, tmp_path):
    def more(writer):
        head = 16
        writer.add_rope_scaling_type(gguf.RopeScalingType.NONE)
        writer.add_rope_scaling_attn_factors(1.0)
        writer.add_float32("gemma2.rope.freq_base_swa", 10000.0)
        writer.add_rope_dimension_count(head)
        writer.add_uint32("gemma2.attention.key_length_swa", head)
        writer.add_sliding_window_pattern(2)

    base = make_model()
    assert open_checkpoint(base).config.head_dim == 16
    write_gguf(tmp_path / "model.gguf", base, TYPES.F16, more=more)
    assert open_source(str(tmp_path / "model.gguf")).config == open_checkpoint(base).config


def test_the_end_of_a_turn_in_a_gguf_ends_an_answer(make_model, tmp_path):
    write_gguf(tmp_path / "model.gguf", make_model(), TYPES.F16, more=lambda writer: writer.add_eot_token_id(7))
    assert open_source(str(tmp_path / "model.gguf")).config.eos_token_ids == (1, 7)


def test_values_of_any_kind_in_a_header(make_model, tmp_path, monkeypatch):
    write_gguf(path := tmp_path / "model.gguf", make_model(), TYPES.F16)
    file, seen = read_gguf(path), set()
    rng = random.Random(4)
    values = [None, True, -1, 2, 2**64, float("nan"), 0.5, "", "x", [], [1], ["a"], [[1], [2]], [float("inf")], b"x"]
    named = ["eot_token_id", "eom_token_id", "add_eos_token", "remove_extra_whitespaces"]
    keys = [*file.metadata, *(f"tokenizer.ggml.{name}" for name in named), "split.count", "general.type"]
    for key in keys:
        for value in rng.sample(values, 6):
            content = {**file.metadata, key: value}
            monkeypatch.setattr(gguf_model, "read_gguf", lambda _, content=content: replace(file, metadata=content))
            try:
                read_chat(merged_model(open_source(str(path)), []))
                seen.add("good")
            except CheckpointError:
                seen.add("refused")
    assert seen == {"good", "refused"}


def test_a_bundle_of_another_release_of_gguf_is_another(make_model, tmp_path, monkeypatch, capsys):
    write_gguf(tmp_path / "model.gguf", make_model(), TYPES.Q8_0)
    recipe = {"checkpoint": "model.gguf", "output": "out", "force_dtype": True, "matrix": {"max_context": [64]}}
    (tmp_path / "m.yaml").write_text(json.dumps(recipe))

    def outcome():
        main(["convert", "--matrix", str(tmp_path / "m.yaml"), "--json", "-q"])
        return json.loads(capsys.readouterr().out)[0]

    made = outcome()
    assert (made["status"], outcome()["status"]) == ("made", "there")
    report = json.loads((Path(made["output"]) / "report" / "convert.json").read_text())
    assert report["made_of"]["libraries"] == {"gguf": metadata.version("gguf")}
    monkeypatch.setattr("rkconvert.sources.gguf_model.version", lambda _: "0.0.1")
    assert "made from something else: its libraries differ" in outcome()["message"]


def test_an_adapter_in_place_of_a_model(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "lora.gguf", "gemma2")
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_tensor("blk.0.attn_q.weight.lora_a", np.zeros((4, 32), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="is an adapter, not a model"):
        open_source(str(tmp_path / "lora.gguf"))
