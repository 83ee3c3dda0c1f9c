"""The rule table against the collected cases, and against everything that happens to a log on its way to a person."""

import errno
import json
import os
import random
import re
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from tests import diagnosis_corpus as corpus
from tests.bench import diagnosis as bench
from tests.diagnosis_corpus import Case

from rkruntime import cli, resources
from rkruntime.checks import failures
from rkruntime.checks.diagnosis import FOREIGN, NONE, UNEXPLAINED, diagnose
from rkruntime.checks.failures import CONFIDENCES
from rkruntime.checks.signatures import Log, Signature

CASES = corpus.cases("failures")
MORE = corpus.cases("more_failures")
UNSEEN = corpus.cases("unseen_failures")
FRESH = corpus.cases("fresh_failures")
LATER = corpus.cases("later_failures")
RECENT = corpus.cases("recent_failures")
EXPLAINED = [case for case in CASES + MORE if diagnose(case.log).explained]
VARIATIONS = yaml.safe_load((corpus.DATA / "log_variations.yaml").read_text("utf-8"))

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

Lines = Sequence[str]


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


NAMING = ("docker compose", "logcat", "other level", "compose in 90 columns")
BROKEN = ("80 columns", "97 columns", "words wrapped at 60", "compose in 90 columns")


def test_joined_lines_do_not_make_a_fault_of_two() -> None:
    found = diagnose(
        "I rkllm: loading rkllm model from /srv/models/gemma-2-2b-it-rk3588-w8a8-1.2.3/a/rather/long/path/model.rkllm\n"
        "robot:I rkllm: prompt cache saved to /srv/models/gemma-2-2b-it/another/long/path/prompt_cache.bin\n"
        "'utf-8' codec can't decode byte 0xc3 in position 0: unexpected end of data\n"
    )
    assert (found.class_, found.confidence) == ("utf8-split", "medium")


def test_score() -> None:
    """docs/diagnose.md states what `make bench` prints; these are floors."""
    known = bench.score(corpus.known())
    assert known.told_right / known.told >= 0.97, known
    assert known.wrong_sure <= 1, known
    for later in (bench.score(UNSEEN), bench.score(FRESH), bench.score(LATER), bench.score(RECENT)):
        assert later.told_right / later.told >= 0.93, later
        assert later.wrong_sure == 0, later


def test_cross_validation() -> None:
    """With a case's repository hidden, what other repositories and the messages of programs say must do."""
    for cases in (corpus.known(), corpus.everything()):
        total = bench.total(bench.cross_validation(cases).values())
        assert total.told_right / total.told >= 0.9, total
        assert total.wrong_sure / total.cases <= 0.03, total


@pytest.mark.parametrize("case", MORE, ids=lambda case: case.id)
def test_cases_met_later(case: Case) -> None:
    found = diagnose(case.log)
    assert found.class_ == case.class_
    assert found.lines


@pytest.mark.parametrize("row", corpus.other_logs(), ids=lambda row: row["id"])
def test_logs_without_a_known_failure_are_not_explained_with_confidence(row: dict[str, Any]) -> None:
    found = diagnose(row["log"])
    if row["kind"] == "healthy":
        assert (found.class_, found.others) == (UNEXPLAINED, ())
    else:
        assert not found.explained or found.confidence == "low"


@pytest.mark.parametrize(("class_", "log"), VARIATIONS, ids=[f"{row[0]}-{row[1][-1][:40]}" for row in VARIATIONS])
def test_other_wordings(class_: str, log: Lines) -> None:
    assert diagnose(log).class_ == class_


@pytest.mark.parametrize(("class_", "log"), VARIATIONS, ids=[f"{row[0]}-{row[1][-1][:40]}" for row in VARIATIONS])
def test_a_cut_line_is_never_another_fault_for_sure(class_: str, log: Lines) -> None:
    """A log that was cut anywhere in its lines still means the same, something unsure, or nothing."""
    text = "\n".join(log)
    chosen = random.Random(5)
    for at in chosen.sample(range(1, len(text)), min(12, len(text) - 1)):
        for part in (text[:at], text[at:]):
            found = diagnose(part)
            assert found.class_ in (class_, *_SIBLINGS.get(class_, ())) or found.confidence in ("low", NONE), part


# A part of some texts is the whole text of a class that stands for the same trouble.
_SIBLINGS = {
    "npu-driver-mainline": ("npu-device-not-reachable", "npu-job-timeout"),
    "npu-memory-old-driver": ("npu-address-space-exhausted",),
    "driver-too-old-run": ("npu-job-timeout",),
    "convert-architecture-unsupported": ("convert-checkpoint-unusable",),
    "convert-checkpoint-unusable": ("convert-architecture-unsupported",),
    "npu-domain-state-broken": ("npu-no-iommu",),
    "convert-out-of-memory": ("host-ram-at-load",),
    "host-ram-at-load": ("convert-out-of-memory",),
    "model-file-invalid": ("library-missing",),
}


def test_every_message_has_its_class_or_a_reason() -> None:
    """The inventory of what drivers, runtime, examples, servers and libraries can print."""
    without = []
    for message in corpus.messages():
        found = diagnose(message.line)
        assert message.class_ in (None, *failures.table().classes), message
        assert bool(message.class_) != bool(message.why), message
        right = found.class_ == message.class_ if message.class_ else found.confidence not in ("high", "medium")
        if not right:
            without.append(f"{message.source}: {message.text!r}: {found.class_} instead of {message.class_}")
    assert not without, "\n".join(without)


@pytest.mark.parametrize("way", WAYS)
def test_what_happens_to_a_log_changes_nothing(way: str) -> None:
    for case in EXPLAINED:
        # A line that says whose log it is; else a prefix with a program's name, or more lines, would say it.
        log = ["(RKNN)", *case.log]
        plain, changed = diagnose(log), diagnose("\n".join(WAYS[way](log)))
        assert (case.id, changed.class_) == (case.id, plain.class_)
        # A text is less sure where its line had to be put together, and surer where each line names RKLLM.
        ranks = [[*CONFIDENCES, NONE].index(found.confidence) for found in (plain, changed)]
        assert ranks[0] == ranks[1] or (way in NAMING if ranks[1] < ranks[0] else way in BROKEN), case.id


@given(st.sampled_from(EXPLAINED), st.lists(st.sampled_from(NOISE), max_size=30), st.randoms(use_true_random=False))
@settings(max_examples=60)
def test_interleaved_lines_change_nothing(case: Case, noise: Lines, order: random.Random) -> None:
    lines = ["(RKNN)", *case.log]
    for line in noise:
        lines.insert(order.randint(0, len(lines)), line)
    assert diagnose(lines).class_ == diagnose(["(RKNN)", *case.log]).class_


FOREIGN_LOGS = [row["log"] for row in corpus.other_logs() if row["kind"] == "foreign"]
# Numbers that say which fault it is: of errors, results and versions.
_MEANING = re.compile(r"(?:errno:? |error |ret[ =:]+|code |signal |v|version:? )-?\d[\d.]*|\d+\.\d[\d.]*")


def _other_numbers(text: str, order: random.Random) -> str:
    """The text with other times, sizes, addresses and counts, each as long as it was."""
    kept = [match.span() for match in _MEANING.finditer(text)]

    def changed(match: re.Match[str]) -> str:
        if any(start < match.end() and match.start() < end for start, end in kept):
            return match[0]
        return "".join(order.choice("123456789") for _ in match[0])

    return re.sub(r"\d{2,}", changed, text)


@given(
    st.sampled_from(CASES + MORE + UNSEEN + FRESH),
    st.sampled_from(["head", "tail", "both", "foreign", "numbers"]),
    st.sampled_from(FOREIGN_LOGS),
    st.randoms(use_true_random=False),
)
@settings(max_examples=150)
def test_no_change_of_a_log_makes_another_fault_sure(
    case: Case, way: str, foreign: Lines, order: random.Random
) -> None:
    """Cut anywhere, mixed with another program's log, with other numbers: high is only what the whole log has."""
    text = "\n".join(case.log)
    start, end = sorted(order.sample(range(len(text) + 1), 2))
    lines = list(case.log)
    for line in foreign:
        lines.insert(order.randint(0, len(lines)), line)
    changed = {
        "head": text[:end],
        "tail": text[start:],
        "both": text[start:end],
        "foreign": "\n".join(lines),
        "numbers": _other_numbers(text, order),
    }[way]
    whole, found = diagnose(text), diagnose(changed)
    known = (whole.class_, *whole.others, case.class_, *_SIBLINGS.get(case.class_, ()))
    assert found.confidence != "high" or found.class_ in known, changed


@pytest.mark.parametrize("foreign", FOREIGN_LOGS, ids=lambda log: log[-1][:40])
def test_another_programs_trouble_beside_a_healthy_log_is_never_sure(foreign: Lines) -> None:
    healthy = HEALTHY.splitlines()
    for log in ([*healthy, *foreign], [*foreign, *healthy]):
        assert diagnose(log).confidence != "high"


@pytest.mark.parametrize("number", sorted(errno.errorcode))
def test_the_errno_of_another_program_is_not_explained(number: int) -> None:
    text = os.strerror(number)
    for line in (
        f"OSError: [Errno {number}] {text}: '/srv/x'",
        f"backupd[12]: cannot write /srv/x: {text}",
        f"backupd[12]: sync of /srv/x failed, errno: {number} ({text})",
    ):
        assert diagnose(line).confidence in ("low", NONE), line


@pytest.mark.parametrize("log", [HEALTHY, CONVERTED, "", "\n\n", "\0" * 5000])
def test_a_healthy_log_is_unexplained(log: str) -> None:
    found = diagnose(log)
    assert (found.class_, found.confidence, found.others) == (UNEXPLAINED, NONE, ())
    assert found.next_steps


def test_a_healthy_log_says_what_it_rules_out() -> None:
    told = " ".join(diagnose(HEALTHY).rules_out)
    for part in (
        "npu-no-iommu",
        "npu-driver-mainline",
        "Driver 0.9.8",
        "Runtime 1.2.3 with a model of toolkit 1.2.3",
        "figures",
    ):
        assert part in told
    old = " ".join(
        diagnose(
            "I rkllm: rkllm-toolkit version: 1.3.0, max_context_limit: 4096\nrkllm-runtime version: 1.2.0"
        ).rules_out
    )
    assert "not too old" not in old
    assert not diagnose("E rkllm: invalid rkllm model!\nrknpu driver version: 0.9.8").rules_out


def test_a_log_without_a_line_of_rkllm_is_not_explained() -> None:
    assert diagnose("hello world").class_ == FOREIGN
    trace = [
        "Traceback (most recent call last):",
        '  File "train.py", line 3',
        "torch.OutOfMemoryError: CUDA out of memory.",
    ]
    foreign = diagnose(trace)
    assert (foreign.class_, foreign.confidence, foreign.others) == (FOREIGN, NONE, ("convert-out-of-memory",))
    assert diagnose(["INFO: rkllm-toolkit version: 1.2.3", *trace]).confidence == "medium"
    assert diagnose(trace, context={"stage": "convert"}).confidence == "high"
    # One bare line may be anybody's.
    assert (diagnose("Bus error").class_, diagnose("Bus error").confidence) == ("model-file-invalid", "low")


def test_what_others_print_counts_less_the_farther_it_is_from_a_line_of_rkllm() -> None:
    boot = ["[drm] Initialized rknpu 0.9.8 20240828 for fdab0000.npu on minor 1"]
    filler = [f"kernel line {number} about a disk" for number in range(100)]
    trouble = "OSError: [Errno 98] Address already in use"
    assert diagnose([*boot, *filler, trouble]).confidence == "low"
    assert diagnose([*filler, "rkllama.server - starting", trouble]).confidence == "medium"
    assert diagnose([*filler, f"rkllama.server - {trouble}"]).confidence == "high"
    # Another program's name on the line says whose it is.
    assert diagnose([*filler, "rkllama.server - starting", f"nginx: {trouble}"]).confidence == "low"


@given(st.text(max_size=3000))
@settings(max_examples=60)
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
        for rule in failures.table().rules
        for group in rule.all
        for signature in group
    }
    diagnose("\n".join((start + " ") * 40 for start in sorted(starts)))
    for start in random.Random(3).sample(sorted(starts), 3):
        diagnose((start + " ") * (100_000 // max(1, len(start))))


def test_texts_in_any_order_stay_linear() -> None:
    """Every line holds all fixed texts of `a & b` signatures but the last; nothing may be tried twice."""
    for rule in failures.table().rules:
        for signature in (item for group in rule.all for item in group if " & " in item.source):
            parts = re.sub(r"\{[^{}]*\}|\*", "x", signature.source).split(" & ")
            line = " ".join(parts[:-1]) + "\n"
            log = Log([line.strip()] * 200, {})
            assert len(list(signature.matches(log))) <= 3
    diagnose(("npu memory " * 300 + "\n") * 60)
    diagnose("robot:" + " x" * 100_000)
    diagnose("robot: " + "a" * 1_300_000)


def test_signatures_are_bounded() -> None:
    for rule in failures.table().rules:
        for signature in (*(item for group in rule.all for item in group), *rule.none):
            assert all(part.count("*") <= 2 for part in signature.source.split(" & ")), signature.source
            assert "+" not in signature.source.replace("++", ""), f"{signature.source} looks like an expression"


def test_signature_language() -> None:
    log = Log(["Size: 0x1F and `Model-2.rkllm` is Broken", "next killed.", "." * 200], {})
    for source in ("size: {n} and", "'{w}.rkllm' is {whole|broken}", "size*broken", "broken next", "killed$"):
        assert list(Signature(source).matches(log)), source
    for source in ("size: {n}and", "broken$ next", "killed$ more", "size*killed", "ize: {n}"):
        assert not list(Signature(source).matches(log)), source
    with pytest.raises(ValueError, match="needs a fixed text"):
        Signature("{n} * {w}")


def test_signatures_of_texts_in_any_order() -> None:
    log = Log(["ERROR: could not map the buffer of the NPU", "robot: " + "!" * 24, "robot: " + "-" * 99], {})
    words = {"fail": ["could not", "error"]}
    assert list(Signature("npu & {fail} & buffer", words).matches(log))
    assert not list(Signature("npu & {fail} & robot", words).matches(log))
    assert list(Signature("robot:*{same}").matches(log)) == [log.text.index("robot")]


class Counted:
    """A pattern that counts how often it is searched for around a place."""

    def __init__(self, pattern: re.Pattern[str]) -> None:
        self.finditer, self._search, self.searches = pattern.finditer, pattern.search, 0

    def search(self, text: str) -> re.Match[str] | None:
        self.searches += 1
        return self._search(text)


@pytest.mark.parametrize("elsewhere", ["", "lost and found"])
def test_a_text_is_looked_around_only_where_the_others_are(elsewhere: str) -> None:
    signature = Signature("rknpu & lost")
    signature.__dict__["_others"] = others = [Counted(re.compile("lost"))]
    assert not list(signature.matches(Log([elsewhere, *["rknpu " * 500] * 100, elsewhere], {})))
    assert others[0].searches == 0
    assert list(signature.matches(Log([*["rknpu " * 500] * 100, "lost: the rknpu"], {})))
    assert others[0].searches == 1


@given(st.lists(st.sampled_from(["rknpu", "lost", "map", " " * 50, "x" * 90, "\n"]), max_size=60))
def test_texts_in_any_order_are_those_on_one_line_and_near(pieces: list[str]) -> None:
    log = Log(" ".join(pieces).split("\n"), {})
    found = list(Signature("rknpu & lost & map").matches(log))
    near = []
    for match in re.finditer("rknpu", log.text):
        around = log.text[max(0, match.start() - 240) : match.start()].rpartition("\n")[2]
        around += log.text[match.start() : match.end() + 240].partition("\n")[0]
        near += [match.start()] if {"lost", "map"} <= set(around.split()) else []
    assert found == near[:3]


def test_a_text_cut_off_at_the_logs_end_counts() -> None:
    whole = "E RKNN: failed to open rknpu module, need to insmod rknpu dirver!"
    assert diagnose(whole[:33]).class_ == diagnose(whole[11:]).class_ == "npu-device-not-reachable"
    # Half a number is another number, and a text that begins alike is another text.
    assert diagnose("rknn_init fail! ret=-1").class_ == "load-failure-unexplained"
    assert not diagnose("rkllm-runtime version: 1.3.0, rknpu driver version: 0.9.8").explained


def test_the_table_is_whole() -> None:
    table = failures.table()
    named = {rule.class_ for rule in table.rules}
    assert {case.class_ for case in CASES + UNSEEN + FRESH} <= set(table.classes)
    assert named <= set(table.classes)
    for name, words in table.classes.items():
        assert words.title, name
        assert words.cause.endswith((".", ")")), name
        assert words.next_steps, name
        assert words.evidence or name in (UNEXPLAINED, FOREIGN), name
    for rule in table.rules:
        assert rule.confidence in CONFIDENCES
        assert all(group for group in rule.all), rule.class_


def test_no_escape_sequence_reaches_the_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "board.log"
    hostile = "\x1b]0;owned\x07\x9b31m\u202e\u2066\x1b[2J\x08"
    log.write_text(f"{hostile}E rkllm: invalid rkllm model!{hostile}\n", encoding="utf-8")
    for options in ([], ["--json"]):
        assert cli.main(["diagnose", str(log), *options]) == 0
        printed = capsys.readouterr().out
        assert "invalid rkllm model!" in printed
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", printed)


def test_sources_can_be_opened() -> None:
    data = resources.table("diagnosis")
    for name, place in data["sources"].items():
        assert place.startswith("https://") or place.endswith("public address not known"), name
    texts = [str(resources.table(name)) for name in ("diagnosis", "known_pairs")]
    assert not any("file-index" in text for text in texts)
    for name in (
        "failures",
        "more_failures",
        "unseen_failures",
        "fresh_failures",
        "later_failures",
        "recent_failures",
        "other_logs",
    ):
        for line in (corpus.DATA / f"{name}.jsonl").read_text("utf-8").splitlines():
            assert "file-index" not in json.loads(line)["source"]


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


def test_texts_are_found_wherever_they_begin_and_whatever_repeats() -> None:
    """Against a plain search of the whole text, in logs whose lines repeat each other in all but digits."""
    chosen = random.Random(11)
    words = ["rkllm", "x", "a1", "22", "npu", "killed", "skilled", "3 of 7", "112", "ret=-5", "op 12 x", "fail"]
    edges = {"rkllm x": "[a-z]", "killed": "[a-z]", "12 x": r"[\d.]", "fail killed": "[a-z]", "of 7 npu": "[a-z]"}
    found = 0
    for _ in range(400):
        lines = [" ".join(chosen.choices(words, k=chosen.randint(1, 4))) for _ in range(chosen.randint(1, 12))]
        log = Log([*lines, *(line.replace("2", "9") for line in lines)], {})
        for text, before in edges.items():
            plain = re.compile(f"(?<!{before}){re.escape(text)}".replace(r"\ ", r"[ \n]"))
            expected = [match.start() for match in plain.finditer(log.text)]
            assert list(Signature(text).matches(log)) == expected[:3], (text, lines)
            found += bool(expected)
        either = Signature("{npu|ret=-5} {x|killed}")
        assert either.possible(log) or not either.pattern.search(log.text)
    assert found > 300
