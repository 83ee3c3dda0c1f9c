"""Checkpoints, adapters and GGUF files broken in every way we could think of: each refused in its own words.

Each row breaks a good input. `rkedge convert` must end with exit code 3, one message that says what is wrong, and
nothing written; nothing that the files contain is ever run.
"""

from __future__ import annotations

import json
import pickle
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rkruntime.cli import main

NORM = "model.layers.1.post_attention_layernorm.weight"
QUERY = "model.layers.1.self_attn.q_proj.weight"
LORA = "base_model.model.model.layers.1.self_attn.q_proj.lora_A.weight"


class Runs:
    """A pickle that would leave a trace if it were loaded."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("ran"),))


def config(folder: Path, **changes: Any) -> None:
    content = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in content.items() if value != "gone"}))


def tensors(folder: Path, change: Callable[[dict[str, torch.Tensor]], object], file: str = "model.safetensors") -> None:
    found = load_file(folder / file)
    change(found)
    save_file({name: tensor.clone() for name, tensor in found.items()}, folder / file)


def header(folder: Path, change: Callable[[dict[str, Any]], object], file: str = "model.safetensors") -> None:
    """Change the header of a safetensors file and keep its data."""
    data = (folder / file).read_bytes()
    size = int.from_bytes(data[:8], "little")
    content = json.loads(data[8 : 8 + size])
    change(content)
    text = json.dumps(content).encode()
    (folder / file).write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])


def shard(folder: Path) -> None:
    """Two shards and an index in place of one file."""
    found = load_file(folder / "model.safetensors")
    names = sorted(found)
    index = {name: f"model-0000{1 + at % 2}-of-00002.safetensors" for at, name in enumerate(names)}
    for file in set(index.values()):
        save_file({name: found[name] for name in names if index[name] == file}, folder / file)
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def index(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    shard(folder)
    path = folder / "model.safetensors.index.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def other_shard(name: str) -> str:
    return name.replace("-00001-", "-x-").replace("-00002-", "-00001-").replace("-x-", "-00002-")


def cut(path: Path, keep: float) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])


def write(path: Path, data: bytes | str) -> None:
    path.write_bytes(data if isinstance(data, bytes) else data.encode())


def tokenizer(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))


def in_bin(folder: Path, data: bytes) -> None:
    (folder / "model.safetensors").unlink()
    write(folder / "pytorch_model.bin", data)


def not_downloaded(path: Path) -> None:
    """Leave a link as those in the hub's cache, to a blob that is not there."""
    path.unlink(missing_ok=True)
    path.symlink_to("../../blobs/0123")


def put(value: float) -> Callable[[dict[str, torch.Tensor]], object]:
    def change(found: dict[str, torch.Tensor]) -> None:
        found[QUERY][3, 4] = value

    return change


LFS = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"
SEPARATE = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}

# What is done to a good checkpoint, and the words in which it must be refused.
CHECKPOINTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "a folder of nothing": (
        lambda f: [path.unlink() for path in f.iterdir()],
        r"is not a checkpoint: it has no config",
    ),
    "an adapter in place of the model": (
        lambda f: ((f / "config.json").unlink(), write(f / "adapter_config.json", "{}")),
        "is a LoRA adapter, not a model",
    ),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "has no weights"),
    "config.json is no JSON": (lambda f: write(f / "config.json", "{"), r"config\.json is not JSON"),
    "config.json is a list": (lambda f: write(f / "config.json", "[1]"), "contains a JSON list"),
    "config.json is deep": (lambda f: write(f / "config.json", "[" * 200_000), r"config\.json is not JSON"),
    "config.json is an LFS pointer": (lambda f: write(f / "config.json", LFS), r"config\.json is a Git LFS pointer"),
    "weights are an LFS pointer": (lambda f: write(f / "model.safetensors", LFS), r"safetensors is a Git LFS pointer"),
    "another architecture": (lambda f: config(f, **SEPARATE), "is a LlamaForCausalLM; supported are Gemma2ForCausalLM"),
    "no architecture": (lambda f: config(f, architectures="gone", model_type="gone"), "names neither an architecture"),
    "a width that is a text": (lambda f: config(f, hidden_size="64"), "hidden_size is '64'"),
    "a negative number of layers": (lambda f: config(f, num_hidden_layers=-3), "num_hidden_layers is -3"),
    "a layer too many": (lambda f: config(f, num_hidden_layers=4), r"lacks the tensor model\.layers\.2"),
    "absurdly many layers": (lambda f: config(f, num_hidden_layers=2**40), "num_hidden_layers is 1099511627776"),
    "heads that do not divide": (lambda f: config(f, num_attention_heads=3), "3 attention heads cannot share 2"),
    "rope scaling": (
        lambda f: config(f, rope_scaling={"type": "linear", "factor": 2}),
        "rope_scaling asks for 'linear'",
    ),
    "an end token beyond the vocabulary": (lambda f: config(f, eos_token_id=99999), "eos_token_id is 99999"),
    "a first token that does not exist": (lambda f: config(f, bos_token_id=1023), "bos_token_id is 1023, which is not"),
    "an awq checkpoint": (lambda f: config(f, quantization_config={"quant_method": "awq"}), "already quantized by awq"),
    "a file of text": (lambda f: write(f / "model.safetensors", "x" * 500), "is not a safetensors file"),
    "an empty weight file": (lambda f: write(f / "model.safetensors", b""), "is not a safetensors file"),
    "a cut weight file": (lambda f: cut(f / "model.safetensors", 0.6), "is cut: the tensor"),
    "a file cut inside its header": (lambda f: cut(f / "model.safetensors", 0.002), "ends inside its header"),
    "a header of a terabyte": (
        lambda f: write(f / "model.safetensors", struct.pack("<Q", 1 << 40) + b"{" + bytes(99)),
        "claims a header of 1,099,511,627,776 bytes",
    ),
    "a header that is no JSON": (
        lambda f: write(f / "model.safetensors", struct.pack("<Q", 20) + b"{" + b"]" * 400),
        "header of .* is not JSON",
    ),
    "a tensor without a shape": (
        lambda f: header(f, lambda h: h[QUERY].pop("shape")),
        "describes the tensor .*q_proj.* in an unknown way",
    ),
    "a tensor of negative size": (
        lambda f: header(f, lambda h: h[QUERY].update(shape=[-64, -64])),
        "describes the tensor .*q_proj.* in an unknown way",
    ),
    "a tensor of an unknown format": (lambda f: header(f, lambda h: h[QUERY].update(dtype="F4")), "the format F4"),
    "a tensor larger than its bytes": (
        lambda f: header(f, lambda h: h[QUERY].update(shape=[64, 640])),
        r"takes 8,192 bytes; BF16 \[64, 640\] would take 81,920",
    ),
    "tensors that overlap": (
        lambda f: header(f, lambda h: h[NORM].update(data_offsets=[o - 2 for o in h[NORM]["data_offsets"]])),
        "overlaps another tensor",
    ),
    "a tensor that is missing": (lambda f: tensors(f, lambda t: t.pop(NORM)), "lacks the tensor .*post_attention"),
    "a tensor too many": (
        lambda f: tensors(f, lambda t: t.update({"model.layers.0.self_attn.q_proj.lora_A": t[NORM]})),
        r"has the tensor .*lora_A, which a model with this config",
    ),
    "a matrix of another shape": (
        lambda f: tensors(f, lambda t: t.update({QUERY: t[QUERY][:32].contiguous()})),
        r"has the shape \[32, 64\]; config\.json requires \[64, 64\]",
    ),
    "integers without scales": (
        lambda f: tensors(f, lambda t: t.update({QUERY: t[QUERY].int()})),
        "contains I32 numbers",
    ),
    "NaN": (lambda f: tensors(f, put(float("nan"))), "has NaN or infinite weights"),
    "infinity": (lambda f: tensors(f, put(float("-inf"))), "has NaN or infinite weights"),
    "a float64 that is infinite as float32": (
        lambda f: tensors(f, lambda t: t.update({NORM: t[NORM].double() - 1e39})),
        "has NaN or infinite weights",
    ),
    "an index that lost a shard": (
        lambda f: (shard(f), (f / "model-00002-of-00002.safetensors").unlink()),
        "lacks the file model-00002-of-00002",
    ),
    "an index that leaves the folder": (
        lambda f: index(f, lambda i: i["weight_map"].update({NORM: "../../etc/passwd"})),
        r"names a file outside the folder: '\.\./\.\./etc/passwd'",
    ),
    "an index with an absolute path": (
        lambda f: index(f, lambda i: i["weight_map"].update({NORM: "/etc/passwd"})),
        "names a file outside the folder: '/etc/passwd'",
    ),
    "an index that names the wrong shard": (
        lambda f: index(f, lambda i: i["weight_map"].update({NORM: other_shard(i["weight_map"][NORM])})),
        r"the index says that .*post_attention_layernorm.* is in model-0000",
    ),
    "an index with a name that no file can have": (
        lambda f: index(f, lambda i: i["weight_map"].update({NORM: "a" * 3000})),
        "lacks the file a{80}, which",
    ),
    "an index without a map": (lambda f: index(f, lambda i: i.pop("weight_map")), "has no weight_map"),
    "shards without their index": (
        lambda f: (shard(f), (f / "model.safetensors.index.json").unlink()),
        r"not the model\.safetensors\.index\.json",
    ),
    "a pickle that runs code": (lambda f: in_bin(f, pickle.dumps(Runs())), r"not a \.bin file of torch 1\.6"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), r"has no tokenizer\.json"),
    "a template that was not downloaded": (
        lambda f: not_downloaded(f / "chat_template.jinja"),
        r"chat_template\.jinja is not a file: .* a link to a file that is missing",
    ),
    "end tokens that were not downloaded": (
        lambda f: not_downloaded(f / "generation_config.json"),
        r"generation_config\.json is not a file",
    ),
    "a folder in place of added tokens": (lambda f: (f / "added_tokens.json").mkdir(), "is not a file: it is a folder"),
    "another first token than the tokenizer's": (
        lambda f: config(f, bos_token_id=5),
        "bos_token_id is 5, which is the token .*, but the tokenizer begins texts with <bos>",
    ),
    "a tokenizer of another kind": (
        lambda f: tokenizer(f, lambda t: t["model"].update(type="Unigram")),
        "it is a Unigram tokenizer",
    ),
    "a tokenizer that lowers letters": (
        lambda f: tokenizer(f, lambda t: t.update(normalizer={"type": "Lowercase"})),
        "its normalizer is Lowercase",
    ),
    "a tokenizer of a larger model": (
        lambda f: tokenizer(f, lambda t: t["model"]["vocab"].update(more=5000)),
        "the token 'more' has the id 5000, but the model has 1024 tokens",
    ),
    "a tokenizer without bytes": (
        lambda f: tokenizer(f, lambda t: t["model"]["vocab"].pop("<0x41>")),
        "does not have a token for every byte",
    ),
    "merges of unknown parts": (
        lambda f: tokenizer(f, lambda t: t["model"]["merges"].append(["no", "where"])),
        "is not a tokenizer of the `tokenizers` library",
    ),
    "a template that loops for ever": (
        lambda f: write(f / "chat_template.jinja", "{% for i in range(10**9) %}{% endfor %}"),
        "template cannot be rendered",
    ),
    "a template that reaches for Python": (
        lambda f: write(f / "chat_template.jinja", "{{ ''.__class__.__mro__[1].__subclasses__() }}"),
        "template cannot be rendered",
    ),
    "a template that drops the question": (
        lambda f: write(f / "chat_template.jinja", "<bos>hello"),
        "does not put the user's words into the prompt",
    ),
}

# What is done to a good adapter, and the words in which it must be refused.
ADAPTERS: dict[str, tuple[Callable[[Path], object], str]] = {
    "no settings": (lambda f: (f / "adapter_config.json").unlink(), r"is not an adapter: it has no adapter_config"),
    "no weights": (lambda f: (f / "adapter_model.safetensors").unlink(), "has no weights"),
    "weights cut": (lambda f: cut(f / "adapter_model.safetensors", 0.5), "is cut: the tensor"),
    "another method": (lambda f: settings(f, peft_type="IA3"), "of peft's type 'IA3'"),
    "PiSSA": (lambda f: settings(f, init_lora_weights="pissa_niter_4"), "initialized as PiSSA"),
    "LoftQ": (lambda f: settings(f, init_lora_weights="loftq"), "initialized as LoftQ"),
    "an unknown beginning": (lambda f: settings(f, init_lora_weights="magic"), "init_lora_weights is 'magic'"),
    "aLoRA": (lambda f: settings(f, alora_invocation_tokens=[1]), "it uses aLoRA"),
    "repeated layers": (lambda f: settings(f, layer_replication=[[0, 2]]), "it uses repeated layers"),
    "another rank than it says": (lambda f: settings(f, r=16), "have rank 4 and 4, but its settings say 16"),
    "a rank of nothing": (lambda f: settings(f, r=0), "r of .* is 0; it must be a positive number"),
    "unknown modules": (
        lambda f: settings(f, target_modules=["Wqkv"]),
        "targets Wqkv, but the base model has no such module",
    ),
    "a layer that the base has not": (
        lambda f: tensors(f, lambda t: t.update({LORA.replace("s.1.", "s.9."): t[LORA]}), "adapter_model.safetensors"),
        r"changes model\.layers\.9\.self_attn\.q_proj, which the base model does not have",
    ),
    "half a pair": (
        lambda f: tensors(f, lambda t: t.pop(LORA), "adapter_model.safetensors"),
        "has no lora_A for .*q_proj, only its counterpart",
    ),
    "a base of another width": (
        lambda f: tensors(f, lambda t: t.update({LORA: torch.cat([t[LORA], t[LORA]], 1)}), "adapter_model.safetensors"),
        r"changes model\.layers\.1\.self_attn\.q_proj by a matrix \[64, 128\]; the base model's is \[64, 64\]",
    ),
    "NaN": (
        lambda f: tensors(f, lambda t: t[LORA].fill_(float("nan")), "adapter_model.safetensors"),
        "q_proj.lora_A.weight has NaN",
    ),
    "a tensor of no known kind": (
        lambda f: tensors(f, lambda t: t.update({"base_model.model.x.oft_r": t[LORA]}), "adapter_model.safetensors"),
        "has the tensor .*oft_r, which no supported kind of LoRA has",
    ),
    "a pattern that would be searched for ever": (
        lambda f: settings(f, alpha_pattern={"(a+)+$": 3}),
        "too complex to be matched safely",
    ),
    "a pickle that runs code": (
        lambda f: (
            (f / "adapter_model.safetensors").unlink(),
            write(f / "adapter_model.bin", pickle.dumps(Runs())),
        ),
        r"not a \.bin file of torch 1\.6",
    ),
}


def settings(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def gguf(
    architecture: bytes = b"gemma2", version: int = 3, values: int = 1, tensors: int = 0, rest: bytes = b""
) -> bytes:
    key = b"general.architecture"
    text = struct.pack("<Q", len(key)) + key + struct.pack("<IQ", 8, len(architecture)) + architecture
    return b"GGUF" + struct.pack("<IQQ", version, tensors, values) + text + rest


GGUFS: dict[str, tuple[bytes, str]] = {
    "a ZIP archive": (b"PK\x03\x04" + bytes(100), "is not a GGUF file"),
    "an LFS pointer": (LFS.encode(), "is a Git LFS pointer"),
    "an empty file": (b"", "is not a GGUF file"),
    "version 1": (gguf(version=1), "is GGUF version 1"),
    "big-endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0) + bytes(99), "is GGUF version 50331648"),
    "another architecture": (gguf(b"llama"), "has the architecture 'llama'"),
    "a header that ends early": (gguf(values=7), "its header ends early"),
    "more tensors than there are atoms": (gguf(tensors=1 << 60), "claims 1,152,921,504,606,846,976 tensors"),
    "an endless array": (
        gguf(values=2, rest=struct.pack("<Q", 1) + b"x" + struct.pack("<IIQ", 9, 4, 1 << 62)),
        "values in an array",
    ),
    "an endless text": (gguf(values=2, rest=struct.pack("<Q", 1 << 61) + b"x"), "its header ends early"),
    "an unknown type of value": (
        gguf(values=2, rest=struct.pack("<Q", 1) + b"x" + struct.pack("<I", 77) + bytes(64)),
        "has the unknown type 77",
    ),
    "a tensor of nine dimensions": (
        gguf(tensors=1, rest=struct.pack("<Q", 1) + b"t" + struct.pack("<I", 9) + bytes(200)),
        "has 9 dimensions",
    ),
    "far more values than a Gemma has": (
        gguf(
            values=20,
            rest=b"".join(struct.pack("<QBIIQ", 1, 65 + at, 9, 0, 1 << 20) + bytes(1 << 20) for at in range(9)),
        ),
        "more than 8,388,608 values",
    ),
    "settings missing": (gguf(), r"lacks gemma2\.attention\.head_count"),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small checkpoint and an adapter for it, made once."""
    from rkconvert.demo import tokenizer as demo_tokenizer
    from rkconvert.model.gemma import parse_config

    folder = tmp_path_factory.mktemp("good")
    base, lora = folder / "base", folder / "lora"
    base.mkdir()
    lora.mkdir()
    content = {
        "architectures": ["Gemma2ForCausalLM"],
        "model_type": "gemma2",
        "vocab_size": 1024,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
    }
    (base / "config.json").write_text(json.dumps(content))
    shapes = parse_config(content).tensors()
    made = {name: (torch.randn(shape) * 0.05).bfloat16() for name, shape in shapes.items()}
    save_file(made, base / "model.safetensors")
    demo_tokenizer.save(demo_tokenizer.build(["three cores and a token"] * 10), base)
    pairs = {}
    for name, shape in shapes.items():
        if "q_proj" in name:
            module = f"base_model.model.{name.removesuffix('.weight')}"
            pairs[f"{module}.lora_A.weight"] = torch.randn(4, shape[1])
            pairs[f"{module}.lora_B.weight"] = torch.randn(shape[0], 4)
    save_file(pairs, lora / "adapter_model.safetensors")
    (lora / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]})
    )
    return folder


@pytest.fixture
def refused(tmp_path, capsys, monkeypatch):
    """Convert, and check everything that must be so of a refusal."""
    monkeypatch.chdir(tmp_path)

    def check(arguments: list[str], match: str) -> None:
        before = sorted(tmp_path.rglob("*"))
        code = main(["convert", *arguments, "--output", str(tmp_path / "bundle"), "--quiet"])
        error = capsys.readouterr().err
        assert code == 3, error
        assert error.startswith("error: ")
        assert "Traceback" not in error
        assert "hint:" in error
        message = error.removeprefix("error: ").split("hint:")[0]
        assert re.search(match, message), message
        assert sorted(tmp_path.rglob("*")) == before

    return check


def test_the_good_ones_convert(good, tmp_path):
    output = str(tmp_path / "bundle")
    assert main(["convert", str(good / "base"), "--lora", str(good / "lora"), "-o", output, "--quiet"]) == 0


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_checkpoints(good, tmp_path, refused, case):
    shutil.copytree(good / "base", tmp_path / "base")
    spoil, match = CHECKPOINTS[case]
    spoil(tmp_path / "base")
    refused([str(tmp_path / "base")], match)


@pytest.mark.parametrize("case", ADAPTERS)
def test_adapters(good, tmp_path, refused, case):
    shutil.copytree(good / "lora", tmp_path / "lora")
    spoil, match = ADAPTERS[case]
    spoil(tmp_path / "lora")
    refused([str(good / "base"), "--lora", str(tmp_path / "lora")], match)


@pytest.mark.parametrize("case", GGUFS)
def test_gguf_files(tmp_path, refused, case):
    data, match = GGUFS[case]
    (tmp_path / "model.gguf").write_bytes(data)
    refused([str(tmp_path / "model.gguf")], match)


def test_random_damage_never_crashes(good, tmp_path, capsys):
    """A flipped byte in a header or a JSON file ends in a refusal, or in a model whose damage does not show there."""
    rng = np.random.default_rng(0)
    for at in range(120):
        folder = tmp_path / f"{at}"
        shutil.copytree(good / "base", folder)
        path = folder / str(rng.choice(["config.json", "model.safetensors", "tokenizer.json"]))
        data = bytearray(path.read_bytes())
        data[rng.integers(0, min(len(data), 4000))] ^= int(rng.integers(1, 256))
        path.write_bytes(data)
        code = main(["convert", str(folder), "-o", str(tmp_path / "bundle"), "--quiet"])
        assert code in (0, 2, 3, 4), capsys.readouterr().err
        assert (tmp_path / "bundle").exists() == (code == 0)
        shutil.rmtree(tmp_path / "bundle", ignore_errors=True)
        shutil.rmtree(folder)
