"""What is said of each type: against facts that are restated here with their sources, and properties of all cells.

None of the expectations is read from the tables under test.
"""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest

from rkconvert.plan import ModelSource, Plan, PlanRequest, make_plan, plan_for, require
from rkconvert.plan.planner import TypeVerdict
from rkconvert.rules import quantized_types as dtypes
from rkconvert.rules import releases
from rkruntime import cli, resources
from rkruntime.errors import RefusedError, UsageError

CONFIGS: dict[str, Any] = json.loads((Path(__file__).parents[2] / "data" / "gemma_configs.json").read_text())
EVIDENCE = {"measured on a board", "vendor figure", "vendor tool", "reported", "emulated", "predicted"}
# Every release of https://github.com/airockchip/rknn-llm/tags that has a runtime for files of 1.1 and later, and 1.3.1.
RELEASES = (
    "1.1.0",
    "1.1.1",
    "1.1.2",
    "1.1.3",
    "1.1.4",
    "1.2.0",
    "1.2.1b1",
    "1.2.1",
    "1.2.2",
    "1.2.3",
    "1.3.0",
    "1.3.1",
)
# Manuals 1.1.4 p.15, 1.2.0 p.16, CN 1.3.0 p.16 (build), the same in all of them; fp16 is do_quantization=False.
TAKEN = {
    "rk3588": {"w8a8", "w8a8_g128", "w8a8_g256", "w8a8_g512", "fp16"},
    "rk3576": {"w4a16", "w4a16_g32", "w4a16_g64", "w4a16_g128", "w8a8", "fp16"},
}
ALL_TYPES = TAKEN["rk3588"] | TAKEN["rk3576"] | {"w4a8_g32"}
# What the vendor publishes of Gemma2 2B: README.md @ 1.1.1 ("with version 1.1.0", memory in GiB), benchmark.md @ 1.2.1
# to 1.3.0 (MiB) of https://github.com/airockchip/rknn-llm. No other Gemma 1 or 2 is in them.
GEMMA2_2B = {
    ("rk3588", "w8a8", "1.1.0"): (9.67, 4.84 * 1024),
    ("rk3588", "w8a8_g128", "1.1.0"): (5.49, 5.14 * 1024),
    ("rk3588", "w8a8", "1.2.1"): (9.65, 2764.42),
    ("rk3588", "w8a8", "1.2.2"): (9.80, 2765.30),
    ("rk3588", "w8a8", "1.2.3"): (9.80, 2765.30),
    ("rk3588", "w8a8", "1.3.0"): (10.37, 2779.22),
    ("rk3576", "w4a16", "1.1.0"): (8.00, 3.63 * 1024),
    ("rk3576", "w4a16_g128", "1.1.0"): (7.40, 3.63 * 1024),
    ("rk3576", "w8a8", "1.2.1"): (4.92, 2770.05),
    ("rk3576", "w4a16", "1.2.3"): (8.45, 1529.03),
    ("rk3576", "w4a16", "1.3.0"): (9.14, 1542.14),
    ("rk3576", "w4a16_g128", "1.3.0"): (8.27, 1629.59),
    ("rk3576", "w8a8", "1.3.0"): (5.24, 2784.78),
}
PUBLISHED = {(soc, dtype) for soc, dtype, _ in GEMMA2_2B}


def plan_of(name: str, soc: str = "rk3588", dtype: str = "w8a8", release: str = "1.2.3", **request: Any) -> Plan:
    return plan_for(
        ModelSource(name, CONFIGS[name]), PlanRequest(name, board=soc, dtype=dtype, toolkit=release, **request)
    )


def verdict(name: str, soc: str, dtype: str, release: str, **request: Any) -> TypeVerdict:
    plan = plan_of(name, soc, release=release, **request)
    return next(item for item in plan.verdicts if item.type == dtype)


@pytest.fixture(scope="module")
def every() -> list[tuple[str, str, str, Plan, TypeVerdict]]:
    """Every model, SoC, release and type, on the boards that there are; and on a small and a huge one."""
    boards = [(release, None) for release in RELEASES] + list(product(("1.1.1", "1.3.0"), (2.0, 64.0)))
    plans = [
        (name, soc, release, plan_of(name, soc, release=release, ram_gib=ram))
        for name, soc, (release, ram) in product(CONFIGS, TAKEN, boards)
    ]
    return [(*rest, plan, item) for *rest, plan in plans for item in plan.verdicts]


@pytest.mark.parametrize(("case", "figures"), GEMMA2_2B.items())
def test_a_plan_has_the_vendors_figures_of_its_release(
    case: tuple[str, str, str], figures: tuple[float, float]
) -> None:
    soc, dtype, release = case
    plan = plan_of("gemma-2-2b-it", soc, dtype, release)
    assert plan.vendor is not None
    assert plan.prediction is not None
    assert (plan.vendor.release, plan.costs.release, plan.evidence) == (release, release, "vendor figure")
    assert plan.vendor.decode_tokens_per_s == figures[0]
    assert plan.prediction.decode_tokens_per_s == pytest.approx(figures[0], rel=0.02)
    assert plan.vendor.memory_mb == pytest.approx(figures[1], abs=0.01)
    # The vendor's run of 1.1.0 had 128 tokens more in the cache.
    assert plan.prediction.memory_mb == pytest.approx(figures[1], rel=0.01)


@pytest.mark.parametrize(
    ("release", "of"), [("1.1.4", "1.1.0"), ("1.2.0", "1.1.0"), ("1.2.1b1", "1.1.0"), ("1.3.1", "1.3.0")]
)
def test_a_release_without_figures_says_whose_they_are(release: str, of: str) -> None:
    plan = plan_of("gemma-2-2b-it", release=release)
    assert (plan.evidence, plan.costs.release) == ("predicted", of)
    assert any(f"no figures for release {release}" in note and of in note for note in plan.notes)
    assert f"release {of}; it has none for {release}" in plan.verdict.reason


@pytest.mark.parametrize("release", RELEASES)
def test_the_embedding_table_is_in_ram_where_the_release_cannot_leave_it_in_the_file(release: str) -> None:
    """embed_flash: EN 1.2.0 p.31. Without it Gemma2 2B takes 4.84 GiB, which no board of 4 GiB has."""
    flash = release >= "1.2.0"
    plan = plan_of("gemma-2-2b-it", release=release, ram_gib=4.0)
    assert plan.embedding == ("flash" if flash else "ram")
    assert plan.fits == flash
    if not flash:
        assert plan.memory_bytes > 4.84 * 2**30
        with pytest.raises(UsageError, match=r"embed_flash was added in 1\.2\.0"):
            plan_of("gemma-2-2b-it", release=release, embedding="flash")


# model, SoC, type, release, status, evidence, words that must be there, words that must not.
SAID = [
    ("gemma-2-2b-it", "rk3588", "w8a8", "1.1.0", "ok", "vendor figure", ["9.67", "4,956 MiB", "1.1.0"], []),
    ("gemma-2-2b-it", "rk3588", "w8a8", "1.3.0", "ok", "vendor figure", ["10.37", "2,779 MiB"], ["9.67"]),
    (
        "gemma-2-2b-it",
        "rk3588",
        "w8a8_g128",
        "1.1.0",
        "refuse",
        "vendor figure",
        ["57 %", "5.49", "9.67"],
        ["none for"],
    ),
    ("gemma-2-2b-it", "rk3588", "w8a8_g128", "1.3.0", "refuse", "vendor figure", ["5.49", "none for 1.3.0"], []),
    # README.md @ 1.1.1: 20.08 of 24.21, 6.13 of 7.44, 12.66 of 15.66, 3.05 of 3.79 tokens/s with w8a8_g512.
    ("gemma-2-9b-it", "rk3588", "w8a8_g512", "1.2.3", "refuse", "reported", ["one report"], []),
    # 2304 inputs are 4.5 groups of 512, and 2304 outputs too (manual 1.1.4 p.15).
    ("gemma-2-2b-it", "rk3588", "w8a8_g512", "1.2.3", "refuse", "vendor tool", ["multiples of 512", "2304"], []),
    ("gemma-1.1-2b-it", "rk3588", "w8a8_g512", "1.2.3", "warn", "predicted", ["80 to 83 %"], []),
    ("gemma-2-2b-it", "rk3588", "w8a8_g256", "1.2.3", "warn", "predicted", ["none for w8a8_g256"], []),
    # Gemma 1 2B is in no table of the vendor's.
    ("gemma-1.1-2b-it", "rk3588", "w8a8", "1.2.3", "ok", "predicted", ["no figures for this model"], ["Gemma 2"]),
    ("gemma-1.1-2b-it", "rk3576", "w4a16", "1.3.0", "ok", "predicted", ["no figures for this model"], ["Gemma 2"]),
    # One report, of RKLLM 1.1.1; nobody has said why.
    (
        "gemma-2-9b-it",
        "rk3588",
        "w8a8_g128",
        "1.1.1",
        "refuse",
        "reported",
        ["one report", "inferred"],
        ["cannot place"],
    ),
    (
        "gemma-2-9b-it",
        "rk3588",
        "w8a8_g512",
        "1.3.0",
        "refuse",
        "reported",
        ["1.1.1", "Nothing is known about it with 1.3.0"],
        [],
    ),
    (
        "gemma-1.1-7b-it",
        "rk3588",
        "w8a8_g128",
        "1.1.1",
        "refuse",
        "predicted",
        ["nobody", "One report", "inferred"],
        [],
    ),
    (
        "gemma-2-9b-it",
        "rk3588",
        "w8a8",
        "1.2.3",
        "warn",
        "predicted",
        ["Llama3 8B", "3.79", "3 NPU memory domains"],
        [],
    ),
    (
        "gemma-2-27b-it",
        "rk3588",
        "fp16",
        "1.3.0",
        "refuse",
        "predicted",
        ["fits no rk3588 board", "GB"],
        ["half the speed"],
    ),
    ("gemma-2-27b-it", "rk3588", "w8a8_g128", "1.3.0", "refuse", "predicted", ["fits no rk3588 board"], []),
    ("gemma-2-27b-it", "rk3576", "w8a8", "1.3.0", "refuse", "predicted", ["fits no rk3576 board"], []),
    ("gemma-2-27b-it", "rk3588", "w8a8", "1.3.0", "warn", "predicted", ["no report of a model of this size"], []),
    (
        "gemma-2-2b-it",
        "rk3588",
        "w4a16",
        "1.3.0",
        "impossible",
        "vendor tool",
        ["not support quantized_dtype: w4a16!"],
        [],
    ),
    ("gemma-2-2b-it", "rk3588", "w4a8_g32", "1.1.0", "impossible", "vendor tool", ["up to 1.3.0"], ["any release."]),
    ("gemma-2-2b-it", "rk3576", "w8a8_g128", "1.2.3", "impossible", "vendor tool", ["w4a16_g128"], []),
]


@pytest.mark.parametrize(("name", "soc", "dtype", "release", "status", "evidence", "words", "not_words"), SAID)
def test_what_is_said(
    name: str, soc: str, dtype: str, release: str, status: str, evidence: str, words: list[str], not_words: list[str]
) -> None:
    said = verdict(name, soc, dtype, release)
    assert (said.status, said.evidence) == (status, evidence)
    assert [word for word in words if word not in said.reason] == []
    assert [word for word in not_words if word in said.reason] == []


def test_every_type_is_there_and_impossible_is_what_no_toolkit_takes(every: Any) -> None:
    for _, soc, _, plan, said in every:
        assert {item.type for item in plan.verdicts} == ALL_TYPES
        assert (said.status == "impossible") == (said.type not in TAKEN[soc])
        unmade = said.status == "impossible" or "multiples of" in said.reason
        assert (said.file_bytes is None) == unmade


def test_no_verdict_without_evidence_and_an_address(every: Any) -> None:
    for _, _, _, _, said in every:
        assert said.evidence in EVIDENCE
        assert "https://" in said.source or "not published" in said.source or said.source.startswith("sizes of")
        assert "{" not in said.reason
        assert 40 < len(said.reason) < 600
        assert not said.reason.endswith((".", " "))


def test_a_vendors_figure_is_of_this_very_model(every: Any) -> None:
    for name, soc, release, plan, said in every:
        if said.evidence == "vendor figure":
            assert name == "gemma-2-2b-it"
            assert (soc, said.type) in PUBLISHED
        if plan.evidence == "vendor figure":
            assert name == "gemma-2-2b-it"
            assert release in {"1.1.0", "1.2.1", "1.2.2", "1.2.3", "1.3.0"}


def test_what_does_not_load_has_no_speed_and_is_not_ok(every: Any) -> None:
    for _, _, _, plan, said in every:
        if not plan.fits:
            assert plan.prediction is None
            assert plan.verdict.status == "refuse"
        if said.status == "refuse" and ("needs" in said.reason or "failed while it loaded" in said.reason):
            assert said.decode_tokens_per_s is None
        if said.status in ("ok", "warn"):
            assert said.decode_tokens_per_s is not None
            assert said.memory_bytes is not None
            assert said.memory_bytes < plan.ram[-1].usable_bytes


@pytest.mark.parametrize("release", ["1.1.0", "1.2.3", "1.3.0"])
@pytest.mark.parametrize("name", CONFIGS)
def test_more_memory_never_fits_less(name: str, release: str) -> None:
    """Statuses get no worse, what fits still fits, the largest context does not shrink."""
    rank = {"impossible": 0, "refuse": 1, "warn": 2, "ok": 3}
    before: list[int] = []
    context, fitted = 0, False
    for gib in (1.0, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 128):
        plan = plan_of(name, release=release, ram_gib=gib)
        now = [rank[item.status] for item in plan.verdicts]
        assert all(after >= first for first, after in zip(before, now, strict=False))
        assert plan.ram[0].largest_context >= context
        assert plan.fits >= fitted
        before, context, fitted = now, plan.ram[0].largest_context, plan.fits
    assert fitted


def test_every_rule_is_reached_by_some_model() -> None:
    """Llama3 8B with w8a8_g512 is the vendor's own (README.md @ 1.1.1), so it is neither refused nor predicted."""
    shape = {
        "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "max_position_embeddings": 8192,
    }  # fmt: skip
    plan = plan_for(ModelSource("llama", shape), PlanRequest("llama", dtype="w8a8_g512", toolkit="1.1.0"))
    assert (plan.verdict.status, plan.verdict.evidence) == ("warn", "vendor figure")
    assert "80 %" in plan.verdict.reason
    assert "3.05 tokens/s" in plan.verdict.reason
    reached = {plan.judgement.rule.reason}
    for name, soc, dtype in product(CONFIGS, TAKEN, ALL_TYPES):
        if dtype in TAKEN[soc]:
            reached.add(plan_of(name, soc, dtype).judgement.rule.reason)
    small = CONFIGS["gemma-2-2b-it"] | {"num_hidden_layers": 1, "hidden_size": 256}
    plans = (plan_for(ModelSource("small", small), PlanRequest("small", board=soc)) for soc in TAKEN)
    reached |= {plan.judgement.rule.reason for plan in plans}
    assert [rule.reason for rule in dtypes.rules() if rule.reason not in reached] == []


@pytest.mark.parametrize(("soc", "dtype"), [("rk3588", "w4a16"), ("rk3588", "w4a8_g32"), ("rk3576", "w8a8_g128")])
def test_an_impossible_type_is_the_same_error_in_text_and_json(
    soc: str, dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIGS["gemma-2-2b-it"]))
    line = ["plan", str(tmp_path), "--board", soc, "--dtype", dtype]
    assert cli.main(line) == RefusedError.exit_code
    plain = capsys.readouterr()
    assert cli.main([*line, "--json"]) == RefusedError.exit_code
    as_json = capsys.readouterr()
    assert plain.out == ""
    assert json.loads(as_json.out)["error"] == "RefusedError"
    assert plain.err == as_json.err


@pytest.mark.parametrize(
    "release",
    [
        "1.4.0",
        "1.3.9",
        "2.0.0",
        "1.0.1",
        "1.0.2b",
        "1.2",
        "abc",
        "../x",
        "v1.2.3",
        "1.2.3 ",
        "1.02.3",
        "1.2.3b1",
        "",
        "١.2.3",
    ],
)
@pytest.mark.parametrize("dtype", sorted(ALL_TYPES))
def test_nothing_is_said_of_a_release_that_is_not_known(release: str, dtype: str) -> None:
    with pytest.raises(UsageError, match="RKLLM has no release") as caught:
        make_plan(PlanRequest("nowhere", dtype=dtype, toolkit=release))
    assert all(known in caught.value.hint for known in RELEASES)


@pytest.mark.parametrize(("name", "dtype"), [("gemma-2-2b-it", "w8a8_g128"), ("gemma-2-9b-it", "w8a8_g512")])
def test_force_opens_what_is_refused(name: str, dtype: str) -> None:
    plan = plan_of(name, dtype=dtype)
    require(plan, force=True)
    with pytest.raises(RefusedError) as caught:
        require(plan)
    assert plan.verdict.reason in caught.value.message
    assert "--force-dtype" in caught.value.hint
    assert caught.value.details["verdict"] == "refuse"


def test_what_fits_no_board_is_not_offered_to_be_forced() -> None:
    with pytest.raises(RefusedError, match="fits no rk3588 board") as caught:
        require(plan_of("gemma-2-27b-it", dtype="fp16"))
    assert "--force-dtype" not in caught.value.hint


@pytest.mark.parametrize("soc", ["rk3562", "rv1126b", "RK3588", ""])
def test_other_socs_are_refused_by_name(soc: str) -> None:
    with pytest.raises(UsageError, match=f"does not support '{soc}'") as caught:
        dtypes.accepted(soc, "1.3.0")
    assert caught.value.hint == "It supports rk3588, rk3576."


@pytest.mark.parametrize("platform", ["rk3588", "rk3576"])
@pytest.mark.parametrize("layers", [1, 2, 4, 8, 16, 26, 40])
@pytest.mark.parametrize("width", [64, 256, 1024, 2304])
def test_others_of_its_size_have_its_size(platform: str, layers: int, width: int) -> None:
    """The vendor's models have 0.43 (MiniCPM4 0.5B) to 8 billion weights (benchmark.md @ 1.3.0, README.md @ 1.1.1)."""
    sizes = {"num_hidden_layers": layers, "hidden_size": width, "intermediate_size": 4 * width}
    config = CONFIGS["gemma-2-2b-it"] | sizes
    plan = plan_for(ModelSource("x", config), PlanRequest(model="x", board=platform))
    for verdict in plan.verdicts:
        if "of its size" in verdict.reason:
            assert 0.4e9 < plan.shape.parameters < 9e9
        if "this small" in verdict.reason:
            assert plan.shape.parameters < 0.434e9


def test_sources_of_releases_are_addresses_or_say_that_there_is_none() -> None:
    """The manual of 1.1.4 came with a commit after that tag (git ls-tree -r release-v1.1.4 has the one of 1.1.0)."""
    rows = [source for row in releases.table()["generations"] for source in row["sources"].values()]
    for source in [*rows, *(row["source"] for row in resources.table("types"))]:
        found = releases.addresses(source)
        assert (
            "https://github.com/" in found or found.startswith("no ") or "no address" in found or "packages @" in found
        )
        assert "blob/release-v1.1.4/doc" not in found
    assert releases.addresses("EN 1.2.0 p.16-17") == (
        "https://github.com/airockchip/rknn-llm/blob/release-v1.2.0/doc/Rockchip_RKLLM_SDK_EN_1.2.0.pdf (p.16-17)"
    )
    assert "/blob/29a9fb97d14c773b6efa07415dce6ec91c7d8461/doc/" in releases.addresses("EN 1.1.4 p.15")
