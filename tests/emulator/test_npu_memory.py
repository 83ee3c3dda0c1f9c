"""The NPU's 16 domains of 4 GiB: what fits, what does not, and who shares them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rkconvert.model.shapes import parse_shape
from rkconvert.plan import ModelSource, PlanRequest, plan_for
from rkconvert.plan.domains import place
from rkconvert.rules.quantized_types import Verdict
from rkconvert.rules.type_names import parse_type
from rkruntime.bundle.rkemu import TensorSpec, Writer
from rkruntime.checks.diagnosis import diagnose

GIB = 1 << 30
# hidden, intermediate, layers, heads, kv_heads, head_dim, vocabulary
SHAPES = {
    "qwen3-0.6b": (1024, 3072, 28, 16, 8, 128, 151936),
    "qwen3-1.7b": (2048, 6144, 28, 16, 8, 128, 151936),
    "qwen3-4b": (2560, 9728, 36, 32, 8, 128, 151936),
    "gemma2-2b": (2304, 9216, 26, 8, 4, 256, 256000),
    "gemma2-9b": (3584, 14336, 42, 16, 8, 256, 256000),
    "gemma2-27b": (4608, 36864, 46, 32, 16, 128, 256000),
    "chatglm3-6b": (4096, 13696, 28, 32, 2, 128, 65024),
    "qwen2.5-vl-3b": (2048, 11008, 36, 16, 2, 128, 151936),
    "a 1.4 GB model": (2048, 6144, 22, 16, 8, 128, 151936),
}


@pytest.fixture(scope="module")
def shaped(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A file of sizes only, of a model's shape: `shaped("gemma2-9b", group=0)`."""
    folder = tmp_path_factory.mktemp("shaped")

    def make(name: str, group: int = 0) -> Path:
        path = folder / f"{name}-{group}.rkemu"
        if path.exists():
            return path
        hidden, inner, layers, heads, kv_heads, dim, vocab = SHAPES[name]
        matrices = {
            "attn_q": (heads * dim, hidden), "attn_k": (kv_heads * dim, hidden), "attn_v": (kv_heads * dim, hidden),
            "attn_o": (hidden, heads * dim), "ffn_gate": (inner, hidden), "ffn_up": (inner, hidden),
            "ffn_down": (hidden, inner),
        }  # fmt: skip
        specs = []
        layer_parts = {f"blk.{layer}.{part}": shape for layer in range(layers) for part, shape in matrices.items()}
        for prefix, shape in ({"token_embd": (vocab, hidden)} | layer_parts).items():
            groups = shape[1] // group if group else 1
            specs += [TensorSpec(prefix, "int8", shape), TensorSpec(f"{prefix}.scale", "float32", (shape[0], groups))]
        keys = {
            "vocab_size": vocab, "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
            "num_attention_heads": heads, "num_key_value_heads": kv_heads, "head_dim": dim, "sliding_window": 0,
        }  # fmt: skip
        floats = {
            "rms_norm_eps": 1e-6, "rope_theta": 1e4, "query_pre_attn_scalar": 1.0, "attn_logit_softcapping": 0.0,
            "final_logit_softcapping": 0.0,
        }  # fmt: skip
        metadata = {
            "general.kind": "model", "general.architecture": "gemma", "rkllm.target_platform": "RK3588",
            "rkllm.model_dtype": f"W8A8_G{group}" if group else "W8A8", "rkllm.max_context": 8192,
            "rkllm.npu_core_num": 3, "model.layer_types": [0] * layers,
            **{f"model.{key}": value for key, value in (keys | floats).items()},
        }  # fmt: skip
        with Writer(path, metadata, specs, sizes_only=True):
            pass
        return path

    return make


def test_two_1_7b_models_share_a_domain_and_a_third_does_not(load: Any, shaped: Any, capfd: Any) -> None:
    """As was reported in rknn-llm issue 437."""
    model = shaped("qwen3-1.7b")
    load(model)
    load(model)
    capfd.readouterr()
    load(model, expect=-1)
    log = capfd.readouterr().err
    assert "errno: 14, errstr: Bad address" in log
    assert diagnose(log).class_ == "npu-address-space-exhausted"
    load(model, base_domain_id=1)


def test_six_0_6b_models_share_a_domain_and_a_seventh_does_not(load: Any, shaped: Any) -> None:
    model = shaped("qwen3-0.6b")
    clients = [load(model) for _ in range(6)]
    load(model, expect=-1)
    assert clients[2].destroy() == 0
    load(model)


def refused_size(log: str) -> int:
    return int(log.partition("malloc npu memory, size: ")[2].partition(",")[0])


def held() -> dict[int, int]:
    """Bytes by domain, as the file of the NPU's memory says."""
    rows = [line.split() for line in Path(os.environ["RKEMU_NPU_STATE"]).read_text().splitlines()[1:-1]]
    return {domain: sum(int(row[4]) for row in rows if int(row[3]) == domain) for domain in {int(r[3]) for r in rows}}


@pytest.mark.parametrize("context", [512, 2048, 4096])
def test_two_4b_models_need_two_domains(context: int, load: Any, shaped: Any, capfd: Any) -> None:
    """rknn-llm issue 437; the size of the block is reported to be the same with any context."""
    load(shaped("qwen3-4b"), max_context_len=context)
    capfd.readouterr()
    load(shaped("qwen3-4b"), max_context_len=context, expect=-1)
    assert refused_size(capfd.readouterr().err) == 4022272000
    load(shaped("qwen3-4b"), base_domain_id=2)


def test_a_second_model_of_1_4_gb_needs_another_domain(load: Any, shaped: Any, capfd: Any) -> None:
    """rknn-llm issue 195: the language model has 3.5 GB, and 1.4 GB more do not fit beside it."""
    load(shaped("qwen2.5-vl-3b"), max_context_len=4096)
    capfd.readouterr()
    second = shaped("a 1.4 GB model")
    load(second, expect=-1)
    log = capfd.readouterr().err
    assert "errno: 14, errstr: Bad address" in log
    assert refused_size(log) == 1418461184
    load(second, base_domain_id=1)


@pytest.mark.parametrize(
    ("model", "size"), [("qwen3-4b", 4022272000), ("chatglm3-6b", 4022861824), ("gemma2-9b", 4059037696)]
)
def test_the_first_block_of_weights_has_the_size_that_was_reported(
    model: str, size: int, load: Any, shaped: Any, monkeypatch: Any, capfd: Any
) -> None:
    """Drivers before 0.9.7 refuse it; of the last one the report does not name the model."""
    monkeypatch.setenv("RKEMU_DRIVER", "0.9.6")
    load(shaped(model), "1.1.4", expect=-1)
    log = capfd.readouterr().err
    assert refused_size(log) == size
    assert log.endswith("load model file error!\nrknn_init fail! ret=-1\nE rkllm: rkllm_init failed\n")
    assert diagnose(log).class_ == "npu-memory-old-driver"


def test_a_driver_of_one_domain(load: Any, shaped: Any, monkeypatch: Any, capfd: Any) -> None:
    """rknn-llm issue 62: 0.8.2 cannot make domain 1."""
    monkeypatch.setenv("RKEMU_DRIVER", "0.8.2")
    load(shaped("qwen3-0.6b"), base_domain_id=1, expect=-1)
    log = capfd.readouterr().err
    assert "errno: 12, errstr: Cannot allocate memory\ncan not create weight memory for domain1" in log
    load(shaped("qwen3-0.6b"))


def test_the_kernel_log_tells_too(load: Any, shaped: Any, monkeypatch: Any, capfd: Any, tmp_path: Path) -> None:
    kernel = tmp_path / "kernel.log"
    monkeypatch.setenv("RKEMU_KERNEL_LOG", str(kernel))
    load(shaped("qwen3-4b"))
    load(shaped("qwen3-4b"), expect=-1)
    log = kernel.read_text()
    assert "rknpu_gem_get_pages: dma map 4022272000 fail" in log
    assert diagnose(log).class_ == "npu-address-space-exhausted"
    assert "RKNPU" not in capfd.readouterr().err


@pytest.mark.parametrize("context", [512, 4096, 8192])
@pytest.mark.parametrize("model", ["gemma2-2b", "gemma2-9b", "gemma2-27b"])
def test_it_agrees_with_what_plan_predicts(model: str, context: int, load: Any, shaped: Any) -> None:
    """`rkedge plan` fills domains to the brim, the emulator leaves room in each: at most one domain more."""
    hidden, inner, layers, heads, kv_heads, dim, vocab = SHAPES[model]
    config = {
        "architectures": ["Gemma2ForCausalLM"], "model_type": "gemma2", "hidden_size": hidden, "vocab_size": vocab,
        "intermediate_size": inner, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": kv_heads, "head_dim": dim, "max_position_embeddings": 8192,
    }  # fmt: skip
    planned = place(parse_shape(config), parse_type("w8a8"), context)
    load(shaped(model), max_context_len=context)
    domains = held()
    assert set(domains) == set(range(len(domains)))
    assert len(planned) <= len(domains) <= len(planned) + 1
    total = sum(domain.used for domain in planned)
    assert sum(domains.values()) == pytest.approx(total, rel=0.02)
    assert max(domains.values()) <= 4 * GIB


def test_what_a_handle_held_is_given_back(load: Any, shaped: Any) -> None:
    client = load(shaped("gemma2-9b"))
    assert sum(held().values()) > 9e9
    client.destroy()
    client.handle = None
    assert held() == {}


@pytest.mark.parametrize(("driver", "fits"), [("0.9.2", False), ("0.9.6", False), ("0.9.7", True), ("0.9.8", True)])
def test_old_drivers_refuse_a_large_block(
    driver: str, fits: bool, load: Any, shaped: Any, monkeypatch: Any, capfd: Any
) -> None:
    monkeypatch.setenv("RKEMU_DRIVER", driver)
    load(shaped("qwen3-4b"), expect=0 if fits else -1)
    log = capfd.readouterr().err
    assert fits or diagnose(log).class_ == "npu-memory-old-driver"
    load(shaped("qwen3-1.7b"), base_domain_id=1)


@pytest.mark.parametrize("group", [128, 256, 512])
def test_grouped_9b_does_not_load_and_grouped_2b_does(group: int, load: Any, shaped: Any, capfd: Any) -> None:
    """As was reported with RKLLM 1.1.1; the rule that refuses to convert it quotes the same lines."""
    load(shaped("gemma2-9b", group), "1.1.1", expect=-1)
    log = capfd.readouterr().err
    config = json.loads((Path(__file__).parents[1] / "data" / "gemma_configs.json").read_text())["gemma-2-9b-it"]
    judged = plan_for(ModelSource("9B", config), PlanRequest("9B", dtype=f"w8a8_g{group}", toolkit="1.1.1")).judgement
    if group == 128:
        assert refused_size(log) == 232128512
        assert all(line in log for line in judged.rule.log)
    assert judged.verdict is Verdict.REFUSE
    assert "errno: 14" in log
    assert diagnose(log).class_ == "npu-address-space-exhausted"
    load(shaped("gemma2-2b", group))


def test_plain_9b_goes_over_three_domains(load: Any, shaped: Any) -> None:
    load(shaped("gemma2-9b"))
    for domain in range(2):
        load(shaped("gemma2-2b"), base_domain_id=domain, expect=-1)
    load(shaped("gemma2-2b"), base_domain_id=2)
    load(shaped("gemma2-2b"), base_domain_id=2, expect=-1)


@pytest.mark.parametrize("domain", [-1, 16, 2**31 - 1])
def test_domains_that_do_not_exist(domain: int, load: Any, shaped: Any) -> None:
    load(shaped("qwen3-0.6b"), base_domain_id=domain, expect=-1)
    load(shaped("qwen3-0.6b"), base_domain_id=15)


def test_a_model_of_sizes_only_cannot_run(load: Any, shaped: Any, capfd: Any) -> None:
    client = load(shaped("qwen3-0.6b"))
    assert client.run([1, 2, 3]) == -1
    assert client.states == [3]
    assert "no weights" in capfd.readouterr().err


def test_other_processes_count_until_they_are_gone(library: Any, load: Any, shaped: Any) -> None:
    code = (
        "import sys; from pathlib import Path; from tests.emulator.client import Client\n"
        "client = Client(Path(sys.argv[1]), Path(sys.argv[2]), '1.2.3')\n"
        "print(client.status, flush=True); sys.stdin.read()\n"
    )
    model = shaped("qwen3-4b")
    arguments = [library("1.2.3"), model]
    other = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, arguments)], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, text=True, env=dict(os.environ), cwd=Path(__file__).parents[2],
    )  # fmt: skip
    try:
        assert other.stdout is not None
        assert other.stdout.readline().strip() == "0"
        load(model, expect=-1)
        other.send_signal(signal.SIGKILL)
        other.wait(20)
        load(model)
    finally:
        other.kill()
        other.communicate()


def test_a_ledger_that_is_rubbish_is_no_obstacle(load: Any, small: Any, monkeypatch: Any, tmp_path: Path) -> None:
    ledger = tmp_path / "ledger"
    ledger.write_bytes(os.urandom(100_001))
    monkeypatch.setenv("RKEMU_NPU_STATE", str(ledger))
    load(small.path)
    monkeypatch.setenv("RKEMU_NPU_STATE", str(tmp_path / "no" / "such" / "folder"))
    load(small.path)


def test_a_list_that_was_longer_before_counts_no_line_twice(load: Any, shaped: Any) -> None:
    """What stands behind the end mark is left over from a process that was killed while it wrote."""
    load(shaped("qwen3-1.7b"))
    state = Path(os.environ["RKEMU_NPU_STATE"])
    lines = state.read_text()
    state.write_text(lines + "".join(lines.splitlines(keepends=True)[1:-1]) * 3)
    load(shaped("qwen3-1.7b"))
    load(shaped("qwen3-1.7b"), expect=-1)


def test_a_file_of_someone_elses_kind_is_left_alone(load: Any, small: Any, monkeypatch: Any, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("precious")
    link = tmp_path / "link"
    link.symlink_to(victim)
    monkeypatch.setenv("RKEMU_NPU_STATE", str(link))
    load(small.path)
    assert victim.read_text() == "precious"
