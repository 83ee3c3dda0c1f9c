"""rkedge plan: domains, boards, verdicts, what it prints, and what it refuses."""

from __future__ import annotations

import html
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from click.testing import CliRunner
from huggingface_hub import errors
from hypothesis import given, settings
from hypothesis import strategies as st

from rkconvert.commands.plan import run
from rkconvert.conversion.convert import Options, convert
from rkconvert.demo import checkpoint
from rkconvert.model.shapes import parse_shape
from rkconvert.model.sizes import cache_bytes_per_token, npu_bytes
from rkconvert.output.host_memory import HostMemory, read_memory
from rkconvert.plan import ModelSource, PlanRequest, make_plan, plan_for, require
from rkconvert.plan.boards import GIB, board_names, find_board, usable_bytes
from rkconvert.plan.domains import place
from rkconvert.plan.page import render
from rkconvert.plan.source import read_source
from rkconvert.rules import quantized_types as dtypes
from rkconvert.rules.context import choose_context
from rkconvert.rules.type_names import parse_type
from rkconvert.sources.checkpoint import open_checkpoint
from rkruntime import cli
from rkruntime.errors import CheckpointError, HostError, InputError, OutputError, RefusedError, UsageError

# The releases that `rkedge emulator` can stand for: those marked so in rkruntime.abi.
EMULATED = ("1.1.0", "1.1.1", "1.1.2", "1.1.3", "1.1.4", "1.2.0", "1.2.1b1", "1.2.1", "1.2.2", "1.2.3", "1.3.0")

CONFIGS = json.loads((Path(__file__).parents[2] / "data" / "gemma_configs.json").read_text())


def config_of(name: str) -> dict[str, Any]:
    return dict(CONFIGS[name])


@pytest.fixture
def model(tmp_path: Path) -> Any:
    def make(name: str = "gemma-2-2b-it", **changes: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config_of(name) | changes))
        return folder

    return make


def plan_of(name: str, **request: Any) -> Any:
    return plan_for(ModelSource(name, config_of(name)), PlanRequest(name, **request))


def as_json(*arguments: object) -> dict[str, Any]:
    result = CliRunner().invoke(run, [*map(str, arguments), "--json"], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_json_has_what_programs_ask_for(model):
    plan = as_json(model())
    assert plan["model"]["parameters"] == 2_614_341_888
    assert sum(plan["model"]["parts"].values()) == 2_614_341_888
    assert plan["fits"] is True
    for key in ("decode_tokens_per_s", "ttft_ms", "memory_mb"):
        vendor = plan["prediction"]["vendor"][key]
        assert plan[key] == pytest.approx(vendor, rel=0.001)
    assert plan["prediction"]["release"] == plan["prediction"]["vendor"]["release"] == plan["toolkit"]
    assert plan["prediction"]["evidence"] == "vendor figure"
    assert plan["verdict"] in plan["verdicts"]
    by_type = {verdict["type"]: verdict for verdict in plan["verdicts"]}
    assert set(by_type) == set(dtypes.known_types())
    assert by_type["w8a8"]["status"] == "ok"
    assert by_type["w4a16"]["status"] == "impossible"
    assert all(verdict["reason"] and verdict["evidence"] for verdict in by_type.values())


@pytest.mark.parametrize(("name", "domains", "fits"), [("gemma-2-2b-it", 1, 4), ("gemma-2-9b-it", 3, 16)])
def test_known_sizes(name, domains, fits):
    plan = plan_of(name)
    assert len(plan.domains) == domains
    assert next(choice.gib for choice in plan.ram if choice.fits) == fits


def test_27b_fits_the_largest_boards_only():
    assert len(plan_of("gemma-2-27b-it").domains) == 7
    assert not plan_of("gemma-2-27b-it", board="orange-pi-5-max").fits
    with pytest.raises(RefusedError, match=r"needs .* GB of memory with a context of 4096"):
        require(plan_of("gemma-2-27b-it", ram_gib=16.0))
    require(plan_of("gemma-2-27b-it", ram_gib=16.0), force=True)


@settings(max_examples=40)
@given(
    name=st.sampled_from(list(CONFIGS)),
    dtype=st.sampled_from(["w8a8", "w8a8_g128", "fp16", "w4a16"]),
    context=st.integers(1, 512).map(lambda n: 32 * n),
)
def test_domains_hold_everything_and_none_is_too_full(name, dtype, context):
    shape, kind = parse_shape(config_of(name)), parse_type(dtype)
    domains = place(shape, kind, context)
    assert all(domain.used <= dtypes.DOMAIN_BYTES for domain in domains)
    whole = npu_bytes(shape, kind) + context * cache_bytes_per_token(shape)
    assert sum(domain.used for domain in domains) == pytest.approx(whole)
    assert len(domains) >= whole / dtypes.DOMAIN_BYTES


@settings(max_examples=40)
@given(name=st.sampled_from(list(CONFIGS)), ram=st.floats(3, 40), embedding=st.sampled_from(["flash", "ram"]))
def test_the_largest_context_fits_and_the_next_does_not(name, ram, embedding):
    plan = plan_of(name, ram_gib=ram, embedding=embedding)
    largest = plan.ram[0].largest_context
    if largest:
        assert plan_of(name, ram_gib=ram, embedding=embedding, context=largest).fits
    if largest + 32 <= plan.most_context:
        assert not plan_of(name, ram_gib=ram, embedding=embedding, context=largest + 32).fits


def test_the_embedding_in_ram_counts():
    flash, ram = (plan_of("gemma-2-2b-it", embedding=where) for where in ("flash", "ram"))
    assert ram.memory_bytes - flash.memory_bytes == pytest.approx(256000 * 2304 * 4)


def test_a_type_that_cannot_be_made_is_refused_as_convert_refuses_it():
    with pytest.raises(RefusedError, match="supports a 4-bit type"):
        plan_of("gemma-2-2b-it", dtype="w4a16")
    assert plan_of("gemma-2-2b-it", dtype="w4a16", board="rk3576").fits


def test_toolkit_and_model_limit_the_context():
    assert plan_of("gemma-2-2b-it").context == 4096
    assert plan_of("gemma-2-2b-it", context=8192).context == 8192
    for request in ({"context": 8224}, {"context": 100}, {"context": 8192, "toolkit": "1.1.4"}):
        with pytest.raises(UsageError):
            plan_of("gemma-2-2b-it", **request)


def test_the_demo_checkpoint_needs_next_to_nothing():
    plan = make_plan(PlanRequest(str(checkpoint())))
    assert plan.fits
    assert plan.context == 4096
    shards = sum(path.stat().st_size for path in checkpoint().glob("*.safetensors"))
    assert plan.source.stored_bytes == pytest.approx(shards, rel=0.01)


@pytest.mark.parametrize("name", board_names())
def test_board_profiles(name):
    board = find_board(name)
    assert board.soc in dtypes.PLATFORMS
    assert board.ram_gib == tuple(sorted(board.ram_gib))
    for key in ("ram_gib", "memory", "memory_mhz"):
        if getattr(board, key) is not None:
            assert key in board.sources or board.unknown, f"{key} has no source"


def test_memory_left_for_a_program():
    assert 3 * GIB < usable_bytes(4) < 4 * GIB
    assert usable_bytes(16) > 4 * usable_bytes(4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: X\nsoc: rk3588\nram_gib: [8]\nnpu: 3\n", "unknown key npu"),
        ("name: X\nsoc: rk3588\n", "ram_gib is missing"),
        ("name: X\nsoc: rk3588\nram_gib: [eight]\n", "ram_gib"),
        ("name: X\nsoc: rk3588\nram_gib: []\n", "ram_gib must list"),
        ("- a\n", "must be a mapping, not list"),
        ("a: [", "is not YAML"),
        ("!!python/object/apply:os.system ['true']", "is not YAML"),
    ],
)
def test_a_bad_profile_is_refused(tmp_path, text, message):
    (tmp_path / "board.yaml").write_text(text)
    with pytest.raises(InputError, match=re.escape(message)):
        find_board(str(tmp_path / "board.yaml"))


def test_the_nearest_board_is_named():
    with pytest.raises(UsageError) as error:
        find_board("orangepi-5-plus")
    assert "orange-pi-5-plus" in error.value.hint


def test_a_board_nobody_has_figures_for(tmp_path):
    (tmp_path / "board.yaml").write_text("name: X\nsoc: rk3566\nram_gib: [8]\n")
    with pytest.raises(UsageError, match="rk3566"):
        plan_of("gemma-2-2b-it", board=str(tmp_path / "board.yaml"))


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        ('{"model_type": "gpt2"}', CheckpointError),
        ("[]", CheckpointError),
        ("{", CheckpointError),
        ("version https://git-lfs.github.com/spec/v1\n", CheckpointError),
        ('{"architectures": ["Gemma2ForCausalLM"], "hidden_size": -1}', CheckpointError),
        ('{"architectures": [{}], "model_type": "gemma2"}', CheckpointError),
    ],
)
def test_a_bad_config_is_refused(tmp_path, content, kind):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(kind):
        make_plan(PlanRequest(str(tmp_path)))


def test_a_model_that_is_not_there(tmp_path):
    with pytest.raises(CheckpointError, match="no folder or file"):
        make_plan(PlanRequest(str(tmp_path / "nothing" / "here")))
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match=r"has no config\.json"):
        make_plan(PlanRequest(str(tmp_path / "empty")))


@pytest.fixture
def hub(monkeypatch) -> Any:
    """`hub(answer)`: what fetching a file answers, a path or an error; nothing is cached."""
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *_, **__: None)

    def answers(answer: Callable[[str], Path] | type[Exception]) -> None:
        def fetch(_: str, name: str, **__: object) -> str:
            if isinstance(answer, type):
                raise answer.__new__(answer, "no")  # their own constructors want a whole HTTP response
            return str(answer(name))

        monkeypatch.setattr(huggingface_hub, "hf_hub_download", fetch)

    return answers


def test_a_model_on_the_hub(hub, tmp_path, model):
    (tmp_path / "model.safetensors.index.json").write_text('{"metadata": {"total_size": 5228717568}}')
    (model() / "config.json").rename(tmp_path / "config.json")
    hub(lambda name: tmp_path / name)
    plan = make_plan(PlanRequest("google/gemma-2-2b-it"))
    assert (plan.source.name, plan.source.stored_bytes) == ("gemma-2-2b-it", 5228717568)


@pytest.mark.parametrize(
    ("failure", "kind", "hint"),
    [
        (errors.GatedRepoError, CheckpointError, "accept"),
        (errors.RepositoryNotFoundError, CheckpointError, "spelling"),
        (errors.RevisionNotFoundError, CheckpointError, "spelling"),
        (errors.EntryNotFoundError, CheckpointError, "config.json"),
        (errors.LocalEntryNotFoundError, HostError, "network"),
        (errors.HfHubHTTPError, HostError, "network"),
        (ConnectionError, HostError, "network"),
    ],
)
def test_what_the_hub_refuses(hub, failure, kind, hint):
    hub(failure)
    with pytest.raises(kind) as error:
        make_plan(PlanRequest("google/gemma-2-2b-it"))
    assert hint in error.value.hint


def test_a_quantized_checkpoint_is_noted(model):
    plan = as_json(model(quantization_config={"quant_method": "bitsandbytes"}))
    assert any("already quantized (bitsandbytes)" in note for note in plan["notes"])


def test_a_checkpoint_that_convert_refuses_is_said(model):
    plan = as_json(model(quantization_config={"quant_method": "gptq"}))
    assert any("`rkedge convert` refuses it" in note for note in plan["notes"])


REFUSED_BY_CONVERT = {
    "files for other releases": {"configuration_files": ["config.4.0.0.json"]},
    "weights of another name": {"transformers_weights": "other.safetensors"},
    "no caps": {"attn_logit_softcapping": 0},
    "no window": {"sliding_window": 0},
    "biases": {"attention_bias": True},
    "another model_type": {"model_type": "gemma"},
    "sizes of a part": {"text_config": {"model_type": "llama", "hidden_size": 64}, "hidden_size": 0},
    "other rotary embeddings": {"rope_scaling": {"rope_type": "yarn"}},
    "no end": {"eos_token_id": []},
}


@pytest.mark.parametrize("case", REFUSED_BY_CONVERT)
def test_what_convert_refuses_is_not_planned(tmp_path, case):
    folder = tmp_path / "model"
    shutil.copytree(checkpoint(), folder)
    open_checkpoint(folder)
    make_plan(PlanRequest(str(folder)))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | REFUSED_BY_CONVERT[case]))
    with pytest.raises(CheckpointError) as by_convert:
        open_checkpoint(folder)
    with pytest.raises(CheckpointError) as by_plan:
        make_plan(PlanRequest(str(folder)))
    assert (by_plan.value.message, by_plan.value.hint) == (by_convert.value.message, by_convert.value.hint)


@pytest.mark.parametrize("size", ["1e999", "1e300", "NaN", "-5", "true", '"5"', "0", "1" + "0" * 400, "[5]"])
def test_a_size_that_no_model_has_is_not_taken(hub, model, size):
    folder = model()
    index = folder / "model.safetensors.index.json"
    index.write_text(f'{{"metadata": {{"total_size": {size}}}, "weight_map": {{}}}}')
    hub(lambda name: folder / name)
    for name in (str(folder), "google/gemma-2-2b-it"):
        assert read_source(name).stored_bytes is None


@pytest.mark.parametrize("where", ["file", "hub"])
def test_files_for_other_releases_wherever_the_config_is(hub, model, where):
    config = model(configuration_files=["config.4.0.0.json"]) / "config.json"
    hub(lambda name: config)
    with pytest.raises(CheckpointError, match="configuration_files"):
        make_plan(PlanRequest(str(config) if where == "file" else "google/gemma-2-2b-it"))


@pytest.mark.parametrize("settings", [{"load_in_4bit": True}, {"quant_method": "bitsandbytes"}])
def test_what_bitsandbytes_made_is_not_said_to_be_refused(model, settings):
    (note,) = [note for note in as_json(model(quantization_config=settings))["notes"] if "already quantized" in note]
    assert "refuses" not in note


@pytest.mark.parametrize("ram", [float("nan"), float("inf"), 0.5, 1e300])
def test_memory_that_no_board_has(model, ram):
    with pytest.raises(UsageError, match="1 to 1024 GiB"):
        make_plan(PlanRequest(str(model()), ram_gib=ram))


def test_the_picture(model, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    result = CliRunner().invoke(run, [str(model("gemma-2-9b-it"))], catch_exceptions=False)
    bars = [line for line in result.output.splitlines() if line.startswith("domain ")]
    assert len(bars) == 3
    assert all(len(re.findall("[█▓▒░]", line)) == 64 for line in bars)
    assert bars[2].count("░") > bars[0].count("░")
    assert "16 GiB     yes" in result.output
    assert "predicted" in result.output


@pytest.mark.parametrize(("columns", "encoding"), [("40", "utf-8"), ("80", "ascii"), ("400", "latin-1")])
def test_the_picture_without_colour(model, columns, encoding):
    """Each part is told from the others by its mark, and no line breaks."""
    environment = os.environ | {"COLUMNS": columns, "PYTHONIOENCODING": encoding, "NO_COLOR": "1"}
    command = [sys.executable, "-m", "rkruntime.cli", "plan", str(model("gemma-2-2b-it"))]
    found = subprocess.run(command, env=environment, capture_output=True, check=True).stdout.decode(encoding)
    (bar,) = (line for line in found.splitlines() if line.startswith("domain "))
    marks = "█▓▒░" if encoding == "utf-8" else "#=+."
    assert all(mark in bar for mark in marks)
    assert len(re.findall(f"[{re.escape(marks)}]", bar)) == min(64, int(columns) - 16)
    assert len(bar) <= int(columns)


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        # 9.80 tokens/s at https://github.com/airockchip/rknn-llm/blob/release-v1.2.3/benchmark.md
        ("gemma-2-2b-it", [], "Yes, from 4 GiB of board memory on: about 9.8 tokens/s (the vendor's figure"),
        ("gemma-2-2b-it", ["--ram", "8"], "Yes, with 8 GiB of board memory: "),
        ("gemma-2-9b-it", [], "Probably, from 16 GiB of board memory on: "),
        ("gemma-2-9b-it", ["--ram", "8"], "No: it needs "),
        ("gemma-2-2b-it", ["--dtype", "fp16"], "No: unquantized weights"),
    ],
)
def test_the_answer_comes_first(model, monkeypatch, tmp_path, name, options, said):
    monkeypatch.setenv("COLUMNS", "400")
    page = tmp_path / "plan.html"
    result = CliRunner().invoke(run, [str(model(name)), *options, "--html", str(page)], catch_exceptions=False)
    assert result.output.startswith(said)
    assert (result.exit_code == 4) == said.startswith("No")
    answer = html.unescape(page.read_text())
    assert result.output.splitlines()[0] in answer


def test_reasons_are_asked_for(model, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    path = str(model("gemma-2-2b-it"))
    short, long = (CliRunner().invoke(run, [path, *more]).output for more in ([], ["--why"]))
    assert "--why shows the reasons." in short
    assert "the NPU reads a scale" not in short
    assert "the NPU reads a scale" in " ".join(long.split())


class Tags(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.addresses += [value or "" for key, value in attrs if key in ("src", "href", "xlink:href")]


def test_the_page_stands_alone_and_escapes_names(tmp_path):
    name = "<script>alert(1)</script>"
    plan = plan_for(ModelSource(name, config_of("gemma-2-9b-it")), PlanRequest(name))
    tags = Tags()
    page = render(plan)
    tags.feed(page)
    assert "script" not in tags.seen
    assert tags.addresses == []
    assert "@import" not in page
    assert tags.seen.count("svg") == 3 + 2  # a bar for each domain, two plots
    assert tags.seen.count("polyline") == 2


def test_the_page_is_written_whole_or_not_at_all(tmp_path, model):
    folder = model()
    CliRunner().invoke(run, [str(folder), "--html", str(tmp_path / "plan.html")], catch_exceptions=False)
    assert (tmp_path / "plan.html").read_text().rstrip().endswith("</html>")
    with pytest.raises((OutputError, HostError)):
        CliRunner().invoke(run, [str(folder), "--html", str(tmp_path / "no" / "plan.html")], catch_exceptions=False)


def test_convert_plans_first_and_leaves_the_plan_in_the_bundle(tmp_path):
    convert(Options(checkpoint(), tmp_path / "bundle"))
    plan = json.loads((tmp_path / "bundle" / "report" / "plan.json").read_text())
    assert plan["fits"]
    assert "host" not in plan


@pytest.mark.parametrize(
    "release",
    ["1.3.1", "1.2.9", "1.3.9", "9.0.0", "1.2", "1", "abc", "../x", "v1.2.3", "1.2.3 ", "1.02.3", "1.2.3b1", "1.0.1"],
)
@pytest.mark.parametrize("dtype", ["w8a8", "fp32"])
def test_a_release_that_nothing_runs_is_refused_before_work(tmp_path, release, dtype):
    with pytest.raises(UsageError, match="The emulator has no release") as error:
        convert(Options("nowhere", tmp_path / "other", release=release, dtype=dtype))
    assert error.value.hint == f"Use one of {', '.join(EMULATED)}."
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("dtype", ["w8a8", "fp32", "w4a16"])
def test_the_emulator_is_an_rk3588(tmp_path, dtype):
    with pytest.raises(UsageError, match="would not load a model for rk3576"):
        convert(Options("nowhere", tmp_path / "other", platform="rk3576", dtype=dtype))
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("trained", [1, 16, 31])
def test_a_model_for_shorter_texts_than_any_context_is_refused(trained, model, tmp_path):
    with pytest.raises(CheckpointError, match=f"trained for {trained} token"):
        make_plan(PlanRequest(str(model(max_position_embeddings=trained))))
    with pytest.raises(CheckpointError, match=f"trained for {trained} token"):
        choose_context(None, trained)
    assert choose_context(None, 32) == 32


@pytest.mark.parametrize(
    ("limits", "ram", "swap"),
    [
        ({}, 16, 8),
        ({"memory.max": 4 * GIB, "memory.current": 0}, 4, 8),
        ({"memory.max": 4 * GIB, "memory.current": 0, "memory.swap.max": GIB}, 4, 1),
        ({"memory.max": "max", "memory.current": 0, "memory.swap.max": "max"}, 16, 8),
        ({"memory.swap.max": 0}, 16, 0),
    ],
)
def test_plan_and_convert_count_this_machine_alike(tmp_path, monkeypatch, limits, ram, swap):
    """RAM and swap, each at most what the container may have."""
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc" / "meminfo").write_text(
        f"MemTotal: {16 << 20} kB\nMemAvailable: {12 << 20} kB\nSwapTotal: {8 << 20} kB\n"
    )
    (tmp_path / "sys" / "fs" / "cgroup").mkdir(parents=True)
    for name, value in limits.items():
        (tmp_path / "sys" / "fs" / "cgroup" / name).write_text(f"{value}\n")
    here = read_memory(tmp_path)
    assert (here.ram, here.swap) == (ram * GIB, swap * GIB)
    monkeypatch.setattr("rkconvert.plan.planner.read_memory", lambda: read_memory(tmp_path))
    host = plan_of("gemma-2-9b-it").host
    # 9.24 billion weights in float32, and the file.
    assert host.ram_bytes == pytest.approx(4 * 9_241_705_984 + 11.1e9, rel=0.01)
    assert host.missing_bytes == pytest.approx(max(0, host.ram_bytes - (ram + swap) * GIB))


@pytest.mark.parametrize(("toolkit", "loads_half"), [("1.1.4", False), ("1.2.3", True), ("1.3.0", False)])
def test_loading_in_16_bits_is_offered_where_the_release_does_it(model, capsys, monkeypatch, toolkit, loads_half):
    little = HostMemory(8 * GIB, 0, 8 * GIB)
    monkeypatch.setattr("rkconvert.plan.planner.read_memory", lambda: little)
    folder = model()
    host = as_json(folder, "--release", toolkit)["host"]
    assert (host["ram_16_bit_bytes"] is not None) is loads_half
    if loads_half:
        assert host["ram_bytes"] - host["ram_16_bit_bytes"] == 2 * 2_614_341_888  # Google's own number of weights
    assert cli.main(["plan", str(folder), "--release", toolkit]) == 0
    assert ("--toolkit-load-dtype bfloat16" in " ".join(capsys.readouterr().out.split())) is loads_half


def test_a_machine_that_does_not_say_its_memory_can_still_plan(monkeypatch):
    def unknown():
        raise HostError("no /proc")

    monkeypatch.setattr("rkconvert.plan.planner.read_memory", unknown)
    assert plan_of("gemma-2-2b-it").host.missing_bytes == 0


@pytest.mark.parametrize(
    ("line", "status", "code"),
    [([], "ok", 0), (["--dtype", "w8a8_g256"], "warn", 0), (["--dtype", "w8a8_g128"], "refuse", 4),
     (["--ram", "2"], "refuse", 4)],
)  # fmt: skip
def test_the_exit_status_is_that_of_the_verdict(model, capsys, line, status, code):
    line = ["plan", str(model()), *line]
    assert cli.main([*line, "--json"]) == code
    said = capsys.readouterr()
    assert (said.err, json.loads(said.out)["verdict"]["status"]) == ("", status)
    assert cli.main(line) == code
    said = capsys.readouterr()
    assert said.err == ""
    assert "board memory" in said.out


@pytest.mark.parametrize("ram", ["nan", "inf", "0", "-1", "1e300"])
def test_a_memory_that_no_board_has(model, ram):
    assert cli.main(["plan", str(model()), f"--ram={ram}"]) == 2


@pytest.mark.parametrize("command", ["plan", "convert", "merge"])
def test_a_revision_of_what_is_no_hub_model(model, tmp_path, capsys, command):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    more = ["--lora", "x", "-o", str(tmp_path / "out")] if command == "merge" else []
    folder = model()
    for source in (folder, folder / "config.json", tmp_path / "model.gguf"):
        assert cli.main([command, str(source), "--revision", "main", *more]) == 3
        assert "not have a revision main" in capsys.readouterr().err
