"""The folder for the toolkit, loaded by transformers, and free of what a stranger put into the checkpoint."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, Gemma2Config, Gemma2ForCausalLM

from rkconvert import demo
from rkconvert.adapters.merged_model import AdapterSource, merged_model
from rkconvert.model.chat_template import read_template
from rkconvert.rules.releases import release
from rkconvert.sources.checkpoint import open_checkpoint
from rkconvert.toolkit.staging import stage
from rkruntime.errors import CheckpointError

MakeModel = Callable[..., Path]


def staged(base: Path, into: Path, loras: tuple[Path, ...] = (), version: str = "1.2.3") -> Path:
    model = merged_model(open_checkpoint(base), [AdapterSource(path) for path in loras])
    into.mkdir()
    stage(model, read_template(model.tokenizer_folder, "<bos>"), release(version), into, lambda done: None)
    return into


def logits(model: Any) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(torch.arange(3, 40)[None]).logits


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16, attn_implementation="eager")


def change(folder: Path, name: str, **values: Any) -> None:
    path = folder / name
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize("family", ["gemma2", "gemma"])
def test_the_model_is_the_same_and_its_files_are_linked(make_model: MakeModel, tmp_path: Path, family: str) -> None:
    base = make_model(family=family)
    folder = staged(base, tmp_path / "staged")
    assert len(list(folder.glob("*.safetensors"))) > 1
    assert all(path.is_symlink() for path in folder.glob("*.safetensors"))
    assert torch.equal(logits(load(folder)), logits(load(base)))


def test_a_model_of_one_file_under_another_name(make_model: MakeModel, tmp_path: Path) -> None:
    base = make_model(shard_size="1GB")
    expected = logits(load(base))
    (base / "model.safetensors").rename(base / "weights.safetensors")
    folder = staged(base, tmp_path / "staged")
    assert (folder / "model.safetensors").is_symlink()
    assert torch.equal(logits(load(folder)), expected)


def test_an_adapter_is_merged(make_model: MakeModel, make_adapter: Callable[..., Path], tmp_path: Path) -> None:
    base = make_model()
    adapter = make_adapter(base)
    folder = staged(base, tmp_path / "staged", (adapter,))
    merged = PeftModel.from_pretrained(load(base), adapter).merge_and_unload()
    assert torch.equal(logits(load(folder)), logits(merged))


def test_no_stranger_s_code(make_model: MakeModel, tmp_path: Path) -> None:
    base = make_model()
    (base / "modeling.py").write_text("raise SystemExit('ran')")
    (base / "rogue.bin").write_bytes(b"\x80\x04pickle")
    change(base, "config.json", auto_map={"AutoModelForCausalLM": "modeling.Rogue"})
    change(base, "tokenizer_config.json", auto_map={"AutoTokenizer": ["modeling.Rogue", None]})
    folder = staged(base, tmp_path / "staged")
    assert not {path.suffix for path in folder.iterdir()} - {".json", ".safetensors"}
    assert "auto_map" not in "".join(path.read_text() for path in folder.glob("*.json"))


STRANGE = {
    "attribute_map": {"rms_norm_eps": "query_pre_attn_scalar"},
    "attn_implementation": "owner/kernel",
    "_attn_implementation": "owner/kernel",
    "text_config": {"hidden_size": 1},
    "peft_config": {},
    "compression_config": {},
    "torch_dtype": {"": "float32"},
    "use_cache": "no",
    "unheard_of": 1,
}


@pytest.mark.parametrize("key", STRANGE)
def test_no_stranger_s_settings(make_model: MakeModel, tmp_path: Path, key: str) -> None:
    base = make_model()
    expected = logits(load(base))
    change(base, "config.json", **{key: STRANGE[key]})
    folder = staged(base, tmp_path / "staged")
    assert json.loads((folder / "config.json").read_text()).get(key) != STRANGE[key]
    assert torch.equal(logits(load(folder)), expected)


CAPS = st.none() | st.integers(1, 80) | st.floats(0.5, 80)
# Values that transformers 4 took as they are.
LEGAL = st.fixed_dictionaries(
    {},
    optional={
        "attn_logit_softcapping": CAPS,
        "final_logit_softcapping": CAPS,
        "query_pre_attn_scalar": st.integers(1, 300) | st.integers(1, 300).map(float),
        "rms_norm_eps": st.sampled_from([1e-6, 1e-5, 1]),
        "rope_theta": st.integers(100, 10**6) | st.floats(100, 1e6),
        "sliding_window": st.integers(1, 4096),
        "initializer_range": st.integers(0, 1) | st.floats(0, 1),
        "attention_dropout": st.none() | st.integers(0, 7) | st.floats(0, 1),
        "pad_token_id": st.none() | st.integers(-2, 1_000_000) | st.just("x"),
        "torch_dtype": st.sampled_from(["float99", "int8", "float32", None, "", 5, ["float32"]]),
        "hidden_act": st.sampled_from(["gelu_pytorch_tanh", "gelu", None, 3]),
        "use_cache": st.sampled_from([True, False, None, 1]),
        "layer_types": st.none() | st.permutations(["full_attention", "sliding_attention"]),
    },
)
SAMPLING = st.dictionaries(
    st.sampled_from(
        ["pad_token_id", "temperature", "num_beams", "watermarking_config", "cache_implementation", "stop_strings",
         "constraints", "early_stopping", "compile_config", "max_new_tokens", "suppress_tokens", "do_sample"]
    ),
    st.none() | st.integers(-2, 2) | st.text(max_size=3) | st.dictionaries(st.text(max_size=3), st.integers()),
    max_size=3,
)  # fmt: skip


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The smallest model that has everything."""
    folder = tmp_path_factory.mktemp("small") / "model"
    config = Gemma2Config(
        vocab_size=1024, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=64, bos_token_id=2, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(3)
    Gemma2ForCausalLM(config).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copyfile(demo.checkpoint() / name, folder / name)
    return folder


@settings(max_examples=40)
@given(config=LEGAL, generation=SAMPLING)
def test_what_transformers_4_took_is_loaded_by_the_installed_one(
    small: Path, tmp_path_factory: pytest.TempPathFactory, config: dict[str, Any], generation: dict[str, Any]
) -> None:
    base = shutil.copytree(small, tmp_path_factory.mktemp("random") / "base")
    change(base, "config.json", **config)
    (base / "generation_config.json").write_text(json.dumps(generation))
    folder = staged(base, base.with_name("staged"))
    # The oracle's own configuration has no strict fields once it is made.
    expected = load(small)
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):
        if key in config:
            setattr(expected.config, key, config[key] and float(config[key]))
    for layer in expected.model.layers:
        layer.self_attn.attn_logit_softcapping = expected.config.attn_logit_softcapping
        layer.self_attn.scaling = config.get("query_pre_attn_scalar", 256) ** -0.5
    found = load(folder)
    assert found.config.pad_token_id in range(1024)
    if config.keys().isdisjoint({"rms_norm_eps", "rope_theta", "sliding_window", "layer_types"}):
        assert torch.equal(logits(found), logits(expected))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_not_linked(make_model: MakeModel, tmp_path: Path, value: float) -> None:
    base = make_model(shard_size="1GB")
    tensors = load_file(base / "model.safetensors")
    tensors["model.layers.1.mlp.gate_proj.weight"][3, 2] = value
    save_file(tensors, base / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match="NaN or infinite"):
        staged(base, tmp_path / "staged")


def test_weights_that_transformers_4_would_not_read_are_written(make_model: MakeModel, tmp_path: Path) -> None:
    """It takes the `format` in the metadata without asking whether there are any."""
    base = make_model(shard_size="1GB")
    save_file(load_file(base / "model.safetensors"), base / "model.safetensors")
    folder = staged(base, tmp_path / "staged")
    assert not (folder / "model.safetensors").is_symlink()
    with safe_open(folder / "model.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt"


def test_what_transformers_5_writes_is_said_as_4_reads_it(make_model: MakeModel, tmp_path: Path) -> None:
    base = make_model(rope_theta=50_000.0)
    assert "rope_parameters" in json.loads((base / "config.json").read_text())
    change(base, "tokenizer_config.json", tokenizer_class="TokenizersBackend", extra_special_tokens=["<start_of_turn>"])
    folder = staged(base, tmp_path / "staged")
    config = json.loads((folder / "config.json").read_text())
    rope = json.loads((base / "config.json").read_text())["rope_parameters"]["rope_theta"]
    assert config["rope_theta"] == rope
    assert not {"rope_parameters", "dtype", "transformers_version"} & set(config)
    assert config["torch_dtype"] == "bfloat16"
    tokenizer = json.loads((folder / "tokenizer_config.json").read_text())
    assert tokenizer["tokenizer_class"] == "GemmaTokenizerFast"
    assert tokenizer["additional_special_tokens"] == ["<start_of_turn>"]


def test_nulls_are_filled_in(make_model: MakeModel, tmp_path: Path) -> None:
    base = make_model()
    change(base, "config.json", attn_logit_softcapping=None, sliding_window=1024)
    expected = logits(load(base))
    # No window: transformers 5 cannot run that itself.
    change(base, "config.json", sliding_window=None, eos_token_id=None, rms_norm_eps=None)
    folder = staged(base, tmp_path / "staged")
    config = json.loads((folder / "config.json").read_text())
    assert {key for key, value in config.items() if value is None} == {"attn_logit_softcapping"}
    assert config["sliding_window"] == 1024
    assert torch.equal(logits(load(folder)), expected)


@pytest.mark.parametrize(
    "written",
    [
        {"architectures": None, "model_type": "gemma2"},
        {"architectures": ["Gemma2ForSequenceClassification", "Gemma2ForCausalLM"], "model_type": "gemma2"},
        {"architectures": ["Gemma2ForCausalLM"], "model_type": None},
    ],
)
def test_the_architecture_is_named_as_the_toolkit_reads_it(
    make_model: MakeModel, tmp_path: Path, edit_json: Callable[..., None], written: dict[str, Any]
) -> None:
    """It goes by the first architecture, transformers by the model_type."""
    base = make_model()
    edit_json(base / "config.json", **written)
    folder = staged(base, tmp_path / "staged")
    config = json.loads((folder / "config.json").read_text())
    assert (config["architectures"], config["model_type"]) == (["Gemma2ForCausalLM"], "gemma2")
    assert isinstance(load(folder), Gemma2ForCausalLM)


@pytest.mark.parametrize(("version", "eos"), [("1.1.4", 1), ("1.2.3", 1), ("1.3.0", [1, 6])])
def test_end_tokens(make_model: MakeModel, tmp_path: Path, version: str, eos: object) -> None:
    base = make_model()
    (base / "generation_config.json").write_text('{"eos_token_id": [1, 6]}')
    folder = staged(base, tmp_path / "staged", version=version)
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == eos
    assert json.loads((folder / "generation_config.json").read_text())["eos_token_id"] == [1, 6]


def test_the_template_is_where_every_release_looks(make_model: MakeModel, tmp_path: Path) -> None:
    base = make_model()
    source = (base / "chat_template.jinja").read_text()
    settings = json.loads((base / "tokenizer_config.json").read_text())
    (base / "tokenizer_config.json").write_text(
        json.dumps({key: value for key, value in settings.items() if key != "chat_template"})
    )
    folder = staged(base, tmp_path / "staged")
    assert json.loads((folder / "tokenizer_config.json").read_text())["chat_template"] == source
    chat = [{"role": "user", "content": "hello"}]
    expected = AutoTokenizer.from_pretrained(base).apply_chat_template(chat, tokenize=False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.apply_chat_template(chat, tokenize=False) == expected
    assert tokenizer("hello").input_ids[0] == 2


def test_the_tokenizer_cuts_and_fills_nothing(make_model: MakeModel, tmp_path: Path) -> None:
    base = make_model()
    file = base / "tokenizer.json"
    backend = Tokenizer.from_file(str(file))
    texts = ["What is it? " * 50, "x"]
    expected = [item.ids for item in backend.encode_batch(texts)]
    backend.enable_truncation(3)
    backend.enable_padding(length=70)
    backend.save(str(file))
    folder = staged(base, tmp_path / "staged")
    assert [item.ids for item in Tokenizer.from_file(str(folder / "tokenizer.json")).encode_batch(texts)] == expected
