"""`rkedge run`, `chat`, `inspect` and `demo` as a person types them, with the emulator behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from rkconvert.demo import adapter, checkpoint, questions
from rkruntime import cli

QA = {row.question: row for row in questions()}
FIRST = "What is the RK3588?"


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("commands") / "demo"
    assert cli.main(["convert", str(checkpoint()), "-q", "-o", str(folder)]) == 0
    return folder


def rkedge(*arguments: str | Path, text: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "rkruntime.cli", *map(str, arguments)]
    return subprocess.run(
        command, input=text, capture_output=True, text=True, timeout=120, env={**os.environ, **environment}, check=False
    )


def test_run_prints_the_answer_alone(bundle: Path) -> None:
    done = rkedge("run", bundle, "-p", FIRST, "--temperature", "0")
    assert (done.returncode, done.stdout) == (0, QA[FIRST].answer + "\n"), done.stderr


def test_run_reads_standard_input_and_files(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "question").write_text(FIRST)
    for done in (
        rkedge("run", bundle, "--temperature", "0", text=FIRST),
        rkedge("run", bundle, "--temperature", "0", "-f", tmp_path / "question"),
        rkedge("run", bundle, "--temperature", "0", "-f", "-", text=FIRST),
    ):
        assert done.stdout == QA[FIRST].answer + "\n", done.stderr


def test_run_with_a_prompt_leaves_standard_input_alone(bundle: Path) -> None:
    """So that a loop that reads lines keeps them."""
    loop = f'while read -r line; do "{sys.executable}" -m rkruntime.cli run "{bundle}" --temperature 0 -p "$line"; done'
    done = subprocess.run(
        ["bash", "-c", loop],
        input=f"{FIRST}\nDoes it work?\n",
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout == f"{QA[FIRST].answer}\n{QA['Does it work?'].answer}\n", done.stderr


@pytest.mark.parametrize("limit", [("--max-new-tokens", "3"), ("--max-context", "32")])
def test_a_cut_answer_is_said_to_be_cut(bundle: Path, limit: tuple[str, str]) -> None:
    done = rkedge("run", bundle, "-p", FIRST, "--temperature", "0", *limit)
    assert done.returncode == 0
    assert QA[FIRST].answer.startswith(done.stdout.rstrip("\n"))
    assert done.stdout != QA[FIRST].answer + "\n"
    assert done.stderr == "The answer may not be whole: the limit of tokens was reached.\n"


@pytest.mark.parametrize("where", [["-f", "/dev/zero"], []])
def test_a_prompt_without_end_fills_no_memory(bundle: Path, where: list[str]) -> None:
    with Path("/dev/zero").open("rb") as endless:
        command = ["bash", "-c", 'ulimit -v 1000000; exec "$@"', "bash", sys.executable, "-m", "rkruntime.cli"]
        done = subprocess.run(
            [*command, "run", str(bundle), *where],
            stdin=endless,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
    assert (done.returncode, "more than 16 MB" in done.stderr) == (2, True), done.stderr


def test_run_answers_whatever_else_is_closed(bundle: Path) -> None:
    line = f'"{sys.executable}" -m rkruntime.cli run "{bundle}" --temperature 0 -p "{FIRST}" <&- 2>&-'
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout) == (0, QA[FIRST].answer + "\n")


def test_a_program_without_standard_streams_has_a_model_too(bundle: Path, tmp_path: Path) -> None:
    """Its first pipe gets the number of standard input, in whose place the worker has something else."""
    program = (
        "import sys; from pathlib import Path; from rkruntime import open_model, SamplingOptions\n"
        "with open_model(sys.argv[1], sampling=SamplingOptions(temperature=0)) as model:\n"
        "    Path(sys.argv[2]).write_text(model.ask(sys.argv[3]).text)\n"
    )
    said = tmp_path / "said"
    command = ["bash", "-c", '"$@" <&- >&- 2>&-', "bash", sys.executable, "-c", program, str(bundle), str(said), FIRST]
    assert subprocess.run(command, timeout=120, check=False).returncode == 0
    assert said.read_text() == QA[FIRST].answer


@pytest.mark.parametrize("locale", ["C", "C.UTF-8", "POSIX"])
@pytest.mark.parametrize("name", ["run", "chat"])
def test_an_input_that_is_not_utf8_is_refused_in_every_locale(bundle: Path, name: str, locale: str) -> None:
    command = [sys.executable, "-m", "rkruntime.cli", name, str(bundle)]
    environment = {**os.environ, "LC_ALL": locale}
    done = subprocess.run(command, input=b"caf\xe9\n", capture_output=True, timeout=120, env=environment, check=False)
    assert (done.returncode, done.stdout) == (2, b""), done.stderr
    assert b"is not UTF-8" in done.stderr


def test_run_as_json(bundle: Path) -> None:
    done = rkedge("run", bundle, "-p", FIRST, "--max-new-tokens", "3", "--temperature", "0", "--json")
    report = json.loads(done.stdout)
    assert (report["finish_reason"], report["completion_tokens"], report["emulated"]) == ("length", 3, True)
    assert QA[FIRST].answer.startswith(report["text"])
    report = json.loads(
        rkedge("run", bundle, "-p", FIRST, "--stop", "with eight", "--temperature", "0", "--json").stdout
    )
    assert (report["text"], report["finish_reason"]) == (QA[FIRST].answer.partition("with eight")[0], "stop")


@pytest.mark.parametrize(
    ("arguments", "text", "code", "word"),
    [
        (["-p", "  "], "", 2, "no prompt"),
        ([], "", 2, "no prompt"),
        (["-p", "word " * 9000], "", 4, "tokens"),
        (["-p", "x", "--temperature", "-1"], "", 2, "temperature"),
        (["-p", "x", "--library", "/no/such/librkllmrt.so"], "", 6, "librkllmrt.so"),
        (["-p", "x", "--release", "9.9.9"], "", 2, "9.9.9"),
    ],
)
def test_run_says_what_is_wrong(bundle: Path, arguments: list[str], text: str, code: int, word: str) -> None:
    done = rkedge("run", bundle, *arguments, text=text)
    assert (done.returncode, done.stdout) == (code, ""), done.stderr
    assert word in done.stderr
    assert "Traceback" not in done.stderr


def test_a_changed_byte_is_found_before_anything_is_loaded(bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    data = bytearray((copy / "model.rkemu").read_bytes())
    data[-1000] ^= 1
    (copy / "model.rkemu").write_bytes(data)
    for command in (["run", copy, "-p", "x"], ["chat", copy], ["inspect", "--verify", copy]):
        done = rkedge(*command)
        assert done.returncode == 3, done.stderr
        assert "SHA-256" in done.stderr


def test_chat_at_a_pipe(bundle: Path) -> None:
    done = rkedge("chat", bundle, "--temperature", "0", text=f"{FIRST}\nDoes it work?\n")
    assert done.stdout == f"{QA[FIRST].answer}\n{QA['Does it work?'].answer}\n", done.stderr


@pytest.mark.parametrize("name", ["a bundle", "a model file"])
def test_inspect(bundle: Path, name: str) -> None:
    path = bundle if name == "a bundle" else bundle / "model.rkemu"
    report = json.loads(rkedge("inspect", "--json", "--verify", path).stdout)
    assert report["verified"] is True
    assert report.get("family", report.get("general.architecture")) == "gemma2"
    assert "gemma2" in rkedge("inspect", path).stdout


def test_inspect_a_library(bundle: Path) -> None:
    from rkboard.emulator.build import build

    report = json.loads(rkedge("inspect", "--json", build("1.2.3")).stdout)
    assert (report["version"], report["emulated"]) == ("1.2.3", True)


def test_inspect_takes_no_program_for_the_runtime() -> None:
    report = json.loads(rkedge("inspect", "--json", Path(sys.executable).resolve()).stdout)
    assert report["kind"] == "a program or another library"
    assert report["problem"]


def test_inspect_a_vendor_model_file(tmp_path: Path) -> None:
    """Only the plain fields: nothing of it is the vendor's, the bytes are as public studies describe them."""
    path = tmp_path / "x.rkllm"
    head = bytes.fromhex("daeeb336") + (3).to_bytes(4, "little") + (5).to_bytes(8, "little") + (7).to_bytes(8, "little")
    path.write_bytes(head + bytes(4000) + b"rkllm-toolkit version: 1.3.1")
    report: dict[str, Any] = json.loads(rkedge("inspect", "--json", path).stdout)
    assert (report["container_version"], report["tensors"], report["keys"]) == (3, 5, 7)
    assert report["toolkit_version"] == "1.3.1"


@pytest.mark.parametrize("content", [b"", b"hello", b"\x7fELF", b"GGUF" + bytes(100), b"RKEMU\r\n\x1a"])
def test_inspect_refuses_what_it_does_not_know(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "librkllmrt.so"
    path.write_bytes(content)
    done = rkedge("inspect", path)
    assert done.returncode in (3, 6), (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    assert rkedge("inspect", tmp_path / "none").returncode == 3


def test_demo_twice(tmp_path: Path) -> None:
    first = rkedge("demo", "--output", tmp_path / "demo")
    assert first.returncode == 0, first.stderr
    assert f"--lora {adapter()}" in first.stdout
    for question in (FIRST, "Does it work?"):
        assert QA[question].answer in first.stdout
        assert QA[question].pirate in first.stdout
    assert "no board was used" in first.stdout
    stamps = {path: path.stat().st_mtime_ns for path in (tmp_path / "demo").rglob("*")}
    second = rkedge("demo", "--output", tmp_path / "demo")
    assert "already exists" in second.stdout
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "demo").rglob("*")} == stamps


def test_a_failed_load_shows_its_log_and_its_diagnosis(bundle: Path) -> None:
    done = rkedge("run", bundle, "-p", "x", RKEMU_FAULT="alloc-14")
    assert done.returncode == 7
    *log, error, hint = done.stderr.splitlines()
    assert any("errno: 14, errstr: Bad address" in line for line in log)
    assert error.startswith("error: rkllm_init returned -1")
    assert hint.startswith("hint:  Diagnosis (high confidence): ")
    assert "address window" in hint
    chat = rkedge("chat", bundle, text="x\n", RKEMU_FAULT="typo")
    assert "there is no RKEMU_FAULT typo" in chat.stderr


def test_what_comes_through_a_pipe_writes_no_files(bundle: Path, tmp_path: Path) -> None:
    done = rkedge("chat", bundle, text=f"/save {tmp_path / 'talk.json'}\n{FIRST}\n")
    assert done.returncode == 0
    assert list(tmp_path.iterdir()) == []


def test_serve_ends_at_once_where_there_is_no_bundle(tmp_path: Path) -> None:
    done = rkedge("serve", tmp_path / "nowhere", "--socket", tmp_path / "socket")
    assert done.returncode == 3
    assert "There is no folder" in done.stderr
    assert not (tmp_path / "socket").exists()


@pytest.mark.parametrize(
    ("log", "message"),
    [
        (b"", "The log is empty"),
        (b" \n\r\n\t", "The log is empty"),
        (bytes(range(256)) * 40, "is not text"),
        (b"\0" * 5000, "is not text"),
        (b"\x7fELF\x02\x01" + b"\0\x90\x01\xff" * 500, "is not text"),
    ],
)
def test_what_is_not_a_log_is_not_diagnosed(log: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(log)
    done = rkedge("diagnose", tmp_path / "log")
    assert (done.returncode, done.stdout) == (3, "")
    assert message in done.stderr


@pytest.mark.parametrize("encoding", ["utf-8", "gbk", "utf-16"])
def test_what_is_a_log_is_one_in_every_encoding(encoding: str, tmp_path: Path) -> None:
    (tmp_path / "log").write_bytes(
        "\x1b[31mE RKNN: 打开设备失败, failed to open rknpu module\x1b[0m\r\n".encode(encoding)
    )
    assert rkedge("diagnose", tmp_path / "log").returncode == 0


def test_run_takes_the_prompt_behind_the_bundle(bundle: Path) -> None:
    for words in ([FIRST], FIRST.split()):
        done = rkedge("run", bundle, *words, "--temperature", "0", text="not read")
        assert (done.returncode, done.stdout) == (0, QA[FIRST].answer + "\n"), done.stderr
    assert rkedge("run", bundle, FIRST, "-p", FIRST).returncode == 2


def test_inspect_says_that_nobody_asked_for_a_check(bundle: Path) -> None:
    assert "not asked (--verify)" in rkedge("inspect", bundle).stdout
    assert "yes" in rkedge("inspect", bundle, "--verify").stdout.splitlines()[1]
    assert json.loads(rkedge("inspect", bundle, "--json").stdout)["verified"] is False


def test_a_demo_that_may_not_write_says_where_to(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for done in (rkedge("demo", "--output", "/proc/x"), rkedge("demo", XDG_CACHE_HOME="/proc/x")):
        assert done.returncode == 3
        assert "--output" in done.stderr


def test_serve_says_how_to_chat(bundle: Path, tmp_path: Path) -> None:
    config = tmp_path / "daemon.yaml"
    config.write_text(f"sessions: {{folder: {tmp_path}/sessions}}\nprompt_cache: {{folder: {tmp_path}/cache}}\n")
    options = ["--config", str(config), "--socket", str(tmp_path / "s"), "--port", "0"]
    command = [sys.executable, "-m", "rkruntime.cli", "serve", str(bundle), *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as daemon:
        assert daemon.stderr is not None
        said = [daemon.stderr.readline() for _ in range(3)]
        daemon.terminate()
    assert "rkedge chat" in said[1]
    assert "http://127.0.0.1:" in said[2]
