"""Judge whether an adapter's name for its base (base_model_name_or_path) contradicts the model it is applied to.

A name proves nothing: one model can be in folders of any name and in quantized mirrors. Only what both names say is
compared, and the result is only a note.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final

from rkconvert.sources.hub import is_hub_id

# Suffixes added by mirrors and quantizers: unsloth's -bnb-4bit, mlx-community's -4bit, -GGUF, -GPTQ-Int4.
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
    """Return a model's name without owner, folders, case and mirrors' suffixes: `gemma-2-2b-it`."""
    cached = _CACHE.search(name)
    plain = (cached[1] if cached else re.split(r"[/\\]", name.rstrip("/\\"))[-1]).lower()
    while _MIRROR.search(plain):
        plain = _MIRROR.sub("", plain)
    return plain.replace("_", "-")


def is_other_base(named: str, family: str, size: str, own_names: Sequence[str]) -> bool:
    """Whether `named`, an adapter's name for its base, seems to be a model other than the one it is applied to.

    Args:
        named: Hub id or path; may be empty.
        family: Family of the model it is applied to, `gemma` or `gemma2`.
        size: Size of that model, such as `9B` (see `GemmaConfig.size_name`).
        own_names: Names of that model: hub ids, folders.
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
