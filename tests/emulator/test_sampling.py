"""Sampling, and parameters that clients get wrong."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.emulator.client import LOGITS, every_layout


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
