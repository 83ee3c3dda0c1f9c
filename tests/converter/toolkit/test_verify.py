"""`rkedge convert --target toolkit --verify`: the stand-in's logits come from transformers, or are spoiled."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from rkconvert import demo
from rkconvert.adapters.merged_model import AdapterSource
from rkconvert.conversion.convert import Options, convert
from rkconvert.progress import Reporter
from rkconvert.toolkit import session, target
from rkruntime.bundle.manifest import Bundle
from rkruntime.errors import UsageError

Make = Callable[..., Path]
Fail = Callable[[str], None]


@pytest.fixture
def base(make_model: Make) -> Path:
    """A model wide enough for the toolkit, with a head of its own."""
    return make_model(head_dim=64, query_pre_attn_scalar=64, tie_word_embeddings=False)


@pytest.fixture
def verified(base: Path, tmp_path: Path, environments: Callable[[str], Path]) -> Callable[..., tuple[Bundle, Any]]:
    """Convert, and return the bundle and the toolkit's report: `verified("1.3.0", field=value)`."""

    def make(version: str = "1.2.3", **fields: Any) -> tuple[Bundle, Any]:
        asked = {"checkpoint": str(base), "output": tmp_path / "bundle", "target": "toolkit", "force_dtype": True}
        bundle = convert(Options(**{**asked, "toolkit_python": environments(version), "verify": True, **fields}))
        bundle.verify(trust_stamps=False)
        return bundle, json.loads((bundle.path / "report" / "toolkit.json").read_text())

    return make


def test_the_self_test_needs_no_toolkit(verified: Callable[..., tuple[Bundle, Any]], base: Path) -> None:
    """Its answers are the float model's, whatever the toolkit makes of it."""
    bundle, _ = verified(verify=False)
    found = bundle.read_selftest()
    assert found is not None
    for prompt in found.prompts:
        count, likeliest = top_of(base, prompt.question)
        assert (count, likeliest) == (len(prompt.tokens), list(prompt.answer[0].ids))
    assert found.rounding > 0


def top_of(folder: Path, text: str) -> tuple[int, list[int]]:
    """Length of a question in the chat template, and the likeliest five ids after it, by transformers."""
    ids = AutoTokenizer.from_pretrained(folder).apply_chat_template(
        [{"role": "user", "content": text}], add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.inference_mode():
        return ids.shape[1], model(input_ids=ids).logits[0, -1].topk(5).indices.tolist()


@pytest.mark.usefixtures("oracle")
@pytest.mark.parametrize("version", ["1.1.4", "1.2.0", "1.2.3", "1.3.0"])
def test_a_model_that_the_toolkit_has_understood(
    verified: Callable[..., tuple[Bundle, Any]], base: Path, version: str
) -> None:
    bundle, report = verified(version)
    found = report["verify"]
    assert (found["problem"], found["model"], len(found["prompts"])) == ("", "base", 3)
    for prompt in found["prompts"]:
        assert prompt["kl"] < 1e-6
        assert prompt["agreement"] == 1
        assert prompt["found"] == prompt["expected"]
    first = found["prompts"][0]
    assert (first["tokens"], first["expected"]) == top_of(base, "What is the capital of France?")
    assert not any("logits" in note for note in bundle.manifest.notes)
    assert sorted(report["seconds"]) == ["build", "export", "import", "load", "verify"]


@pytest.mark.usefixtures("oracle")
@pytest.mark.parametrize("fault", ["logits:head", "logits:doubled"])
def test_what_is_another_model_or_prompt_shows(
    verified: Callable[..., tuple[Bundle, Any]], base: Path, fail: Fail, fault: str
) -> None:
    fail(fault)
    # Only a trained model cares much about what is further back.
    bundle, report = verified(checkpoint=str(demo.checkpoint() if fault == "logits:doubled" else base))
    assert max(prompt["kl"] for prompt in report["verify"]["prompts"]) > 0.01
    assert any("are not those of this model" in text for text in report["doubts"])
    assert any("are not those of this model" in note for note in bundle.manifest.notes)


@pytest.mark.usefixtures("oracle")
@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("none", "returned None"), ("raise", "RuntimeError"), ("exit", "exit(3)"), ("segfault", "signal 11"),
        ("killed", "was killed"), ("hang", "did not end within 2 s"), ("rows", "the shape"), ("flat", "the shape"),
        ("narrow", "bytes instead of"), ("nan", "NaN"), ("infinite", "NaN or infinite"),
    ],
)  # fmt: skip
def test_nothing_to_compare_is_no_failure(
    verified: Callable[..., tuple[Bundle, Any]], fail: Fail, fault: str, words: str
) -> None:  # fmt: skip
    fail(f"logits:{fault}")
    _, report = verified(toolkit_patience=2.0)
    assert words in report["verify"]["problem"]
    assert report["verify"]["prompts"] == []
    assert report["file"]["size"] > 0


@pytest.mark.usefixtures("oracle")
def test_a_float_model_that_cannot_be_computed_is_no_failure(
    verified: Callable[..., tuple[Bundle, Any]], make_model: Make
) -> None:
    folder = make_model("odd", shard_size="1GB", head_dim=64, query_pre_attn_scalar=64)
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.gate_proj.weight"][:] = 3e38
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    problem = verified(checkpoint=str(folder))[1]["verify"]["problem"]
    assert "not finite" in problem or "NaN" in problem


@pytest.mark.usefixtures("oracle")
def test_a_padded_vocabulary(verified: Callable[..., tuple[Bundle, Any]], fail: Fail) -> None:
    fail("logits:padded")
    assert all(prompt["kl"] < 1e-6 for prompt in verified()[1]["verify"]["prompts"])


@pytest.mark.usefixtures("oracle")
@pytest.mark.parametrize(("fault", "model"), [("", "base"), ("logits:adapter", "adapter")])
def test_with_an_adapter_of_its_own_either_model_is_right(
    verified: Callable[..., tuple[Bundle, Any]], base: Path, make_adapter: Make, fail: Fail, fault: str, model: str
) -> None:
    fail(fault)
    found = verified(loras=(AdapterSource(str(make_adapter(base))),), lora_mode="runtime")[1]["verify"]
    assert found["model"] == model
    assert all(prompt["kl"] < 1e-6 for prompt in found["prompts"])


@pytest.mark.usefixtures("oracle")
def test_ctrl_c_while_the_toolkit_computes_logits_keeps_its_file(
    verified: Callable[..., tuple[Bundle, Any]], fail: Fail, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail("logits:hang")
    listen = session.WorkerRun._watch

    def stop(run: session.WorkerRun, *given: Any) -> None:
        listen(run, *given)
        if run.stage == session.VERIFY:
            raise KeyboardInterrupt

    monkeypatch.setattr(session.WorkerRun, "_watch", stop)
    _, report = verified()
    assert "it was stopped" in report["verify"]["problem"]
    assert report["file"]["size"] > 0


@pytest.mark.usefixtures("oracle")
def test_the_prompts_are_those_of_the_calibration_data(
    verified: Callable[..., tuple[Bundle, Any]], base: Path, tmp_path: Path
) -> None:
    texts = ["a", "b c d e f", "many " * 150, "x"]
    rows = [
        {"input": f"<bos><start_of_turn>user\n{text}<end_of_turn>\n<start_of_turn>model\n", "target": "a"}
        for text in texts
    ]
    (tmp_path / "data.json").write_text(json.dumps(rows))
    found = verified(calibration=tmp_path / "data.json")[1]["verify"]
    # The long one costs time and says no more.
    expected = [top_of(base, text) for text in (texts[0], texts[1], texts[3])]
    assert [(prompt["tokens"], prompt["expected"]) for prompt in found["prompts"]] == expected


@pytest.mark.usefixtures("oracle")
def test_a_comparison_that_is_stopped_costs_nothing_but_itself(
    verified: Callable[..., tuple[Bundle, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(target, "verify", interrupt)
        verified()
    monkeypatch.setattr(target, "run_toolkit", None)
    assert verified()[1]["verify"] is None


def test_without_it_nothing_is_asked(verified: Callable[..., tuple[Bundle, Any]], fail: Fail) -> None:
    fail("logits:segfault")
    report = verified(verify=False)[1]
    assert report["verify"] is None
    assert "verify" not in report["seconds"]


@pytest.mark.usefixtures("oracle")
def test_a_person_reads_it(
    base: Path, tmp_path: Path, environments: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    convert(
        Options(
            checkpoint=str(base), output=tmp_path / "b", target="toolkit", force_dtype=True, verify=True,
            toolkit_python=environments("1.2.3"),
        ),
        Reporter(),
    )  # fmt: skip
    text = capsys.readouterr().err
    assert text.count("100% of 16 likeliest tokens agree, KL") == 3
    assert "computing its own logits" in text


def test_only_the_toolkit_verifies(base: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--verify: only the vendor's toolkit"):
        convert(Options(checkpoint=str(base), output=tmp_path / "b", verify=True))
