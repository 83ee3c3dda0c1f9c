"""Whether what an adapter calls its base (base_model_name_or_path) speaks against the model that it is put on.

A name proves nothing: one model lies in folders of any name and in quantized mirrors. Only what both names say of
themselves is compared, and what comes of it is a note.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from rkconvert.sources.hub import is_hub_id

# What mirrors and quantizers put behind a model's name: unsloth's -bnb-4bit, mlx-community's -4bit, -GGUF, -GPTQ-Int4.
_MIRROR: Final = re.compile(
    r"[-_.](bnb|unsloth|dynamic|quantized|gguf|gptq|awq|exl2|mlx|hf|pytorch|[2-8]-?bit|int[48]|nf4|fp(4|8|16|32)|bf16|f16"
    r"|w\da\d+|i?q\d(_\w+)?)$"
)
_CACHE: Final = re.compile(r"models--[^/]+--([^/]+)")
_GEMMA: Final = re.compile(r"(?<![a-z])gemma[-_]?(?P<version>\d(\.\d)?)?[-_](?P<size>\d+)b(?![a-z0-9])")
_FAMILIES: Final = {"2": "gemma2", "1": "gemma", "1.1": "gemma", None: "gemma"}
_OTHERS: Final = (
    "llama", "tinyllama", "mistral", "mixtral", "qwen", "phi", "falcon", "gpt", "bloom", "yi", "deepseek", "internlm",
    "chatglm", "smollm", "olmo", "granite", "stablelm", "starcoder", "vicuna", "zephyr", "minicpm", "opt", "pythia",
)  # fmt: skip


def plain_name(name: str) -> str:
    """A model's name without owner, folders, case, and what mirrors put behind it: `gemma-2-2b-it`."""
    cached = _CACHE.search(name)
    plain = (cached[1] if cached else re.split(r"[/\\]", name.rstrip("/\\"))[-1]).lower()
    while _MIRROR.search(plain):
        plain = _MIRROR.sub("", plain)
    return plain.replace("_", "-")


def is_other_base(named: str, family: str, size: str, own_names: Sequence[str]) -> bool:
    """Whether `named`, what an adapter calls its base, seems to be another model than the one that it is put on.

    Args:
        named: a hub id or a path; may be empty.
        family: of the model that it is put on, `gemma` or `gemma2`.
        size: its size, such as `9B` (see `GemmaConfig.size_name`).
        own_names: what it is called: hub ids, folders.
    """
    name, own = plain_name(named), {plain_name(own): own for own in own_names if own}
    if not name or name in own:
        return False
    found = _GEMMA.search(name)
    if found is None:
        words = set(re.split(r"[^a-z]+", name))
        return bool(words & set(_OTHERS)) or (is_hub_id(named) and any(map(is_hub_id, own.values())))
    if _FAMILIES.get(found["version"]) != family or (re.fullmatch(r"\d+B", size) and f"{found['size']}B" != size):
        return True
    return any(_GEMMA.search(plain) or is_hub_id(known) for plain, known in own.items())
