"""What a run is: the same ids whichever way the prompt gets into the KV cache; hidden states, logits, batches."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.emulator.client import FINISH, HIDDEN, LAST_HIDDEN, LAYOUTS, LOGITS, NORMAL, every_layout


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
    client.clear()
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
