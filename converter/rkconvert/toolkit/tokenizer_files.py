"""The tokenizer for the toolkit: every file of it is written anew from one checked tokenizer.json, so that all agree.

Which of them the exporter reads is not known: transformers' fast tokenizers take tokenizer.json; llama.cpp's converter,
from which the vendor's seems to descend, takes tokenizer.model with added_tokens.json and tokenizer_config.json.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

from rkconvert.model.added_tokens import CONFIG, named_tokens, text_of, tokenizer_settings
from rkconvert.model.chat_template import ChatTemplate
from rkconvert.model.tokenizer import bos_in_front, tokenizer_json
from rkconvert.output.hf_folder import write_json
from rkconvert.tensors.memory_folder import Place, open_file
from rkruntime.bundle.manifest import TOKENIZER
from rkruntime.errors import CheckpointError
from rkruntime.files import read_error
from rkruntime.text.template import SPECIAL_TOKENS

PIECES: Final = "tokenizer.model"
# Limit on tokenizer.model, in bytes; Gemma 2's has 4.2 MB.
_MOST_PIECES: Final = 64 << 20
_ADDED: Final = "added_tokens.json"
_NAMED: Final = (*SPECIAL_TOKENS, "sep_token", "cls_token", "mask_token")
_EXTRA: Final = "additional_special_tokens"


def stage_tokenizer(source: Place, bos_token_id: int, template: ChatTemplate, folder: Path) -> None:
    """Write the tokenizer of the folder `source` into `folder`.

    Raises:
        CheckpointError: See `read_tokenizer`.
    """
    content = tokenizer_json(source / TOKENIZER)
    settings = _settings(tokenizer_settings(source), content, bos_token_id)
    if content.get("post_processor") is None:  # transformers 4 would make one from add_bos_token, but 5 would not
        content["post_processor"] = bos_in_front(settings["bos_token"], bos_token_id)
    (folder / TOKENIZER).write_text(json.dumps(with_plain_merges(content)), encoding="utf-8")
    write_json(folder / CONFIG, settings | {"chat_template": template.source})
    vocab = content["model"]["vocab"]
    beyond = {token["content"]: token["id"] for token in content["added_tokens"] if token["content"] not in vocab}
    if beyond:
        write_json(folder / _ADDED, beyond)
    pieces, problem = _checked_pieces(source, content)
    if not problem:
        (folder / PIECES).write_bytes(pieces)


def with_plain_merges(content: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a tokenizer.json with each merge as "a b", all that `tokenizers` read before 0.20, and llama.cpp then.

    Merges stay pairs if one of them would be misread: split in another place, or taken for a line with a version.
    """
    model = content["model"]
    texts = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    plain = all(text.count(" ") == 1 and not text.startswith("#version") for text in texts)
    return {**content, "model": {**model, "merges": texts}} if plain else content


def _settings(given: Mapping[str, Any], content: Mapping[str, Any], bos_token_id: int) -> dict[str, Any]:
    """Return tokenizer_config.json, with only the special tokens of the untrusted `given`, but no class and no path."""
    added = {token["id"]: token for token in content["added_tokens"]}
    known = {token["content"] for token in added.values()}
    texts = {index: text for text, index in content["model"]["vocab"].items()}
    named = {**SPECIAL_TOKENS} | {name: text_of(token) for name, token in named_tokens(given).items()}
    tokens = {name: named[name] if named.get(name) in known else None for name in _NAMED}
    # config.json names this token too, and the toolkit warns if the two differ (airockchip/rknn-llm issue 163).
    tokens["bos_token"] = texts[bos_token_id] if bos_token_id in texts else added[bos_token_id]["content"]
    more = given.get("extra_special_tokens")
    extra = [text for token in more if (text := text_of(token)) in known] if isinstance(more, list) else []
    return {
        # The class of every Gemma: the general one does not heed add_bos_token in older releases of transformers.
        "tokenizer_class": "GemmaTokenizerFast",
        "add_bos_token": True,
        "add_eos_token": False,
        "clean_up_tokenization_spaces": False,
        "spaces_between_special_tokens": False,
        **tokens,
        **({_EXTRA: extra} if extra else {}),
        "added_tokens_decoder": {
            str(index): {key: value for key, value in added[index].items() if key != "id"} for index in sorted(added)
        },
    }


def pieces_problem(folder: Place) -> str:
    """Say what is wrong with the tokenizer.model beside a tokenizer.json, as the end of a sentence; empty if it fits.

    Raises:
        CheckpointError: See `read_tokenizer`.
    """
    return _checked_pieces(folder, tokenizer_json(folder / TOKENIZER))[1]


def _checked_pieces(folder: Place, content: Mapping[str, Any]) -> tuple[bytes, str]:
    """Return the bytes of tokenizer.model, and `pieces_problem`."""
    file = folder / PIECES
    if not file.is_file():
        return b"", "is missing"
    try:
        with open_file(file) as opened:
            data = opened.read(_MOST_PIECES + 1)
    except OSError as error:
        raise read_error(file, error, CheckpointError) from error
    try:
        scored = _pieces(data) if len(data) <= _MOST_PIECES else []
        changes = len(data) <= _MOST_PIECES and _normalizes(data)
    except ValueError:
        return data, "is not a SentencePiece model"
    pieces = [text for text, _ in scored]
    added = {token["content"] for token in content["added_tokens"]}
    # The names of added tokens come from the other files.
    vocab = content["model"]["vocab"]
    learned = ((text, index) for text, index in vocab.items() if text not in added)
    fits = len(pieces) <= len(vocab) + len(added) and all(
        index < len(pieces) and pieces[index] == _piece(text) for text, index in learned
    )
    if not fits:
        return data, "is of another tokenizer"
    if not _in_order(dict(scored), content["model"]["merges"]):
        return data, "has scores by which it merges in another order than tokenizer.json"
    return data, "changes white space or characters, which Gemma's does not" if changes else ""


def _piece(text: str) -> bytes:
    """Return a token as SentencePiece writes it; transformers writes the byte 9 as the tab (GemmaConvert)."""
    return b"<0x09>" if text == "\t" else text.encode("utf-8", "surrogatepass")


def _pieces(data: bytes) -> list[tuple[bytes, float]]:
    """Return texts and scores of a SentencePiece model: fields 1 and 2 of each field 1 (sentencepiece_model.proto)."""
    found = [_once(piece) for number, piece in _fields(data) if number == 1]
    return [(fields.get(1, b""), _float(fields.get(2, bytes(4)))) for fields in found]


def _float(data: bytes) -> float:
    if len(data) != 4:
        raise ValueError("not a float")
    number: float = struct.unpack("<f", data)[0]
    return number


def _in_order(scores: Mapping[bytes, float], merges: Iterable[Any]) -> bool:
    """Whether no merge makes a piece with a greater score than the one before: SentencePiece makes those first.

    transformers takes the merges of a tokenizer.json from the scores (generate_merges in convert_slow_tokenizer.py).
    """
    texts = (merge.replace(" ", "") if isinstance(merge, str) else "".join(merge) for merge in merges)
    made = [scores[piece] for piece in map(_piece, texts) if piece in scores]
    return all(second <= first for first, second in pairwise(made))


def _normalizes(data: bytes) -> bool:
    """Whether a SentencePiece model changes a text first: field 3, a NormalizerSpec, whose flags are true if absent."""
    spec = _once(_once(data, 3).get(3, b""))
    flags = spec.get(3, b"\1"), spec.get(4, b"\1")  # add_dummy_prefix, remove_extra_whitespaces
    return bool(spec.get(2)) or any(int.from_bytes(flag, "little") for flag in flags)


def _once(message: bytes, *only: int) -> dict[int, bytes]:
    """Return fields by number. Raises ValueError for a repeated one, of which readers may take the last or all."""
    found: dict[int, bytes] = {}
    for number, content in _fields(message):
        if only and number not in only:
            continue
        if number in found:
            raise ValueError(number)
        found[number] = content
    return found


def _fields(data: bytes) -> Iterator[tuple[int, bytes]]:
    """Yield numbers and contents of a Protocol Buffers message's fields; an integer's content is little-endian bytes.

    Raises:
        ValueError: The data is not such a message.
    """
    at = 0
    while at < len(data):
        tag, at = _varint(data, at)
        kind, size = tag & 7, 0
        if kind == 0:
            value, at = _varint(data, at)
            yield tag >> 3, value.to_bytes(10, "little")
            continue
        elif kind == 2:
            size, at = _varint(data, at)
        elif kind in (1, 5):
            size = 8 if kind == 1 else 4
        else:
            raise ValueError(kind)
        if at + size > len(data):
            raise ValueError("cut")
        yield tag >> 3, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """Read an integer of at most 64 bits; return it, and where it ends. Raises ValueError."""
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            break
        byte = data[at]
        value, at = value | (byte & 0x7F) << shift, at + 1
        if byte < 0x80:
            return value, at
    raise ValueError("not a number")
