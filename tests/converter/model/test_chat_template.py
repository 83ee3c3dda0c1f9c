"""A checkpoint's own template from the folder to a prompt: bundle, emulator file, calibration and chat agree."""

from __future__ import annotations

import json
import random
import shutil
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import transformers
from tests.runtime.text.chat_templates import FOLDED, NATIVE

from rkconvert import demo
from rkconvert.model.chat_template import read_template
from rkconvert.model.rendering import rendered
from rkconvert.model.tokenizer import tokenizer_bytes
from rkruntime import cli
from rkruntime.bundle.manifest import open_bundle
from rkruntime.bundle.rkemu import read_container
from rkruntime.errors import CheckpointError
from rkruntime.text.prompt_process import PromptProcess
from rkruntime.text.template import Message
from rkruntime.text.tokenizer import Tokenizer

TRUNCATION = {"direction": "Right", "max_length": 3, "strategy": "LongestFirst", "stride": 0}
PADDING = {
    "strategy": "BatchLongest",
    "direction": "Right",
    "pad_to_multiple_of": 64,
    "pad_id": 0,
    "pad_type_id": 0,
    "pad_token": "<pad>",
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shutil.copytree(demo.checkpoint(), tmp_path / "model")
    return tmp_path / "model"


# As transformers writes it today: then tokenizer_config.json alone counts.
NEWER = {"added_tokens_decoder": {"0": {"content": "<pad>", "special": True}}}


def configure(folder: Path, **settings: Any) -> None:
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | settings))


@pytest.mark.parametrize("name", ["alpaca", "gemma without newline", "gemma with system", "vicuna"])
def test_all_parts_agree(folder: Path, tmp_path: Path, name: str) -> None:
    (folder / "chat_template.jinja").write_text((FOLDED | NATIVE)[name])
    configure(folder, eos_token="<end_of_turn>")
    (folder / "special_tokens_map.json").unlink()
    assert cli.main(["convert", str(folder), "-q", "-o", str(tmp_path / "bundle")]) == 0
    oracle = transformers.AutoTokenizer.from_pretrained(folder)
    question = [{"role": "user", "content": "Hello there"}, {"role": "assistant", "content": "Hi"}]
    question += [{"role": "user", "content": "And now?"}]
    text = oracle.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    bundle = open_bundle(tmp_path / "bundle")
    with closing(PromptProcess(bundle)) as prompts:
        ids, _ = prompts.prompt([Message(**item) for item in question], 1024)
    assert ids == oracle(text, add_special_tokens=False)["input_ids"]
    template = read_template(folder, "<bos>")
    assert template.system_role == bundle.manifest.system_role == ("fold" if name in FOLDED else "native")
    assert rendered(template.source, [question], template.special_tokens) == [text]
    metadata = read_container(bundle.model).metadata
    prefix, suffix = (metadata[f"rkllm.chat_template.{end}"] for end in ("prefix", "suffix"))
    assert f"<bos>{prefix}Hello there{suffix}" == oracle.apply_chat_template(
        question[:1], add_generation_prompt=True, tokenize=False
    )


def test_a_missing_bos_is_said(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(NATIVE["chatml"])
    assert "does not start with <bos>" in read_template(folder, "<bos>").notes[0]
    (folder / "chat_template.jinja").write_text(NATIVE["vicuna"])
    assert read_template(folder, "<bos>").notes == ()


@pytest.mark.parametrize("model", [False, True])
@pytest.mark.parametrize(
    "kind",
    [None, "GemmaTokenizer", "GemmaTokenizerFast", "PreTrainedTokenizerFast", "TokenizersBackend", "LlamaTokenizer",
     "LlamaTokenizerFast", "Qwen2Tokenizer", "CohereTokenizerFast", "GPT2TokenizerFast", "CodeLlamaTokenizer"],
)  # fmt: skip
def test_a_class_that_splits_texts_otherwise_is_said(folder: Path, kind: str | None, model: bool) -> None:
    """Whether tokenizer_config.json names it, or only the model's config.json."""
    configure(folder, tokenizer_class=None if model else kind)
    if model:
        (folder / "config.json").write_text(json.dumps({"model_type": "gemma2", "tokenizer_class": kind}))
    oracle, own = (
        transformers.AutoTokenizer.from_pretrained(folder),
        Tokenizer.parse((folder / "tokenizer.json").read_bytes(), folder / "tokenizer.json"),
    )
    texts = ["Hello there", "the key", " two  spaces", "é\n\n日本"]
    same = all(oracle(text, add_special_tokens=False)["input_ids"] == own.encode(text) for text in texts)
    notes = [note for note in read_template(folder, "<bos>").notes if "splits texts otherwise" in note]
    assert len(notes) == (not same)


@pytest.mark.parametrize("kind", [None, "GemmaTokenizer", "GemmaTokenizerFast", "PreTrainedTokenizerFast"])
@pytest.mark.parametrize("kept", [1.0, 0.9, 0.5, 0.0])
def test_added_tokens_that_a_list_leaves_out_are_said(folder: Path, kind: str | None, kept: float) -> None:
    rng = random.Random(f"{kind} {kept}")
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    table = {str(token["id"]): {**token} for token in added if rng.random() < kept}
    configure(folder, tokenizer_class=kind, added_tokens_decoder=table, additional_special_tokens=[])
    (folder / "special_tokens_map.json").unlink()
    oracle = transformers.AutoTokenizer.from_pretrained(folder)
    ids = [oracle(token["content"], add_special_tokens=False)["input_ids"] for token in added]
    split = [token for token, found in zip(added, ids, strict=True) if found != [token["id"]]]
    notes = [note for note in read_template(folder, "<bos>").notes if "lists added tokens" in note]
    assert len(notes) == bool(split)
    if split:
        assert f"not {split[0]['content']} ({len(split)} such token" in notes[0]


@pytest.mark.parametrize("start", [" \n<bos>", "<bos><bos>", "\n<bos> <bos>", "<bos>"])
def test_bos_is_first_and_once_in_the_text_that_a_library_adds(folder: Path, start: str) -> None:
    (folder / "chat_template.jinja").write_text(start + "\n{{ messages[0].content }}!")
    found = read_template(folder, "<bos>")
    assert (found.prefix, found.suffix) == ("\n", "!")


def test_named_templates_whose_names_are_none(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink()
    configure(folder, chat_template=[{"name": []}, {"name": "default", "template": "{{ messages[0].content }}"}])
    assert read_template(folder, "<bos>").source == "{{ messages[0].content }}"


@pytest.mark.parametrize("config", [None, "text", "list", "list without default"])
@pytest.mark.parametrize("main", [True, False])
@pytest.mark.parametrize("more", [(), ("tool_use",), ("default",), ("default", "tool_use", "rag")])
def test_the_template_is_the_one_that_transformers_takes(
    folder: Path, tmp_path: Path, config: str | None, main: bool, more: tuple[str, ...]
) -> None:
    def template(where: str) -> str:
        return f"{where}: {{{{ messages[0].content }}}}"

    named = [{"name": name, "template": template(f"key {name}")} for name in ("tool_use", "default")]
    values = {"text": template("key"), "list": named, "list without default": named[:1]}
    configure(folder, chat_template=values.get(str(config)))
    (folder / "chat_template.jinja").unlink()
    if main:
        (folder / "chat_template.jinja").write_text(template("main"))
    for name in more:
        (folder / "additional_chat_templates").mkdir(exist_ok=True)
        (folder / "additional_chat_templates" / f"{name}.jinja").write_text(template(f"more {name}"))
    chat = [{"role": "user", "content": "x"}]
    line = ["merge", str(folder), "--lora", str(demo.adapter()), "-q", "-o", str(tmp_path / "merged")]
    try:
        expected = transformers.AutoTokenizer.from_pretrained(folder).apply_chat_template(chat, tokenize=False)
    except ValueError as error:
        if "not set" in str(error):  # RKEdge has Gemma's then
            assert not read_template(folder, "<bos>").own
        else:
            with pytest.raises(CheckpointError, match="none of them is called default"):
                read_template(folder, "<bos>")
            assert cli.main(line) == 3
        return
    found = read_template(folder, "<bos>")
    assert rendered(found.source, [chat], found.special_tokens) == [expected]
    assert cli.main(line) == 0
    merged = transformers.AutoTokenizer.from_pretrained(tmp_path / "merged")
    assert merged.chat_template == transformers.AutoTokenizer.from_pretrained(folder).chat_template


def test_an_additional_template_decides_what_is_kept(folder: Path, tmp_path: Path, capsys: Any) -> None:
    (folder / "additional_chat_templates").mkdir()
    file = folder / "additional_chat_templates" / "default.jinja"
    file.write_text((folder / "chat_template.jinja").read_text())
    recipe = {"checkpoint": str(folder), "output": str(tmp_path), "matrix": {"dtype": ["w8a8"]}}
    (tmp_path / "m.yaml").write_text(json.dumps(recipe))
    codes = [cli.main(["convert", "--matrix", str(tmp_path / "m.yaml"), "-q"])]
    file.write_text(file.read_text().replace("trim", "trim | trim"))
    assert [*codes, cli.main(["convert", "--matrix", str(tmp_path / "m.yaml"), "-q"])] == [0, 3]


@pytest.mark.parametrize(
    "config", [{}, {"eos_token": None}, NEWER, {"eos_token": {"content": "<unused9>"}, "unk_token": "<mask>"}]
)
@pytest.mark.parametrize("older", [{}, {"eos_token": "<unused8>", "pad_token": {"content": "<eos>"}}])
def test_special_tokens_are_those_of_transformers(folder: Path, config: Any, older: Any) -> None:
    wrapped = dict(config)
    if isinstance(config.get("eos_token"), dict):
        wrapped["eos_token"] = {"__type": "AddedToken", "special": True, **config["eos_token"]}
    configure(folder, **wrapped)
    (folder / "special_tokens_map.json").write_text(json.dumps(older))
    (folder / "chat_template.jinja").write_text(
        "{{ messages[0].content }}{{ bos_token }}{{ eos_token }}{{ unk_token }}{{ pad_token }}"
    )
    oracle = transformers.AutoTokenizer.from_pretrained(folder)
    chat = [{"role": "user", "content": "x"}]
    found = read_template(folder, "<bos>")
    if config.get("eos_token", "") is None and not older:
        return  # transformers has none then; Gemma's is better than an empty text
    assert rendered(found.source, [chat], found.special_tokens) == [oracle.apply_chat_template(chat, tokenize=False)]


def test_truncation_and_padding_are_left_out(folder: Path, tmp_path: Path) -> None:
    file = folder / "tokenizer.json"
    before = file.read_bytes()
    assert tokenizer_bytes(file) == before
    file.write_text(json.dumps({**json.loads(before), "truncation": TRUNCATION, "padding": PADDING}))
    assert cli.main(["convert", str(folder), "-q", "-o", str(tmp_path / "bundle")]) == 0
    kept = json.loads((tmp_path / "bundle" / "tokenizer.json").read_text())
    assert kept["truncation"] is None
    assert kept["padding"] is None
    text = "What is the RK3588, in some more words?"
    assert Tokenizer.parse(file.read_bytes(), file).encode(text) == Tokenizer.parse(
        (tmp_path / "bundle" / "tokenizer.json").read_bytes(), tmp_path / "bundle" / "tokenizer.json"
    ).encode(text)


@pytest.mark.parametrize(
    "source",
    [
        "{{ bos_token }}{{ ('<start_of_turn>' ~ messages[0].content) | tojson }}",
        "{{ bos_token }}{{ '<start_of_turn>{}'.format(messages[0].content) }}",
        "{{ bos_token }}{{ messages[0].content }}{{ range(10 ** 6) | random }}",
        "{{ bos_token }}{{ messages[0].content }}{% if 'lines' in messages[0].content %}{{ nothing() }}{% endif %}",
    ],
)
def test_what_cannot_be_followed_is_refused_before_work(folder: Path, source: str) -> None:
    (folder / "chat_template.jinja").write_text(source)
    with pytest.raises(CheckpointError, match=r"tracked|rendered|failed") as caught:
        read_template(folder, "<bos>")
    assert "Download the checkpoint again" not in caught.value.hint


def prompts_of(folder: Path, text: str) -> tuple[list[int], list[int]]:
    """Ids of a question: ours, and those of transformers."""
    shutil.rmtree(folder.parent / "bundle", ignore_errors=True)
    assert cli.main(["convert", str(folder), "-q", "-o", str(folder.parent / "bundle")]) == 0
    question = [{"role": "system", "content": "Be brief"}, {"role": "user", "content": text}]
    oracle = transformers.AutoTokenizer.from_pretrained(folder)
    rendered_text = oracle.apply_chat_template(question, add_generation_prompt=True, tokenize=False)
    with closing(PromptProcess(open_bundle(folder.parent / "bundle"))) as prompts:
        ids, _ = prompts.prompt([Message(**item) for item in question], 1024)
    return ids, oracle(rendered_text, add_special_tokens=False)["input_ids"]


NAMED = (
    "{{ bos_token }}{% for m in messages %}{{ sot_token }}{{ m.role }}{{ '\n' }}{{ m.content | trim }}{{ eot_token }}"
    "{{ '\n' }}{% endfor %}{{ sot_token }}{{ 'model\n' }}"
)
NAMES = {"sot_token": "<start_of_turn>", "eot_token": "<end_of_turn>"}


@pytest.mark.parametrize("place", ["extra_special_tokens", "tokenizer_config", "special_tokens_map"])
def test_special_tokens_of_any_name(folder: Path, place: str) -> None:
    (folder / "chat_template.jinja").write_text(NAMED)
    if place == "special_tokens_map":
        file = folder / "special_tokens_map.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | NAMES))
    else:
        configure(folder, **({place: NAMES} if place == "extra_special_tokens" else NAMES))
    ours, theirs = prompts_of(folder, "Hello")
    assert ours == theirs


@pytest.mark.parametrize("change", ["m.content | upper", "m.content | wordwrap(6)", "m.content | replace('e', '3')"])
def test_a_system_role_that_rewrites_its_text(folder: Path, change: str) -> None:
    source = (
        "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ CHANGED if m.role == 'system' else m.content }}"
        "{{ '\n' }}{% endfor %}"
    )
    (folder / "chat_template.jinja").write_text(source.replace("CHANGED", f"({change})"))
    ours, theirs = prompts_of(folder, "Hello")
    assert ours == theirs


def test_words_that_a_fine_tune_added_are_text(folder: Path) -> None:
    oracle = transformers.AutoTokenizer.from_pretrained(folder)
    oracle.add_tokens(["Rockchip"])
    oracle.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(NATIVE["gemma with system"])
    ours, theirs = prompts_of(folder, "What is a Rockchip, and what Rockchips?")
    assert ours == theirs
    word = oracle.convert_tokens_to_ids("Rockchip")
    assert word in ours
    with closing(PromptProcess(open_bundle(folder.parent / "bundle"))) as prompts:
        assert prompts.vocabulary.decode([word]) == "Rockchip"


def test_a_control_token_that_takes_white_space_along_is_refused(folder: Path) -> None:
    file = folder / "tokenizer.json"
    content = json.loads(file.read_text())
    next(token for token in content["added_tokens"] if token["content"] == "<end_of_turn>")["rstrip"] = True
    file.write_text(json.dumps(content))
    (folder / "chat_template.jinja").write_text(NATIVE["gemma with system"])
    with pytest.raises(CheckpointError, match="<end_of_turn>, for which tokenizer"):
        read_template(folder, "<bos>")


def test_templates_by_name(folder: Path) -> None:
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    configure(folder, chat_template={"default": NATIVE["vicuna"]})
    assert read_template(folder, "<bos>").source == NATIVE["vicuna"]
    configure(folder, chat_template=[{"name": "tools", "template": NATIVE["vicuna"]}])
    with pytest.raises(CheckpointError, match="none of them is called default"):
        read_template(folder, "<bos>")


def test_another_class_of_tokenizer_has_no_tokens_of_gemmas(folder: Path) -> None:
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    configure(folder, tokenizer_class="PreTrainedTokenizerFast", eos_token=None, pad_token=None)
    (folder / "chat_template.jinja").write_text(
        "{{ bos_token }}{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token }}{{ pad_token }}"
        "{{ '\n' }}{% endfor %}"
    )
    ours, theirs = prompts_of(folder, "Hello")
    assert ours == theirs
