"""On an RK3588 board with the vendor's library: `RKEDGE_BUNDLE=DIR pytest -m board -s`. CI has no board.

What these print is what this kit calls "measured on a board"; nothing else is.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from rkruntime.bundle.manifest import Bundle, open_bundle
from rkruntime.checks import machine
from rkruntime.cli.options import open_engine
from rkruntime.engine.engine import Engine
from rkruntime.engine.generation import FinishReason, Request
from rkruntime.engine.open import RuntimeOptions, SamplingOptions
from rkruntime.text.answer import Answer, stream_answer
from rkruntime.text.prompt_process import PromptProcess
from rkruntime.text.template import Message

pytestmark = pytest.mark.board


@pytest.fixture(scope="module")
def bundle() -> Bundle:
    bundle = open_bundle(Path(os.environ["RKEDGE_BUNDLE"]))
    assert bundle.manifest.target != "emulator", "this bundle is for the emulator, not for a board"
    return bundle


@pytest.fixture(scope="module")
def engine(bundle: Bundle) -> Iterator[Engine]:
    library = os.environ.get("RKEDGE_LIBRARY")
    options = RuntimeOptions(library=Path(library) if library else None)
    with open_engine(bundle, options, SamplingOptions(temperature=0.0)) as engine:
        yield engine


def ask(engine: Engine, bundle: Bundle, *texts: str, max_new_tokens: int = 64) -> Answer:
    """The answer to the last of `texts`, which are user and assistant in turn."""
    messages = [Message("assistant" if at % 2 else "user", text) for at, text in enumerate(texts)]
    stops = frozenset(bundle.manifest.stop_token_ids)
    with closing(PromptProcess(bundle)) as prompts:
        tokens, _ = prompts.prompt(messages, engine.info.max_context)
        *_, answer = stream_answer(engine, Request(tokens, max_new_tokens, stops), prompts.vocabulary)
    assert isinstance(answer, Answer)
    return answer


def test_the_board_is_what_the_bundle_was_made_for(engine: Engine, bundle: Bundle) -> None:
    assert not engine.info.emulated
    assert engine.info.platform.lower() == bundle.manifest.platform
    assert machine.platform_of(machine.soc()) is not None


def test_an_answer_ends_by_itself(engine: Engine, bundle: Bundle) -> None:
    answer = ask(engine, bundle, "Answer with one word: what is the capital of France?")
    assert answer.reason is FinishReason.STOP
    assert "Paris" in answer.text


def test_a_limit_and_the_next_run(engine: Engine, bundle: Bundle) -> None:
    assert ask(engine, bundle, "Count from 1 to 100.", max_new_tokens=5).reason is FinishReason.LENGTH
    assert "Paris" in ask(engine, bundle, "Answer with one word: what is the capital of France?").text


def test_the_same_prompt_gives_the_same_answer(engine: Engine, bundle: Bundle) -> None:
    first, second = (ask(engine, bundle, "Name three colours.") for _ in range(2))
    assert first.tokens == second.tokens


def test_figures(engine: Engine, bundle: Bundle) -> None:
    answer = ask(engine, bundle, "Write about rivers. " * 16, max_new_tokens=64)
    perf = answer.perf
    if perf is None:
        pytest.skip(f"release {engine.info.release} reports no figures: they came with 1.2.1")
    info = engine.info
    figures = {
        "measured": "on a board",
        "bundle": bundle.manifest.name,
        "runtime": info.runtime_version,
        "driver": info.driver_version,
        "soc": machine.soc(),
        "load_s": round(info.load_seconds, 2),
        "prefill_tokens": perf.prefill_tokens,
        "ttft_ms": round(perf.prefill_ms, 1),
        "decode_tokens_per_s": round(perf.generate_tokens / perf.generate_ms * 1000, 2),
        "memory_mb": round(perf.memory_mb, 1),
    }
    print(json.dumps(figures, indent=2))
    assert perf.generate_tokens > 0
