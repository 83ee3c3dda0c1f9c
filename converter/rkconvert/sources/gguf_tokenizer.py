"""Build tokenizer.json from the tokenizer in a GGUF file.

Gemma's tokenizer is SentencePiece. Hugging Face writes it as BPE whose merges are all the ways to build a piece from
two others, ordered by score (transformers, convert_slow_tokenizer.generate_merges), and so does this module.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Final

from rkconvert.model.tokenizer import bos_in_front
from rkconvert.sources.gguf_file import GgufFile
from rkruntime.errors import CheckpointError

# token_type of llama.cpp: 1 normal, 2 unknown, 3 control, 4 user-defined, 5 unused, 6 byte.
_NORMAL: Final = 1
_USER_DEFINED: Final = 4
_SPECIAL: Final = (2, 3)
_ADDED: Final = (2, 3, 4, 5)
_SPACE: Final = "▁"
# Limit on a token's characters (Gemma's longest has 31): every way to build a token from two others is tried.
_MAX_TOKEN: Final = 1024
# Limits on the characters of all tokens and on merges; Gemma has 2 million characters and some 580,000 merges.
_MAX_TEXT: Final = 1 << 24
_MAX_MERGES: Final = 1 << 21
# Limit on the characters in all merges, each of which has those of its token.
_MAX_MERGED: Final = 1 << 26
# Settings of llama.cpp's tokenizer that change its tokens, and their values in files without them
# (https://github.com/ggml-org/llama.cpp/blob/master/src/llama-vocab.cpp). Gemma's have no space in front, and no <eos>
# at the end; <bos> is put in front of every prompt.
_DEFAULTS: Final = {"add_space_prefix": True, "add_eos_token": False, "remove_extra_whitespaces": False}


def tokenizer_json(file: GgufFile) -> dict[str, Any]:
    """Return the content of tokenizer.json. Raises CheckpointError if the file's tokenizer is not SentencePiece's."""
    data = file.metadata
    if data.get("tokenizer.ggml.model") != "llama":
        raise CheckpointError(f"{file.path} has a tokenizer {data.get('tokenizer.ggml.model')!r}; Gemma's is 'llama'.")
    columns = {"tokens": str, "scores": float, "token_type": int}
    tokens, scores, kinds = (_list(file, key, kind) for key, kind in columns.items())
    if not len(tokens) == len(scores) == len(kinds):
        raise CheckpointError(f"{file.path} has {len(tokens)} tokens, but not a score and a type for each.")
    if not all(map(math.isfinite, scores)):
        raise CheckpointError(
            f"{file.path} has a token whose score is not a number, so that the order of its merges is unknown.",
            hint="Convert the original checkpoint, or download the file again.",
        )
    vocab = {token: index for index, token in enumerate(tokens)}
    if len(vocab) != len(tokens):
        raise CheckpointError(f"{file.path} has a duplicate token.")
    if (longest := max(map(len, tokens), default=0)) > _MAX_TOKEN:
        raise CheckpointError(f"{file.path} has a token of {longest:,} characters.")
    if (all_ := sum(map(len, tokens))) > _MAX_TEXT:
        raise CheckpointError(f"{file.path} has tokens of {all_:,} characters; at most {_MAX_TEXT:,} are allowed.")
    for key, default in _DEFAULTS.items():
        if (value := data.get(f"tokenizer.ggml.{key}", default)) is not False:
            raise CheckpointError(
                f"{file.path} has tokenizer.ggml.{key} {str(value)[:80]}; Gemma's tokenizer has it False.",
                hint="Convert the original checkpoint, or make the GGUF file anew with a current llama.cpp.",
            )
    unknown, bos = (_special(file, tokens, *item) for item in (("unknown", 3), ("bos", 2)))
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [_added(index, tokens[index], kind) for index, kind in enumerate(kinds) if kind in _ADDED],
        "normalizer": {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE},
        "pre_tokenizer": {
            "type": "Split",
            "pattern": {"String": " "},
            "behavior": "MergedWithPrevious",
            "invert": False,
        },
        "post_processor": bos_in_front(bos, vocab[bos]),
        "decoder": {
            "type": "Sequence",
            "decoders": [
                {"type": "Replace", "pattern": {"String": _SPACE}, "content": " "},
                {"type": "ByteFallback"},
                {"type": "Fuse"},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": unknown,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": merges(tokens, scores, kinds, vocab),
        },
    }


def merges(
    tokens: Sequence[str], scores: Sequence[float], kinds: Sequence[int], vocab: Mapping[str, int]
) -> list[tuple[str, str]]:
    """Return every pair of pieces that forms a piece, best score first.

    Raises:
        CheckpointError: There are far more pairs than in Gemma's.
    """
    found: list[tuple[float, int, int, str, str]] = []
    characters = 0
    for token, score, kind in zip(tokens, scores, kinds, strict=True):
        # User-defined tokens are found in the text as it is, which has spaces. One with word marks (Gemma's runs of
        # spaces, in files that keep the marks) is formed by merges, as in llama.cpp.
        if kind != _NORMAL and not (kind == _USER_DEFINED and _SPACE in token):
            continue
        pairs = ((token[:at], token[at:]) for at in range(1, len(token)))
        ways = [(left, right) for left, right in pairs if left in vocab and right in vocab]
        ways.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        characters += len(token) * len(ways)
        if len(found) + len(ways) > _MAX_MERGES or characters > _MAX_MERGED:
            raise CheckpointError("The GGUF file's tokens can be built from each other in far more ways than Gemma's.")
        found += [(score, len(left), len(right), left, right) for left, right in ways]
    found.sort(key=lambda item: item[:3], reverse=True)
    return [(left, right) for _, _, _, left, right in found]


def _list(file: GgufFile, key: str, kind: type) -> list[Any]:
    found = file.metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(found, list) or any(type(item) is not kind for item in found):
        raise CheckpointError(f"{file.path} has no tokenizer.ggml.{key}, a list of {kind.__name__}.")
    return found


def _special(file: GgufFile, tokens: Sequence[str], key: str, usual: int) -> str:
    index = file.metadata.get(f"tokenizer.ggml.{key}_token_id", usual)
    if not isinstance(index, int) or not 0 <= index < len(tokens):
        raise CheckpointError(f"{file.path} names the token {index!r} as {key}; it has {len(tokens)} tokens.")
    return tokens[index]


def _added(index: int, token: str, kind: int) -> dict[str, Any]:
    return {
        "id": index,
        "content": token,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": kind in _SPECIAL,
    }
