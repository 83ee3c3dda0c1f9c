"""Text from outside that instructs terminals and fakes lines: no command prints it, and no log holds it."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from rkruntime import cli
from rkruntime.bundle.manifest import MANIFEST, Bundle
from rkruntime.engine.engine import Engine, LoadOptions
from rkruntime.engine.generation import Request
from rkruntime.errors import RKEdgeError, RunError
from rkruntime.printable import escaped, one_line, printable
from rkruntime.serve.systemd import log_to_stderr

# CSI, OSC, a C1 control, DEL, a bidi override and isolate, a line separator, CR, LF: each would do harm.
HOSTILE = "\x1b[2Jx\x1b]0;owned\x07\x9b31m\x85\x7f\u202egnp\u2066\u2028\rfalse\nerror: false line"
HARMFUL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")


@pytest.fixture
def check(capfdbinary: pytest.CaptureFixture[bytes]) -> Callable[..., str]:
    """Runs a command and looks at every byte that it printed."""

    def run(*arguments: str | Path, code: int | None = None) -> str:
        returned = cli.main([*map(str, arguments)])
        out, err = (data.decode() for data in capfdbinary.readouterr())
        assert not HARMFUL.search(out + err), (out, err)
        assert not re.search(r"^(error: )?false", out + err, re.MULTILINE), (out, err)
        assert "defect" not in err, err
        assert returned == code or code is None
        if "--json" in arguments:
            json.loads(out)
        return out + err

    return run


def change(bundle: Bundle, **values: Any) -> Path:
    path = bundle.path / MANIFEST
    path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text()) | values))
    return bundle.path


Check = Callable[..., str]
JSON = pytest.mark.parametrize("json_flag", [[], ["--json"]], ids=["text", "json"])


@JSON
@pytest.mark.parametrize(
    "values",
    [
        {"name": HOSTILE, "family": HOSTILE, "licence": HOSTILE, "created_by": HOSTILE, "notes": [HOSTILE] * 2},
        {"source": {"name": HOSTILE, "revision": HOSTILE}, "adapters": [{"name": HOSTILE}]},
        {"options": {HOSTILE: {HOSTILE: [HOSTILE, {HOSTILE: 1}]}, "when": "2024-01-01"}},
        {"toolkit_version": HOSTILE, "platform": HOSTILE, "dtype": HOSTILE, "size": HOSTILE},
        {HOSTILE: 1},
        {"schema": HOSTILE},
        {"model_file": HOSTILE},
        {"files": {HOSTILE: {"size": 1, "sha256": "0" * 64}}},
        {"files": {"model.rkemu": {"size": 1, "sha256": HOSTILE}}},
        {"max_context": HOSTILE},
        {"system_role": HOSTILE},
        {"stop_token_ids": [HOSTILE]},
    ],
    ids=lambda values: next(iter(values))[:12].encode("unicode_escape").decode(),
)
def test_manifests(check: Check, fake_bundle: Bundle, values: dict[str, Any], json_flag: list[str]) -> None:
    folder = change(fake_bundle, **values)
    check("inspect", folder, *json_flag)
    check("inspect", "--verify", folder, *json_flag)
    check("run", folder, "-p", "x", *json_flag)
    check("chat", folder)


def test_a_manifest_that_is_no_yaml(check: Check, fake_bundle: Bundle) -> None:
    path = fake_bundle.path / MANIFEST
    for text in (
        f'a: "{HOSTILE}',
        'a: "\\ud800\\e[2J"',
        "a: *\x1b",
        f"? {HOSTILE}",
        "\x1b",
        '{"\\e[2J": 1, "\\e[2J": 2}',
    ):
        path.write_text(text)
        check("inspect", fake_bundle.path, code=3)


@JSON
@pytest.mark.parametrize("name", [HOSTILE, os.fsdecode(b"\xff\x1b[2J\n"), "\U000e0041\u202e"])
def test_names_of_files(check: Check, tmp_path: Path, name: str, json_flag: list[str]) -> None:
    name = name.replace("/", "")
    check("inspect", tmp_path / name, *json_flag, code=3)
    (tmp_path / name).write_text("nothing")
    check("inspect", tmp_path / name, *json_flag, code=3)
    check("run", tmp_path / name, "-p", "x", *json_flag, code=3)
    check("chat", tmp_path / name, code=3)
    check("serve", "--config", tmp_path / name, code=2)
    check("plan", tmp_path / name, *json_flag)
    (tmp_path / "log").write_text("E rkllm: nothing")
    shutil.move(tmp_path / "log", tmp_path / (name + "log"))
    check("diagnose", tmp_path / (name + "log"), *json_flag)
    check("diagnose", tmp_path / (name + "none"), *json_flag, code=3)


def test_arguments(check: Check) -> None:
    for arguments in ([HOSTILE], ["run", f"--{HOSTILE}"], ["run", "x", HOSTILE], ["plan", "x", "--platform", HOSTILE]):
        check(*arguments)
    check("run", "x", "-f", HOSTILE, code=2)


@JSON
def test_logs(check: Check, tmp_path: Path, json_flag: list[str]) -> None:
    log = tmp_path / "log"
    for line in (
        f"E RKNN: failed to submit!, {HOSTILE}",
        f"{HOSTILE} E rkllm: model file is {HOSTILE}",
        f"E RKNN: failed to malloc npu memory, size: 1 \u202e\u2066 errno: 12 {HOSTILE}",
        HOSTILE,
    ):
        log.write_text(line)
        check("diagnose", log, *json_flag)
    log.write_bytes(os.urandom(3000) + HOSTILE.encode())
    check("diagnose", log, *json_flag)


@JSON
def test_template_and_tokenizer(check: Check, fake_bundle: Bundle, json_flag: list[str]) -> None:
    """Their parsers quote what they do not take."""
    for name, text in (
        ("tokenizer.json", '{"' + HOSTILE + '": }'),
        ("tokenizer.json", json.dumps({"version": HOSTILE, "model": {"type": HOSTILE}})),
        ("chat_template.jinja", "{% " + HOSTILE + " %}"),
        ("chat_template.jinja", "{{ raise_exception(" + json.dumps(HOSTILE) + ") }}"),
    ):
        (fake_bundle.path / name).write_text(text)
        check("run", fake_bundle.path, "-p", "x", *json_flag)


@JSON
def test_checkpoints(check: Check, tmp_path: Path, json_flag: list[str]) -> None:
    for config in (
        {"model_type": HOSTILE, "architectures": [HOSTILE]},
        {HOSTILE: HOSTILE},
        {"model_type": "gemma2", "hidden_size": HOSTILE},
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        check("plan", tmp_path, *json_flag)
        check("convert", tmp_path, "-o", tmp_path / "out", *json_flag)


def test_recipes_and_settings(check: Check, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    for content in (
        {HOSTILE: 1},
        {"limits": {HOSTILE: 1}},
        {"log_level": HOSTILE},
        {"listen": {"socket_mode": HOSTILE}},
    ):
        recipe.write_text(yaml.safe_dump(content))
        check("serve", "--config", recipe, code=2)
        check("convert", "--recipe", recipe, tmp_path, "-o", tmp_path / "out")


def test_the_traceback_of_an_error(fake_bundle: Bundle, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    folder = change(fake_bundle, toolkit_version=HOSTILE, **{HOSTILE: 1})
    done = subprocess.run([sys.executable, "-m", "rkruntime.cli", "--debug", "inspect", folder], capture_output=True)
    assert b"Traceback" in done.stderr
    assert not HARMFUL.search(done.stderr.decode())


# --- the library --------------------------------------------------------------------------------------------------


def test_lines_of_the_library(double: Callable[..., Path], tmp_path: Path) -> None:
    """In the error, its details, the log and what is handed on."""
    model = tmp_path / "model.rkllm"
    model.write_bytes(b"not read")
    line = "\x1b[2J\x9b31m\u202e E RKNN: failed to submit!\x7f\x1b]0;owned\x07\rfalse\n"
    environment = {"RKDOUBLE": "token-say", "RKDOUBLE_LINE": line}
    lines: list[str] = []
    with Engine.load(
        LoadOptions(library=double("1.2.3"), model=model, environment=environment), lines.append
    ) as engine:
        with pytest.raises(RunError, match="failed to submit") as caught:
            list(engine.generate(Request([1])))
        texts = [caught.value.message, *caught.value.details["log"], *engine.log, *lines]
    assert any("failed to submit" in text for text in lines)
    assert not any(HARMFUL.search(text) or "\n" in text for text in texts)


# --- logging ------------------------------------------------------------------------------------------------------


@pytest.fixture(params=["", "8:1234"])
def logged(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[io.StringIO]:
    """The daemon's log, on a terminal and for journald."""
    if request.param:
        monkeypatch.setenv("JOURNAL_STREAM", request.param)
    stream = io.StringIO()
    monkeypatch.setattr("sys.stderr", stream)
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    log_to_stderr("info")
    yield stream
    root.handlers[:], _ = before, root.setLevel(level)


def test_logs_of_the_daemon(logged: io.StringIO) -> None:
    log = logging.getLogger("rkedge")
    log.info("model %s", HOSTILE)
    log.error(HOSTILE)
    logging.getLogger("uvicorn").warning("%s", HOSTILE)
    try:
        raise RKEdgeError(HOSTILE)
    except RKEdgeError:
        log.exception("request %s", HOSTILE)
    text = logged.getvalue()
    assert not HARMFUL.search(text)
    records = [line for line in text.splitlines() if not re.match(r"(<\d>)?    ", line)]
    assert len(records) == 4
    assert not re.search(r"^(<\d>)?(error|false)", text, re.MULTILINE)


# --- the functions ------------------------------------------------------------------------------------------------


@given(st.text(st.characters(codec=None, categories=None)))
def test_nothing_harmful_is_left(text: str) -> None:
    assert not HARMFUL.search(printable(text))
    assert not HARMFUL.search(one_line(text))
    assert len(one_line(text).splitlines()) <= 1
    printable(text).encode()
    one_line(text).encode()
    document = escaped(json.dumps({"text": text}, ensure_ascii=False, indent=2))
    assert not HARMFUL.search(document)
    assert json.loads(document.encode()) == {"text": text}


@given(st.text(st.characters(exclude_categories=["Cc", "Cf", "Cs", "Zl", "Zp"])))
def test_honest_text_stays_as_it_is(text: str) -> None:
    for whole in (text, f"{text}\t{text}", "👩‍💻 שלום العربية"):
        assert printable(whole) == one_line(whole) == whole
    assert printable(f"{text}\n{text}") == f"{text}\n{text}"
