"""Adapters that change embedding, head or vocabulary, every way peft offers: the merged model gives the logits of the
PeftModel that was trained, or the adapter is refused because peft's own file or merge has lost something.
"""

from __future__ import annotations

import copy
from collections import Counter
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, Gemma2Config, Gemma2ForCausalLM

from rkconvert.adapters.merged_model import AdapterSource, merged_model
from rkconvert.sources.checkpoint import open_checkpoint
from rkruntime.errors import AdapterError

VOCAB, WIDTH, MORE = 40, 16, 3
NEW = VOCAB + 1
SIDES: dict[str, list[str]] = {
    "neither": [], "embed": ["embed_tokens"], "head": ["lm_head"], "both": ["embed_tokens", "lm_head"],
}  # fmt: skip
TOKENS: dict[str, Any] = {
    "no tokens": None,
    "a list of tokens": [5, 9],
    "tokens of embed": {"embed_tokens": [5, 9]},
    "tokens of head": {"lm_head": [5, 9]},
    "the same tokens of both": {"embed_tokens": [5, 9], "lm_head": [5, 9]},
    "other tokens of each": {"embed_tokens": [5, 9], "lm_head": [7, 8, 9]},
}
BASES = ["tied", "untied", "tied, with a head of its own"]
OWN_HEAD = BASES[2]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    """So small a model is computed sooner by one thread than several can agree."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Models of transformers, each loaded from a folder of its own."""
    found = {}
    for kind in BASES:
        torch.manual_seed(0)
        folder = tmp_path_factory.mktemp("base")
        model = Gemma2ForCausalLM(
            Gemma2Config(
                vocab_size=VOCAB, hidden_size=WIDTH, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
                num_key_value_heads=1, head_dim=8, query_pre_attn_scalar=8, max_position_embeddings=64,
                final_logit_softcapping=None, tie_word_embeddings=kind != "untied",
            )
        )  # fmt: skip
        for parameter in model.parameters():
            parameter.data.normal_(std=0.3)
        model.save_pretrained(folder)
        if kind == OWN_HEAD:
            state = load_file(folder / "model.safetensors") | {"lm_head.weight": torch.randn(VOCAB, WIDTH) * 0.3}
            save_file(state, folder / "model.safetensors", {"format": "pt"})
        found[kind] = AutoModelForCausalLM.from_pretrained(folder)
    return found


def resized(base: Any, rows: int, seed: int = 1) -> Any:
    torch.manual_seed(seed)
    model = copy.deepcopy(base)
    if rows != VOCAB:
        model.resize_token_embeddings(rows, mean_resizing=False)
    return model


def trained(base: Any, rows: int, **settings: Any) -> Any:
    """A PeftModel whose every trainable weight has moved; None where peft offers no such thing."""
    try:
        model = get_peft_model(resized(base, rows), LoraConfig(task_type="CAUSAL_LM", r=2, lora_alpha=3, **settings))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += torch.randn_like(parameter) * 0.3
        logits(model, rows)
    except (TypeError, ValueError):
        return None
    return model.eval()


def logits(model: Any, rows: int) -> torch.Tensor:
    """Over every token there is."""
    with torch.no_grad():
        return model(input_ids=torch.arange(rows)[None]).logits


def merged_logits(base: Any, adapters: list[Path], rows: int) -> torch.Tensor:
    """Of our merge, computed by transformers."""
    weights = merged_model(
        open_checkpoint(Path(base.name_or_path)), [AdapterSource(str(path)) for path in adapters]
    ).weights
    config = copy.deepcopy(base.config)
    config.vocab_size, config.tie_word_embeddings = weights.config.vocab_size, weights.config.tie_word_embeddings
    state = {name: torch.from_numpy(weights.read(name, 0, info.shape[0])) for name, info in weights.tensors.items()}
    model = Gemma2ForCausalLM(config)
    model.load_state_dict(state | {"lm_head.weight": state.get("lm_head.weight", state["model.embed_tokens.weight"])})
    return logits(model.eval(), rows)


def peft_is_right(base: Any, model: Any, adapter: Path, rows: int) -> bool:
    """Whether peft itself gets the trained model back from the file, and merges it into the same."""
    try:
        again = PeftModel.from_pretrained(resized(base, rows, seed=2), adapter).eval()
    except (KeyError, RuntimeError):
        return False
    wanted = logits(model, rows)
    # peft's merge into tied weights changes both sides, so a model with two sides is merged in a tied one's place.
    return torch.allclose(logits(again, rows), wanted, atol=1e-3) and torch.allclose(
        logits(again.merge_and_unload(), rows), wanted, atol=1e-3
    )


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("kind", [*BASES[:2], pytest.param(OWN_HEAD, marks=pytest.mark.long)])
def test_every_combination(bases: dict[str, Any], tmp_path: Path, kind: str, tokens: str) -> None:
    base, outcomes, wrong = bases[kind], Counter[str](), []
    for lora, saved, tying, rows in product(SIDES, SIDES, (False, True), (VOCAB, VOCAB + MORE, VOCAB - MORE)):
        if rows < VOCAB and "neither" not in (lora, saved):
            continue
        indices = copy.deepcopy(TOKENS[tokens])
        if rows > VOCAB and indices:
            for ids in indices.values() if isinstance(indices, dict) else [indices]:
                ids.append(NEW)
        model = trained(
            base, rows, target_modules=["q_proj", *SIDES[lora]], modules_to_save=SIDES[saved] or None,
            trainable_token_indices=indices, ensure_weight_tying=tying,
        )  # fmt: skip
        if model is None:
            continue
        cell = f"LoRA on {lora}, {saved} saved, tying {tying}, {rows} tokens"
        adapter = tmp_path / f"{sum(outcomes.values())}"
        model.save_pretrained(adapter)
        try:
            found = merged_logits(base, [adapter], rows)
        except AdapterError as error:
            outcomes["refused"] += 1
            # A vocabulary that shrank and two heads in one are rare enough for a refusal to do.
            if kind != OWN_HEAD and rows >= VOCAB and peft_is_right(base, model, adapter, rows):
                wrong.append(f"{cell}: refused, and peft can do it: {error}")
        else:
            outcomes["equal"] += 1
            if not torch.allclose(found, logits(model, rows), atol=1e-3):
                wrong.append(f"{cell}: other logits than the trained model's")
    assert not wrong
    assert outcomes["equal"] + outcomes["refused"] > 0
