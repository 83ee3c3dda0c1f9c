"""Text: prompts that are tokenized here, templates, tools, and what a token's text is."""

from __future__ import annotations

import codecs
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.emulator.client import LAYOUTS, NORMAL, WAITING


class TestText:
    @pytest.fixture(scope="class")
    @classmethod
    def templated(cls, make_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
        return make_model(
            tmp_path_factory.mktemp("templated") / "m.rkemu",
            tie_word_embeddings=False,
            meta={
                "rkllm.chat_template.system": "S:",
                "rkllm.chat_template.prefix": "<start_of_turn>user\n",
                "rkllm.chat_template.suffix": "<end_of_turn>\n<start_of_turn>model\n",
            },
        )

    @staticmethod
    def ids(text: str) -> list[int]:
        """The test tokenizer: special tokens, then bytes (characters of the vocabulary are not used here)."""
        out: list[int] = []
        names = {"<start_of_turn>": 4, "<end_of_turn>": 5}
        while text:
            name = next((name for name in names if text.startswith(name)), None)
            if name:
                out.append(names[name])
                text = text[len(name) :]
            else:
                out += [6 + byte for byte in text[0].replace(" ", "▁").encode()]
                text = text[1:]
        return out

    @pytest.mark.parametrize("release", LAYOUTS)
    def test_the_template_is_put_around_text_from_1_2_0(self, release: str, load: Any, templated: Any) -> None:
        client = load(templated.path, release)
        whole = "S:<start_of_turn>user\nhi there<end_of_turn>\n<start_of_turn>model\n"
        rendered = [2, *self.ids(whole if LAYOUTS[release] >= 4 else "hi there")]
        by_text = client.answer("hi there")
        assert client.answer(rendered) == by_text

    def test_a_new_template_takes_effect_at_once(self, load: Any, templated: Any, capfd: Any) -> None:
        client = load(templated.path)
        client.answer("hi", keep_history=1)
        assert client.lib.rkllm_set_chat_template(client.handle, b"", b"[", b"]") == 0
        assert "Calling rkllm_set_chat_template will disable" in capfd.readouterr().err
        assert client.cache_size() == 0
        by_text = client.answer("hi")
        assert client.answer([2, *self.ids("[hi]")]) == by_text

    def test_second_turns_have_neither_bos_nor_system(self, load: Any, templated: Any) -> None:
        client = load(templated.path)
        first = client.answer("hi", keep_history=1)
        second = client.answer("ho", keep_history=1)
        client.clear()
        turn = "<start_of_turn>user\n{}<end_of_turn>\n<start_of_turn>model\n"
        ids = [2, *self.ids("S:" + turn.format("hi")), *first, *self.ids(turn.format("ho"))]
        assert client.answer(ids) == second

    def test_keep_system_prompt(self, load: Any, templated: Any) -> None:
        client = load(templated.path)
        client.answer("hi", keep_history=1)
        assert client.clear(1) == 0
        assert client.cache_size() == 3
        assert client.clear(0) == 0
        assert client.cache_size() == 0

    def test_function_tools_replace_the_system_prompt(self, load: Any, templated: Any) -> None:
        client = load(templated.path)
        assert client.lib.rkllm_set_function_tools(client.handle, b"sys", b"[]", b"") == 0
        with_tools = client.answer("hi")
        assert client.answer(
            [2, *self.ids("sys\n[]\n<start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n")]
        ) == (with_tools)
        assert client.lib.rkllm_set_function_tools(client.handle, b"sys", None, None) == -1

    def test_a_character_split_over_tokens_waits_for_its_last_byte(
        self, make_model: Any, load: Any, tmp_path: Path
    ) -> None:
        """The model says its last token again and again; logits of a mask let it say one byte after the other."""
        made = make_model(tmp_path / "m.rkemu", echo=True)
        client = load(made.path, max_new_tokens=1)
        said = []
        for byte in "é€🙂".encode():
            client.answer([6 + byte], keep_history=0)
            said.append((client.events[0][0].state, client.events[0][0].text))
        # Alone, a lead byte waits and a continuation byte is no character at all: it comes as it is.
        assert [state for state, _ in said] == [
            WAITING,
            NORMAL,
            WAITING,
            NORMAL,
            NORMAL,
            WAITING,
            NORMAL,
            NORMAL,
            NORMAL,
        ]
        assert all((state == WAITING) == (text == b"") for state, text in said)

    def test_streamed_text_is_the_bytes_of_the_tokens(self, talker: Any, load: Any) -> None:
        """Sampled evenly, tokens are bytes of all kinds; no piece ends inside of a character, and none is lost."""
        client = load(talker.path, max_context_len=512, max_new_tokens=400, top_k=0, temperature=100.0, top_p=1.0)
        tokens = client.answer([7, 8, 9])
        pieces = [batch[0].text for batch in client.events[:-1]]
        names = ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]
        texts = [*(name.encode() for name in names), *(bytes([i]) for i in range(256))]
        texts += [chr(0x100 + i).encode() for i in range(320 - len(texts))]
        texts[6] = b""  # a byte of zero ends a C string
        whole = b"".join(texts[token] for token in tokens)
        text = b"".join(pieces)
        assert whole.startswith(text)
        assert len(whole) - len(text) <= 3
        for token, state, piece in zip(tokens, client.states, pieces, strict=False):
            assert state == WAITING or piece or token == 6
            assert state == NORMAL or piece == b""
        for end in np.cumsum([len(piece) for piece in pieces])[:-1]:
            decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
            decoder.decode(whole[:end])
            inside = decoder.getstate()[0] != b""
            assert not inside or decoder.decode(whole[end : end + 1]).startswith("\ufffd"), "a character was cut"

    @pytest.mark.parametrize("skip", [False, True])
    def test_control_tokens_as_text(
        self, skip: bool, load: Any, talker: Any, make_model: Any, prompt: list[int], tmp_path: Path
    ) -> None:
        answer = load(talker.path).answer(prompt)
        made = make_model(tmp_path / "m.rkemu", tie_word_embeddings=False)
        client = load(made.path, "1.3.0", skip_special_token=skip)
        client.answer(prompt)
        texts = {event[0].token: event[0].text for event in client.events[:-1]}
        for token in set(answer):
            if token < 6:
                assert (texts[token] == b"") == skip
