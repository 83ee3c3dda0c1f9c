"""The rule table against the collected cases, and against everything that happens to a log on its way to a person."""

import json
import random
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rkruntime import cli, diagnosis
from rkruntime.diagnosis import CONFIDENCES, NONE, UNEXPLAINED, Signature, diagnose

DATA = Path(__file__).parents[1] / "data"


def _cases(name: str) -> list[dict[str, Any]]:
    with (DATA / name).open(encoding="utf-8") as lines:
        return [case for case in map(json.loads, lines) if case["log"]]


CASES = _cases("failures.jsonl")
MORE = _cases("more_failures.jsonl")
EXPLAINED = [case for case in CASES + MORE if diagnose(case["log"]).explained]

HEALTHY = """\
[    9.920161] RKNPU fdab0000.npu: RKNPU: rknpu iommu is enabled, using iommu mode
[    9.924989] RKNPU fdab0000.npu: can't request region for resource [mem 0xfdab0000-0xfdabffff]
[    9.926311] [drm] Initialized rknpu 0.9.8 20240828 for fdab0000.npu on minor 1
[   10.848766] RKNPU fdab0000.npu: failed to find power_model node
[   10.848810] RKNPU fdab0000.npu: RKNPU: failed to initialize power model
[   10.848828] RKNPU fdab0000.npu: RKNPU: failed to get dynamic-coefficient
rkllm init start
I rkllm: rkllm-runtime version: 1.2.3, rknpu driver version: 0.9.8, platform: RK3588
I rkllm: loading rkllm model from ./gemma-2-2b-it.rkllm
I rkllm: rkllm-toolkit version: 1.2.3, max_context_limit: 4096, npu_core_num: 3, target_platform: RK3588
I rkllm: Enabled cpus: [4, 5, 6, 7]
I rkllm: Enabled cpus num: 4
rkllm init success
user: how many days has a year?
robot: A year has 365 days, a leap year 366.
I rkllm: rkllm_run was aborted
--------------------------------------------------------------------------------------
 Model init time (ms)  2117.26
 Stage         Total Time (ms)  Tokens    Time per Token (ms)      Tokens per Second
 Prefill       598.41           14        42.74                    23.40
 Generate      5432.10          52        104.46                   9.57
2025-12-19 23:45:27,704 - rkllama.rkllm - WARNING - Not found expected prompt cache file for fast inference: /x.bin
"""
CONVERTED = """\
INFO: rkllm-toolkit version: 1.2.3
Loading checkpoint shards: 100%|##########| 2/2 [00:03<00:00,  1.21it/s]
UserWarning: pkg_resources is deprecated as an API. Refrain from using this package or pin to Setuptools<81.
Building model: 100%|##########| 290/290 [00:05<00:00, 93.10it/s]
Optimizing model: 100%|##########| 26/26 [02:14<00:00,  5.17s/it]
INFO: Setting token_id of bos to 2
Converting model: 100%|##########| 290/290 [00:00<00:00, 18.36it/s]
INFO: Setting max_context_limit to 4096
[=================================================>] 555/555 (100%)
INFO: Model has been saved to ./gemma-2-2b-it_W8A8_RK3588.rkllm!
"""
NOISE = [
    "usb 2-1: new SuperSpeed Gen 1 USB device number 2 using xhci-hcd",
    "[    4.593408] cfg80211: Loading compiled-in X.509 certificates for regulatory database",
    "systemd[1]: Started Daily apt download activities.",
    '127.0.0.1 - - [11/Aug/2025 23:38:16] "GET / HTTP/1.1" 200 -',
    "total 12",
]

Lines = list[str]


def _prefix(text: str) -> Callable[[Lines], Lines]:
    return lambda lines: [text + line for line in lines]


def _hard(width: int) -> Callable[[Lines], Lines]:
    return lambda lines: [
        line[at : at + width] for line in ["=" * width, *lines] for at in range(0, max(1, len(line)), width)
    ]


def _soft(width: int) -> Callable[[Lines], Lines]:
    def wrap(lines: Lines) -> Lines:
        long = "word " * width
        return [
            part
            for line in [long, *lines]
            for part in textwrap.wrap(line, width, break_long_words=False, break_on_hyphens=False)
        ]

    return wrap


def _noisy(lines: Lines) -> Lines:
    chosen = random.Random(7)
    return [part for line in lines for part in (chosen.choice(NOISE), line, chosen.choice(NOISE))]


WAYS: dict[str, Callable[[Lines], Lines]] = {
    "journal": _prefix("Nov 21 02:24:45 rock-5b python[1082]: "),
    "dmesg": _prefix("[  605.159276] "),
    "dmesg -T": _prefix("[Wed Apr  1 10:09:24 2026] "),
    "Python logging": _prefix("2025-12-19 23:45:27,704 - worker - INFO - "),
    "docker compose": _prefix("rkllm-server-1  | "),
    "kubernetes": _prefix("2026-08-06T10:11:12.123456789Z stderr F "),
    "docker JSON": lambda lines: [json.dumps({"log": line + "\n", "stream": "stderr"}) for line in lines],
    "logcat": _prefix("09-14 08:45:03.277  6912  6912 E RKNN    : "),
    "quoted mail": _prefix("> "),
    "other level": _prefix("W rkllm: "),
    "colours": lambda lines: [f"\x1b[0;1;31m{line.replace(' ', chr(27) + '[0m ')}\x1b[0m" for line in lines],
    "spelled colours": _prefix("^[[31m"),
    "lost escapes": _prefix("[31m"),
    "CRLF": lambda lines: [line + "\r" for line in lines],
    "progress bar": _prefix("  3%|#   | 1/30 [00:01<00:29]\r"),
    "NUL bytes": lambda lines: [f"\0{line}\0" for line in lines],
    "curly quotes": lambda lines: [line.replace("'", "’") for line in lines],
    "80 columns": _hard(80),
    "97 columns": _hard(97),
    "words wrapped at 60": _soft(60),
    "compose in 90 columns": lambda lines: _hard(90)(_prefix("rkllm-server-1  | Nov 21 02:24:45 ")(lines)),
    "unrelated lines": _noisy,
    "upper case": lambda lines: [line.upper() for line in lines],
}


def test_score(capsys: pytest.CaptureFixture[str]) -> None:
    found = [(case, diagnose("\n".join(case["log"]))) for case in CASES]
    right = sum(result.class_ == case["class"] for case, result in found)
    wrong = [(case["id"], case["class"], result) for case, result in found if result.class_ != case["class"]]
    wrong = [(name, label, result) for name, label, result in wrong if result.explained]
    with capsys.disabled():
        print(f"\ndiagnosis: {right} of {len(CASES)} cases ({right / len(CASES):.1%}) get their class")
        for name, label, result in wrong:
            print(f"  {name}: {result.class_} ({result.confidence}) in place of {label}")
    assert right / len(CASES) >= 0.93
    assert not [name for name, _, result in wrong if result.confidence == "high"]
    assert len([name for name, _, result in wrong if result.confidence == "medium"]) <= 1


@pytest.mark.parametrize("case", MORE, ids=lambda case: case["id"])
def test_cases_met_later(case: dict[str, Any]) -> None:
    found = diagnose(case["log"])
    assert found.class_ == case["class"]
    assert found.lines


@pytest.mark.parametrize("way", WAYS)
def test_what_happens_to_a_log_changes_nothing(way: str) -> None:
    for case in EXPLAINED:
        plain, changed = diagnose(case["log"]), diagnose("\n".join(WAYS[way](case["log"])))
        assert (case["id"], changed.class_, changed.confidence) == (case["id"], plain.class_, plain.confidence)


@given(st.sampled_from(EXPLAINED), st.lists(st.sampled_from(NOISE), max_size=30), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_interleaved_lines_change_nothing(case: dict[str, Any], noise: Lines, order: random.Random) -> None:
    lines = list(case["log"])
    for line in noise:
        lines.insert(order.randint(0, len(lines)), line)
    assert diagnose(lines).class_ == diagnose(case["log"]).class_


@pytest.mark.parametrize("log", [HEALTHY, CONVERTED, "", "\n\n", "\0" * 5000, "hello world"])
def test_a_healthy_log_is_unexplained(log: str) -> None:
    found = diagnose(log)
    assert (found.class_, found.confidence, found.others) == (UNEXPLAINED, NONE, ())
    assert found.next_steps


@given(st.text(max_size=3000))
@settings(max_examples=100, deadline=None)
def test_random_text_is_unexplained(text: str) -> None:
    assert not diagnose(text).explained


def test_a_context_speaks_where_the_log_is_silent() -> None:
    log = "E RKNN: [10:00:00.000] failed to malloc npu memory, size: 93241344, flags: 0x2"
    assert diagnose(log, context={"driver": "0.9.2"}).class_ == "npu-memory-old-driver"
    assert diagnose(log, context={"driver": "0.9.8"}).class_ == "npu-address-space-exhausted"
    crash = diagnose("rkllm init success", context={"signal": "SIGSEGV", "stage": "run", "driver": None})
    assert (crash.class_, crash.confidence, crash.lines) == ("api-struct-or-library-mismatch", "low", ())
    assert diagnose("", context={"stage": "load", "signal": "SIGKILL"}).class_ == "host-ram-at-load"
    assert diagnose("", context={"stage": "convert", "signal": "SIGKILL"}).class_ == "convert-out-of-memory"


def test_the_first_fault_is_named_and_the_others_listed() -> None:
    log = [
        "E RKNN: failed to allocate handle, ret: -1, errno: 12, errstr: Cannot allocate memory",
        "E RKNN: failed to convert handle(1020) to fd, ret: -1, errno: 24, errstr: Too many open files",
        "E RKNN: failed to open rknpu module, need to insmod rknpu dirver!",
    ]
    found = diagnose(log)
    assert found.class_ == "fd-limit"
    assert found.others == ("npu-address-space-exhausted", "npu-device-not-reachable")
    assert found.lines == (log[1],)


def test_lines_are_the_logs_own() -> None:
    line = "E RKNN: [09:40:45.140] Failed to Malloc NPU memory, size: 3085697024, flags: 0x2"
    assert diagnose(f"one\n\x1b[31m{line}\x1b[0m\r\ntwo").lines == (line,)


def test_numbers_end_where_they_end() -> None:
    assert not diagnose("errno: 140, errno: 114").explained
    assert not diagnose("skilled workers").explained


def test_a_long_log_is_read_at_both_ends() -> None:
    filler = "a line of a long log that says nothing at all\n" * 60_000
    late = diagnose(filler + "E rkllm: invalid rkllm model!\n")
    early = diagnose("E rkllm: invalid rkllm model!\n" + filler)
    assert late.class_ == early.class_ == "model-file-invalid"


@pytest.mark.parametrize("unit", ["a", " ", "\n", "0x", "[31m", "\x1b[", "\\u001b", "'", "failed to ", "段", "\x1b]0;"])
def test_hostile_text_comes_to_an_end(unit: str) -> None:
    assert not diagnose(unit * (1_200_000 // len(unit))).explained


def test_every_signature_stands_its_own_text_repeated() -> None:
    """Each signature's beginning over and over is what backtracking would be slowest on."""
    starts = {
        signature.plain.partition("*")[0]
        for rule in diagnosis.table().rules
        for group in rule.all
        for signature in group
    }
    diagnose("\n".join((start + " ") * 40 for start in sorted(starts)))
    for start in random.Random(3).sample(sorted(starts), 12):
        diagnose((start + " ") * (400_000 // len(start)))


def test_signatures_are_bounded() -> None:
    for rule in diagnosis.table().rules:
        for signature in (*(item for group in rule.all for item in group), *rule.none):
            assert signature.source.count("*") <= 2, signature.source
            assert "+" not in signature.source.replace("++", ""), f"{signature.source} looks like an expression"


def test_signature_language() -> None:
    log = diagnosis.Log(["Size: 0x1F and `Model-2.rkllm` is Broken", "next killed.", "." * 200], {})
    for source in ("size: {n} and", "'{w}.rkllm' is {whole|broken}", "size*broken", "broken next", "killed$"):
        assert any(Signature(source).matches(log)), source
    for source in ("size: {n}and", "broken$ next", "killed$ more", "size*killed", "ize: {n}"):
        assert not any(Signature(source).matches(log)), source
    with pytest.raises(ValueError, match="no fixed text"):
        Signature("{n} * {w}")


def test_the_table_is_whole() -> None:
    table = diagnosis.table()
    named = {rule.class_ for rule in table.rules}
    assert {case["class"] for case in CASES} <= set(table.classes)
    assert named <= set(table.classes)
    for name, words in table.classes.items():
        assert words.title, name
        assert words.cause.endswith((".", ")")), name
        assert words.next_steps, name
        assert words.evidence or name == UNEXPLAINED, name
    for rule in table.rules:
        assert rule.confidence in CONFIDENCES
        assert all(group for group in rule.all), rule.class_


def test_command_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "board.log"
    log.write_bytes("E rkllm: invalid rkllm model!\r\n".encode("utf-16"))
    assert cli.main(["diagnose", str(log), "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["class"] == "model-file-invalid"
    assert printed["confidence"] == "high"
    assert printed["lines"] == ["E rkllm: invalid rkllm model!"]
    assert printed["cause"]
    assert printed["next_steps"]
    assert any("https://github.com/" in source for source in printed["evidence"])


def test_command_for_a_person(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "board.log"
    log.write_text("E RKNN: failed to allocate handle, ret: -1, errno: 14, errstr: Bad address\n")
    assert cli.main(["diagnose", str(log)]) == 0
    printed = capsys.readouterr().out
    for part in (
        "npu-address-space-exhausted",
        "confidence: high",
        "errno: 14",
        "What to do",
        "1. ",
        "https://github.com",
    ):
        assert part in printed
    assert cli.main(["diagnose", str(tmp_path / "none.log")]) == 3
    assert "cannot be read" in capsys.readouterr().err
