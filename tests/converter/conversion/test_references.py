"""What probes compare a library with, held against transformers with the same settings changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from rkconvert.compat.case import Case
from rkconvert.compat.tried import case_of
from rkconvert.demo import checkpoint
from rkconvert.plan.source import read_source
from rkruntime import cli
from rkruntime.bundle.manifest import open_bundle
from rkruntime.bundle.references import References


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("references") / "bundle"
    assert cli.main(["convert", str(checkpoint()), "-q", "-o", str(path)]) == 0
    return path


@pytest.fixture(scope="module")
def references(bundle: Path) -> References:
    found = open_bundle(bundle).read_references()
    assert found
    return found


def logits(tokens: tuple[int, ...], **settings: Any) -> torch.Tensor:
    """transformers' own, with other settings of config.json."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint(), dtype=torch.float32, attn_implementation="eager")
    for name, value in settings.items():
        setattr(model.config, name, value)
    for layer in model.model.layers:
        layer.self_attn.attn_logit_softcapping = model.config.attn_logit_softcapping
    with torch.no_grad():
        return model(torch.tensor([tokens])).logits[0]


def test_the_window_s_tokens_are_those_of_transformers(references: References) -> None:
    window = references.window
    assert window
    assert window.window == 32
    assert len(window.forks) >= 2
    windowed = logits(window.tokens)
    whole = logits(window.tokens, sliding_window=4096)
    for fork in window.forks:
        assert window.window < fork.length <= len(window.tokens)
        assert int(windowed[fork.length - 1].argmax()) == fork.windowed
        assert int(whole[fork.length - 1].argmax()) == fork.whole
        assert fork.windowed != fork.whole
        for rows in (windowed, whole):
            first, second = rows[fork.length - 1].topk(2).values
            assert float(first - second) >= fork.margin - 1e-3


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("capped", {}),
        ("logits_uncapped", {"final_logit_softcapping": None}),
        ("attention_uncapped", {"attn_logit_softcapping": None}),
    ],
)
def test_the_soft_caps_logits_are_those_of_transformers(
    references: References, name: str, settings: dict[str, Any]
) -> None:
    caps = references.caps
    assert caps
    found = logits(caps.tokens, **settings)
    for row in caps.rows:
        assert getattr(row, name) == pytest.approx(found[row.at, list(row.ids)].tolist(), abs=2e-3)


def test_a_context_that_is_too_short_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["convert", str(checkpoint()), "--max-context", "256", "-o", str(tmp_path / "bundle")]
    assert cli.main(words) == 0
    assert "the window is not probed, which takes a context of 325 tokens" in capsys.readouterr().err
    found = open_bundle(tmp_path / "bundle").read_references()
    assert found
    assert found.window is None
    assert found.caps


def test_none_if_they_are_not_wanted(tmp_path: Path) -> None:
    assert cli.main(["convert", str(checkpoint()), "--no-references", "-q", "-o", str(tmp_path / "bundle")]) == 0
    assert open_bundle(tmp_path / "bundle").read_references() is None


def test_a_bundle_says_which_model_it_is_of(bundle: Path) -> None:
    assert case_of(open_bundle(bundle)).digest == Case.of(read_source(str(checkpoint()))).digest


def test_a_bundle_s_copy_of_the_configuration_has_no_paths(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    for path in checkpoint().iterdir():
        (model / path.name).symlink_to(path)
    config = json.loads((checkpoint() / "config.json").read_text())
    (model / "config.json").unlink()
    private = {"_name_or_path": "/home/ann/secret", "other": ["/home/ann"], "more": {"path": "/home/ann"}}
    (model / "config.json").write_text(json.dumps({**config, **private}))
    assert cli.main(["convert", str(model), "-q", "-o", str(tmp_path / "bundle")]) == 0
    assert "ann" not in (tmp_path / "bundle" / "report" / "config.json").read_text()
    assert case_of(open_bundle(tmp_path / "bundle")).digest == Case.of(read_source(str(model))).digest
