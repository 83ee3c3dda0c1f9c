"""Loads: adapters, models without tokenizer or embeddings, what is refused, and the end of an engine."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.runtime.engine.one_question import ANSWER, Load, collect

from rkruntime.bundle.rkemu import TensorSpec, Writer, read_container
from rkruntime.checks.preflight import ModelFacts
from rkruntime.engine.engine import Lora
from rkruntime.engine.generation import (
    FinishReason,
    Request,
    TextPrompt,
    Token,
)
from rkruntime.errors import (
    AdapterError,
    LibraryError,
    LoadError,
    ModelFileError,
    RunError,
    UsageError,
)
from rkruntime.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def adapter(bundle: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A rank-2 adapter that says something else."""
    container = read_container(bundle.model)
    random = np.random.default_rng(3)
    tensors = {}
    for layer in range(4):
        columns, rows = 128, 384
        tensors[f"blk.{layer}.ffn_up.lora_a"] = random.normal(0, 0.5, (2, columns)).astype(np.float32)
        tensors[f"blk.{layer}.ffn_up.lora_b"] = random.normal(0, 0.5, (rows, 2)).astype(np.float32)
    metadata = {
        "general.kind": "adapter",
        "general.architecture": "gemma2",
        "general.name": "noise",
        "adapter.alpha": 4.0,
        "adapter.base_fingerprint": container.fingerprint,
    }
    path = tmp_path_factory.mktemp("adapter") / "noise.rkemu"
    with Writer(path, metadata, [TensorSpec(name, "float32", a.shape) for name, a in tensors.items()]) as writer:
        for name, array in tensors.items():
            writer.write(name, array)
    return path


def test_lora(load: Load, release: str, adapter: Path, question: list[int], ids_of: Any) -> None:
    """Loaded with the model or later; a run has the one it names, and no other."""
    engine = load(release, loras=(Lora("noise", adapter),))
    base = ids_of(engine.generate(Request(question, max_new_tokens=12)))
    noisy = ids_of(engine.generate(Request(question, max_new_tokens=12, lora="noise")))
    assert noisy != base
    engine.load_lora(Lora("quiet", adapter, scale=0.0))
    assert ids_of(engine.generate(Request(question, max_new_tokens=12, lora="quiet"))) == base
    assert ids_of(engine.generate(Request(question, max_new_tokens=12, lora="noise"))) == noisy
    assert ids_of(engine.generate(Request(question, max_new_tokens=12))) == base
    with pytest.raises(RunError):
        list(engine.generate(Request(question, lora="unknown")))
    with pytest.raises(AdapterError, match="no adapter file"):
        engine.load_lora(Lora("none", adapter.parent / "none.rkemu"))
    with pytest.raises(RunError, match="rkllm_load_lora returned -1"):
        engine.load_lora(Lora("self", engine.options.model))
    assert ids_of(engine.generate(Request(question, max_new_tokens=12))) == base


def test_tokenizer_callback(
    load: Load, model_without: Callable[[str], Path], demo_tokenizer: Tokenizer, stops: frozenset[int]
) -> None:
    asked: list[str] = []

    def tokenize(text: str) -> list[int]:
        asked.append(text)
        control = demo_tokenizer.control
        if "fail" in text:
            raise ValueError("no such text")
        body = text.removeprefix("<start_of_turn>user\n").removesuffix("<end_of_turn>\n<start_of_turn>model\n")
        ids = [control["<start_of_turn>"], *demo_tokenizer.encode("user\n" + body), control["<end_of_turn>"]]
        return [*ids, *demo_tokenizer.encode("\n"), control["<start_of_turn>"], *demo_tokenizer.encode("model\n")]

    engine = load("1.3.0", model=model_without("tokenizer."), tokenizer=tokenize)
    *tokens, finished = engine.generate(Request(prompt=TextPrompt("What is the RK3588?"), stop_tokens=stops))
    assert demo_tokenizer.decode([token.token_id for token in tokens]) == ANSWER
    assert asked == ["<start_of_turn>user\nWhat is the RK3588?<end_of_turn>\n<start_of_turn>model\n"]
    assert finished.reason is FinishReason.STOP

    async def go() -> list[Any]:
        return await collect(engine, Request(prompt=TextPrompt("What is the RK3588?"), stop_tokens=stops))

    with pytest.raises(RunError, match="no such text"):
        list(engine.generate(Request(prompt=TextPrompt("fail"))))
    assert [event.token_id for event in asyncio.run(go())[:-1]] == [token.token_id for token in tokens]


@pytest.mark.usual("tokens-wrapped")  # then the callback is asked for the template's tokens first
def test_embedding_callback(
    load: Load, model_without: Callable[[str], Path], bundle: Any, question: list[int], ids_of: Any
) -> None:
    container = read_container(bundle.model)
    table = container.read("token_embd").astype(np.float32) * container.read("token_embd.scale")
    whole = _untied(container, bundle.model.parent.parent / "untied.rkemu", table)
    expected = ids_of(load("1.3.0", model=bundle.model).generate(Request(question, max_new_tokens=8)))
    calls: list[int] = []

    def embed(ids: Any) -> Any:
        calls.extend(ids)
        return table[list(ids)]

    engine = load("1.3.0", model=whole, embed=embed)
    assert ids_of(engine.generate(Request(question, max_new_tokens=8))) == expected
    assert calls[: len(question)] == question
    broken = load("1.3.0", model=whole, embed=lambda ids: table[:0])
    with pytest.raises(UsageError, match="returned 0 bytes; the runtime needs 512"):
        list(broken.generate(Request(question)))


def _untied(container: Any, path: Path, table: Any) -> Path:
    """The model with its head as a tensor of its own, and no embedding table."""
    kept = {name: entry.spec for name, entry in container.tensors.items() if not name.startswith("token_embd")}
    head = container.tensors["token_embd"].spec, container.tensors["token_embd.scale"].spec
    specs = [
        *kept.values(),
        TensorSpec("output", "int8", head[0].shape),
        TensorSpec("output.scale", "float32", head[1].shape),
    ]
    with Writer(path, container.metadata, specs) as writer:
        for name in kept:
            writer.write(name, container.read(name))
        writer.write("output", container.read("token_embd"))
        writer.write("output.scale", container.read("token_embd.scale"))
    return path


def test_loads_that_the_library_refuses(load: Load, release: str, tmp_path: Path, bundle: Any) -> None:
    with pytest.raises(LoadError, match="rkllm_init returned -1") as caught:
        load(release, max_context=8192)
    assert caught.value.details["diagnosis"]["class"] == "context-limit"
    damaged = tmp_path / "model.rkllm"
    damaged.write_bytes(b"no model" * 1000)
    with pytest.raises(LoadError) as caught:
        load(release, model=damaged)
    assert caught.value.details["diagnosis"]["class"] in ("model-file-invalid", "model-runtime-version-mismatch")
    load(release)


def test_files_that_are_not_there(load: Load, tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="no model file"):
        load(model=tmp_path / "none.rkllm")
    with pytest.raises(LibraryError, match="cannot be read"):
        load(library=tmp_path / "librkllmrt.so")


def test_preflight_is_asked(load: Load, bundle: Any) -> None:
    known = bundle.known
    engine = load(known=known, max_context=8192)
    assert engine.info.max_context == known.max_context
    assert [finding.code for finding in engine.info.findings] == ["context-clamped"]
    assert isinstance(known, ModelFacts)


def test_closed_engines(load: Load, question: list[int]) -> None:
    engine = load()
    engine.close()
    engine.close()
    engine.abort()
    with pytest.raises(RunError, match="closed"):
        list(engine.generate(Request(question)))
    with pytest.raises(RunError, match="closed"):
        engine.cache_sizes()
    assert engine.log


def test_close_during_a_run(load: Load, question: list[int]) -> None:
    engine = load(environment={"RKEMU_TOKEN_US": "5000"})
    events = engine.generate(Request(question))
    next(events)
    engine.close()
    assert not Path(f"/proc/{engine._connection.worker.process.pid}").exists()
    with pytest.raises((RunError, StopIteration)):
        for _ in range(2):
            next(events)


def test_two_models_at_once(load: Load, question: list[int], ids_of: Any) -> None:
    one, other = load("1.2.3"), load("1.3.0")
    first, second = (
        one.generate(Request(question, max_new_tokens=6)),
        other.generate(Request(question, max_new_tokens=6)),
    )
    pairs = [(a.token_id, b.token_id) for a, b in zip(first, second, strict=False) if isinstance(a, Token)]
    assert len(pairs) == 6
    assert all(a == b for a, b in pairs)
    first.close()
    second.close()
