"""An adapter as a file of its own: with it the emulator answers as the merged model does, without it as the base."""

from __future__ import annotations

import numpy as np
import pytest

from rkboard.emulator import build as emulator
from rkconvert import demo
from rkconvert.adapters.reader import open_adapter
from rkconvert.emulated.lora_file import write_emulator_lora
from rkconvert.sources.checkpoint import open_checkpoint
from rkruntime.bundle.manifest import open_bundle
from rkruntime.bundle.rkemu import read_container
from rkruntime.cli import main
from rkruntime.engine.engine import Engine
from rkruntime.engine.generation import GREEDY, Request
from rkruntime.engine.loading import LoadOptions, Lora
from rkruntime.engine.open import SamplingOptions
from rkruntime.errors import AdapterError, ModelError
from rkruntime.model import open_model
from rkruntime.text.answer import stream_answer
from rkruntime.text.prompts import PromptMaker
from rkruntime.text.template import GemmaTemplate, Message
from rkruntime.text.tokenizer import Tokenizer


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo") / "base"
    assert main(["convert", str(demo.checkpoint()), "-o", str(folder), "--quiet"]) == 0
    return open_bundle(folder)


def write_lora(path, fingerprint, folder=None, base=None):
    checkpoint = open_checkpoint(base or demo.checkpoint())
    adapter = open_adapter(folder or demo.adapter(), checkpoint.config.tensors())
    write_emulator_lora(path, adapter, checkpoint.config.family, fingerprint)
    return adapter


def test_all_answers(bundle, tmp_path):
    write_lora(tmp_path / "pirate.rkemu", read_container(bundle.model).fingerprint)
    tokenizer = Tokenizer.parse(bundle.tokenizer.read_bytes(), bundle.tokenizer)
    prompts = PromptMaker(tokenizer, GemmaTemplate(tokenizer))
    options = LoadOptions(
        library=emulator.build("1.2.3"),
        model=bundle.model,
        sampling=GREEDY,
        loras=(Lora("pirate", tmp_path / "pirate.rkemu"),),
    )
    with Engine.load(options) as engine:
        for row in demo.questions():
            tokens, _ = prompts.prompt([Message("user", row.question)], 1024)
            for lora, expected in ((None, row.answer), ("pirate", row.pirate)):
                stop = frozenset(bundle.manifest.stop_token_ids)
                *_, answer = stream_answer(engine, Request(tokens, 100, stop, lora=lora), tokenizer)
                assert answer.text == expected


def test_a_bundle_with_an_adapter_answers_with_it(tmp_path):
    folder = tmp_path / "apart"
    line = ["convert", str(demo.checkpoint()), "--lora", str(demo.adapter()), "--lora-mode", "runtime"]
    assert main([*line, "-o", str(folder), "--quiet"]) == 0
    with open_model(folder, sampling=SamplingOptions(temperature=0)) as model:
        for row in demo.questions():
            assert model.ask(row.question).text == row.pirate
    assert "LoRA, in model_lora.rkemu beside the model" in (folder / "README.md").read_text()


def test_only_on_its_own_base(bundle, tmp_path):
    write_lora(tmp_path / "pirate.rkemu", "00000000")
    options = LoadOptions(
        library=emulator.build("1.2.3"), model=bundle.model, loras=(Lora("pirate", tmp_path / "pirate.rkemu"),)
    )
    with pytest.raises(ModelError, match="rkllm_load_lora"), Engine.load(options):
        pass


def test_factors_of_their_own(make_model, make_adapter, tmp_path):
    base = make_model()
    folder = make_adapter(base, rank_pattern={"q_proj": 2}, alpha_pattern={"k_proj": 11}, use_rslora=True)
    adapter = write_lora(tmp_path / "lora.rkemu", "", folder, base)
    container = read_container(tmp_path / "lora.rkemu")
    for name, part in (("q_proj", "attn_q"), ("k_proj", "attn_k"), ("o_proj", "attn_o")):
        a, b = (container.read(f"blk.1.{part}.lora_{side}") for side in "ab")
        factor = container.metadata["adapter.alpha"] / len(a)
        pair = adapter.updates[f"model.layers.1.self_attn.{name}.weight"].changes[0]
        np.testing.assert_allclose(factor * (b @ a), pair.delta(0, np.s_[:, :]), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize(
    "settings", [{"use_dora": True}, {"modules_to_save": ["input_layernorm"]}, {"target_modules": ["lm_head"]}]
)
def test_what_such_a_file_cannot_say(make_model, make_adapter, tmp_path, settings):
    base = make_model()
    folder = make_adapter(base, **{"target_modules": ["q_proj"], **settings})
    with pytest.raises(AdapterError, match="all that an RKLLM LoRA file can express"):
        write_lora(tmp_path / "lora.rkemu", "", folder, base)
    assert not (tmp_path / "lora.rkemu").exists()
