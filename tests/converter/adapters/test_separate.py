"""An adapter as a file of its own, against peft's forward pass with the adapter as it was trained."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rkconvert.adapters.reader import open_adapter
from rkconvert.adapters.separate import SeparateLora, separate_lora
from rkconvert.sources.checkpoint import open_checkpoint
from rkconvert.toolkit.staging import stage_adapter
from rkruntime.errors import AdapterError

MakeFolder = Callable[..., Path]
# What the LoRA settings of peft had from the beginning; each release fails at keys that it does not know.
OLD_KEYS = {
    *("peft_type", "task_type", "base_model_name_or_path", "inference_mode", "r", "lora_alpha", "lora_dropout"),
    *("bias", "fan_in_fan_out", "target_modules", "modules_to_save", "init_lora_weights"),
}


def separate(base: Path, adapter: Path) -> SeparateLora:
    return separate_lora(open_adapter(adapter, open_checkpoint(base).config.tensors()))


def logits(base: Path, adapter: Path | None) -> torch.Tensor:
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    if adapter:
        model = PeftModel.from_pretrained(model, adapter)
    with torch.inference_mode():
        found: torch.Tensor = model.eval()(torch.arange(3, 40)[None]).logits
    return found


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 2, "down_proj": 7}, "alpha_pattern": {"k_proj": 11.5}, "lora_alpha": 5},
        {"target_modules": ["q_proj"], "layers_to_transform": [1]},
        {"target_modules": r".*\.(q|v)_proj", "lora_dropout": 0.3},
        {"exclude_modules": ["q_proj"]},
        {"lora_alpha": 0.01},
    ],
    ids=lambda settings: "-".join(settings) or "plain",
)
def test_what_is_staged_computes_the_same(
    make_model: MakeFolder, make_adapter: MakeFolder, tmp_path: Path, settings: dict[str, Any]
) -> None:
    base = make_model(dtype=torch.float32)
    adapter = make_adapter(base, **settings)
    staged = tmp_path / "staged"
    stage_adapter(separate(base, adapter), staged)
    expected = logits(base, adapter)
    torch.testing.assert_close(logits(base, staged), expected, atol=2e-6, rtol=1e-5)
    assert settings.get("lora_alpha") == 0.01 or not torch.allclose(logits(base, None), expected, atol=1e-3)
    written = json.loads((staged / "adapter_config.json").read_text())
    assert set(written) <= OLD_KEYS
    weights = load_file(staged / "adapter_model.safetensors")
    assert {tensor.shape[1] for name, tensor in weights.items() if "lora_B" in name} == {written["r"]}
    assert isinstance(written["lora_alpha"], int)


def test_an_ordinary_adapter_keeps_its_numbers(
    make_model: MakeFolder, make_adapter: MakeFolder, tmp_path: Path
) -> None:
    base = make_model()
    adapter = make_adapter(base, r=8, lora_alpha=20)
    stage_adapter(separate(base, adapter), tmp_path / "staged")
    given, written = (load_file(path / "adapter_model.safetensors") for path in (adapter, tmp_path / "staged"))
    assert given.keys() == written.keys()
    assert all(torch.equal(given[name], written[name]) for name in given)
    settings = json.loads((tmp_path / "staged" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (8, 20)


def test_nothing_of_a_stranger_s_files_goes_along(
    make_model: MakeFolder, make_adapter: MakeFolder, tmp_path: Path, edit_json: Callable[..., None]
) -> None:
    base = make_model()
    adapter = make_adapter(base)
    rogue = {"auto_mapping": {"base_model_class": "Rogue", "parent_library": "rogue"}, "revision": "rogue"}
    edit_json(adapter / "adapter_config.json", base_model_name_or_path="/rogue", eva_config={"rho": 2.0}, **rogue)
    data = (adapter / "adapter_model.safetensors").read_bytes()
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size]) | {"__metadata__": {"format": "pt", "note": "rogue"}}
    text = json.dumps(header).encode()
    (adapter / "adapter_model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data[8 + size :])
    stage_adapter(separate(base, adapter), tmp_path / "staged")
    assert not any(b"rogue" in path.read_bytes().lower() for path in (tmp_path / "staged").iterdir())


def test_ranks_too_far_apart(monkeypatch: pytest.MonkeyPatch, make_model: MakeFolder, make_adapter: MakeFolder) -> None:
    base = make_model()
    adapter = make_adapter(base, r=1, rank_pattern={"layers.0.self_attn.k_proj": 32})
    assert separate(base, adapter).rank == 32  # nothing to worry about
    monkeypatch.setattr("rkconvert.adapters.separate._SMALL", 0)
    with pytest.raises(AdapterError, match="ranks go from 1 to 32"):
        separate(base, adapter)


def test_factors_that_lead_to_infinity(make_model: MakeFolder, make_adapter: MakeFolder) -> None:
    def huge(model: Any) -> None:
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.data.fill_(3e38)

    base = make_model()
    adapter = make_adapter(base, r=2, lora_alpha=2, alpha_pattern={"k_proj": 1e6})
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter, is_trainable=True)
    huge(model)
    model.save_pretrained(adapter)
    with pytest.raises(AdapterError, match="infinite when they are scaled"):
        separate(base, adapter)
