"""tokenizer.model, SentencePiece's file, for a vocabulary that has tokenizer.json only.

The fields and their numbers are those of sentencepiece_model.proto
(https://github.com/google/sentencepiece/blob/v0.2.0/src/sentencepiece_model.proto).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import Any, Final

# SentencePiece.Type
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _BYTE = 1, 2, 3, 4, 6
_BPE: Final = 2
_KINDS: Final = {"<unk>": _UNKNOWN, "<pad>": _CONTROL, "<eos>": _CONTROL, "<bos>": _CONTROL}


def sentencepiece_model(tokenizer: Mapping[str, Any]) -> bytes:
    """Return a tokenizer.model with the vocabulary of a tokenizer.json laid out as Gemma's.

    Args:
        tokenizer: Content of tokenizer.json: BPE, with ids from 0 without a gap, and merges in the order of their ids.
    """
    vocabulary = sorted(tokenizer["model"]["vocab"].items(), key=lambda pair: pair[1])
    added = {token["content"] for token in tokenizer["added_tokens"]}
    pieces = b"".join(_message(1, _piece(text, index, added)) for text, index in vocabulary)
    ids = dict(vocabulary)
    trainer = {3: _BPE, 4: len(vocabulary), 35: 1}
    trainer |= {field: ids[text] for field, text in ((40, "<unk>"), (41, "<bos>"), (42, "<eos>"), (43, "<pad>"))}
    names = _message(46, b"<bos>") + _message(47, b"<eos>")
    normalizer = _message(1, b"identity") + _numbers({3: 0, 4: 0, 5: 1})
    return pieces + _message(2, _numbers(trainer) + names) + _message(3, normalizer)


def _piece(text: str, index: int, added: set[str]) -> bytes:
    kind = _KINDS.get(text, _USER_DEFINED if text in added else _BYTE if text.startswith("<0x") else _NORMAL)
    # Of two possible merges, the one with the greater score is made first.
    score = -float(index) if kind == _NORMAL else 0.0
    return _message(1, text.encode()) + b"\x15" + struct.pack("<f", score) + _numbers({3: kind})


def _numbers(fields: Mapping[int, int]) -> bytes:
    return b"".join(_varint(field << 3) + _varint(value) for field, value in fields.items())


def _message(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
