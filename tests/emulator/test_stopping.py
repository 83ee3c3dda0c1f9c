"""How answers end, stop and are aborted."""

from __future__ import annotations

import ctypes
import threading
from pathlib import Path
from typing import Any

import pytest
from tests.emulator.client import EOS, ERROR, FINISH, NORMAL, every_layout, wait_idle


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
