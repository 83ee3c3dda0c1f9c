"""Odd values on the command line: every one ends in a documented exit code, with an error that is not a defect."""

from __future__ import annotations

import contextlib
import io
import json
import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rkconvert.demo import adapter, checkpoint
from rkruntime import cli, errors

# docs and `rkruntime.errors`: click's own 2 is that of a UsageError; 130 is Ctrl-C, 141 a reader that went away.
EXIT_CODES = {0, 1, 2, 3, 4, 5, 6, 7, 8}
TEXTS = ["", " ", "-", "--", "--json", "-h", "0", "-1", "1e999", "nan", "inf", "9" * 400, "abc", "../x", "/", ".", "~",
         "a=b", "=", "a=", "=1", "x=nan", "x=1e400", "\n", "\t1", "é", "\udcff", "{0}", "%s", "{name}", "1.2.3 ",
         "v1.2.3", "١", "w8a8", "W8A8", "fp32", "rk3588", "RK3588", "emulator", "google/gemma", "a/b/c", "/dev/null",
         "/proc/self/mem", "/dev/zero/x", "https://huggingface.co/x/y", "C:\\x", "x" * 5000]  # fmt: skip
NUMBERS = [
    "0",
    "-1",
    "31",
    "32",
    "33",
    "4096",
    "16385",
    "1e9",
    "99999999999999999999",
    "0.5",
    "nan",
    "-0",
    "+32",
    "３２",
]
RELEASES = ["1.0.1", "1.1.0", "1.2.3", "1.2.3b1", "1.3.0", "1.3.1", "1.3.9", "1.4.0", "", "../../x", "1.2.3\n"]
TYPES = ["w8a8", "w8a8_g128", "w8a8_g0", "w8a8_g512", "w4a16", "w4a8_g32", "fp16", "fp32", "w8a8_g99999999999", "w8a"]
MODELS = ["{demo}", "{config}", "{folder}", "{missing}", "{file}", "{binary}", "{lora}"]

any_text = st.sampled_from(TEXTS) | st.text(max_size=12)
OPTIONS = {
    "plan": {"--release": RELEASES, "--dtype": TYPES, "--ram": NUMBERS, "--max-context": NUMBERS, "--board": TEXTS,
             "--embedding": ["flash", "ram", "x"], "--html": ["{missing}/x.html", "{folder}", "{file}"],
             "--revision": TEXTS},
    "convert": {"--release": RELEASES, "--dtype": TYPES, "--max-context": NUMBERS, "--npu-cores": NUMBERS,
                "--platform": ["rk3588", "rk3576", "rk1"], "--target": ["emulator", "toolkit", ""], "--lora": TEXTS,
                "--lora-mode": ["merge", "runtime", ""], "--recipe": TEXTS,
                "--matrix": ["{missing}", "{file}", "{binary}"], "--calibration": TEXTS, "--algorithm": TEXTS,
                "--hybrid-rate": NUMBERS, "--optimization-level": NUMBERS,
                "--toolkit-python": TEXTS, "--toolkit-patience": NUMBERS, "--push-to-hub": TEXTS, "--revision": TEXTS},
    "merge": {"--lora": TEXTS, "--revision": TEXTS},
    "inspect": {},
    "run": {"-p": TEXTS, "--temperature": NUMBERS, "--top-k": NUMBERS, "--max-context": NUMBERS, "--release": RELEASES,
            "--library": TEXTS},
}  # fmt: skip


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "empty").mkdir()
    (folder / "text").write_text("- a\n")
    (folder / "binary").write_bytes(bytes(range(256)) * 20)
    (folder / "config.json").write_text(json.dumps({"model_type": "gemma2", "architectures": ["Gemma2ForCausalLM"]}))
    return {
        "demo": str(checkpoint()),
        "lora": str(adapter()),
        "config": str(folder / "config.json"),
        "folder": str(folder / "empty"),
        "file": str(folder / "text"),
        "binary": str(folder / "binary"),
        "missing": str(folder / "none"),
    }


@st.composite
def lines(draw: st.DrawFn) -> list[str]:
    command = draw(st.sampled_from(list(OPTIONS)))
    line = [command, draw(st.sampled_from(MODELS) | any_text)]
    options = OPTIONS[command]
    for name in draw(st.lists(st.sampled_from(list(options)), max_size=3, unique=True)) if options else ():
        line += [name, draw(st.sampled_from(options[name]) | any_text)]
    if draw(st.booleans()):
        line.append("--json")
    # What is written goes nowhere: most lines end before, and the rest must not fill the disk.
    return [*line, "--output", "{folder}"] if command in ("convert", "merge") else line


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(line=lines())
def test_odd_values_end_in_a_documented_way(
    line: list[str], places: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(Path(places["folder"]).parent)
    filled = [places.get(word.strip("{}"), word) if word.startswith("{") else word for word in line]
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main(filled)
    said = err.getvalue()
    assert code in EXIT_CODES, (code, said)
    assert code != errors.RKEdgeError.exit_code, said
    assert "defect" not in said, said
    assert "Traceback" not in said, said
    # A plan that says no is a plan.
    error = code and not (filled[0] == "plan" and code == errors.RefusedError.exit_code)
    if error:
        assert "rror: " in said
    if error and "--json" in line[2:] and out.getvalue().startswith("{"):
        assert json.loads(out.getvalue())["message"]
    assert Path(places["folder"]).is_dir()
    assert os.listdir(places["folder"]) == []
