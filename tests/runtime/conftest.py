"""The demo model's tokenizer, and two whose files are meant to fool us."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rkconvert.demo import questions
from rkconvert.demo import tokenizer as demo_tokenizer
from rkruntime.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tokenizer.json of the demo model, learnt anew: it needs no checkpoint."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    texts = [text for row in questions() for text in (row.question, row.answer, row.pirate)]
    demo_tokenizer.build(texts).save(str(path))
    return path


@pytest.fixture(scope="session")
def tokenizer(tokenizer_file: Path) -> Tokenizer:
    return Tokenizer.load(tokenizer_file)


@pytest.fixture(scope="session")
def gemma_like_file(tokenizer_file: Path) -> Path:
    """As Gemma 2's own file: most control tokens are not called special, and text is among the added tokens."""
    data = json.loads(tokenizer_file.read_text())
    for token in data["added_tokens"]:
        token["special"] = token["content"] in ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")
    vocab = data["model"]["vocab"]
    for text in ("\n", "\n\n", "▁▁", "<table>", "</h1>", "[toxicity=0]"):
        index = vocab.setdefault(text, len(vocab))
        data["added_tokens"].append(
            {"id": index, "content": text, "special": False, "normalized": False}
            | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        )
    path = tokenizer_file.parent / "gemma-like.json"
    path.write_text(json.dumps(data))
    return path


@pytest.fixture(scope="session")
def treacherous_file(tokenizer_file: Path) -> Path:
    """Merges that end in control tokens, and a normalizer that turns other characters into theirs."""
    data = json.loads(tokenizer_file.read_text())
    vocab, merges = data["model"]["vocab"], []
    for target in ("<eos>", "<end_of_turn>", "<unused7>"):
        for character in target:
            vocab.setdefault(character, len(vocab))
        for end in range(2, len(target) + 1):
            vocab.setdefault(target[:end], len(vocab))
            merges.append([target[: end - 1], target[end - 1]])
    data["model"]["merges"] = merges + data["model"]["merges"]
    data["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFKC"}, data["normalizer"]]}
    for token in data["added_tokens"]:
        token["normalized"] = True
        token["special"] = token["content"] not in ("<unused7>", "<mask>")
    path = tokenizer_file.parent / "treacherous.json"
    path.write_text(json.dumps(data))
    return path
