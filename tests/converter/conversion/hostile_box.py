"""A whole model, adapter and GGUF to break, and the register of the functions that break them (hostile.py)."""

import json
import os
import pickle
import shutil
import struct
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rkconvert import demo

SECONDS = 30
LFS = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 5\n"
Make = Callable[["Box"], "list[Any] | None"]
CASES: dict[str, tuple[str, Make]] = {}


def case(words: str) -> Callable[[Make], Make]:
    """Register a function that breaks something; `words` stand in the message that a person then reads."""

    def register(make: Make) -> Make:
        CASES[make.__name__] = (words, make)
        return make

    return register


@dataclass
class Box:
    """A folder with a whole model, adapter and GGUF to break."""

    root: Path
    lora: list[Path] = field(default_factory=list)

    @property
    def model(self) -> Path:
        path = self.root / "model"
        if not path.exists():
            shutil.copytree(demo.checkpoint(), path)
        return path

    @property
    def shard(self) -> Path:
        return self.model / "model-00002-of-00003.safetensors"

    @property
    def adapter(self) -> Path:
        path = self.root / "lora"
        if not path.exists():
            shutil.copytree(demo.adapter(), path)
            self.lora = [path]
        return path

    @property
    def executed(self) -> Path:
        """Code in a file would make this one."""
        return self.root / "executed"

    def code(self) -> bytes:
        """A pickle that runs a command when it is loaded."""

        class Code:
            def __reduce__(self) -> Any:
                return os.system, (f"touch '{self.path}'",)

            path = self.executed

        return pickle.dumps({"model.embed_tokens.weight": Code()}, protocol=2)

    def edit(self, path: Path, **changes: Any) -> None:
        """Change keys of a JSON file."""
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    def config(self, **changes: Any) -> None:
        self.edit(self.model / "config.json", **changes)

    def text(self, path: Path, old: str, new: str) -> None:
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))

    def header(self, path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
        """Rewrite the header of a safetensors file; the data stays."""
        data = path.read_bytes()
        size = int.from_bytes(data[:8], "little")
        header = json.loads(data[8 : 8 + size])
        changed = change(header)
        text = changed if isinstance(changed, bytes) else json.dumps(changed or header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])

    def as_bin(self, pickled: bytes, members: dict[str, bytes] | None = None, how: int = zipfile.ZIP_STORED) -> Path:
        """The model's weights as a .bin with this pickle, in place of its safetensors; `how` is that of the members."""
        for file in self.model.glob("*.safetensors*"):
            file.unlink()
        path = self.model / "pytorch_model.bin"
        with zipfile.ZipFile(path, "w", how) as archive:
            archive.writestr("m/data.pkl", pickled, how if members is None else zipfile.ZIP_STORED)
            for name, data in (members or {}).items():
                archive.writestr(f"m/{name}", data)
        return path

    def gguf(self, **changes: Any) -> Path:
        path = self.root / "model.gguf"
        path.write_bytes(gguf_bytes(**changes))
        return path

    def recipe(self, text: str | bytes) -> list[Any]:
        path = self.root / "recipe.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return [self.model, "--recipe", path]


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def value(item: Any) -> bytes:
    """A typed value as GGUF has it: text, truth values, whole numbers, floats and lists of them."""
    if isinstance(item, bool):
        return struct.pack("<I?", 7, item)
    if isinstance(item, str):
        return struct.pack("<I", 8) + text(item)
    if isinstance(item, float):
        return struct.pack("<If", 6, item)
    if isinstance(item, int):
        return struct.pack("<II", 4, item)
    kinds = {str: 8, float: 6, int: 5}
    head = struct.pack("<IIQ", 9, kinds[type(item[0])], len(item))
    form = {float: "f", int: "i"}.get(type(item[0]))
    return head + (struct.pack(f"<{len(item)}{form}", *item) if form else b"".join(map(text, item)))


def gguf_metadata() -> dict[str, Any]:
    config = json.loads((demo.checkpoint() / "config.json").read_text())
    sizes = {"context_length": "max_position_embeddings", "embedding_length": "hidden_size",
             "block_count": "num_hidden_layers", "feed_forward_length": "intermediate_size",
             "attention.head_count": "num_attention_heads", "attention.head_count_kv": "num_key_value_heads",
             "attention.key_length": "head_dim", "attention.value_length": "head_dim",
             "attention.layer_norm_rms_epsilon": "rms_norm_eps", "attention.sliding_window": "sliding_window",
             "attn_logit_softcapping": "attn_logit_softcapping",
             "final_logit_softcapping": "final_logit_softcapping"}  # fmt: skip
    tokenizer = json.loads((demo.checkpoint() / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    special = {token["content"] for token in tokenizer["added_tokens"]}
    tokens = sorted(vocab, key=vocab.__getitem__)
    tokens += [f"<pad{at}>" for at in range(len(tokens), config["vocab_size"])]
    kinds = [
        3 if name in special else 6 if name.startswith("<0x") else 5 if name.startswith("<pad") else 1
        for name in tokens
    ]
    return {
        "general.architecture": "gemma2",
        **{f"gemma2.{key}": config[name] for key, name in sizes.items()},
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.add_space_prefix": False,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-float(at) for at in range(len(tokens))],
        "tokenizer.ggml.token_type": kinds,
        "tokenizer.ggml.bos_token_id": 2,
        "tokenizer.ggml.eos_token_id": 1,
        "tokenizer.ggml.unknown_token_id": 3,
        "tokenizer.chat_template": (demo.checkpoint() / "chat_template.jinja").read_text(),
    }


def gguf_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (1024, 128), "output_norm.weight": (128,)}
    layer = {"attn_q": (256, 128), "attn_k": (128, 128), "attn_v": (128, 128), "attn_output": (128, 256),
             "ffn_gate": (384, 128), "ffn_up": (384, 128), "ffn_down": (128, 384), "attn_norm": (128,),
             "post_attention_norm": (128,), "ffn_norm": (128,), "post_ffw_norm": (128,)}  # fmt: skip
    for at in range(4):
        shapes |= {f"blk.{at}.{name}.weight": shape for name, shape in layer.items()}
    return shapes


def gguf_bytes(
    *,
    metadata: dict[str, Any] | None = None,
    version: int = 3,
    shapes: dict[str, tuple[int, ...]] | None = None,
    offset: int | None = None,
    kind: int = 0,
    fill: float = 1.0,
    twice: bool = False,
) -> bytes:
    """A GGUF of the demo model's shape in float32, with what is asked for changed."""
    pairs = gguf_metadata() | (metadata or {})
    tensors = gguf_shapes() | (shapes or {})
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors) + twice, len(pairs))
    head += b"".join(text(key) + value(item) for key, item in pairs.items())
    end = 0
    entries = []
    for name, shape in tensors.items():
        entry = text(name) + struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
        entries.append(entry + struct.pack("<IQ", kind, end if offset is None else offset))
        end += int(np.prod(gguf_shapes().get(name, shape))) * 4
    head += b"".join(entries) + (entries[0] if twice else b"")
    return head + bytes(-len(head) % 32) + np.full(end // 4, fill, "<f4").tobytes()
