"""Which modules an adapter's settings mean: peft injects matrices into a model, and says where."""

from __future__ import annotations

import copy
import random
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import Gemma2Config, Gemma2ForCausalLM, GemmaConfig, GemmaForCausalLM

from rkconvert.adapters.config import AdapterConfig
from rkconvert.adapters.contents import TOKENS, check_contents
from rkconvert.adapters.merged_model import AdapterSource, MergedModel, merged_model
from rkconvert.adapters.patterns import are_safe
from rkconvert.adapters.targets import Targets, modules_of
from rkconvert.sources.checkpoint import open_checkpoint
from rkruntime.errors import AdapterError

LAYERS = 3
PARTS = [
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.up_proj",
    "mlp.down_proj",
]  # fmt: skip
MATRICES = [f"model.layers.{layer}.{part}" for layer in range(LAYERS) for part in PARTS]
# As in adapter_config.json of adapters that Unsloth made, with releases of 2025 and 2026.
UNSLOTH = [
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?(?:q_proj|k_proj|v_proj|o_proj"
    r"|gate_proj|up_proj|down_proj|proj|linear).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp"
    r"|feed_forward|ffn|dense)\.(?:(?:q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj|proj|linear)))",
    r"(?:.*?(?:vision|image|visual|patch|language|text).*?(?:self_attn|attention|attn|mlp|feed_forward|ffn|dense).*?"
    r"(?:qkv|proj|linear_fc1|linear_fc2|out_proj|in_proj_qkv|in_proj_z|in_proj_b|in_proj_a|gate_proj|up_proj|down_proj"
    r"|q_proj|k_proj|v_proj|o_proj).*?)|(?:\bmodel\.layers\.[\d]{1,}\.(?:self_attn|attention|attn|mlp|feed_forward|ffn"
    r"|dense)\.(?:(?:qkv|proj|linear_fc1|linear_fc2|out_proj|in_proj_qkv|in_proj_z|in_proj_b|in_proj_a|gate_proj|up_proj"
    r"|down_proj|q_proj|k_proj|v_proj|o_proj)))",
    r"(?:.*?(?:language|text).*?(?:self_attn|attention|attn|mixer|mlp|feed_forward|ffn|dense|mixer).*?\.(?:q_proj|v_proj"
    r"|o_proj))|(?:\bmodel\.layers\.[\d]{1,}(?!.*\.experts\.\d)\..*?(?:self_attn|attention|attn|mixer|mlp|feed_forward"
    r"|ffn|dense|mixer).*?\.(?:(?:q_proj|v_proj|o_proj)))",
]  # fmt: skip
TINY = {
    "vocab_size": 16, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": LAYERS, "num_attention_heads": 1,
    "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1,
}  # fmt: skip


@pytest.mark.parametrize("kinds", [(Gemma2Config, Gemma2ForCausalLM), (GemmaConfig, GemmaForCausalLM)])
@pytest.mark.parametrize("tied", [True, False])
def test_a_bases_modules(kinds: Any, tied: bool) -> None:
    model = kinds[1](kinds[0](**TINY, tie_word_embeddings=tied))
    names = [name for name, _ in model.named_parameters()]
    assert {*modules_of(names)} == {name for name, _ in model.named_modules() if name}


@pytest.fixture(scope="module")
def tiny() -> Callable[[bool], Any]:
    made = {tied: Gemma2ForCausalLM(Gemma2Config(**TINY, tie_word_embeddings=tied)) for tied in (True, False)}
    return lambda tied: copy.deepcopy(made[tied])


def name_of(chance: random.Random) -> str:
    module = chance.choice([*MATRICES, "model.embed_tokens", "lm_head"])
    odd = [
        "proj",
        "_proj",
        "layers",
        "q.proj",
        "mlp",
        "0",
        "nope",
        ".q_proj",
        "Q_PROJ",
        "head",
        "norm",
        "attn",
        "lm.head",
    ]
    return chance.choice([module.split(".")[-1]] * 3 + [".".join(module.split(".")[-3:]), module, chance.choice(odd)])


def settings_of(chance: random.Random) -> dict[str, Any]:
    """Settings as a person may write them."""
    names = lambda most: [name_of(chance) for _ in range(chance.randint(1, most))]  # noqa: E731
    pattern = chance.choice(
        [
            ".*q_proj", "q_proj", r".*\.(q|v)_proj", r".*layers\.(0|1)\..*_proj", ".*", "(?i).*Q_PROJ", "(", "",
            "(?!lm_head).*proj", "all-linear", r"(.*(q_proj|embed_tokens)|lm_head)", "lm_head", *UNSLOTH,
        ]
    )  # fmt: skip
    full = chance.sample([*MATRICES, "model.embed_tokens", "lm_head"], chance.randint(15, 23))
    found = {
        "target_modules": chance.choice([None, pattern, names(4), names(4), full, full, ["q_proj", "embed_tokens"]]),
        "exclude_modules": chance.choice([None, None, names(2), pattern]),
        "modules_to_save": chance.choice([None, None, None, names(2), ["embed_tokens"], ["lm_head"], ["norm"]]),
        "layers_to_transform": chance.choice([None, None, [], 0, [0, 2], [9]]),
        "layers_pattern": chance.choice([None, None, None, "", "layers", ["h", "layers"], "[^.]*", "lay(ers)", "("]),
        "ensure_weight_tying": chance.random() < 0.3,
        "trainable_token_indices": chance.choice(
            [None] * 6 + [[3], {"embed_tokens": [3]}, {"lm_head": [3]}, {"tokens": [3]}, {"nope": [3]}]
        ),
    }
    if isinstance(found["target_modules"], str) and chance.random() < 0.9:
        found |= {"layers_to_transform": None, "layers_pattern": None}
    return found


def judged(settings: dict[str, Any], base: dict[str, tuple[int, ...]]) -> set[str]:
    """Modules that settings target, after all that would refuse a file made for them."""
    config = AdapterConfig(Path("adapter_config.json"), {"peft_type": "LORA", "init_lora_weights": True, **settings})
    config._check_kind()
    targets = Targets.of(config, base)
    answers = {module: targets.are_targeted(module) for module in targets.modules}
    parts: dict[str, list[str]] = {module: ["lora_A", "lora_B"] for module, answer in answers.items() if answer}
    for module in targets.with_weights:
        parts.setdefault(module, []).extend(
            ["weight"] * targets.is_saved(module) + [TOKENS] * (module in targets.tokens)
        )
    check_contents(targets, parts)
    assert not targets.untried
    return {module for module, answer in answers.items() if answer}


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("seed", range(100))
def test_random_settings_mean_what_they_mean_to_peft(tiny: Callable[[bool], Any], tied: bool, seed: int) -> None:
    """Where peft fails, a file made for such settings is refused. Elsewhere it may be, or the modules are peft's."""
    chance = random.Random(f"{seed} {tied}")
    settings = settings_of(chance)
    model = tiny(tied)
    base = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kept = copy.deepcopy(settings)
            theirs = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=1, **kept))
    except Exception:  # of many kinds
        with pytest.raises(AdapterError):
            judged(settings, base)
        return
    try:
        mine = judged(settings, base)
    except AdapterError:
        return
    assert mine == set(theirs.base_model.targeted_module_names)


@pytest.fixture
def opened(
    make_model: Callable[..., Path], make_adapter: Callable[..., Path], edit_json: Callable[..., None]
) -> Callable[..., MergedModel]:
    """`opened(edits of adapter_config.json, tied, change of its tensors, **of LoraConfig)`."""

    def make(
        edits: dict[str, Any], tied: bool = True, change: Callable[[Any], object] = lambda _: None, **lora: Any
    ) -> MergedModel:
        base = make_model(num_hidden_layers=LAYERS, tie_word_embeddings=tied)
        folder = make_adapter(base, **{"target_modules": ["q_proj"]} | lora)
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")
        edit_json(folder / "adapter_config.json", **edits)
        return merged_model(open_checkpoint(base), [AdapterSource(str(folder))])

    return make


def without(*ends: str) -> Callable[[Any], object]:
    return lambda tensors: [tensors.pop(name) for name in list(tensors) if any(end in name for end in ends)]


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "layers for many full names, which peft shortens": (
        {"layers_to_transform": [0]}, {"target_modules": MATRICES}, r"layers\.1\..* \(14 such modules\)",
    ),
    "a name to save whose dot is any character": (
        {"modules_to_save": ["q.proj"]}, {"target_modules": ["q_proj", "v_proj"]},
        r"q_proj \(3 such modules\) that its settings do not target",
    ),
    "a name to save with a repeat": ({"modules_to_save": ["(l|m|_)*head"]}, {}, "not a plain name"),
    "a part of what is saved, by the end of its name alone": (
        {"modules_to_save": ["proj"]}, {}, "in target_modules and in modules_to_save",
    ),
    "saved twice over": ({"modules_to_save": ["mlp", "down_proj"]}, {"modules_to_save": ["mlp"]}, "peft does not load"),
    "a tie that the base does not have": (
        {"target_modules": ["q_proj"], "ensure_weight_tying": True},
        {"target_modules": ["q_proj", "lm_head"], "tied": False}, r"lm_head \(1 such modules\)",
    ),
    "a tie of what is not targeted": (
        {"target_modules": ["q_proj"], "ensure_weight_tying": True},
        {"target_modules": ["q_proj", "lm_head"]}, r"lm_head \(1 such modules\)",
    ),
    "a tie that the file does not have": (
        {"ensure_weight_tying": True}, {"target_modules": ["lm_head"]}, r"its file lacks those of model\.embed_tokens",
    ),
    "a tied head that was not saved": (
        {}, {"target_modules": ["embed_tokens"], "ensure_weight_tying": True, "change": without("lm_head")},
        "its file lacks those of lm_head",
    ),
    "a tied and trained head that was not saved": (
        {}, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True, "change": without("lm_head")},
        "name lm_head in modules_to_save, but its file lacks it",
    ),
    "a tied and trained head of its own": (
        {}, {"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True,
             "change": lambda tensors: tensors["base_model.model.lm_head.weight"].add_(1)}, "of the head differ",
    ),
    "an invalid pattern": ({"target_modules": ".*(q_proj"}, {}, "target_modules has what is not a regular expression"),
    "an invalid exclusion": ({"exclude_modules": "["}, {}, "exclude_modules has what is not a regular expression"),
    "an invalid layer": (
        {"layers_pattern": "(", "layers_to_transform": [0]}, {}, "layers_pattern has what is not a regular expression",
    ),
    "a pattern of Unsloth for fewer modules": (
        {"target_modules": UNSLOTH[2]}, {"target_modules": ["q_proj", "k_proj"]}, r"k_proj \(3 such modules\)",
    ),
    "a pattern for what is not a matrix": ({"target_modules": ".*mlp|.*q_proj"}, {}, "mlp, which is not a matrix"),
    "a pattern with layers": ({"target_modules": ".*q_proj", "layers_to_transform": [0]}, {}, "which peft refuses"),
    "layers without indices": ({"layers_pattern": "layers"}, {}, "without layers_to_transform, which peft refuses"),
    "no target at all": (
        {"target_modules": []}, {"modules_to_save": ["norm"], "change": without("lora_")}, "no target_modules",
    ),
    "tokens by half a name": (
        {"trainable_token_indices": {"tokens": [1]}}, {}, r"lacks their rows of model\.embed_tokens",
    ),
    "tokens of a module that is not there": (
        {"trainable_token_indices": {"nope": [1]}}, {}, "does not mean the embedding",
    ),
    "a feature with its defaults": ({"kasa_config": {}}, {}, "it uses KaSA"),
    "a rank that is not whole in Python": ({"r": 4.0}, {}, "must be a whole number"),
    "no token": ({"trainable_token_indices": []}, {}, "must list token ids"),
    "tokens of the embedding, twice": (
        {"trainable_token_indices": {"embed_tokens": [1], "tokens": [2]}}, {"trainable_token_indices": [1]},
        "one of them again",
    ),
    "a whole module where matrices are wanted": (
        {}, {"change": lambda tensors: tensors.update(
            {"base_model.model.model.layers.0.self_attn.k_proj.weight": torch.ones(32, 64)}
        ), "settings": {"target_modules": ["q_proj", "k_proj"]}}, "as a whole, but its settings",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_peft_takes_otherwise_is_refused(opened: Callable[..., MergedModel], case: str) -> None:
    edits, lora, words = REFUSED[case]
    with pytest.raises(AdapterError, match=words):
        opened(edits | lora.get("settings", {}), **{key: value for key, value in lora.items() if key != "settings"})


@pytest.mark.parametrize("pattern", UNSLOTH)
def test_what_unsloth_writes_is_tried(opened: Callable[..., MergedModel], pattern: str) -> None:
    assert are_safe([pattern])
    named = [name for name in MATRICES if re.fullmatch(pattern, name)]
    assert len(named) in (3 * LAYERS, 7 * LAYERS)
    model = opened({"target_modules": pattern}, target_modules=sorted({name.split(".")[-1] for name in named}))
    assert (model.notes, len(model.adapters[0].updates)) == ((), len(named))


def test_many_full_names_with_layers(
    make_model: Callable[..., Path], make_adapter: Callable[..., Path], peft_merge: Any, assert_merged: Any
) -> None:
    base = make_model(num_hidden_layers=LAYERS)
    adapter = make_adapter(base, target_modules=MATRICES, layers_to_transform=[0])
    mine = merged_model(open_checkpoint(base), [AdapterSource(str(adapter))])
    assert (mine.notes, len(mine.adapters[0].updates)) == ((), len(PARTS))
    theirs = peft_merge(base, {adapter: 1.0})
    for name, info in mine.weights.tensors.items():
        assert_merged(name, mine.weights.read(name, 0, info.shape[0]), theirs[name])


@pytest.mark.parametrize("key", ["target_modules", "exclude_modules", "layers_pattern"])
def test_a_pattern_that_was_not_tried_is_said(opened: Callable[..., MergedModel], key: str) -> None:
    edits = {key: r"(?:\w+\.)*(layers|q_proj)"} | ({"layers_to_transform": [0]} if key == "layers_pattern" else {})
    (note,) = opened(edits).notes
    assert f"a pattern in {key} of the adapter lora is too complex to be tried safely" in note


def test_matrices_that_peft_unties_in_16_bits_alone(opened: Callable[..., MergedModel]) -> None:
    def other(tensors: Any) -> None:
        tensors["base_model.model.lm_head.lora_B.weight"] += 1

    lora = {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}
    assert opened({}, change=other, **lora).adapters[0].untied


def test_matrices_that_peft_ties_in_float32(make_model: Callable[..., Path], make_adapter: Callable[..., Path]) -> None:
    base = make_model(dtype=torch.float32, num_hidden_layers=1)
    adapter = make_adapter(base, target_modules=["embed_tokens"], ensure_weight_tying=True)
    merged_model(open_checkpoint(base), [AdapterSource(str(adapter))])
    tensors = load_file(adapter / "adapter_model.safetensors")
    tensors["base_model.model.lm_head.lora_B.weight"] += 1
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="in a base in float32 peft uses one"):
        merged_model(open_checkpoint(base), [AdapterSource(str(adapter))])
