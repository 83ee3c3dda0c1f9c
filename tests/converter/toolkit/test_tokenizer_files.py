"""The tokenizer's files for the toolkit, against transformers, `tokenizers` and llama.cpp's gguf."""

from __future__ import annotations

import json
import random
import shutil
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from gguf import SpecialVocab
from hypothesis import given
from hypothesis import strategies as st
from sentencepiece import SentencePieceProcessor
from tokenizers import AddedToken, Tokenizer
from transformers import AutoTokenizer

from rkconvert import demo
from rkconvert.demo import tokenizer as demo_tokenizer
from rkconvert.model.chat_template import read_template
from rkconvert.tensors.memory_folder import MemoryFolder
from rkconvert.toolkit.tokenizer_files import _checked_pieces, pieces_problem, stage_tokenizer, with_plain_merges
from rkruntime.errors import CheckpointError

TEXTS = (
    "hello world",
    "  two  spaces\t\ttabs\nand\n\nlines",
    "<start_of_turn>user\nhi<end_of_turn>\n",
    "é🙂<0x09>",
    "<bos>a",
    "<unk><pad><mask> x",
    "<extra> y<unused3>",
)
NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")


@pytest.fixture
def source(tmp_path: Path, tokenizer: Any) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    demo_tokenizer.save(tokenizer, folder)
    return folder


def staged(source: Path, bos: int = 2) -> Path:
    folder = source.with_name("staged")
    folder.mkdir()
    stage_tokenizer(source, bos, read_template(source, "<bos>"), folder)
    return folder


def settings(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "tokenizer_config.json").read_text())
    return content


def with_tokens(source: Path, *texts: str) -> None:
    """Tokens beyond the vocabulary, as `tokenizers` adds them."""
    backend = Tokenizer.from_file(str(source / "tokenizer.json"))
    backend.add_tokens([AddedToken(text, normalized=False) for text in texts])
    backend.save(str(source / "tokenizer.json"))


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"tokenizer_class": "TokenizersBackend", "extra_special_tokens": ["<start_of_turn>"]},
        {"add_bos_token": False},  # which the general class ignores, but not Gemma's
        {"pad_token": None, "unk_token": None},
        {"tokenizer_file": "/etc/passwd", "auto_map": {"AutoTokenizer": ["rogue.Rogue", None]}, "model_max_length": 8},
    ],
    ids=lambda changes: "-".join(changes) or "as saved",
)
@pytest.mark.parametrize("more", [(), ("<extra>", "▁▁▁▁▁▁▁")], ids=["own tokens", "more tokens"])
def test_the_tokens_are_the_same(
    source: Path, edit_json: Callable[..., None], changes: dict[str, Any], more: tuple[str, ...]
) -> None:
    with_tokens(source, *more)
    expected = AutoTokenizer.from_pretrained(source)
    edit_json(source / "tokenizer_config.json", **changes)
    found = AutoTokenizer.from_pretrained(folder := staged(source))
    for text in TEXTS:
        assert found(text).input_ids == expected(text).input_ids
        assert found.decode(found(text).input_ids) == expected.decode(expected(text).input_ids)
    assert [found.unk_token_id, found.pad_token_id, found.bos_token_id, found.eos_token_id] == [3, 0, 2, 1]
    assert found("x", truncation=True, max_length=None).input_ids[0] == 2
    assert len(found) == len(expected)
    assert "/etc/passwd" not in (folder / "tokenizer_config.json").read_text()


def test_a_token_that_the_tokenizer_lacks_is_not_added(source: Path, edit_json: Callable[..., None]) -> None:
    content = json.loads((source / "tokenizer.json").read_text())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "<pad>"]
    content["model"]["vocab"]["plain"] = content["model"]["vocab"].pop("<pad>")
    (source / "tokenizer.json").write_text(json.dumps(content))
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        edit_json(source / name, pad_token=None)
    found = AutoTokenizer.from_pretrained(staged(source))
    assert found.pad_token is None
    assert len(found) == len(content["model"]["vocab"])


@pytest.mark.parametrize("written", ["<eos>", {"content": "<eos>"}, None])
def test_both_files_name_the_same_first_token(source: Path, edit_json: Callable[..., None], written: object) -> None:
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        edit_json(source / name, bos_token=written)
    assert settings(staged(source))["bos_token"] == "<bos>"


def test_what_names_tokens_is_rebuilt_from_one_file(source: Path) -> None:
    """llama.cpp's converter lets added_tokens.json and added_tokens_decoder overrule tokenizer.model."""
    with_tokens(source, "<extra>")
    folder = staged(source)
    assert json.loads((folder / "added_tokens.json").read_text()) == {"<extra>": len(learned(source))}
    assert not (folder / "special_tokens_map.json").exists()
    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    named = {int(index): token["content"] for index, token in settings(folder)["added_tokens_decoder"].items()}
    assert named == {index: token.content for index, token in backend.get_added_tokens_decoder().items()}


def test_merges_are_texts_for_older_readers(source: Path) -> None:
    folder = staged(source)
    given, made = (json.loads((path / "tokenizer.json").read_text())["model"]["merges"] for path in (source, folder))
    assert isinstance(given[0], list)
    assert [tuple(text.split(" ")) for text in made] == [*map(tuple, given)]
    assert SpecialVocab(folder, load_merges=True).merges == made


PARTS = st.lists(st.sampled_from(["a", "b", "▁", "\n", "\t", "#", " ", "\u2003"]), min_size=1, max_size=3).map("".join)


@given(st.lists(st.tuples(PARTS | st.just("#version"), PARTS), max_size=6, unique=True))
def test_merges_mean_the_same_to_the_library(pairs: list[tuple[str, str]]) -> None:
    texts = [*dict.fromkeys(text for left, right in pairs for text in (left, right, left + right))]
    model = {"type": "BPE", "vocab": {text: index for index, text in enumerate(texts)}, "merges": pairs}
    given_, made = ({"version": "1.0", "model": model}, with_plain_merges({"version": "1.0", "model": model}))
    expected, found = (json.loads(Tokenizer.from_str(json.dumps(item)).to_str()) for item in (given_, made))
    assert found["model"]["merges"] == expected["model"]["merges"]


def test_bos_stands_in_front_for_every_reader(source: Path) -> None:
    content = json.loads((source / "tokenizer.json").read_text())
    (source / "tokenizer.json").write_text(json.dumps({**content, "post_processor": None}))
    folder = staged(source)
    assert Tokenizer.from_file(str(folder / "tokenizer.json")).encode("a b").ids[0] == 2
    assert AutoTokenizer.from_pretrained(folder)("a b")["input_ids"][0] == 2


def varint(value: int) -> bytes:
    return (bytes([value & 0x7F | 0x80]) + varint(value >> 7)) if value > 0x7F else bytes([value])


def field(number: int, content: bytes) -> bytes:
    return varint(number << 3 | 2) + varint(len(content)) + content


# Name, and the flags for a space in front and for spaces that are removed, both off as in Gemma's.
IDENTITY = field(1, b"identity") + b"\x18\x00\x20\x00"


def sentencepiece(texts: Iterable[str], normalizer: bytes = IDENTITY, scores: Mapping[str, float] = {}) -> bytes:
    """A model as SentencePiece saves it: pieces with score and type, then the settings of trainer and normalizer."""

    def piece(text: str) -> bytes:
        kind = UNKNOWN if text == "<unk>" else BYTE if text.startswith("<0x") else NORMAL
        return field(1, text.encode()) + b"\x15" + struct.pack("<f", scores.get(text, -1.5)) + b"\x18" + kind

    pieces = map(piece, texts)
    return b"".join(field(1, piece) for piece in pieces) + field(2, b"\x18\x02\x98\x02\x01") + field(3, normalizer)


UNKNOWN, NORMAL, BYTE = b"\x02", b"\x01", b"\x06"  # SentencePiece.Type


def learned(source: Path) -> list[str]:
    vocab = json.loads((source / "tokenizer.json").read_text())["model"]["vocab"]
    return sorted(vocab, key=vocab.__getitem__)


def test_a_sentencepiece_model_of_this_tokenizer_goes_along(source: Path) -> None:
    texts = learned(source)
    texts[99] = "<was renamed>"  # an unused token, for which the other files have the name
    data = sentencepiece(texts)
    (source / "tokenizer.model").write_bytes(data)
    assert pieces_problem(source) == ""
    assert (staged(source) / "tokenizer.model").read_bytes() == data


def ranks(source: Path) -> dict[str, float]:
    """Scores as in Gemma's file: the earlier a merge, the greater the score of what it makes."""
    merges = json.loads((source / "tokenizer.json").read_text())["model"]["merges"]
    texts = [merge.replace(" ", "") if isinstance(merge, str) else "".join(merge) for merge in merges]
    return {text: -float(rank) for rank, text in reversed(list(enumerate(texts)))}


@pytest.mark.parametrize("seed", range(5))
def test_scores_that_merge_in_another_order_stay_behind(tmp_path: Path, seed: int) -> None:
    """SentencePiece itself splits words as the library does with the right scores, and otherwise with others."""
    for path in demo.checkpoint().glob("*.json"):
        shutil.copy(path, tmp_path)
    texts, right, rng = learned(tmp_path), ranks(tmp_path), random.Random(seed)
    mine = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    words = [word for text in texts if (word := text.strip("▁")).isalpha() and len(word) > 2]
    words = ["".join(rng.choices(words, k=3)) for _ in range(50)]
    others = dict(zip(right, rng.sample(list(right.values()), len(right)), strict=True))

    def splits(scores: Mapping[str, float]) -> list[list[str]]:
        (tmp_path / "tokenizer.model").write_bytes(data := sentencepiece(texts, scores=scores))
        return [SentencePieceProcessor(model_proto=data).encode(word, out_type=str) for word in words]

    expected = [mine.encode(word, add_special_tokens=False).tokens for word in words]
    assert splits(right) == expected
    assert pieces_problem(tmp_path) == ""
    assert splits(others) != expected
    assert pieces_problem(tmp_path) == "has scores by which it merges in another order than tokenizer.json"


NORMALIZES = "changes white space or characters, which Gemma's does not"
SPOILED: dict[str, tuple[Callable[[list[str]], bytes], str]] = {
    "two swapped": (lambda texts: sentencepiece([*texts[:-2], texts[-1], texts[-2]]), "is of another tokenizer"),
    "one fewer": (lambda texts: sentencepiece(texts[:-1]), "is of another tokenizer"),
    "one more": (lambda texts: sentencepiece([*texts, *map(str, range(2_000))]), "is of another tokenizer"),
    "a piece with two texts": (
        lambda texts: field(1, field(1, texts[0].encode()) + field(1, b"evil")) + sentencepiece(texts[1:]),
        "is not a SentencePiece model",
    ),
    "spaces removed": (lambda texts: sentencepiece(texts, field(1, b"identity") + b"\x18\x00"), NORMALIZES),
    "characters changed": (lambda texts: sentencepiece(texts, IDENTITY + field(2, b"map")), NORMALIZES),
    "by default": (lambda texts: sentencepiece(texts, b""), NORMALIZES),
    "empty": (lambda texts: b"", "is of another tokenizer"),
    "cut": (lambda texts: sentencepiece(texts)[:-2], "is not a SentencePiece model"),
    "a pointer": (lambda texts: b"version https://git-lfs.github.com/spec/v1", "is not a SentencePiece model"),
    "noise": (lambda texts: b"\xff" * 20, "is not a SentencePiece model"),
}


@pytest.mark.parametrize("how", SPOILED)
def test_a_sentencepiece_model_that_does_not_fit_stays_behind(source: Path, how: str) -> None:
    write, words = SPOILED[how]
    (source / "tokenizer.model").write_bytes(write(learned(source)))
    assert pieces_problem(source) == words
    assert not (staged(source) / "tokenizer.model").exists()


@given(st.binary(max_size=60))
def test_any_bytes_are_a_model_or_not(data: bytes) -> None:
    files = {name: (demo.checkpoint() / name).read_bytes() for name in ("tokenizer.json", "tokenizer_config.json")}
    folder = MemoryFolder(Path("any.gguf"), {**files, "tokenizer.model": data})
    assert pieces_problem(folder) in ("is of another tokenizer", "is not a SentencePiece model")


def test_a_file_that_cannot_be_read_is_named(source: Path) -> None:
    (source / "tokenizer.model").write_bytes(b"")
    denied = mock.patch("rkruntime.files.os.open", side_effect=PermissionError(13, "Permission denied"))
    with denied, pytest.raises(CheckpointError, match="Permission denied"):
        _checked_pieces(source, {})


def test_none_is_told(source: Path) -> None:
    assert pieces_problem(source) == "is missing"


def test_transformers_writes_the_tab_for_its_byte(source: Path) -> None:
    """GemmaConvert in convert_slow_tokenizer.py."""
    texts = learned(source)
    (source / "tokenizer.model").write_bytes(sentencepiece(texts))
    content = json.loads((source / "tokenizer.json").read_text())
    content["model"]["vocab"]["\t"] = content["model"]["vocab"].pop("<0x09>")
    (source / "tokenizer.json").write_text(json.dumps(content))
    assert pieces_problem(source) == ""
