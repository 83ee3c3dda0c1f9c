"""Added tokens that a folder names outside tokenizer.json: what transformers makes of the folder is the oracle."""

from __future__ import annotations

import json
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import transformers
from tokenizers import Tokenizer

from rkconvert import demo
from rkconvert.adapters.notes import token_count
from rkconvert.model.tokenizer import read_tokenizer, tokenizer_bytes
from rkruntime import cli
from rkruntime.errors import CheckpointError
from rkruntime.text.tokenizer import open_backend

NEW, WORD = "<|tool|>", "thinking"
TEXT = f"say {NEW} or {WORD}: <end_of_turn> hello  thinking{NEW} \n<unused5> ok"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copytree(demo.checkpoint(), tmp_path / "model")
    return tmp_path / "model"


def change(folder: Path, name: str, **settings: Any) -> None:
    file = folder / name
    file.write_text(json.dumps((json.loads(file.read_text()) if file.is_file() else {}) | settings))


def decoder_of(folder: Path) -> dict[str, Any]:
    """What transformers 4 writes: every added token by its id."""
    own = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    return {str(token["id"]): {key: token[key] for key in token if key != "id"} for token in own}


def agrees(folder: Path) -> Tokenizer:
    """Compare with transformers; return ours."""
    mine = Tokenizer.from_buffer(tokenizer_bytes(folder / "tokenizer.json"))
    oracle = transformers.AutoTokenizer.from_pretrained(folder)
    assert mine.encode(TEXT, add_special_tokens=False).ids == oracle(TEXT, add_special_tokens=False)["input_ids"]
    chat = [{"role": "user", "content": TEXT}]
    prompt = oracle.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    ids = oracle.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert mine.encode(prompt, add_special_tokens=False).ids == ids
    return mine


@pytest.mark.parametrize("extra", ["additional_special_tokens", "extra_special_tokens"])
@pytest.mark.parametrize("file", ["tokenizer_config.json", "special_tokens_map.json"])
def test_special_tokens_outside_the_file(folder: Path, file: str, extra: str) -> None:
    config = folder / "tokenizer_config.json"
    content = json.loads(config.read_text())
    del content["additional_special_tokens"]
    config.write_text(json.dumps(content))
    change(folder, file, **{extra: ["<start_of_turn>", NEW]})
    assert agrees(folder).token_to_id(NEW) == 1024


def test_named_tokens_and_a_table_by_id(folder: Path) -> None:
    flags = {"single_word": False, "lstrip": True, "rstrip": True, "normalized": False, "special": False}
    table = decoder_of(folder) | {"1024": {"content": WORD, **flags}, "1025": {"content": NEW, **flags}}
    table["106"]["rstrip"] = True  # another behaviour than in tokenizer.json
    change(folder, "tokenizer_config.json", added_tokens_decoder=table, pad_token="<pad-new>")
    mine = agrees(folder)
    assert [mine.token_to_id(text) for text in (WORD, NEW, "<pad-new>")] == [1024, 1025, 1026]


def test_a_word_of_the_vocabulary_becomes_an_added_token(folder: Path) -> None:
    vocab = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    word = next(text for text in vocab if text.isalpha() and text.isascii() and len(text) == 3)
    change(folder, "tokenizer_config.json", extra_special_tokens=[word])
    agrees(folder)
    tokenizer = read_tokenizer(folder / "tokenizer.json", 1024)
    assert tokenizer.added[word] == vocab[word]


def test_an_older_list(folder: Path) -> None:
    change(folder, "added_tokens.json", **{WORD: 1025, NEW: 1024})
    assert agrees(folder).token_to_id(WORD) == 1025


@pytest.mark.parametrize("seed", range(12))
def test_random_folders(folder: Path, seed: int) -> None:
    rng = random.Random(seed)
    texts = rng.sample([NEW, WORD, "<x>", "[Y]", "zz", " pad "], k=4)

    def token(text: str) -> Any:
        flags = {key: rng.random() < 0.5 for key in ("lstrip", "rstrip", "normalized")}
        return {"content": text, "single_word": False, "special": rng.random() < 0.5, **flags}

    if rng.random() < 0.5:
        table = decoder_of(folder) | {str(1024 + at): token(text) for at, text in enumerate(texts[:2])}
        change(folder, "tokenizer_config.json", added_tokens_decoder=table)
    elif rng.random() < 0.7:
        change(folder, "added_tokens.json", **{text: 1024 + at for at, text in enumerate(texts[:2])})
    place = rng.choice(["tokenizer_config.json", "special_tokens_map.json"])
    change(folder, place, additional_special_tokens=rng.sample([*texts, "<start_of_turn>", "<unused5>"], k=2))
    change(folder, "tokenizer_config.json", **{rng.choice(["sep_token", "pad_token", "my_token"]): texts[2]})
    agrees(folder)


def test_contradictions_and_missing_rows_are_refused(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change(folder, "tokenizer_config.json", extra_special_tokens=[NEW])
    assert cli.main(["convert", str(folder), "-q", "-o", str(folder.parent / "bundle")]) != 0
    assert "has the id 1024, but the model has 1024 tokens" in capsys.readouterr().err
    table = decoder_of(folder) | {"1030": {"content": WORD}}
    change(folder, "tokenizer_config.json", added_tokens_decoder=table, extra_special_tokens=[])
    with pytest.raises(CheckpointError, match=r"'thinking' the id 1030, but with its tokenizer\.json it gets 1024"):
        tokenizer_bytes(folder / "tokenizer.json")


@pytest.mark.parametrize(
    "settings",
    [{"added_tokens_decoder": value} for value in ([], 1, {"x": {}}, {"0": 1}, {"0": {"content": []}})]
    + [{"added_tokens_decoder": None}, {"extra_special_tokens": [{"content": 1}, 3, None, ""]}, {"pad_token": {}}],
)
def test_strange_settings(folder: Path, settings: Any) -> None:
    change(folder, "tokenizer_config.json", **settings)
    try:
        tokenizer_bytes(folder / "tokenizer.json")
    except CheckpointError as error:
        assert "unknown form" in error.message


FLAGS = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized", "special"), False)


def add(folder: Path, *tokens: tuple[int, str]) -> None:
    own = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    more = [{"id": index, "content": text, **FLAGS} for index, text in tokens]
    change(folder, "tokenizer.json", added_tokens=[*own, *more])


GROWING = {"type": "Replace", "pattern": {"String": "x"}, "content": "x" * 16}
SLOW = {"type": "Replace", "pattern": {"Regex": "(x+x+)+y"}, "content": ""}
SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}


@pytest.mark.parametrize(
    "normalizer",
    [
        {"type": "Sequence", "normalizers": [GROWING] * 12},
        SLOW,
        # The library ignores keys that a type does not have.
        {**SLOW, "normalizers": [SPACES]},
        {"type": "Sequence", "normalizers": [SPACES, SLOW]},
    ],
)
def test_the_library_never_runs_another_normalizer(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, normalizer: Any
) -> None:
    def run(*_: Any) -> None:
        raise AssertionError("the library was given a tokenizer unlike Gemma's")

    monkeypatch.setattr("rkruntime.text.tokenizer.open_backend", run)
    change(folder, "tokenizer.json", normalizer=normalizer)
    change(folder, "tokenizer_config.json", extra_special_tokens=["x" * 60])
    assert cli.main(["convert", str(folder), "-q", "-o", str(folder.parent / "bundle")]) == CheckpointError.exit_code
    assert "its normalizer is" in capsys.readouterr().err
    assert token_count(folder / "tokenizer.json") == 1025  # an adapter's, of which only JSON is read


def test_thousands_of_added_tokens_are_loaded_at_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loads = []

    def counted(*arguments: Any) -> Tokenizer:
        loads.append(arguments)
        return open_backend(*arguments)

    monkeypatch.setattr("rkruntime.text.tokenizer.open_backend", counted)
    table = decoder_of(folder) | {str(1024 + at): {"content": f"word{at}", **FLAGS} for at in range(4000)}
    change(folder, "tokenizer_config.json", added_tokens_decoder=table)
    path = folder / "tokenizer.json"
    found = [tokenizer_bytes(path), tokenizer_bytes(path)]
    assert read_tokenizer(path, 8192).added["word3999"] == 5023
    assert found[0] == found[1] == tokenizer_bytes(path)
    assert len(loads) <= 3
    assert agrees(folder).token_to_id("word3999") == 5023


def test_more_than_the_library_can_take_is_refused(folder: Path) -> None:
    add(folder, *((1024 + at, f"{at:04}".ljust(1000, "x")) for at in range(1000)))
    with pytest.raises(CheckpointError, match=r"1,108 added tokens with 1,00[0-9,]+ characters; at most"):
        tokenizer_bytes(folder / "tokenizer.json")


@pytest.mark.parametrize("kind", ["PreTrainedTokenizerFast", "GemmaTokenizer"])
@pytest.mark.parametrize("beside", ["", "tokenizer_config.json"])
@pytest.mark.parametrize(
    "tokens", [((1025, "beta"), (1024, "alpha")), ((1024, "alpha"), (1026, "beta")), ((1025, "alpha"), (1025, "beta"))]
)
def test_ids_that_depend_on_who_loads_the_file_are_refused(folder: Path, tokens: Any, kind: str, beside: str) -> None:
    add(folder, *tokens)
    change(folder, "tokenizer_config.json", tokenizer_class=kind)
    if beside:
        change(folder, beside, added_tokens_decoder=decoder_of(folder))
    for read in (tokenizer_bytes, lambda path: read_tokenizer(path, 2048)):
        with pytest.raises(CheckpointError, match=r"gives the added token '(alpha|beta)' the id"):
            read(folder / "tokenizer.json")


def test_tokens_of_the_vocabulary_may_be_in_any_order(folder: Path) -> None:
    own = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    change(folder, "tokenizer.json", added_tokens=random.Random(1).sample(own, k=len(own)))
    agrees(folder)
    control = read_tokenizer(folder / "tokenizer.json", 1024).added
    assert control == {token["content"]: token["id"] for token in own}


def test_two_tokens_with_one_id_are_refused(folder: Path) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    content["model"]["vocab"]["another"] = 300
    change(folder, "tokenizer.json", model=content["model"])
    with pytest.raises(CheckpointError, match="both have the id 300"):
        read_tokenizer(folder / "tokenizer.json", 1025)


def flags_of(tokenizer: Tokenizer) -> dict[int, str]:
    return {index: repr(token) for index, token in tokenizer.get_added_tokens_decoder().items()}


@pytest.mark.parametrize("table", [None, {}, {"image_token": "<image>"}])
@pytest.mark.parametrize("listed", [False, True])
def test_a_table_of_tokens_and_an_older_list(folder: Path, table: Any, listed: bool) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    del config["additional_special_tokens"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    sep = {"__type": "AddedToken", "content": WORD, **FLAGS, "lstrip": True}
    change(folder, "tokenizer_config.json", extra_special_tokens=table, sep_token=sep)
    change(folder, "special_tokens_map.json", additional_special_tokens=[NEW, WORD])
    if listed:
        change(folder, "added_tokens.json", **{NEW: 1024})
    oracle = transformers.AutoTokenizer.from_pretrained(folder).backend_tokenizer
    assert flags_of(agrees(folder)) == flags_of(oracle)


@pytest.mark.parametrize(
    ("settings", "older"),
    [({"split_special_tokens": True}, {}), ({}, {"split_special_tokens": True}), ({}, {"chat_template": "a template"}),
     ({"fast_tokenizer_files": ["tokenizer.4.0.0.json"]}, {}), ({"extra_special_tokens": {"my_word": NEW}}, {}),
     ({"extra_special_tokens": {"image_token": NEW}}, {"image_token": WORD})],
)  # fmt: skip
def test_what_transformers_reads_otherwise_is_refused(folder: Path, settings: Any, older: Any) -> None:
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("additional_special_tokens", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    read_tokenizer(folder / "tokenizer.json", 1100)
    change(folder, "tokenizer_config.json", **settings)
    change(folder, "special_tokens_map.json", **older)
    with pytest.raises(CheckpointError, match="|".join([*settings, *older])):
        read_tokenizer(folder / "tokenizer.json", 1100)
