"""What a run is: the same ids whichever way the prompt gets into the KV cache, and how answers begin, pause and end."""

from __future__ import annotations

import codecs
import ctypes
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

NORMAL, WAITING, FINISH, ERROR, LAST_HIDDEN = range(5)
HIDDEN, LOGITS = 1, 2
LAYOUTS = {"1.1.4": 3, "1.2.0": 4, "1.2.1b1": 5, "1.2.3": 6, "1.3.0": 7}
every_layout = pytest.mark.parametrize("release", LAYOUTS)
EOS, END_OF_TURN = 1, 5


@pytest.fixture(scope="module")
def talker(make_model: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """An untied model, whose answers are not its own input again."""
    return make_model(tmp_path_factory.mktemp("talker") / "talker.rkemu", tie_word_embeddings=False)


def wait_idle(client: Any) -> None:
    for _ in range(2000):
        if client.lib.rkllm_is_running(client.handle) == 0:
            return
        time.sleep(0.005)
    raise AssertionError("the run does not end")


@every_layout
def test_every_layout_gives_the_same_answer(release: str, load: Any, talker: Any, prompt: list[int]) -> None:
    reference = load(talker.path, "1.2.3").answer(prompt)
    assert len(set(reference)) > 4
    client = load(talker.path, release)
    assert client.answer(prompt) == reference
    assert client.states == [NORMAL] * 8 + [FINISH]
    assert client.last.text == b""


def test_a_long_prompt_in_chunks_is_one_prompt(load: Any, talker: Any) -> None:
    """300 tokens are three chunks of the engine; the same prompt token by token, through keep_history, is 300."""
    ids = [int(i) for i in np.random.default_rng(2).integers(6, 320, 300)]
    client = load(talker.path, "1.3.0", max_context_len=512)
    chunks = client.answer(ids)
    client.clear()
    for token in ids[:-1]:
        client.run([token], mode=HIDDEN, keep_history=1)
    assert client.cache_size() == len(ids) - 1
    assert client.answer(ids[-1:], keep_history=1) == chunks


def test_prefix_reuse_changes_no_answer_and_saves_its_work(load: Any, talker: Any, prompt: list[int]) -> None:
    client = load(talker.path)
    fresh = client.answer(prompt)
    assert client.last.perf.prefill_tokens == len(prompt)
    other = [*prompt[:40], 7, 8, 9]
    client.answer(other)
    assert client.last.perf.prefill_tokens == 3
    assert client.answer(prompt) == fresh
    assert client.last.perf.prefill_tokens == len(prompt) - 40
    assert client.answer(prompt) == fresh
    assert client.last.perf.prefill_tokens == 1


@pytest.mark.parametrize("release", ["1.2.0", "1.2.3", "1.3.0"])
def test_history_continues_the_conversation(release: str, load: Any, talker: Any, prompt: list[int]) -> None:
    client = load(talker.path, release)
    first = client.answer(prompt[:30], keep_history=1)
    second = client.answer(prompt[30:], keep_history=1)
    client.clear()
    assert client.answer([*prompt[:30], *first, *prompt[30:]]) == second
    client.clear()
    assert client.answer(prompt[30:], keep_history=1) != second


@every_layout
def test_prompt_cache_files(release: str, load: Any, talker: Any, prompt: list[int], tmp_path: Path) -> None:
    cache = tmp_path / "prompt_cache.bin"
    writer = load(talker.path, release)
    expected = writer.answer(prompt)
    assert writer.run(prompt[:50], save=cache) == 0
    reader = load(talker.path, release)
    assert reader.lib.rkllm_load_prompt_cache(reader.handle, str(cache).encode()) == 0
    assert reader.answer(prompt) == expected
    if LAYOUTS[release] >= 6:
        assert reader.last.perf.prefill_tokens == 10
    assert reader.answer(prompt) == expected
    assert reader.lib.rkllm_release_prompt_cache(reader.handle) == 0
    assert reader.answer(prompt) == expected


def test_prompt_cache_of_another_model_or_damaged(
    load: Any, talker: Any, small: Any, prompt: list[int], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "prompt_cache.bin"
    client = load(talker.path)
    expected = client.answer(prompt, save=cache)
    other = load(small.path)

    def refused(by: Any, path: Path, text: str) -> None:
        capfd.readouterr()
        assert by.lib.rkllm_load_prompt_cache(by.handle, str(path).encode()) == -1
        assert text in capfd.readouterr().err

    refused(other, cache, "does not match the current model")
    refused(client, tmp_path / "none", "does not exist")
    data = cache.read_bytes()
    for name, wrong, text in [
        ("cut", data[:-100], "does not match"),
        ("empty", b"", "is empty"),
        ("flipped", data[:500] + bytes([data[500] ^ 1]) + data[501:], "is damaged"),
        ("text", b"no cache at all", "does not match"),
    ]:
        path = tmp_path / name
        path.write_bytes(wrong)
        refused(client, path, text)
    assert client.answer(prompt) == expected


def test_a_cleared_range_can_be_filled_again(load: Any, talker: Any, prompt: list[int]) -> None:
    client = load(talker.path)
    expected = client.answer(prompt)
    client.clear()
    client.on_event = lambda event: 1
    assert client.run(prompt) == 0
    assert client.states == [NORMAL]
    assert client.cache_size() == len(prompt)
    assert client.clear(0, 45, 60) == 0
    assert client.cache_size() == 45
    client.on_event = lambda event: 0
    assert client.answer(prompt[45:]) == expected


def test_a_range_in_the_middle_moves_what_is_behind_it(
    make_model: Any, load: Any, prompt: list[int], tmp_path: Path
) -> None:
    """In one layer a cached row depends on its own token only, so cutting out equals never having been there."""
    made = make_model(
        tmp_path / "m.rkemu", dtype="FP32", num_hidden_layers=1, tie_word_embeddings=False, sliding_window=512
    )
    client = load(made.path)
    assert client.run(prompt[:-1], mode=HIDDEN, keep_history=1) == 0
    assert client.clear(0, 10, 30) == 0
    assert client.cache_size() == len(prompt) - 21
    assert client.run(prompt[-1:], mode=LOGITS, keep_history=1) == 0
    cut = client.events[0][0].logits
    client.clear()
    assert client.run(prompt[:10] + prompt[30:], mode=LOGITS) == 0
    np.testing.assert_allclose(cut[0], client.events[0][0].logits[-1], atol=1e-4)


@pytest.mark.parametrize("span", [(-1, 5), (5, 5), (9, 3), (0, 1000)])
def test_impossible_ranges(span: tuple[int, int], load: Any, talker: Any, prompt: list[int]) -> None:
    client = load(talker.path)
    client.answer(prompt)
    assert client.clear(0, *span) == -1


def test_pause_goes_on_with_another_run(load: Any, talker: Any, prompt: list[int]) -> None:
    client = load(talker.path, max_new_tokens=6)
    client.on_event = lambda event: int(len(client.events) == 3)
    assert client.run(prompt) == 0
    paused = client.tokens()
    assert client.states == [NORMAL] * 3
    client.on_event = lambda event: 0
    resumed = client.answer([11, 12])
    client.clear()
    assert client.answer([*prompt, *paused, 11, 12]) == resumed


def test_callbacks_before_1_2_1_return_nothing_to_pause_by(load: Any, talker: Any, prompt: list[int]) -> None:
    client = load(talker.path, "1.2.0")
    assert len(client.answer(prompt)) == 8


def test_embedding_input_is_the_table_row_by_row(load: Any, make_model: Any, prompt: list[int], tmp_path: Path) -> None:
    made = make_model(tmp_path / "m.rkemu", dtype="FP32", tie_word_embeddings=False)
    table = made.reference.model.embed_tokens.weight.detach().numpy()
    client = load(made.path)
    by_tokens = client.answer(prompt)
    assert client.answer(table[prompt]) == by_tokens
    assert client.last.perf.prefill_tokens == len(prompt)
    assert client.answer(table[prompt]) == by_tokens
    assert client.last.perf.prefill_tokens == 1, "1.2.3 reuses embeddings as well"
    older = load(made.path, "1.2.1")
    assert older.answer(table[prompt]) == by_tokens
    assert older.answer(table[prompt]) == by_tokens
    assert older.last.perf.prefill_tokens == len(prompt)


def test_hidden_states_have_a_state_of_their_own_in_1_1(load: Any, talker: Any, prompt: list[int]) -> None:
    old, new = load(talker.path, "1.1.4"), load(talker.path, "1.2.0")
    assert old.run(prompt, mode=HIDDEN) == 0
    assert new.run(prompt, mode=HIDDEN) == 0
    assert old.states == [LAST_HIDDEN, FINISH]
    assert new.states == [NORMAL, FINISH]
    np.testing.assert_array_equal(old.events[0][0].hidden, new.events[0][0].hidden)


def test_logits_come_for_the_prompt_first_then_token_by_token(load: Any, talker: Any, prompt: list[int]) -> None:
    client = load(talker.path)
    expected = client.answer(prompt)
    client.run(prompt, mode=LOGITS)
    shapes = [batch[0].logits.shape for batch in client.events[:-1]]
    assert shapes == [(60, 320)] + [(1, 320)] * 7
    assert [int(batch[0].logits[-1].argmax()) for batch in client.events[:-1]] == expected


@pytest.mark.parametrize("release", ["1.2.1", "1.3.0"])
def test_batches_are_independent_conversations(release: str, load: Any, talker: Any, prompt: list[int]) -> None:
    prompts = [prompt, prompt[:20], [9, 8, 7]]
    single = load(talker.path, release)
    alone = [single.answer(one) for one in prompts]
    client = load(talker.path, release, n_batch=3)
    assert client.call("rkllm_run", prompts, client.infer()) == 0
    assert [client.tokens(i) for i in range(3)] == alone
    assert client.states == [NORMAL] * 8 + [FINISH]


def test_an_ended_batch_has_a_negative_token_and_no_text(
    load: Any, talker: Any, prompt: list[int], make_model: Any, tmp_path: Path
) -> None:
    single = load(talker.path)
    long, short = single.answer(prompt), single.answer(prompt[:20])
    stop = next(token for token in short[:4] if token not in long)
    made = make_model(tmp_path / "m.rkemu", tie_word_embeddings=False, meta={"tokenizer.eos_token_ids": [stop]})
    client = load(made.path, n_batch=2)
    assert client.call("rkllm_run", [prompt, prompt[:20]], client.infer()) == 0
    ended = short.index(stop)
    second = [batch[1] for batch in client.events[:-1]]
    assert [event.token for event in second] == short[:ended] + [-1] * (8 - ended)
    assert all(event.text is None for event in second[ended:])
    assert client.tokens(0) == long


class TestEnds:
    @pytest.mark.parametrize(("release", "ends"), [("1.2.3", False), ("1.3.0", True)])
    def test_only_1_3_0_knows_the_second_eos(
        self, release: str, ends: bool, load: Any, talker: Any, make_model: Any, prompt: list[int], tmp_path: Path
    ) -> None:
        answer = load(talker.path).answer(prompt)
        made = make_model(
            tmp_path / "m.rkemu", tie_word_embeddings=False, meta={"tokenizer.eos_token_ids": [EOS, answer[3]]}
        )
        client = load(made.path, release)
        assert client.answer(prompt) == (answer[:3] if ends else answer)

    def test_ignore_eos_token(self, load: Any, talker: Any, make_model: Any, prompt: list[int], tmp_path: Path) -> None:
        answer = load(talker.path).answer(prompt)
        made = make_model(
            tmp_path / "m.rkemu", tie_word_embeddings=False, meta={"tokenizer.eos_token_ids": [answer[3]]}
        )
        assert load(made.path, "1.3.0", ignore_eos_token=True).answer(prompt) == answer

    def test_max_new_tokens_of_a_run_wins(self, load: Any, talker: Any, prompt: list[int]) -> None:
        client = load(talker.path, "1.3.0")
        assert len(client.answer(prompt, max_new_tokens=3)) == 3
        assert len(client.answer(prompt, max_new_tokens=-1)) == 8

    def test_without_a_limit_the_context_is_one(self, load: Any, talker: Any) -> None:
        client = load(talker.path, max_context_len=64, max_new_tokens=-1)
        assert len(client.answer([7] * 40)) == 64 - 40 + 1

    def test_with_a_limit_the_oldest_tokens_make_room(self, load: Any, talker: Any) -> None:
        client = load(talker.path, max_context_len=64, max_new_tokens=200, n_keep=8)
        assert len(client.answer([7] * 40)) == 200
        assert client.cache_size() <= 64

    def test_a_prompt_longer_than_the_context(self, load: Any, talker: Any, capfd: pytest.CaptureFixture[str]) -> None:
        client = load(talker.path, max_context_len=64)
        assert client.run([7] * 61) == -1
        assert client.states == [ERROR]
        assert "prompt gather than max context (prompt: 61 tokens, max context: 60)" in capfd.readouterr().err
        assert len(client.answer([7] * 60)) > 0


class TestStopping:
    def test_abort_from_the_callback(self, load: Any, talker: Any, prompt: list[int]) -> None:
        client = load(talker.path, max_new_tokens=100)
        client.on_event = lambda event: 0 * client.lib.rkllm_abort(client.handle)
        assert client.run(prompt) == 0
        assert client.states == [NORMAL, FINISH]
        client.on_event = lambda event: 0
        assert len(client.answer(prompt)) == 100

    def test_abort_from_another_thread(self, load: Any, talker: Any, prompt: list[int], monkeypatch: Any) -> None:
        monkeypatch.setenv("RKEMU_TOKEN_US", "2000")
        client = load(talker.path, max_new_tokens=5000, n_keep=0)
        started = threading.Event()
        client.on_event = lambda event: started.set() or 0
        thread = threading.Thread(target=client.run, args=(prompt,))
        thread.start()
        assert started.wait(20)
        assert client.lib.rkllm_is_running(client.handle) == 1
        assert client.lib.rkllm_abort(client.handle) == 0
        thread.join(20)
        assert not thread.is_alive()
        assert client.lib.rkllm_is_running(client.handle) == 0
        assert client.states[-1] == FINISH

    @every_layout
    def test_async_runs_end_by_themselves(self, release: str, load: Any, talker: Any, prompt: list[int]) -> None:
        client = load(talker.path, release)
        expected = client.answer(prompt)
        for _ in range(3):
            assert client.call("rkllm_run_async", [prompt], client.infer()) == 0
            wait_idle(client)
            assert client.tokens() == expected

    def test_a_handle_runs_one_thing_at_a_time(self, load: Any, talker: Any, prompt: list[int]) -> None:
        client = load(talker.path)
        inner: list[int] = []

        def again(event: Any) -> int:
            infer = client.infer()
            one = client.input(prompt)
            inner.append(client.lib.rkllm_run(client.handle, ctypes.byref(one), ctypes.byref(infer), None))
            inner.append(client.lib.rkllm_clear_kv_cache(client.handle, 0, None, None))
            return 1

        client.on_event = again
        assert client.run(prompt) == 0
        assert inner == [-1, -1]

    def test_the_cache_size_can_be_asked_in_a_callback(self, load: Any, talker: Any, prompt: list[int]) -> None:
        client = load(talker.path)
        sizes: list[int] = []
        client.on_event = lambda event: sizes.append(client.cache_size()) or 0
        client.run(prompt)
        assert sizes == [*range(60, 68), 67]

    @every_layout
    def test_destroy_twice_and_strangers(self, release: str, load: Any, talker: Any, prompt: list[int]) -> None:
        client = load(talker.path, release)
        assert client.destroy() == 0
        assert client.destroy() == -1
        assert client.run(prompt) == -1
        for handle in (0, 1, 0x52000000, 2**63):
            stranger = ctypes.c_void_p(handle)
            assert client.lib.rkllm_destroy(stranger) == -1
            assert client.lib.rkllm_abort(stranger) == -1
            assert client.lib.rkllm_is_running(stranger) == -1
            assert client.lib.rkllm_run(stranger, None, None, None) == -1

    def test_destroy_while_running(self, load: Any, talker: Any, prompt: list[int], monkeypatch: Any) -> None:
        monkeypatch.setenv("RKEMU_TOKEN_US", "2000")
        client = load(talker.path, max_new_tokens=5000, n_keep=0)
        started = threading.Event()
        client.on_event = lambda event: started.set() or 0
        assert client.call("rkllm_run_async", [prompt], client.infer()) == 0
        assert started.wait(20)
        assert client.destroy() == 0
        assert client.states[-1] == FINISH

    @pytest.mark.parametrize("function", ["rkllm_run", "rkllm_run_async"])
    def test_destroy_in_a_callback(self, function: str, load: Any, talker: Any, prompt: list[int]) -> None:
        client = load(talker.path, max_new_tokens=50)
        done = threading.Event()

        def destroy(event: Any) -> int:
            if event.state == FINISH:
                done.set()
            else:
                client.destroy()
            return 0

        client.on_event = destroy
        assert client.call(function, [prompt], client.infer()) == 0
        assert done.wait(20)
        assert client.states == [NORMAL, FINISH]

    def test_another_thread_may_use_the_handle(self, load: Any, talker: Any, prompt: list[int]) -> None:
        client = load(talker.path)
        expected = client.answer(prompt)
        answers: list[list[int]] = []
        for _ in range(3):
            thread = threading.Thread(target=lambda: answers.append(client.answer(prompt)))
            thread.start()
            thread.join()
        assert answers == [expected] * 3

    def test_two_handles_at_once(self, load: Any, talker: Any, prompt: list[int]) -> None:
        clients = [load(talker.path, max_new_tokens=30) for _ in range(2)]
        expected = clients[0].answer(prompt)
        clients[0].clear()
        threads = [threading.Thread(target=client.run, args=(prompt,)) for client in clients]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [client.tokens() for client in clients] == [expected] * 2


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


class TestSampling:
    def test_top_k_1_and_temperature_0_are_greedy(self, load: Any, talker: Any, prompt: list[int]) -> None:
        greedy = load(talker.path, top_k=1).answer(prompt)
        assert load(talker.path, top_k=40, temperature=0.0).answer(prompt) == greedy

    def test_a_seed_repeats_and_another_differs(
        self, load: Any, talker: Any, prompt: list[int], monkeypatch: Any
    ) -> None:
        def sample() -> list[int]:
            return load(talker.path, top_k=0, top_p=1.0, temperature=5.0, max_new_tokens=30).answer(prompt)

        assert sample() == sample()
        monkeypatch.setenv("RKEMU_SEED", "7")
        seven = sample()
        monkeypatch.delenv("RKEMU_SEED")
        assert seven != sample()

    def test_top_k_and_top_p_keep_to_the_likely(self, load: Any, talker: Any, prompt: list[int]) -> None:
        client = load(talker.path, "1.3.0", max_new_tokens=1)
        client.run(prompt, mode=LOGITS)
        logits = client.events[0][0].logits[-1].astype(np.float64)
        order = np.argsort(-logits)
        p = np.exp(logits - logits.max())
        p = p[order] / p.sum()
        for sampling, kept in [
            ({"top_k": 3, "top_p": 1.0, "temperature": 50.0, "repeat_penalty": 1.0}, 3),
            ({"top_k": 0, "top_p": 0.3, "temperature": 50.0, "repeat_penalty": 1.0}, int((p.cumsum() < 0.3).sum()) + 1),
        ]:
            seen = {client.answer(prompt, sampling=sampling)[0] for _ in range(80)}
            assert seen <= set(order[:kept].tolist())
            assert len(seen) > 1

    def test_frequencies_follow_the_softmax(self, load: Any, talker: Any, prompt: list[int]) -> None:
        client = load(talker.path, "1.3.0", max_new_tokens=1)
        client.run(prompt, mode=LOGITS)
        logits = client.events[0][0].logits[-1].astype(np.float64)
        sampling = {"top_k": 2, "top_p": 1.0, "temperature": 1.0, "repeat_penalty": 1.0}
        best, second = np.argsort(-logits)[:2]
        chance = 1 / (1 + np.exp(logits[second] - logits[best]))
        draws = [client.answer(prompt, sampling=sampling)[0] for _ in range(400)]
        assert abs(draws.count(best) / 400 - chance) < 4 * (chance * (1 - chance) / 400) ** 0.5

    @pytest.mark.parametrize("mirostat", [1, 2])
    def test_mirostat_holds_the_surprise(
        self, mirostat: int, load: Any, make_model: Any, prompt: list[int], tmp_path: Path
    ) -> None:
        made = make_model(tmp_path / "m.rkemu", tie_word_embeddings=False, spread=12.0, final_logit_softcapping=None)

        def surprise(tau: float) -> float:
            client = load(
                made.path, mirostat=mirostat, mirostat_tau=tau, mirostat_eta=0.3, top_k=0, temperature=1.0,
                repeat_penalty=1.0, max_new_tokens=150,
            )  # fmt: skip
            assert client.run(prompt, mode=LOGITS) == 0
            bits = []
            for batch in client.events[:-1]:
                logits = batch[0].logits[-1].astype(np.float64)
                p = np.exp(logits - logits.max())
                bits.append(-np.log2(p[batch[0].token] / p.sum()))
            return float(np.mean(bits[30:]))

        assert surprise(0.1) < surprise(2.0) < surprise(4.0)

    def test_penalties_push_repeated_tokens_down(self, make_model: Any, load: Any, tmp_path: Path) -> None:
        """The model repeats its last token for ever; a penalty makes it stop that."""
        made = make_model(tmp_path / "m.rkemu", echo=True, spread=1.0)
        stuck = load(made.path, "1.3.0", max_new_tokens=12)
        assert len(set(stuck.answer([50, 60, 70]))) == 1
        for penalty in ({"repeat_penalty": 50.0}, {"frequency_penalty": 2.0}, {"presence_penalty": 2.0}):
            usual = {"top_k": 2, "top_p": 1e-6, "temperature": 0.01, "repeat_penalty": 1.0}
            assert len(set(stuck.answer([50, 60, 70], sampling=usual))) == 1
            moved = stuck.answer([50, 60, 70], sampling=usual | penalty)
            assert len(set(moved)) > 1, penalty


class TestClients:
    def test_parameters_of_the_wrong_type_are_clamped(self, load: Any, talker: Any, prompt: list[int]) -> None:
        """rkllama 0.0.74 declares top_k as float: the library gets 1088421888."""
        nan = float("nan")
        client = load(
            talker.path, top_k=1088421888, top_p=nan, temperature=float("inf"), repeat_penalty=-1.0,
            frequency_penalty=nan, presence_penalty=1e30, mirostat=77, mirostat_tau=nan, mirostat_eta=nan,
            max_new_tokens=20,
        )  # fmt: skip
        assert len(client.answer(prompt)) == 20

    @pytest.mark.parametrize("values", [[320], [-1], [2**31 - 1], [-(2**31)]])
    def test_token_ids_out_of_the_vocabulary(self, values: list[int], load: Any, talker: Any) -> None:
        client = load(talker.path)
        assert client.run([5, *values]) == -1
        assert client.run([5, 6]) == 0

    @every_layout
    def test_null_and_unknown_inputs(self, release: str, load: Any, talker: Any) -> None:
        client = load(talker.path, release)
        run = client.lib.rkllm_run
        assert run(client.handle, None, None, None) == -1
        for kind in (0, 1, 2, 3, 4, 77):
            empty = client.layout.Input()
            empty.input_type = kind
            assert run(client.handle, ctypes.byref(empty), None, None) == -1
        bad = client.infer()
        bad.mode = 99
        assert run(client.handle, ctypes.byref(client.input("hi")), ctypes.byref(bad), None) == -1
        assert client.lib.rkllm_init(None, None, None) == -1
        assert client.run("hi") == 0

    def test_an_embedding_or_a_tokenizer_of_the_clients_own(self, load: Any, make_model: Any, tmp_path: Path) -> None:
        """1.3.0 asks the client when the file was exported without a table."""
        whole = make_model(tmp_path / "whole.rkemu", dtype="FP32", tie_word_embeddings=False)
        bare = make_model(
            tmp_path / "bare.rkemu", dtype="FP32", tie_word_embeddings=False, drop=("token_embd", "tokenizer.")
        )
        expected = load(whole.path, "1.3.0").answer("hi")
        table = whole.reference.model.embed_tokens.weight.detach().numpy()
        client = load(bare.path, "1.3.0", tokenizer=lambda text: [6 + byte for byte in text], embedding=table)
        assert client.answer("hi") == expected
        assert load(bare.path, "1.3.0").run("hi") == -1

    def test_userdata_of_a_run_wins(self, library: Any, load: Any, talker: Any, prompt: list[int]) -> None:
        client = load(talker.path, "1.3.0")
        seen: list[int | None] = []
        plain = client._on_result

        def note(results: Any, userdata: int | None, state: int) -> int:
            seen.append(userdata)
            return plain(results, userdata, state)

        callbacks = client.layout.Callbacks(result=client.layout.ResultCallback(note), result_userdata=41)
        handle = ctypes.c_void_p()
        assert client.lib.rkllm_init(ctypes.byref(handle), ctypes.byref(client.param), ctypes.byref(callbacks)) == 0
        one, infer = client.input(prompt), client.infer()
        client.lib.rkllm_run(handle, ctypes.byref(one), ctypes.byref(infer), None)
        assert set(seen) == {41}
        seen.clear()
        client.lib.rkllm_run(handle, ctypes.byref(one), ctypes.byref(infer), ctypes.c_void_p(42))
        assert set(seen) == {42}
        assert client.lib.rkllm_destroy(handle) == 0


def test_pace(load: Any, talker: Any, prompt: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RKEMU_TOKEN_US", "3000")
    monkeypatch.setenv("RKEMU_PROMPT_TOKEN_US", "500")
    client = load(talker.path)
    client.answer(prompt)
    assert client.last.perf.prefill_time_ms >= 60 * 0.5
    assert client.last.perf.generate_time_ms >= 7 * 3


@every_layout
def test_exports_are_those_of_the_header_and_no_more(release: str, library: Any) -> None:
    from elftools.elf.elffile import ELFFile

    with library(release).open("rb") as file:
        table = ELFFile(file).get_section_by_name(".dynsym")
        names = {
            s.name for s in table.iter_symbols() if s["st_shndx"] != "SHN_UNDEF" and s["st_info"]["type"] == "STT_FUNC"
        }
    base = {"createDefaultParam", "init", "load_lora", "load_prompt_cache", "release_prompt_cache", "destroy", "run",
            "run_async", "abort", "is_running"}  # fmt: skip
    if LAYOUTS[release] >= 4:
        base |= {"clear_kv_cache", "set_chat_template"}
    if LAYOUTS[release] >= 6:
        base |= {"get_kv_cache_size", "set_function_tools", "set_cross_attn_params"}
    assert names == {f"rkllm_{name}" for name in base}
    text = f"RKLLM SDK (version: {release} | target: Linux | build: emulator".encode()
    assert text in library(release).read_bytes()


def test_the_next_run_may_start_when_the_last_callback_comes(load: Any, talker: Any, prompt: list[int]) -> None:
    """Clients wake another thread in that callback, which calls before rkllm_run has returned."""
    client = load(talker.path)
    expected = client.answer(prompt)
    second = load(talker.path)
    called, status = threading.Event(), []

    def next_run() -> None:
        called.set()
        status.append(second.run(prompt))

    thread = threading.Thread(target=next_run)

    def on_event(event: Any) -> int:
        if event.state == FINISH and not called.is_set():
            thread.start()
            called.wait(10)
            time.sleep(0.05)
        return 0

    second.on_event = on_event
    assert second.run(prompt) == 0
    thread.join(20)
    assert status == [0]
    assert second.tokens()[-len(expected) :] == expected
