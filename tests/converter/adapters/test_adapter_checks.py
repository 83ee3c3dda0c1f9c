"""What adapters say of themselves and do not hold, or hold and do not say; and whose base they name."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from peft import PEFT_TYPE_TO_TUNER_MAPPING, LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTuner, check_target_module_exists
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULT_TARGETS
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rkconvert import demo
from rkconvert.adapters.base_names import is_other_base, plain_name
from rkconvert.adapters.merged_model import AdapterSource, merged_model
from rkconvert.demo import tokenizer as demo_tokenizer
from rkconvert.model.chat_template import read_template
from rkconvert.sources.checkpoint import open_checkpoint
from rkconvert.tensors.weights import read_float32
from rkruntime.cli import main
from rkruntime.errors import AdapterError, UsageError

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}{% endfor %}"
HEAD, EMBEDDING = "base_model.model.lm_head", "base_model.model.model.embed_tokens"
QUERY = "base_model.model.model.layers.1.self_attn.q_proj"


@pytest.fixture
def opened(make_model, make_adapter, edit_json):
    """A base and an adapter whose settings and tensors were changed: `opened(change, settings, **of LoraConfig)`."""

    def make(change=lambda tensors: None, settings=None, **lora):
        base = make_model(num_hidden_layers=2)
        folder = make_adapter(base, **{"target_modules": ["q_proj"]} | lora)
        tensors = load_file(folder / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")
        edit_json(folder / "adapter_config.json", **settings or {})
        return merged_model(open_checkpoint(base), [AdapterSource(str(folder))])

    return make


def renamed(old, new):
    return lambda tensors: tensors.update({new: tensors.pop(old)})


REFUSED = {
    "DoRA without magnitudes": (
        lambda tensors: [tensors.pop(name) for name in list(tensors) if "magnitude" in name],
        {},
        {"use_dora": True},
        "say DoRA .* no magnitudes for model.layers",
    ),
    "magnitudes without DoRA": (
        lambda tensors: None,
        {"use_dora": False},
        {"use_dora": True},
        "lora_magnitude_vector for .* which peft would not use",
    ),
    "a module to save that is not there": (
        lambda tensors: tensors.pop(f"{EMBEDDING}.weight"),
        {},
        {"modules_to_save": ["embed_tokens"]},
        "name model.embed_tokens in modules_to_save, but its file lacks it",
    ),
    "one norm of all that are to be saved": (
        lambda tensors: tensors.pop("base_model.model.model.layers.1.input_layernorm.weight"),
        {},
        {"modules_to_save": ["input_layernorm"]},
        r"name model\.layers\.1\.input_layernorm in modules_to_save",
    ),
    "a saved module under peft's inner name alone": (
        renamed(f"{HEAD}.weight", f"{HEAD}.modules_to_save.weight"),
        {},
        {"modules_to_save": ["lm_head"]},
        r"lacks it|from which peft loads that module",
    ),
    "an inner name that no setting asks for": (
        lambda tensors: tensors.update({f"{HEAD}.modules_to_save.weight": torch.ones(1024, 64)}),
        {},
        {},
        r"has .*modules_to_save\.weight but not lm_head\.weight",
    ),
    "matrices that are not targeted": (
        lambda tensors: None,
        {"target_modules": ["v_proj"]},
        {"target_modules": ["q_proj", "v_proj"]},
        r"has matrices for model\.layers\.0\.self_attn\.q_proj \(2 such modules\) that its settings do not target",
    ),
    "matrices of a layer that is not targeted": (
        lambda tensors: None,
        {"layers_to_transform": [1]},
        {},
        r"has matrices for model\.layers\.0\.self_attn\.q_proj \(1 such modules\)",
    ),
    "a base layer under nothing": (
        lambda tensors: tensors.update({f"{EMBEDDING}.base_layer.weight": torch.ones(1024, 64)}),
        {},
        {},
        "base_layer for model.embed_tokens, which do not go together",
    ),
    "a whole tensor under matrices": (
        lambda tensors: tensors.update({f"{QUERY}.weight": torch.ones(64, 64)}),
        {},
        {},
        "lora_A, lora_B, weight for .*q_proj, which do not go together",
    ),
    "tokens that are not in the file": (
        lambda tensors: None,
        {"trainable_token_indices": {"embed_tokens": [3, 4]}},
        {},
        "settings name trainable_token_indices, but its file lacks their rows",
    ),
    "a token twice": (
        lambda tensors: None,
        {"trainable_token_indices": [3, 3]},
        {"trainable_token_indices": [3, 4]},
        "has 2 trained tokens .* its settings name 1",
    ),
    "a token beyond the vocabulary": (
        lambda tensors: None,
        {"trainable_token_indices": [3, 5000]},
        {"trainable_token_indices": [3, 4]},
        "needs 5,001 rows of model.embed_tokens.weight, but the base model has 1,024",
    ),
    "modules to save that are no list": (
        lambda tensors: None,
        {"modules_to_save": "embed_tokens"},
        {},
        "must list names of modules",
    ),
    "targets of another model, with a pattern": (
        lambda tensors: None,
        {"target_modules": ["c_attn"], "exclude_modules": ".*vision.*", "layers_to_transform": [0]},
        {},
        "targets c_attn, but the base model has no such module",
    ),
    "targets of another model": (
        lambda tensors: None,
        {"target_modules": ["c_attn", "query_key_value"]},
        {},
        "targets c_attn, query_key_value, but the base model has no such module",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(opened, case):
    change, settings, lora, words = REFUSED[case]
    with pytest.raises(AdapterError, match=words):
        opened(change, settings, **lora)


def test_lists_of_targets_for_many_models(opened):
    model = opened(settings={"target_modules": ["q_proj", "c_attn", "query_key_value"]})
    assert model.notes == ()
    assert len(model.adapters[0].updates) == 2


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], r".*\.(q|v)_proj"])
def test_a_missing_pair_is_noted(opened, targets):
    model = opened(settings={"target_modules": targets})
    (note,) = model.notes
    assert "targets model.layers.0.self_attn.v_proj but has no matrices for it (2 such modules)" in note


@pytest.mark.parametrize(
    "lora",
    [
        {"target_modules": "all-linear"}, {"target_modules": "all-linear", "exclude_modules": ["k_proj"]},
        {"target_modules": r".*\.[01]\.mlp\..*_proj"}, {"layers_to_transform": [1]}, {"layers_to_transform": 0},
        {"target_modules": ["model.layers.1.self_attn.k_proj"]}, {"target_modules": ["embed_tokens", "lm_head"]},
        {"target_modules": ["embed_tokens"], "ensure_weight_tying": True}, {"modules_to_save": ["norm"]},
        {"modules_to_save": ["q_proj"], "target_modules": ["q_proj", "k_proj"]}, {"modules_to_save": ["mlp"]},
        {"layers_to_transform": [1], "layers_pattern": "layers"}, {"exclude_modules": ".*vision.*"},
    ],
)  # fmt: skip
def test_what_peft_saves_is_taken_without_a_word(opened, lora):
    assert opened(**lora).notes == ()


LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EDITED = [
    {"target_modules": None},
    {"target_modules": "all-linear"},
    {"target_modules": ".*_proj"},
    {"target_modules": "q_proj"},
    {"target_modules": r"model\.layers\.\d\.mlp\.(up|down)_proj", "exclude_modules": ["up_proj"]},
    {"exclude_modules": ".*q_proj"},
    {"exclude_modules": "q_proj"},
    {"exclude_modules": ["self_attn.q_proj", "proj"]},
    {"exclude_modules": r"model\.layers\.[^0]\..*"},
    {"layers_to_transform": [1]},
    {"layers_to_transform": [1], "layers_pattern": "layers"},
    {"layers_to_transform": 0, "layers_pattern": ["blocks", "layers"]},
    {"layers_to_transform": [0, 1], "layers_pattern": ["model.layers"]},
    {"layers_to_transform": [0, 1], "layers_pattern": "h"},
    {"layers_to_transform": [], "layers_pattern": "layers"},
    {"layers_to_transform": [0], "layers_pattern": r"l\w+s", "exclude_modules": ".*(up|down)_proj"},
]


@pytest.mark.parametrize("settings", EDITED, ids=str)
def test_settings_that_leave_out_what_the_file_has(opened, settings):
    """peft drops such matrices without a word: its own rules say which these are."""
    full = {"target_modules": LINEAR} | settings
    rules = LoraConfig(target_modules=full["target_modules"] or DEFAULT_TARGETS["gemma2"])
    for key, value in full.items():
        setattr(rules, key, value)
    if full["target_modules"] in (None, "all-linear"):
        rules.target_modules = DEFAULT_TARGETS["gemma2"] if full["target_modules"] is None else LINEAR
    modules = [f"model.layers.{at}.{'mlp' if at_mlp else 'self_attn'}.{name}" for at in (0, 1)
               for at_mlp, names in enumerate((LINEAR[:4], LINEAR[4:])) for name in names]  # fmt: skip
    used = [module for module in modules if check_target_module_exists(rules, module)]
    if len(used) == len(modules):
        assert len(opened(settings=settings, target_modules=LINEAR).adapters[0].updates) == len(modules)
        return
    unused = rf"matrices for {min(set(modules) - set(used))} \({len(modules) - len(used)} such modules\)"
    with pytest.raises(AdapterError, match=f"{unused}|has no such module"):
        opened(settings=settings | dict.fromkeys(["target_modules"], full["target_modules"]), target_modules=LINEAR)


@pytest.mark.parametrize("pattern", ["(a+)+$", ["((x*)*)*"] * 9, ["layers"] * 9000])
def test_patterns_that_are_not_safe_are_left_alone(opened, pattern):
    model = opened(settings={"layers_to_transform": [0, 1], "layers_pattern": pattern})
    assert model.adapters[0].updates
    assert "too complex to be tried" in model.notes[0]


def test_a_copy_of_another_base(opened, make_model, bits):
    def change(tensors):
        tensors[f"{EMBEDDING}.base_layer.weight"][7] += 1

    model = opened(change, target_modules=["embed_tokens"])
    assert "was saved with its base's model.embed_tokens.weight, which differs from this base's" in model.notes[0]
    adapter = load_file(model.adapters[0].path / "adapter_model.safetensors")
    # A PeftModel computes with the adapter's copy, on both sides of a tied model.
    assert not model.weights.config.tie_word_embeddings
    expected = adapter[f"{EMBEDDING}.base_layer.weight"]
    np.testing.assert_array_equal(model.weights.read("lm_head.weight", 0, 1024), bits(expected))


def test_several_adapters_on_one_embedding(make_model, make_adapter):
    base = open_checkpoint(make_model())
    folder = base.path
    first = make_adapter(folder, "first", target_modules=["q_proj"], trainable_token_indices=[3, 4])
    other = make_adapter(folder, "other", target_modules=["q_proj"], trainable_token_indices=[5], seed=2)
    same = make_adapter(folder, "same", target_modules=["q_proj"], trainable_token_indices=[4], seed=3)
    head = make_adapter(folder, "head", target_modules=["lm_head"])
    grown = make_adapter(
        folder,
        "grown",
        target_modules=["q_proj"],
        prepare=lambda m: m.resize_token_embeddings(1030, mean_resizing=False),
    )

    def of(*paths):
        return merged_model(base, [AdapterSource(str(path)) for path in paths]).weights

    both = of(first, other)
    assert both.config.tie_word_embeddings
    rows, plain = both.read("model.embed_tokens.weight", 0, 10), base.weights.read("model.embed_tokens.weight", 0, 10)
    assert [at for at in range(10) if (rows[at] != plain[at]).any()] == [3, 4, 5]
    for pair, words in (
        ((first, same), "change the same rows"), ((first, head), "change the same rows"),
        ((head, first), "change the same rows"), ((head, grown), "as a whole"), ((grown, head), "as a whole"),
    ):  # fmt: skip
        with pytest.raises(AdapterError, match=words):
            of(*pair)


def test_a_tokenizer_of_rows_that_were_not_saved(make_model, make_adapter, tokenizer):
    base = make_model()
    adapter = make_adapter(base)
    demo_tokenizer.save(tokenizer, adapter)
    content = json.loads((adapter / "tokenizer.json").read_text())
    content["added_tokens"].append(content["added_tokens"][0] | {"id": 1024, "content": "<more>"})
    (adapter / "tokenizer.json").write_text(json.dumps(content))
    (note,) = merged_model(open_checkpoint(base), [AdapterSource(str(adapter))]).notes
    assert "has a tokenizer of 1,025 tokens" in note


def test_magnitudes_under_both_of_their_names(make_model, make_adapter, peft_merge):
    base = make_model()
    adapter = make_adapter(base, target_modules=["q_proj", "up_proj"], use_dora=True)
    tensors = load_file(adapter / "adapter_model.safetensors")
    names = [name for name in tensors if name.endswith("lora_magnitude_vector")]
    twice = tensors | {f"{name}.weight": tensors[name].clone() for name in names}
    save_file(twice, adapter / "adapter_model.safetensors")
    assert names
    expected = peft_merge(base, {adapter: 1.0})
    model = merged_model(open_checkpoint(base), [AdapterSource(str(adapter))])
    name = "model.layers.0.self_attn.q_proj.weight"
    np.testing.assert_allclose(read_float32(model.weights, name), expected[name].float().numpy(), atol=1e-5)
    save_file(twice | {f"{names[0]}.weight": tensors[names[0]] + 1}, adapter / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="two values for one tensor"):
        merged_model(open_checkpoint(base), [AdapterSource(str(adapter))])


@pytest.mark.parametrize("lora", [{}, {"use_dora": True}, {"target_modules": ["q_proj", "embed_tokens"]}])
def test_names_of_a_state_dict_that_peft_did_not_save(make_model, make_adapter, lora):
    """peft's own save_pretrained takes the adapter's name out; its loading knows both."""
    base = make_model(tie_word_embeddings=False)
    adapter = make_adapter(base, **{"target_modules": ["q_proj", "up_proj"]} | lora)
    live = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).state_dict()
    tensors = {name: tensor.clone() for name, tensor in live.items() if "lora_" in name}
    assert all(".default" in name for name in tensors)
    save_file(tensors, adapter / "adapter_model.safetensors")
    expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).merge_and_unload()
    model = merged_model(open_checkpoint(base), [AdapterSource(str(adapter))])
    for name, tensor in expected.state_dict().items():
        # A step of bfloat16, in which the base is.
        np.testing.assert_allclose(read_float32(model.weights, name), tensor.float().numpy(), rtol=2**-7, atol=1e-5)
    kept = {name.replace(".default", ""): tensor + 1 for name, tensor in tensors.items()}
    save_file({**tensors, **kept}, adapter / "adapter_model.safetensors")
    with pytest.raises(AdapterError, match="two values for one tensor"):
        merged_model(open_checkpoint(base), [AdapterSource(str(adapter))])


def test_a_combination_that_peft_saves_is_not_said_to_be_edited(make_model, make_adapter):
    base = make_model()
    adapter = make_adapter(base, target_modules=["q_proj", "lm_head"], trainable_token_indices=[3])
    with pytest.raises(AdapterError, match="in target_modules and in trainable_token_indices") as caught:
        merged_model(open_checkpoint(base), [AdapterSource(str(adapter))])
    assert "train each module in one way" in caught.value.hint


OWN_TOKENS = {
    "single tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [3, 4]},
    "LoRA on the embedding": {"target_modules": ["embed_tokens"]},
    "LoRA on the head": {"target_modules": ["lm_head"]},
    "a head trained as a whole": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "nothing of these": {"target_modules": ["q_proj"]},
}


@pytest.mark.parametrize("kind", OWN_TOKENS)
def test_whose_tokenizer_is_used(make_model, make_adapter, tokenizer, edit_json, tmp_path, kind):
    base = make_model()
    adapter = make_adapter(base, **OWN_TOKENS[kind])
    demo_tokenizer.save(tokenizer, adapter)
    (adapter / "chat_template.jinja").unlink()
    edit_json(adapter / "tokenizer_config.json", chat_template=TEMPLATE)
    (adapter / "special_tokens_map.json").unlink(missing_ok=True)
    (base / "special_tokens_map.json").write_text('{"pad_token": "<base>"}')
    content = json.loads((adapter / "tokenizer.json").read_text())
    vocab = content["model"]["vocab"]
    vocab["<mine>"] = vocab.pop(content["added_tokens"][-1]["content"])
    content["added_tokens"][-1]["content"] = "<mine>"
    (adapter / "tokenizer.json").write_text(json.dumps(content))
    notes = merged_model(open_checkpoint(base), [AdapterSource(str(adapter))]).notes
    assert main(["merge", str(base), "--lora", str(adapter), "-o", str(tmp_path / "merged"), "-q"]) == 0
    merged = AutoTokenizer.from_pretrained(tmp_path / "merged")
    own = kind != "nothing of these"
    for mine in (False, True):
        source = AutoTokenizer.from_pretrained(adapter if mine else base)
        assert (merged.chat_template == source.chat_template) == (mine == own)
        assert (merged.get_vocab() == source.get_vocab()) == (mine == own)
    assert (tmp_path / "merged" / "special_tokens_map.json").exists() != own
    said = [word for word in ("different tokenizer", "different chat template") if any(word in note for note in notes)]
    assert len(said) == len(notes) == (0 if own else 2)
    assert (tmp_path / "merged" / "generation_config.json").read_bytes() == (
        base / "generation_config.json"
    ).read_bytes()


def test_an_adapter_without_a_template_leaves_the_bases(make_model, make_adapter, tokenizer, edit_json, tmp_path):
    base = make_model()
    (base / "chat_template.jinja").write_text(TEMPLATE)
    adapter = make_adapter(base, modules_to_save=["embed_tokens"])
    demo_tokenizer.save(tokenizer, adapter)
    (adapter / "chat_template.jinja").unlink()
    edit_json(adapter / "tokenizer_config.json", chat_template=None)
    model = merged_model(open_checkpoint(base), [AdapterSource(str(adapter))])
    assert model.tokenizer_folder == adapter
    template = read_template(model.tokenizer_folder, "<bos>", base)
    assert template.source == TEMPLATE
    assert any("the base model's is used" in note for note in template.notes)
    assert main(["merge", str(base), "--lora", str(adapter), "-o", str(tmp_path / "merged"), "-q"]) == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == TEMPLATE


def test_the_same_tokenizer_in_another_form(make_model, make_adapter, tokenizer):
    base = make_model()
    adapter = make_adapter(base)
    demo_tokenizer.save(tokenizer, adapter)
    content = json.loads((adapter / "tokenizer.json").read_text())
    content["truncation"] = {"direction": "Right", "max_length": 5, "strategy": "LongestFirst", "stride": 0}
    content["model"]["merges"] = [
        pair if isinstance(pair, str) else " ".join(pair) for pair in content["model"]["merges"]
    ]
    (adapter / "tokenizer.json").write_text(json.dumps(content, indent=1))
    assert merged_model(open_checkpoint(base), [AdapterSource(str(adapter))]).notes == ()


@pytest.mark.parametrize("lora", [{"modules_to_save": ["embed_tokens", "lm_head"]}, {"trainable_token_indices": [3]}])
@pytest.mark.parametrize("grow_to", [0, 1030])
def test_an_adapters_tokenizer_that_its_rows_do_not_suffice_for(make_model, make_adapter, tokenizer, lora, grow_to):
    base = make_model()

    def grow(model):
        if grow_to:
            model.resize_token_embeddings(grow_to, mean_resizing=False)

    adapter = make_adapter(base, prepare=grow, target_modules=["q_proj"], **lora)
    demo_tokenizer.save(tokenizer, adapter)
    content = json.loads((adapter / "tokenizer.json").read_text())
    content["added_tokens"].append(content["added_tokens"][0] | {"id": 1030, "content": "<more>"})
    (adapter / "tokenizer.json").write_text(json.dumps(content))
    checkpoint = open_checkpoint(base)
    if grow_to:
        with pytest.raises(AdapterError, match="tokenizer of 1,031 tokens, but its embeddings have 1,030 rows"):
            merged_model(checkpoint, [AdapterSource(str(adapter))])
    else:
        model = merged_model(checkpoint, [AdapterSource(str(adapter))])
        assert model.tokenizer_folder == base
        assert any("has a tokenizer of 1,031 tokens" in note for note in model.notes)


@pytest.mark.parametrize("kind", [str(kind.value) for kind in PEFT_TYPE_TO_TUNER_MAPPING if kind.value != "LORA"])
def test_other_types_of_peft(opened, kind):
    tuner = PEFT_TYPE_TO_TUNER_MAPPING[kind]
    with pytest.raises(AdapterError, match=f"of peft's type '{kind}'") as caught:
        opened(settings={"peft_type": kind})
    if not issubclass(tuner, BaseTuner):
        assert "merge_and_unload" not in caught.value.hint
    if kind in ("LOHA", "LOKR", "IA3", "VERA", "ADALORA", "OFT", "BOFT", "LN_TUNING", "TRAINABLE_TOKENS", "RANDLORA"):
        assert "merge_and_unload" in caught.value.hint


def test_a_folder_whose_name_looks_like_a_weight(make_adapter, make_model, tmp_path, monkeypatch):
    base = make_model()
    folder = make_adapter(base, "a=0.5")
    monkeypatch.chdir(tmp_path)
    assert AdapterSource.parse("a=0.5") == AdapterSource("a=0.5", 1.0)
    assert AdapterSource.parse("a=0.5=0.25") == AdapterSource("a=0.5", 0.25)
    folder.rename(tmp_path / "a")
    assert AdapterSource.parse("a=0.5") == AdapterSource("a", 0.5)


@pytest.mark.parametrize("weight", ["1_0", "nan", "inf", "", "0x1", "x"])
def test_weights_that_are_no_numbers(weight):
    with pytest.raises(UsageError, match="is not a number"):
        AdapterSource.parse(f"folder={weight}")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("weight", ["1e300", "-1e39"])
def test_a_weight_beyond_float32(tmp_path, capsys, weight):
    arguments = [str(demo.checkpoint()), "--lora", f"{demo.adapter()}={weight}", "-o", str(tmp_path / "merged"), "-q"]
    assert main(["merge", *arguments]) == 3
    assert capsys.readouterr().err.startswith("error: The tensor")


# Names of bases: named by the adapter, family and size of the model, what the model is called, whether it is another.
IT = ["google/gemma-2-2b-it"]
NAMES = [
    ("google/gemma-2-2b-it", "gemma2", "2B", IT, False),
    ("unsloth/gemma-2-2b-it-bnb-4bit", "gemma2", "2B", IT, False),
    ("unsloth/gemma-2-2b-it-unsloth-bnb-4bit", "gemma2", "2B", IT, False),
    ("unsloth/Gemma-2-2B-it", "gemma2", "2B", IT, False),
    ("mlx-community/gemma-2-2b-it-4bit", "gemma2", "2B", IT, False),
    ("bartowski/gemma-2-2b-it-GGUF", "gemma2", "2B", IT, False),
    ("someone/gemma-2-2b-it-GPTQ-Int4", "gemma2", "2B", IT, False),
    ("/home/me/models/gemma-2-2b-it/", "gemma2", "2B", IT, False),
    (r"C:\models\gemma-2-2b-it", "gemma2", "2B", ["gemma_2_2b_it"], False),
    ("/c/hub/models--google--gemma-2-2b-it/snapshots/0123abcd", "gemma2", "2B", IT, False),
    ("google/gemma-2-2b-it", "gemma2", "2B", ["gemma-2-2b-it-Q4_K_M"], False),
    ("google/gemma-2-2b-it", "gemma2", "2B", ["my-model"], False),
    ("google/gemma-2-2b-it", "gemma2", "1.1M", ["base"], False),
    ("./outputs/checkpoint-500", "gemma2", "2B", ["gemma-2-2b-it"], False),
    ("merged", "gemma2", "9B", IT, False),
    ("", "gemma2", "2B", IT, False),
    ("google/gemma-2b-it", "gemma", "2B", ["base"], False),
    ("google/gemma-1.1-7b-it", "gemma", "7B", ["base"], False),
    ("google/shieldgemma-2b", "gemma2", "2B", ["base"], False),
    ("google/gemma-2-2b", "gemma2", "2B", IT, True),
    ("google/gemma-2-2b-jpn-it", "gemma2", "2B", IT, True),
    ("unsloth/gemma-2-2b-bnb-4bit", "gemma2", "2B", ["gemma-2-2b-it"], True),
    ("google/gemma-2-9b-it", "gemma2", "2B", ["base"], True),
    ("google/gemma-2b-it", "gemma2", "2B", ["base"], True),
    ("google/gemma-2-2b-it", "gemma", "2B", ["base"], True),
    ("google/gemma-3-1b-it", "gemma2", "2B", ["base"], True),
    ("meta-llama/Llama-3-8B", "gemma2", "2B", ["base"], True),
    ("unsloth/Meta-Llama-3.1-8B-bnb-4bit", "gemma2", "2B", ["base"], True),
    ("Qwen/Qwen2.5-7B", "gemma2", "9B", ["base"], True),
    ("mistralai/Mistral-7B-v0.1", "gemma2", "9B", ["base"], True),
    ("microsoft/phi-2", "gemma2", "9B", ["base"], True),
    ("princeton-nlp/gemma-2-9b-it-SimPO", "gemma2", "9B", ["google/gemma-2-9b-it"], True),
    ("someone/her-finetune", "gemma2", "9B", ["google/gemma-2-9b-it"], True),
]  # fmt: skip


@pytest.mark.parametrize(("named", "family", "size", "own", "other"), NAMES)
def test_names_of_bases(named, family, size, own, other):
    assert is_other_base(named, family, size, own) == other


def test_names_are_plain_in_any_case():
    for name in ("gemma-2-9b", "gemma-2-27b-it"):
        for form in ("{}", "x/{}", "{}-bnb-4bit", "{}-AWQ", "{}-GGUF", "./{}/", "{}-8bit", "{}-fp16", "{}.Q8_0.gguf"):
            assert plain_name(form.format(name)) == plain_name(form.format(name).upper()) == name


@pytest.mark.parametrize("mode", ["merge", "runtime"])
def test_notes_reach_a_person(make_model, make_adapter, edit_json, tmp_path, capsys, mode):
    base = make_model()
    adapter = make_adapter(base)
    edit_json(adapter / "adapter_config.json", base_model_name_or_path="/home/me/secret/Llama-3-8B\x1b[2J")
    arguments = [str(base), "--lora", str(adapter)]
    words = "names Llama-3-8B[2J as its base, but this is base"
    assert main(["merge", *arguments, "-o", str(tmp_path / "merged"), "--json"]) == 0
    said = capsys.readouterr()
    assert words in json.loads(said.out)["notes"][0]
    assert words in said.err.replace("\n", " ")
    assert main(["convert", *arguments, "-o", str(tmp_path / mode), "--lora-mode", mode, "--json"]) == 0
    said = capsys.readouterr()
    assert any(words in note for note in json.loads(said.out)["notes"])
    assert words in said.err.replace("\n", " ")
    assert "secret" not in (tmp_path / mode / "rkedge.yaml").read_text()


def test_an_adapter_in_the_models_own_folder(make_model, make_adapter, edit_json, tmp_path, capsys):
    """transformers applies it when it loads the folder, so the model alone is not what a person has been using."""
    base = make_model(dtype=torch.float32, shard_size="10GB")
    before = load_file(base / "model.safetensors")
    adapter, other = make_adapter(base), make_adapter(base, name="other")
    for file in adapter.glob("adapter_*"):
        file.rename(base / file.name)
    edit_json(base / "adapter_config.json", base_model_name_or_path=str(base))
    assert any("lora" in name for name, _ in AutoModelForCausalLM.from_pretrained(base).named_modules())
    for arguments in (["convert"], ["merge", "--lora", str(other)]):
        assert main([*arguments, str(base), "-o", str(tmp_path / "out")]) == 3
        said = " ".join(capsys.readouterr().err.split())
        assert "contains a LoRA adapter besides the model" in said
        assert f"--lora {base}" in said
    (tmp_path / "link").symlink_to(base)
    assert main(["merge", str(base), "--lora", str(tmp_path / "link"), "-o", str(tmp_path / "out")]) == 0
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(load_file(tmp_path / "out" / "model.safetensors")[name], before[name])
    runtime = ["--lora-mode", "runtime", "--no-selftest", "--no-references"]
    assert main(["convert", str(base), "--lora", str(base), *runtime, "-o", str(tmp_path / "apart")]) == 0
    (base / "adapter_config.json").unlink()
    assert merged_model(open_checkpoint(base), []).adapters == ()
