"""Whole conversions for the emulator: what is in the file, what is left after a failure, how much memory it takes."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import closing
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file as save_numpy
from safetensors.torch import load_file
from tokenizers import Tokenizer

from rkconvert import demo
from rkconvert.demo import tokenizer as demo_tokenizer
from rkconvert.emulated.quantize import quantize_rows
from rkconvert.model.families import FAMILIES
from rkconvert.model.gemma import parse_config
from rkconvert.output.hf_folder import plan_shards
from rkconvert.tensors.weights import TensorInfo
from rkruntime.bundle.manifest import open_bundle
from rkruntime.bundle.rkemu import read_container
from rkruntime.cli import main
from rkruntime.text.prompt_process import PromptProcess


def convert(*arguments: object) -> int:
    return main(["convert", *map(str, arguments), "--quiet"])


# what is in the file


@pytest.mark.parametrize("family", ["gemma2", "gemma"])
def test_the_file_holds_the_merged_weights(make_model, make_adapter, peft_merge, tmp_path, family):
    base = make_model(family=family)
    adapter = make_adapter(base)
    assert convert(base, "--lora", adapter, "-o", tmp_path / "bundle") == 0
    container = read_container(tmp_path / "bundle" / "model.rkemu")
    theirs = peft_merge(base, {adapter: 1.0})
    names = {FAMILIES[family].to_rkemu(name): name for name in theirs if name != "lm_head.weight"}
    for name, source in names.items():
        values = theirs[source].float().numpy()
        if values.ndim == 1:
            np.testing.assert_array_equal(container.read(name), values)
            continue
        expected, scale = quantize_rows(values, values.shape[1])
        np.testing.assert_array_equal(container.read(name), expected)
        np.testing.assert_array_equal(container.read(f"{name}.scale"), scale)
    others = set(container.tensors) - set(names) - {f"{name}.scale" for name in names}
    assert others == {f"tokenizer.{part}" for part in ("text", "offsets", "kinds", "merges")}


def test_an_oracle_in_float32_is_exact(make_model, tmp_path):
    base = make_model(tie_word_embeddings=False)
    assert convert(base, "--dtype", "fp32", "-o", tmp_path / "bundle") == 0
    container = read_container(tmp_path / "bundle" / "model.rkemu")
    state = {name: tensor for file in base.glob("*.safetensors") for name, tensor in load_file(file).items()}
    for name, tensor in state.items():
        np.testing.assert_array_equal(container.read(FAMILIES["gemma2"].to_rkemu(name)), tensor.float().numpy())
    assert "output" in container.tensors


def test_groups(make_model, tmp_path):
    base = make_model(hidden_size=256, intermediate_size=512, num_attention_heads=16, head_dim=16)
    output = tmp_path / "bundle"
    assert convert(base, "--dtype", "w8a8_g128", "--force-dtype", "-o", output) == 0
    container = read_container(output / "model.rkemu")
    assert container.read("blk.0.ffn_down.scale").shape == (256, 4)
    assert container.metadata["rkllm.model_dtype"] == "W8A8_G128"
    assert any("w8a8_g128" in note for note in open_bundle(output).manifest.notes)


def test_the_demo_bundle(tmp_path):
    output = tmp_path / "pirate"
    assert convert(demo.checkpoint(), "--lora", demo.adapter(), "-o", output) == 0
    bundle = open_bundle(output)
    bundle.verify(trust_stamps=False)
    manifest = bundle.manifest
    assert (manifest.family, manifest.dtype, manifest.platform, manifest.max_context) == (
        "gemma2",
        "w8a8",
        "rk3588",
        4096,
    )
    assert manifest.stop_token_ids == (demo_tokenizer.EOS, demo_tokenizer.END_OF_TURN)
    assert manifest.parameters == sum(p.numel() for p in _state(demo.checkpoint()).values())
    assert [adapter.name for adapter in manifest.adapters] == ["pirate"]
    assert {"README.md", "model.rkemu", "tokenizer.json", "chat_template.jinja", "generation_config.json"} < set(
        manifest.files
    )
    card = (output / "README.md").read_text()
    assert "emulator" in card
    assert "ai.google.dev/gemma/terms" in card
    assert str(tmp_path) not in (output / "rkedge.yaml").read_text()
    metadata = read_container(bundle.model).metadata
    assert metadata["rkllm.chat_template.prefix"] == "<start_of_turn>user\n"
    assert metadata["rkllm.chat_template.suffix"] == "<end_of_turn>\n<start_of_turn>model\n"
    assert metadata["tokenizer.eos_token_ids"] == [107, 1]


def _state(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_tokenizer_tables_spell_every_token(tmp_path):
    assert convert(demo.checkpoint(), "-o", tmp_path / "bundle") == 0
    container = read_container(tmp_path / "bundle" / "model.rkemu")
    text, offsets = container.read("tokenizer.text").tobytes(), container.read("tokenizer.offsets")
    kinds, merges = container.read("tokenizer.kinds"), container.read("tokenizer.merges")
    theirs = Tokenizer.from_file(str(demo.checkpoint() / "tokenizer.json"))
    texts = [text[first:last] for first, last in pairwise(offsets)]
    for index, own in enumerate(texts):
        token = theirs.id_to_token(index) or ""
        assert own == (bytes([int(token[3:5], 16)]) if kinds[index] == 2 else token.encode())
    assert [bytes(texts[result]) for _, _, result in merges] == [
        texts[left] + texts[right] for left, right, _ in merges
    ]
    model = json.loads((demo.checkpoint() / "tokenizer.json").read_text())["model"]
    assert [(texts[left].decode(), texts[right].decode()) for left, right, _ in merges] == [
        tuple(merge) for merge in model["merges"]
    ]


def test_merges_written_the_older_way(make_model, tmp_path, edit_json):
    base = make_model()
    assert convert(base, "-o", tmp_path / "new") == 0
    model = json.loads((base / "tokenizer.json").read_text())["model"]
    edit_json(base / "tokenizer.json", model=model | {"merges": [" ".join(pair) for pair in model["merges"]]})
    assert convert(base, "-o", tmp_path / "old") == 0
    new, old = (read_container(tmp_path / name / "model.rkemu") for name in ("new", "old"))
    assert new.fingerprint == old.fingerprint


def test_rope_theta_is_found_in_both_places(make_model, tmp_path, edit_json):
    base = make_model()
    edit_json(base / "config.json", rope_parameters={"rope_type": "default", "rope_theta": 5000.0})
    assert convert(base, "-o", tmp_path / "new") == 0
    edit_json(base / "config.json", rope_parameters=None, rope_theta=5000.0)
    assert convert(base, "-o", tmp_path / "old") == 0
    for name in ("new", "old"):
        assert read_container(tmp_path / name / "model.rkemu").metadata["model.rope_theta"] == 5000.0


def test_a_grown_vocabulary_brings_its_own_tokenizer(make_model, make_adapter, tmp_path, tokenizer):
    base = make_model()
    adapter = make_adapter(base, prepare=lambda model: model.resize_token_embeddings(1056, mean_resizing=False))
    demo_tokenizer.save(tokenizer, adapter)
    content = json.loads((adapter / "tokenizer.json").read_text())
    following = 1 + max(*content["model"]["vocab"].values(), *(token["id"] for token in content["added_tokens"]))
    content["added_tokens"].append(content["added_tokens"][0] | {"id": following, "content": "<new>"})
    (adapter / "tokenizer.json").write_text(json.dumps(content))
    assert convert(base, "--lora", adapter, "-o", tmp_path / "bundle") == 0
    container = read_container(tmp_path / "bundle" / "model.rkemu")
    assert container.metadata["model.vocab_size"] == 1056
    assert b"<new>" in container.read("tokenizer.text").tobytes()
    assert "<new>" in (tmp_path / "bundle" / "tokenizer.json").read_text()


def test_rows_that_fill_up_the_embedding(make_model, tmp_path, tokenizer):
    """Ids without a token: one may end an answer, and the bundle still opens."""
    rows = 64 + tokenizer.get_vocab_size()
    base = make_model(vocab_size=rows, eos_token_id=[1, rows - 1])
    assert convert(base, "-o", tmp_path / "bundle") == 0
    bundle = open_bundle(tmp_path / "bundle")
    assert rows - 1 in bundle.manifest.stop_token_ids
    assert bundle.manifest.vocab_size == rows
    with closing(PromptProcess(bundle)) as prompts:
        assert prompts.vocabulary.vocab_size == rows
    whole = make_model("whole", vocab_size=tokenizer.get_vocab_size())
    assert convert(whole, "-o", tmp_path / "other") == 0
    assert open_bundle(tmp_path / "other").manifest.vocab_size == 0


@pytest.mark.parametrize("own", ["<start_of_turn>", "<bos>"])
def test_texts_begin_with_bos_or_with_the_tokenizers_own_token(make_model, tmp_path, tokenizer, edit_json, own):
    """As after trl's setup_chat_format, which gives ChatML's first token to both, or to the tokenizer alone."""
    base = make_model(bos_token_id=tokenizer.token_to_id(own))
    (base / "special_tokens_map.json").unlink()
    edit_json(base / "tokenizer_config.json", bos_token="<start_of_turn>")
    assert convert(base, "-o", tmp_path / "bundle") == 0
    assert open_bundle(tmp_path / "bundle").manifest.bos_token_id == tokenizer.token_to_id(own)


def test_a_template_with_a_system_role(make_model, tmp_path):
    base = make_model()
    (base / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content }}<end_of_turn>\n{% endfor %}"
        "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
    )
    assert convert(base, "-o", tmp_path / "bundle") == 0
    assert open_bundle(tmp_path / "bundle").manifest.system_role == "native"


# what is refused before any work


def sparse_checkpoint(folder: Path, **sizes: int) -> Path:
    """Headers of a real size over files without content."""
    folder.mkdir()
    settings = {"architectures": ["Gemma2ForCausalLM"], **sizes}
    (folder / "config.json").write_text(json.dumps(settings))
    tensors = {name: TensorInfo("BF16", shape) for name, shape in parse_config(settings).tensors().items()}
    plan = plan_shards(tensors, 1 << 62)[0]
    with (folder / "model.safetensors").open("wb") as file:
        file.write(plan.header())
        file.truncate(len(plan.header()) + plan.nbytes)
    return folder


NINE = {
    "hidden_size": 3584,
    "intermediate_size": 14336,
    "num_hidden_layers": 42,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
}


@pytest.mark.parametrize(
    ("sizes", "dtype", "words"),
    [
        ({}, "w4a16", ["supports a 4-bit type", "int8 weights", "2.61 GB"]),
        ({}, "w8a8_g128", ["57 % of the speed", "5.49", "9.67", "vendor figure", "--force-dtype"]),
        (
            NINE,
            "w8a8_g128",
            [
                "4 GiB",
                "9.24 GB of int8 weights",
                "errno: 14",
                "Bad address",
                "failed to malloc npu memory, size: 232128512, flags: 0x2",
                "rknn_init fail! ret=-1",
                "RKLLM 1.1.1",
                "Use --dtype w8a8",
                "--force-dtype",
            ],
        ),
    ],
)
def test_types_are_refused_with_their_reason(tmp_path, capsys, sizes, dtype, words):
    base = sparse_checkpoint(tmp_path / "gemma", **sizes)
    assert convert(base, "--dtype", dtype, "-o", tmp_path / "bundle") == 4
    said = " ".join(capsys.readouterr().err.split())
    assert [word for word in words if word not in said] == []
    assert list(tmp_path.iterdir()) == [base]


def test_contexts(make_model, tmp_path, capsys):
    base = make_model(max_position_embeddings=512)
    for asked in ("1024", "100", "0", "-32"):
        assert convert(base, "--max-context", asked, "-o", tmp_path / "bundle") == 2
        assert "--max-context" in capsys.readouterr().err
    assert convert(base, "--max-context", 256, "-o", tmp_path / "bundle") == 0
    assert open_bundle(tmp_path / "bundle").manifest.max_context == 256


def test_a_folder_that_exists_and_one_that_does_not(make_model, tmp_path, capsys):
    base = make_model()
    (tmp_path / "there").mkdir()
    assert convert(base, "-o", tmp_path / "there") == 3
    assert "exists already" in capsys.readouterr().err
    assert convert(base, "-o", tmp_path / "no" / "where") == 3
    assert "no folder" in capsys.readouterr().err


def test_a_disk_that_is_too_small(make_model, tmp_path, capsys, monkeypatch):
    base = make_model()
    monkeypatch.setattr("shutil.disk_usage", lambda _: type("Usage", (), {"total": 100, "used": 99, "free": 1}))
    assert convert(base, "-o", tmp_path / "bundle") == 5
    assert "B free" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == [base]


# what is left when it goes wrong


@pytest.mark.parametrize("command", ["convert", "merge"])
def test_a_disk_that_fills_up(make_model, make_adapter, tmp_path, capsys, monkeypatch, command):
    base = make_model()
    adapter = make_adapter(base)
    before = sorted(tmp_path.rglob("*"))

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("rkruntime.bundle.rkemu.Writer.write_rows", full)
    monkeypatch.setattr("rkconvert.output.hf_folder._write", full)
    assert main([command, str(base), "--lora", str(adapter), "-o", str(tmp_path / "out"), "--quiet"]) == 5
    assert "disk is full" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.fixture(scope="module")
def larger(tmp_path_factory):
    """A model that takes long enough to be killed: `larger(layers, shards)` with an adapter."""
    made: dict[tuple[int, int], tuple[Path, Path]] = {}

    def make(layers: int, shards: int) -> tuple[Path, Path]:
        if (layers, shards) in made:
            return made[layers, shards]
        folder = tmp_path_factory.mktemp("larger")
        base, lora = folder / "base", folder / "lora"
        base.mkdir()
        lora.mkdir()
        settings = {
            "architectures": ["Gemma2ForCausalLM"],
            "vocab_size": 1024,
            "hidden_size": 512,
            "intermediate_size": 2048,
            "num_hidden_layers": layers,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 64,
        }
        (base / "config.json").write_text(json.dumps(settings))
        demo_tokenizer.save(demo_tokenizer.build(["three cores"] * 5), base)
        rng = np.random.default_rng(0)
        shapes = parse_config(settings).tensors()
        weights = {name: rng.standard_normal(shape, np.float32).astype(np.float16) for name, shape in shapes.items()}
        index = {name: f"model-{at % shards}.safetensors" for at, name in enumerate(sorted(shapes))}
        for file in set(index.values()):
            save_numpy({name: weights[name] for name in shapes if index[name] == file}, base / file)
        (base / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
        pairs = {}
        for name, shape in shapes.items():
            if "_proj" in name:
                module = f"base_model.model.{name.removesuffix('.weight')}"
                pairs[f"{module}.lora_A.weight"] = rng.standard_normal((8, shape[1]), np.float32)
                pairs[f"{module}.lora_B.weight"] = rng.standard_normal((shape[0], 8), np.float32)
        save_numpy(pairs, lora / "adapter_model.safetensors")
        settings = {"peft_type": "LORA", "r": 8, "lora_alpha": 8, "target_modules": "all-linear"}
        (lora / "adapter_config.json").write_text(json.dumps(settings))
        made[layers, shards] = base, lora
        return base, lora

    return make


RUN = "import sys; from rkruntime.cli import main; sys.exit(main(sys.argv[1:]))"


def start(command: str, base: Path, lora: Path, output: Path) -> subprocess.Popen[bytes]:
    arguments = [command, str(base), "--lora", str(lora), "-o", str(output), "--quiet"]
    # What it computes is not on the disk before it is whole; the kills at each step are with it.
    arguments += ["--no-selftest"] if command == "convert" else []
    return subprocess.Popen([sys.executable, "-c", RUN, *arguments], stdout=subprocess.DEVNULL)


def digest(folder: Path) -> dict[str, bytes]:
    return {
        path.name: path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.suffix in (".rkemu", ".safetensors", ".json") and path.parent.name != "report"
    }


@pytest.mark.parametrize("command", ["convert", "merge"])
def test_a_kill_at_any_moment(larger, tmp_path, command):
    base, lora = larger(10, 2)
    whole = tmp_path / "whole"
    began = time.monotonic()
    assert start(command, base, lora, whole).wait() == 0
    seconds = time.monotonic() - began
    expected, output = digest(whole), tmp_path / "out"
    random.seed(command)
    for _ in range(4):
        process = start(command, base, lora, output)
        time.sleep(random.uniform(0.3, 1.0) * seconds)
        process.send_signal(signal.SIGKILL)
        process.wait()
        if output.exists():
            assert digest(output) == expected
            shutil.rmtree(output)
    assert start(command, base, lora, output).wait() == 0
    assert digest(output) == expected
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "out"}


def peak_memory(command: str, base: Path, lora: Path, output: Path) -> int:
    """Bytes. VmHWM belongs to the new program alone; ru_maxrss would begin with the peak of the one that starts it."""
    report = "import sys; from rkruntime.cli import main; main(sys.argv[1:]); print(open('/proc/self/status').read())"
    arguments = [command, str(base), "--lora", str(lora), "-o", str(output), "--quiet"]
    done = subprocess.run([sys.executable, "-c", report, *arguments], capture_output=True, check=True, text=True)
    return int(re.search(r"VmHWM:\s+(\d+) kB", done.stdout)[1]) * 1024


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())


@pytest.mark.parametrize("command", ["convert", "merge"])
def test_memory_does_not_grow_with_the_model(larger, tmp_path, command):
    small, large = larger(2, 1), larger(24, 24)
    first = peak_memory(command, *small, tmp_path / "small")
    second = peak_memory(command, *large, tmp_path / "large")
    assert size(large[0]) - size(small[0]) > 100e6
    # Adapters are held in memory.
    assert second - first < size(large[1]) + 16e6
