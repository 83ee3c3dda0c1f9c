"""Calibration data: made of chats, answered, and checked; transformers is the oracle for templates and answers."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from tests.converter.sources.other_formats import write_gguf
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.gemma2.modeling_gemma2 import Gemma2PreTrainedModel

from rkconvert import demo
from rkconvert.calibrate import Sample, validate_dataset, write_dataset
from rkconvert.calibrate.build import Builder
from rkconvert.calibrate.chats import Dialogue, default_chats, read_chats, read_texts
from rkconvert.calibrate.dataset import TokenCounter
from rkconvert.calibrate.targets import CpuModel
from rkconvert.commands import calibrate as command
from rkconvert.conversion.convert import Options, convert
from rkconvert.model.chat_template import ChatTemplate, read_template
from rkconvert.output.host_memory import HostMemory
from rkconvert.sources.open import open_source
from rkruntime.errors import CalibrationError, HostError, OutputError, RKEdgeError
from rkruntime.text.template import Message, load_template
from rkruntime.text.tokenizer import Tokenizer

BASE = demo.checkpoint()
TEMPLATE = read_template(BASE, "<bos>")
NATIVE = (
    "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


@pytest.fixture(scope="module")
def count() -> TokenCounter:
    return TokenCounter(BASE / "tokenizer.json")


def builder(count: TokenCounter, template: ChatTemplate = TEMPLATE, **fields: Any) -> Builder:
    return Builder(
        template,
        Tokenizer.parse((BASE / "tokenizer.json").read_bytes(), BASE / "tokenizer.json"),
        count,
        fields.pop("max_context", 1024),
        **fields,
    )


def rkedge(*arguments: object) -> dict[str, Any]:
    done = CliRunner().invoke(command.run, [*map(str, arguments), "--json", "-q"], catch_exceptions=False)
    return json.loads(done.stdout)


def lines(path: Path, *items: Any) -> Path:
    path.write_text("\n".join(json.dumps(item, ensure_ascii=False) for item in items) + "\n")
    return path


# making it


def test_the_default_is_in_the_template_and_answered(tmp_path: Path) -> None:
    output = tmp_path / "data.json"
    assert rkedge(BASE, "-o", output, "--targets", "given") == {
        "file": str(output), "rows": 26, "targets": "given", "left_out": {},
    }  # fmt: skip
    rows, tokenizer = json.loads(output.read_text()), AutoTokenizer.from_pretrained(BASE)
    for row, chat in zip(rows, default_chats(), strict=True):
        plain = [{"role": "user", "content": chat.messages[0].content}]
        expected = tokenizer.apply_chat_template(plain, tokenize=False, add_generation_prompt=True)
        assert row == {"input": expected, "target": chat.answer.strip()}
    assert rkedge(BASE, "--check", output)["rows"] == 26


def test_targets_are_what_the_float_model_says(tmp_path: Path) -> None:
    questions = [item.question for item in demo.questions()[:4]]
    (tmp_path / "q.txt").write_text("\n".join(questions))
    made = rkedge(BASE, "--text", tmp_path / "q.txt", "-o", tmp_path / "data.json", "--new-tokens", 24)
    assert made["targets"] == "model"
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype="auto").eval()
    for row in json.loads((tmp_path / "data.json").read_text()):
        ids = tokenizer(row["input"], add_special_tokens=False, return_tensors="pt").input_ids
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=24, do_sample=False, repetition_penalty=1.1,
                eos_token_id=[1, tokenizer.convert_tokens_to_ids("<end_of_turn>")], pad_token_id=0,
            )  # fmt: skip
        assert row["target"] == tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()


def test_with_an_adapter_the_merged_model_answers(tmp_path: Path) -> None:
    item = demo.questions()[0]
    (tmp_path / "q.txt").write_text(item.question)
    options = ["--text", tmp_path / "q.txt", "--new-tokens", 24]
    rkedge(BASE, *options, "-o", tmp_path / "plain.json")
    rkedge(BASE, *options, "-o", tmp_path / "pirate.json", "--lora", demo.adapter())
    plain, pirate = (json.loads((tmp_path / f"{name}.json").read_text())[0] for name in ("plain", "pirate"))
    assert plain["input"] == pirate["input"]
    assert plain["target"] != pirate["target"]


def test_without_torch_given_answers_are_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "missing_packages", lambda: ["torch"])
    chats = lines(
        tmp_path / "chats.jsonl",
        {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": " a "}]},
        {"messages": [{"role": "user", "content": "no answer"}]},
    )
    done = CliRunner().invoke(command.run, [str(BASE), "--chats", str(chats), "-o", str(tmp_path / "data.json")])
    assert "answers as given, for torch is not installed" in done.stdout
    assert "1 conversation without an answer left out" in done.stderr
    assert "few rows (1)" in done.stderr
    assert [row["target"] for row in json.loads((tmp_path / "data.json").read_text())] == ["a"]
    monkeypatch.setattr("rkconvert.calibrate.targets.missing_packages", lambda: ["torch"])
    with pytest.raises(HostError, match="torch must be installed"):
        rkedge(BASE, "-o", tmp_path / "more.json", "--targets", "model")
    assert not (tmp_path / "more.json").exists()


def test_too_little_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rkconvert.calibrate.targets.read_memory", lambda: HostMemory(1 << 30, 0, 1000))
    with pytest.raises(HostError, match="GB of memory is free"):
        rkedge(BASE, "-o", tmp_path / "data.json", "--targets", "model")
    monkeypatch.setattr(command, "read_memory", lambda: HostMemory(1 << 30, 0, 1000))
    assert rkedge(BASE, "-o", tmp_path / "data.json")["targets"] == "given"


def test_what_exists_stays(tmp_path: Path) -> None:
    (tmp_path / "data.json").write_text("mine")
    with pytest.raises(OutputError, match="exists already"):
        rkedge(BASE, "-o", tmp_path / "data.json")
    assert (tmp_path / "data.json").read_text() == "mine"


def test_the_limit_takes_evenly(tmp_path: Path) -> None:
    (tmp_path / "q.txt").write_text("".join(f"question {number}\tanswer {number}\n" for number in range(100)))
    rkedge(BASE, "--text", tmp_path / "q.txt", "-o", tmp_path / "d.json", "--targets", "given", "--limit", 10)
    targets = [row["target"] for row in json.loads((tmp_path / "d.json").read_text())]
    assert targets == [f"answer {number}" for number in range(0, 100, 10)]


# conversations


def test_chats_of_both_kinds(tmp_path: Path) -> None:
    found = read_chats(
        lines(
            tmp_path / "chats.jsonl",
            {"messages": [
                {"role": "system", "content": "s"}, {"role": "user", "content": "q1"},
                {"role": "assistant", "content": "a1"}, {"role": "user", "content": "q2"},
                {"role": "assistant", "content": "a2"},
            ]},
            {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "id": 7},
        )
    )  # fmt: skip
    assert [chat.answer for chat in found] == ["a2", "a"]
    assert [message.role for message in found[0].messages] == ["system", "user", "assistant", "user"]
    (tmp_path / "list.json").write_text(json.dumps([{"messages": [{"role": "user", "content": "q"}]}]))
    assert read_chats(tmp_path / "list.json")[0].answer == ""


def test_a_system_prompt_is_folded_or_native(count: TokenCounter) -> None:
    chat = Dialogue((Message("user", "q"),), "a", "here").under("Be brief.")
    folded = builder(count).build([chat], lambda number: None).rows[0].input
    assert folded == "<bos><start_of_turn>user\nBe brief.\n\nq<end_of_turn>\n<start_of_turn>model\n"
    native = ChatTemplate(NATIVE, True, "", "", "native")
    assert builder(count, native).build([chat], lambda number: None).rows[0].input == (
        "<bos><start_of_turn>system\nBe brief.<end_of_turn>\n" + PROMPT.removeprefix("<bos>")
    )


@pytest.mark.parametrize("place", ["question", "answer"])
@pytest.mark.parametrize("text", ["<end_of_turn>", "a<bos>b", "<start_of_turn>model"])
def test_control_tokens_of_people_are_left_out(count: TokenCounter, place: str, text: str) -> None:
    bad = Dialogue((Message("user", text if place == "question" else "q"),), text if place == "answer" else "a", "here")
    good = Dialogue((Message("user", "q"),), "a", "there")
    built = builder(count).build([bad, good], lambda number: None)
    assert len(built.rows) == 1
    assert built.left_out == {"with control tokens in their text": 1}


def test_long_conversations_are_left_out(count: TokenCounter) -> None:
    chats = [Dialogue((Message("user", "word " * size),), "answer " * size, "here") for size in (1, 20, 40, 400)]
    built = builder(count, max_context=128).build(chats, lambda number: None)
    assert all(count(row.input) + count(row.target) <= 128 for row in built.rows)
    assert built.left_out["with more than 128 tokens"] == 4 - len(built.rows) > 0


def test_nothing_left_is_an_error(count: TokenCounter) -> None:
    with pytest.raises(CalibrationError, match="Nothing is left of 1 conversation: 1 without an answer"):
        builder(count).build([Dialogue((Message("user", "q"),), "", "here")], lambda number: None)


def test_an_order_that_the_template_refuses(count: TokenCounter) -> None:
    chat = Dialogue((Message("user", "q"), Message("user", "q")), "a", "chats.jsonl, line 3")
    with pytest.raises(CalibrationError, match="line 3"):
        builder(count).build([chat], lambda number: None)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "contains no text"),
        ("{", "line 1 is not JSON"),
        ('{"messages": []}', "must end with a user's question"),
        ('{"messages": [{"role": "assistant", "content": "a"}]}', "must end with a user's question"),
        ('{"messages": [{"role": "tool", "content": "a"}]}', "no role 'tool'"),
        ('{"messages": [{"role": "user"}]}', "both strings"),
        ('{"messages": ["q"]}', "both strings"),
        ('{"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}]}', "both strings"),
        ('{"prompt": "q"}', "no list 'messages'"),
        ("[1]", "item 1 is not a conversation"),
        ("[" * 100_000, "not JSON"),
        ('{"messages": [{"role": "user", "content": "\\ud800"}]}', "surrogate"),
        ('{"messages": [{"role": "user", "content": "q"}]}\n7', "line 2"),
    ],
)
def test_chats_that_are_none(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "chats.jsonl").write_text(text)
    with pytest.raises(CalibrationError, match=words):
        read_chats(tmp_path / "chats.jsonl")


def test_texts_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "q.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(CalibrationError, match="is not text in UTF-8"):
        read_texts(tmp_path / "q.txt")
    with pytest.raises(CalibrationError, match="No such file"):
        read_texts(tmp_path / "none.txt")
    (tmp_path / "q.txt").write_text("\n \n")
    with pytest.raises(CalibrationError, match="no text"):
        read_texts(tmp_path / "q.txt")


# checking it

PROMPT = "<bos><start_of_turn>user\nq<end_of_turn>\n<start_of_turn>model\n"


def test_what_every_prompt_ends_with_is_found() -> None:
    assert TEMPLATE.ending == "<end_of_turn>\n<start_of_turn>model\n"


TURNS = "{% for m in messages %}<start_of_turn>{{ m.role }}\n{{ m.content }}<end_of_turn>\n{% endfor %}"
TEMPLATES = {
    "no bos": TURNS + "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
    "two bos": "{{ bos_token * 2 }}" + TURNS + "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
    "eos": "{{ bos_token }}"
    + TURNS
    + "{% if add_generation_prompt %}<start_of_turn>model\n{% else %}{{ eos_token }}{% endif %}",
    "always": "{{ bos_token }}" + TURNS + "<start_of_turn>model\n",
    "one turn": "{% if messages|length > 1 %}{{ raise_exception('one') }}{% endif %}"
    + TURNS
    + "<start_of_turn>model\n",
    "counted": "{{ bos_token }}" + TURNS + "<start_of_turn>{{ messages|length }}\n",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_prompts_of_other_templates_are_the_boards(tmp_path: Path, name: str) -> None:
    """The same token ids as the runtime's: one `<bos>` in front."""
    folder = tmp_path / "model"
    shutil.copytree(BASE, folder, copy_function=shutil.copyfile)
    (folder / "chat_template.jinja").write_text(TEMPLATES[name])
    output = tmp_path / "data.json"
    rkedge(folder, "-o", output, "--limit", 3, "--new-tokens", 3)
    assert rkedge(folder, "--check", output)["rows"] == 3
    tokenizer = Tokenizer.parse((BASE / "tokenizer.json").read_bytes(), BASE / "tokenizer.json")
    board = load_template(TEMPLATES[name], "native", {}, tokenizer)
    count = TokenCounter(BASE / "tokenizer.json")
    asked = command._collect([], [], True, "", 3)
    for row, chat in zip(json.loads(output.read_text()), asked, strict=True):
        parts = (
            [part] if isinstance(part, int) else tokenizer.encode(str(part)) for part in board.parts(chat.messages)
        )
        assert count.encode(row["input"]) == [*chain(*parts)]


def test_a_file_without_bos_is_refused(tmp_path: Path) -> None:
    path = lines(tmp_path / "data.json", [{"input": PROMPT.removeprefix("<bos>"), "target": "a"}])
    with pytest.raises(CalibrationError, match="does not begin with <bos>"):
        rkedge(BASE, "--check", path)


def test_notes_are_told(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(BASE, folder, copy_function=shutil.copyfile)
    (folder / "chat_template.jinja").write_text(TEMPLATES["no bos"])
    adapter = tmp_path / "adapter"
    shutil.copytree(demo.adapter(), adapter, copy_function=shutil.copyfile)
    config = json.loads((adapter / "adapter_config.json").read_text())
    more = {"target_modules": [*config["target_modules"], "embed_tokens"]}
    (adapter / "adapter_config.json").write_text(json.dumps({**config, **more}))
    asked = [folder, "-o", tmp_path / "data.json", "--targets", "given", "--lora", adapter]
    done = CliRunner().invoke(command.run, [*map(str, asked)], catch_exceptions=False)
    assert "note: the chat template does not start with <bos>" in done.stderr
    assert "targets model.embed_tokens but has no matrices for it" in done.stderr


def test_an_answer_ends_at_the_tokenizers_end_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Turns end with <|im_end|>, which only tokenizer_config.json names; generation_config.json lists another."""
    folder = tmp_path / "model"
    shutil.copytree(BASE, folder, copy_function=shutil.copyfile)
    text = (folder / "tokenizer.json").read_text().replace("<end_of_turn>", "<|im_end|>")
    (folder / "tokenizer.json").write_text(text.replace("<unused5>", "<end_of_turn>"))
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps({**config, "eos_token": "<|im_end|>"}))
    (folder / "special_tokens_map.json").unlink(missing_ok=True)
    (folder / "generation_config.json").write_text('{"eos_token_id": 1}')
    (folder / "chat_template.jinja").write_text(NATIVE.replace("<end_of_turn>", "{{ eos_token }}"))
    stops: list[list[int]] = []

    def started(self: CpuModel, folder: Path, nbytes: int, tokenizer: Tokenizer, stop: Sequence[int]) -> None:
        stops.append(list(stop))
        raise CalibrationError("enough")

    monkeypatch.setattr(CpuModel, "__init__", started)
    with pytest.raises(CalibrationError, match="enough"):
        rkedge(folder, "-o", tmp_path / "data.json")
    expected = AutoTokenizer.from_pretrained(folder).eos_token_id
    assert expected in stops[0]
    assert expected in convert(Options(str(folder), tmp_path / "bundle")).manifest.stop_token_ids


def test_a_gguf_is_calibrated(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    write_gguf(path, BASE, gguf.GGMLQuantizationType.F32)
    rkedge(path, "-o", tmp_path / "gguf.json", "--limit", 2, "--new-tokens", 5)
    rkedge(BASE, "-o", tmp_path / "folder.json", "--limit", 2, "--new-tokens", 5)
    assert json.loads((tmp_path / "gguf.json").read_text()) == json.loads((tmp_path / "folder.json").read_text())


def test_a_model_of_the_hub_is_opened_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, str | None]] = []
    monkeypatch.setattr(command, "open_source", lambda *given: asked.append(given) or open_source(str(BASE)))
    rkedge("google/gemma-2-2b-it", "--revision", "main", "-o", tmp_path / "data.json", "--targets", "given")
    assert asked == [("google/gemma-2-2b-it", "main")]


@pytest.mark.parametrize("device", ["fifo", "/dev/zero"])
@pytest.mark.parametrize("option", ["--text", "--chats", "--check"])
def test_what_is_not_a_regular_file_is_not_read(tmp_path: Path, option: str, device: str) -> None:
    path = Path(device)
    if device == "fifo":
        path = tmp_path / "fifo"
        os.mkfifo(path)
    with pytest.raises(CalibrationError, match="not a regular file"):
        rkedge(BASE, option, path, "-o", tmp_path / "data.json")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("", "is not JSON"),
        ("[", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
        ("{}", "a JSON dict; calibration data is a list"),
        ("[]", "an empty list"),
        ('["q"]', "row 1 is a JSON str"),
        ('[{"input": "q"}]', "row 1 has the keys input; they must be input and target"),
        ('[{"input": "q", "target": "a", "more": 1}]', "has the keys input, more, target"),
        ('[{"input_embed": [[1]], "target": "a"}]', "has embeddings"),
        ('[{"input": "", "target": "a"}]', "the input of row 1 is ''"),
        ('[{"input": "q", "target": " "}]', "the target of row 1"),
        ('[{"input": "\\ud800", "target": "a"}]', "the input of row 1"),
        ('[{"input": "q", "target": 7}]', "the target of row 1 is 7"),
        ('[{"input": "q", "target": "a"}]', "not in this model's chat template"),
        (json.dumps([{"input": PROMPT, "target": "a"}, {"input": "q", "target": "a"}]), "the input of row 2 is not"),
        (json.dumps([{"input": PROMPT, "target": "word " * 300}]), r"row 1 has \d+ tokens; the context is 64"),
    ],
)
def test_files_that_the_toolkit_could_not_use(tmp_path: Path, count: TokenCounter, content: str, words: str) -> None:
    path = tmp_path / "data.json"
    path.write_text(content)
    with pytest.raises(CalibrationError, match=words) as caught:
        validate_dataset(path, TEMPLATE, count, 64)
    assert caught.value.hint


def test_no_file(tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match="No such file"):
        validate_dataset(tmp_path / "none.json")


ROWS = st.builds(Sample, *[st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip)] * 2)


@given(st.lists(ROWS, min_size=1, max_size=5))
def test_what_is_written_is_read(tmp_path_factory: pytest.TempPathFactory, rows: list[Sample]) -> None:
    path = tmp_path_factory.getbasetemp() / "rows.json"
    write_dataset(path, rows)
    assert validate_dataset(path) == rows


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from(["input", "target", "x"]), inner),
    )
)
def test_any_json_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, content: Any) -> None:
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(json.dumps(content))
    try:
        rows = validate_dataset(path)
    except RKEdgeError:
        return
    assert [{"input": row.input, "target": row.target} for row in rows] == content


def test_a_callback_counts(count: TokenCounter) -> None:
    seen: list[int] = []
    chats = [Dialogue((Message("user", "q"),), "a", "here")] * 3
    answer: Callable[[Any], str] = lambda prompt: f"{len(prompt)} tokens"  # noqa: E731
    built = builder(count, answer=answer).build(chats, seen.append)
    assert seen == [1, 2, 3]
    assert {row.target for row in built.rows} == {f"{count(PROMPT)} tokens"}


@pytest.mark.parametrize(
    "more",
    [
        {"num_beams": 4}, {"no_repeat_ngram_size": 2, "min_new_tokens": 40}, {"max_length": 5, "max_time": 0.0001},
        {"stop_strings": ["zz"]}, {"return_dict_in_generate": True}, {"penalty_alpha": 0.6, "top_k": 4},
    ],
)  # fmt: skip
def test_the_checkpoints_own_generation_is_not_obeyed(tmp_path: Path, more: dict[str, Any]) -> None:
    asked = ("--default", "--limit", "2", "--targets", "model", "--new-tokens", "12")
    rkedge(BASE, "-o", tmp_path / "plain.json", *asked)
    folder = tmp_path / "other"
    shutil.copytree(BASE, folder)
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**config, **more}))
    rkedge(folder, "-o", tmp_path / "other.json", *asked)
    assert (tmp_path / "other.json").read_text() == (tmp_path / "plain.json").read_text()


def test_attention_scores_are_capped(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many releases of transformers run Gemma 2 by sdpa, which has no cap: newer ones fail, others leave it out."""
    chat = [{"role": "user", "content": "Who are you?"}]
    prompt = AutoTokenizer.from_pretrained(BASE).apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(BASE, dtype="auto", attn_implementation="eager")
    ids = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False, repetition_penalty=1.1)
    tokenizer = Tokenizer.parse((BASE / "tokenizer.json").read_bytes(), BASE / "tokenizer.json")
    monkeypatch.setattr(Gemma2PreTrainedModel, "_supports_sdpa", True)
    answer = CpuModel(BASE, 1, tokenizer, [1, 107]).answer(prompt, 12)
    assert answer == tokenizer.decode(ids[0, len(prompt) :].tolist()).strip() != ""


def test_lines_end_where_an_editor_ends_them(tmp_path: Path) -> None:
    questions = ["Who are you?\u2028Really?\tanswer one", "What\x0cis\x85this\tyes", "And\u2029that?\tno"]
    (tmp_path / "q.txt").write_bytes(("\ufeff" + "\r\n".join(questions)).encode())
    chats = read_texts(tmp_path / "q.txt")
    assert [(chat.messages[0].content, chat.answer) for chat in chats] == [
        tuple(line.split("\t")) for line in questions
    ]
    line = json.dumps({"messages": [{"role": "user", "content": "a\u2028b"}]}, ensure_ascii=False)
    (tmp_path / "c.jsonl").write_text(f"{line}\n{line}\n", encoding="utf-8")
    assert [chat.messages[0].content for chat in read_chats(tmp_path / "c.jsonl")] == ["a\u2028b"] * 2
