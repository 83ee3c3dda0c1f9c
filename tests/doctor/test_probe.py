"""The probe: what it reads of hostile file trees, on which Pythons, and what it leaves alone."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from elftools.elf.elffile import ELFFile
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rkboard.doctor import probe as probe_module
from rkboard.doctor.checks import judge
from rkboard.doctor.document import MARK, MOST_BYTES, Board, Document
from rkboard.doctor.probe import Probe, elf_facts
from rkboard.doctor.visit import PROBE
from rkruntime.errors import ServiceError

from .sysroots import GOOD, Link, Mode, elf, plant

HOSTILE_NAMES = [
    "$(touch x)",
    "a;reboot",
    "`id`",
    "-rf",
    "a b",
    "\x1b[2J",
    "'\"",
    "…",
    "a\nb",
    "b\udcff",
    "a" * 255,
    "|x",
    "%s",
]


def run(root: Path, *, python: str = sys.executable, **options: Any) -> Document:
    """The probe as a board runs it: its text on standard input, in a process of its own."""
    command = [python, "-I", "-", "--root", str(root)]
    done = subprocess.run(command, input=PROBE.read_bytes(), capture_output=True, timeout=60, check=True, **options)
    assert done.stderr == b""
    (line,) = done.stdout.splitlines(keepends=True)
    assert len(line) < MOST_BYTES
    return Document.parse(line)


def judged(document: Document) -> set[str]:
    """Every check, for what it must not do."""
    return {finding.code for finding in judge(Board(document, time.time()))}


@pytest.fixture
def good(tmp_path: Path) -> Path:
    return plant(tmp_path, GOOD)


def test_it_uses_nothing_but_the_standard_library() -> None:
    tree = ast.parse(PROBE.read_text(), feature_version=(3, 7))
    names = {
        name.partition(".")[0]
        for node in ast.walk(tree)
        for name in ([alias.name for alias in node.names] if isinstance(node, ast.Import)
                     else [node.module or ""] if isinstance(node, ast.ImportFrom) else [])
    }  # fmt: skip
    assert names <= sys.stdlib_module_names
    assert not names & {"subprocess", "shutil" * 2, "urllib", "http", "tempfile"}


@pytest.mark.parametrize("version", ["3.7", "3.8", "3.9", "3.10", "3.12", "3.13"])
def test_it_runs_on_a_boards_own_python(good: Path, version: str) -> None:
    python = shutil.which(f"python{version}")
    works = python and subprocess.run([python, "-c", ""], capture_output=True, check=False).returncode == 0
    found = run(good, python=python if works else sys.executable)
    assert found.files["sys/module/rknpu/version"].text == "0.9.8\n"
    if works:
        assert found.me.python.startswith(f"{version}.")


def snapshot(root: Path) -> dict[str, tuple[Any, ...]]:
    found = {}
    for path in sorted(root.rglob("*")):
        state = path.lstat()
        content = path.read_bytes() if path.is_file() else b""
        found[str(path)] = (state.st_mode, state.st_mtime_ns, state.st_uid, content)
    return found


def test_it_changes_nothing(good: Path) -> None:
    before = snapshot(good)
    run(good)
    assert snapshot(good) == before


def test_links_lead_nowhere_else(good: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    secret = tmp_path_factory.mktemp("outside") / "secret"
    secret.write_text("outside of the tree")
    for name in ("etc/os-release", "etc/ld.so.conf"):
        (good / name).unlink(missing_ok=True)
    (good / "etc/os-release").symlink_to(secret)
    (good / "etc/ld.so.conf").symlink_to("../" * 20 + str(secret).lstrip("/"))
    shutil.rmtree(good / "sys/class/thermal")
    (good / "sys/class/thermal").symlink_to(secret.parent)
    found = run(good)
    assert "outside of the tree" not in json.dumps([read.text for read in found.files.values()])
    assert "etc/os-release" not in found.files


@pytest.mark.parametrize("name", ["*", "**", "card*", "[a-z]*", "?", "²", "٣", "1²"])
def test_a_name_is_no_pattern_and_no_number(good: Path, name: str) -> None:
    """The rest is found as without it."""
    expected = run(good)
    for folder in ("sys/class/devfreq", "sys/class/thermal", "sys/class/drm", "dev/dri", "proc"):
        (good / folder / name).mkdir(parents=True, exist_ok=True)
        (good / folder / name / "comm").write_text("x")
        (good / folder / name / "statm").write_text("1 1")
    found = run(good)
    assert found.problems == expected.problems == ()
    assert expected.files.items() <= found.files.items()
    assert [one.pid for one in found.processes] == [one.pid for one in expected.processes]


def endless(path: Path) -> None:
    path.write_bytes(b"")
    os.truncate(path, 1 << 40)


def binary(path: Path) -> None:
    path.write_bytes(bytes(range(256)) * 500)


DAMAGE: dict[str, Callable[[Path], None]] = {
    "empty": lambda path: path.write_bytes(b"") and None,
    "binary": binary,
    "endless": endless,
    "fifo": os.mkfifo,
    "folder": lambda path: path.mkdir(),
    "loop": lambda path: path.symlink_to(path.name),
    "broken link": lambda path: path.symlink_to("nowhere"),
    "device": lambda path: path.symlink_to("/dev/zero"),
    "a long line": lambda path: path.write_text("9" * 100_000) and None,
    "escapes": lambda path: path.write_text("\x1b]0;owned\x07\x9b31m\u202e\n" * 50) and None,
}


@pytest.mark.parametrize("kind", list(DAMAGE))
def test_every_file_may_be_something_else(good: Path, kind: str) -> None:
    for name, content in GOOD.items():
        if not isinstance(content, Link) and "device" not in name:
            path = good / name
            path.unlink()
            DAMAGE[kind](path)
    found = run(good)
    assert judged(found)
    for name, read in found.files.items():
        assert read.text is None or len(read.text) <= probe_module.MOST_TEXT, name
        assert read.text is None or len(read.text) < probe_module.MOST_TEXT or read.more


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to be somebody else")
def test_a_tree_that_may_not_be_read() -> None:
    """As nobody, on a tree with files and folders that are root's."""
    root = Path(subprocess.run(["mktemp", "-d"], capture_output=True, text=True, check=True).stdout.strip())
    try:
        root.chmod(0o755)
        plant(root, GOOD)
        for path in root.rglob("*"):  # whatever the umask
            if path.is_dir():
                path.chmod(0o755)
        for name in ("sys/kernel/debug", "dev/dri/card1", "dev/dri/renderD129", "etc/os-release", "proc/812/fd"):
            (root / name).chmod(0o700)
        python = "/usr/bin/python3"  # one that everybody may run
        found = run(root, python=python, user=65534, group=65534, extra_groups=[])
        assert found.files["sys/kernel/debug/rknpu/version"].error == "EACCES"
        assert found.files["etc/os-release"].error == "EACCES"
        assert not found.nodes["dev/dri/card1"].access
        assert found.hidden_processes == 1
        assert found.me.uid == 65534
        verdicts = {finding.code: finding for finding in judge(Board(found))}
        assert verdicts["npu-nodes"].status == "failure"
        assert "the driver's version and load" in verdicts["more-as-root"].verdict.said
    finally:
        shutil.rmtree(root)


def test_a_folder_that_may_not_be_listed() -> None:
    """It is not taken for an empty one."""
    with tempfile.TemporaryDirectory() as folder:
        root = plant(Path(folder), GOOD)
        for path in (root, *root.rglob("*")):
            if path.is_dir():
                path.chmod(0o755)
        (root / "dev/dri").chmod(0o700)
        found = run(root, python="/usr/bin/python3", user=65534, group=65534, extra_groups=[])
        assert found.files["dev/dri"].error == "EACCES"
        verdicts = {finding.code: finding for finding in judge(Board(found))}
        assert verdicts["npu-nodes"].status == "failure"
        assert "/dev/dri" in verdicts["more-as-root"].verdict.said
        (root / ".dockerenv").write_text("")
        found = run(root, python="/usr/bin/python3", user=65534, group=65534, extra_groups=[])
        verdicts = {finding.code: finding for finding in judge(Board(found))}
        assert "lacks" not in verdicts["container-nodes"].verdict.said


def test_names_that_mean_something_to_a_shell_or_a_terminal(good: Path) -> None:
    places = [
        "sys/class/devfreq",
        "sys/class/drm",
        "sys/class/thermal",
        "dev/dri",
        "sys/devices/system/cpu/cpufreq",
        "proc",
        "usr/lib",
    ]
    for place in places:
        for name in HOSTILE_NAMES:
            for shape in (name, f"{name[:200]}.npu", f"card{name[:200]}", f"librkllmrt.so{name[:200]}"):
                folder = good / place / os.fsdecode(os.fsencode(shape)[:255])
                folder.mkdir(parents=True, exist_ok=True)
                for file, text in (("governor", "ondemand\n"), ("cur_freq", "1\n"), ("available_frequencies", "2\n")):
                    (folder / file).write_text(text)
    found = run(good)
    findings = judge(Board(found))
    commands = [str(fix) for finding in findings for fix in finding.verdict.fixes]
    allowed = re.compile(r"(echo \w+ \| )?sudo [\w/.:=,+ -]+")
    assert [command for command in commands if not allowed.fullmatch(command)] == []


def test_a_tree_without_an_end(good: Path) -> None:
    for number in range(700):
        folder = good / f"sys/class/drm/card{number + 10}"
        folder.mkdir()
        (folder / "device").mkdir()
        (folder / "device" / "uevent").write_text("x" * 1000)
    deep = good / "etc/ld.so.conf.d"
    deep.mkdir()
    for number in range(550):
        (deep / f"{number}.conf").write_text("/usr/lib/../" * 1000)
    (good / "etc/link0").write_text("x")
    for number in range(60):
        (good / f"etc/link{number + 1}").symlink_to(f"link{number}")
    (good / "etc/os-release").unlink()
    (good / "etc/os-release").symlink_to("link60")
    found = run(good)
    assert found.files["etc/os-release"].error == "ELOOP"
    assert sum(len(read.text or "") for read in found.files.values()) <= probe_module.MOST_TOTAL
    assert judged(found)


def test_a_file_that_never_answers_is_named(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A driver that hangs in the kernel: the process ends all the same, and says where."""
    sleeping = "if 'proc/rknpu/version' in path:\n            time.sleep(1000)\n        "
    text = PROBE.read_text().replace("SECONDS = 20.0", "SECONDS = 0.5")
    stuck = text.replace('handle, data = self.open(path), b""', f'{sleeping}handle, data = self.open(path), b""')
    assert stuck != text
    (good / "proc/rknpu").mkdir()
    (good / "proc/rknpu/version").write_text("RKNPU driver: v0.9.8\n")
    done = subprocess.run(
        [sys.executable, "-I", "-", "--root", str(good)],
        input=stuck.encode(),
        capture_output=True,
        timeout=60,
        check=True,
    )
    found = Document.parse(done.stdout)
    assert found.problems == ("/proc/rknpu/version did not answer in 0 seconds",)
    assert found.files["proc/meminfo"].text
    assert {finding.code: finding.status for finding in judge(Board(found))}["seen"] == "warning"


def test_a_compressed_configuration(good: Path) -> None:
    (good / "boot/config-6.1.115-vendor-rk35xx").unlink()
    packed = zlib.compressobj(wbits=31)
    text = b"CONFIG_X=y\nCONFIG_ROCKCHIP_RKNPU=m\n" + b"# zeros\n" * 5_000_000
    (good / "proc/config.gz").write_bytes(packed.compress(text) + packed.flush())
    found = run(good)
    assert found.files["proc/config.gz"].text == "CONFIG_ROCKCHIP_RKNPU=m"
    (good / "proc/config.gz").write_bytes(b"\x1f\x8bnot gzip")
    assert run(good).files["proc/config.gz"].error == "EBADMSG"


# Libraries


@pytest.mark.parametrize(
    "path", sorted(Path("/usr/lib").rglob("libc.so.6"))[:1] + sorted(Path("/usr/lib").rglob("libstdc++.so.6"))[:1]
)
def test_an_elf_file_is_read_as_others_read_it(path: Path) -> None:
    with path.open("rb") as file:
        other = ELFFile(file)
        dynamic = other.get_section_by_name(".dynamic")
        assert dynamic is not None
        needed = [tag.needed for tag in dynamic.iter_tags() if tag.entry.d_tag == "DT_NEEDED"]
        versions = other.get_section_by_name(".gnu.version_r")
        wanted = [aux.name for _, rows in versions.iter_versions() for aux in rows] if versions else []
        facts = elf_facts(path.read_bytes())  # type: ignore[arg-type]
    assert facts["bits"] == other.elfclass
    assert facts["needs"] == needed
    here = (
        max(tuple(map(int, re.findall(r"\d+", name))) for name in wanted if re.fullmatch(r"GLIBC_[\d.]+", name))
        if wanted
        else ()
    )
    assert len(here) < 2 or facts["glibc"] >= ".".join(map(str, here[:2]))


@settings(max_examples=200)
@given(st.integers(0, len(elf())), st.binary(max_size=12))
def test_a_damaged_library_is_no_crash(at: int, put: bytes) -> None:
    import struct

    whole = elf()
    for data in (whole[:at], whole[:at] + put + whole[at + len(put) :]):
        try:
            facts = elf_facts(data)  # type: ignore[arg-type]
        except (struct.error, OverflowError, ValueError):
            continue
        assert len(json.dumps(facts)) < 1 << 20


def test_what_a_library_needs_may_be_next_to_it(good: Path) -> None:
    (good / "usr/lib/aarch64-linux-gnu/libgomp.so.1").rename(good / "usr/lib/libgomp.so.1")
    assert run(good).libraries[0].missing == ()


def test_the_layout_of_the_ioctl_is_the_kernels(tmp_path: Path) -> None:
    """A compiler's word on linux/drm.h, for this machine."""
    compiler = shutil.which("cc") or shutil.which("g++")
    assert compiler
    source = tmp_path / "layout.c"
    source.write_text(
        "#include <stdio.h>\n#include <stddef.h>\n#include <sys/ioctl.h>\n"
        # As Linux documents it: https://docs.kernel.org/gpu/drm-uapi.html
        "struct version { int major, minor, patch; size_t name_len; char *name; size_t date_len; char *date;\n"
        " size_t desc_len; char *desc; };\n"
        'int main(void) { printf("%zu %zu %lu", sizeof(struct version), offsetof(struct version, name),\n'
        " (unsigned long)_IOWR('d', 0, struct version)); return 0; }\n"
    )
    subprocess.run([compiler, str(source), "-o", str(tmp_path / "layout")], check=True, capture_output=True)
    printed = subprocess.run([str(tmp_path / "layout")], capture_output=True, text=True, check=True).stdout
    size, name, request = map(int, printed.split())
    assert probe_module._DRM_VERSION.size == size
    packed = probe_module._DRM_VERSION.pack(0, 0, 0, 0, 0x1122334455667788, 0, 0, 0, 0)
    assert packed.index((0x1122334455667788).to_bytes(8, sys.byteorder)) == name
    assert request == probe_module._DRM_IOCTL_VERSION


# The document


def changed(value: Any, draw: Callable[[st.SearchStrategy[Any]], Any]) -> Any:
    """The value with something else somewhere in it."""
    if isinstance(value, dict) and value and draw(st.booleans()):
        key = draw(st.sampled_from(sorted(value)))
        return {**value, key: changed(value[key], draw)}
    if isinstance(value, list) and value and draw(st.booleans()):
        at = draw(st.integers(0, len(value) - 1))
        return [*value[:at], changed(value[at], draw), *value[at + 1 :]]
    return draw(ODD)


ODD = st.one_of(
    st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=20), st.just("9" * 5000),
    st.sampled_from(["\x1b[2J", "../../etc", "\udcff", "$(id)", "0.9.8.9.9", "-1", "²", "1e9"]),
    st.lists(st.integers(), max_size=3), st.dictionaries(st.text(max_size=5), st.text(max_size=5), max_size=3),
)  # fmt: skip


@pytest.fixture(scope="module")
def example(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    probe = Probe(str(plant(tmp_path_factory.mktemp("board"), GOOD)))
    probe.run()
    found: dict[str, Any] = json.loads(json.dumps({**probe.found, "seconds": 0.1}))
    return found


@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_board_that_lies_gets_findings_or_a_clear_refusal(example: dict[str, Any], data: st.DataObject) -> None:
    document = changed(example, data.draw)
    line = MARK + json.dumps(document).encode()
    try:
        parsed = Document.parse(line)
    except ServiceError as error:
        assert "defect" not in error.message
        return
    for finding in judge(Board(parsed, 1.0)):
        assert finding.verdict.said


@pytest.mark.parametrize(
    "line",
    [b"", b"rkedge-probe: ", b"rkedge-probe: {}", b"rkedge-probe: []", b"rkedge-probe: " + b"[" * 100_000,
     b'rkedge-probe: {"schema": "rkedge-probe/2"}', b'rkedge-probe: {"schema": "rkedge-probe/1"}',
     b"rkedge-probe: " + b" " * MOST_BYTES, b"rkedge-probe: \xff\xfe"],
    ids=range(9),
)  # fmt: skip
def test_what_is_not_a_document_is_refused(line: bytes) -> None:
    with pytest.raises(ServiceError, match="The board sent"):
        Document.parse(line)


def test_what_would_take_all_memory_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: object) -> None:
        raise AssertionError("it was read")

    monkeypatch.setattr("rkboard.doctor.document.json.loads", never)
    line = b'rkedge-probe: {"schema": "rkedge-probe/1", "x": [0' + b",[]" * (MOST_BYTES // 4) + b"]}"
    with pytest.raises(ServiceError, match="The board sent"):
        Document.parse(line)


def test_a_mode_is_kept(good: Path) -> None:
    plant(good, {"dev/dma_heap/cma": Mode(0o640)})
    assert run(good).nodes["dev/dma_heap/cma"].mode == 0o640


@pytest.mark.parametrize(
    ("section", "value"),
    [
        ("files", {f"sys/class/drm/card{number}/device/uevent": {"text": ""} for number in range(10_000)}),
        ("folders", {"sys/class/drm": [f"card{number}" for number in range(1100)]}),
        ("links", {str(number): "x" for number in range(5000)}),
        ("processes", [{"pid": 1, "name": "", "uid": 0, "memory": 0, "nodes": []}] * 100),
        ("libraries", [{"path": "x", "loader": True}] * 100),
        ("log", ["npu failed to"] * 1000),
        ("files", {"sys/devices/system/cpu/online": {"text": "0-9999," * 100_000}}),
    ],
    ids=["files", "folders", "links", "processes", "libraries", "log", "text"],
)
def test_a_document_longer_than_the_probes_is_refused(example: dict[str, Any], section: str, value: Any) -> None:
    """What takes a check seconds or the host's memory does not get that far."""
    with pytest.raises(ServiceError, match=r"longer than the probe's|it may have"):
        Document.parse(MARK + json.dumps({**example, section: value}).encode())


def test_as_much_as_a_document_may_have_is_judged(example: dict[str, Any]) -> None:
    digits = {path: {"text": "0-9999," * 18_000} for path in example["files"]}
    cards = {f"sys/class/drm/card{number}/device/uevent": {"text": "DRIVER=RKNPU"} for number in range(7500)}
    names = {folder: [f"card{number}" for number in range(1024)] for folder in example["folders"]}
    for files in (example["files"] | cards, dict(list(digits.items())[:40])):
        line = MARK + json.dumps({**example, "files": files, "folders": names}).encode()
        assert judged(Document.parse(line))


# The daemon


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (b'HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\n{"state": "loaded"}', {"text": '{"state": "loaded"}'}),
        (b"", {"text": ""}),
        (b"garbage\x00\xff", {"text": ""}),
        (b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 100_000, {"text": "x" * probe_module.MOST_TEXT}),
        (None, {"error": "timeout"}),
    ],
    ids=["status", "nothing", "garbage", "endless", "silence"],
)
def test_a_daemon_that_answers_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, answer: bytes | None, found: dict[str, str]
) -> None:
    path = str(tmp_path / "socket")
    monkeypatch.setattr(probe_module, "SOCKET", path)
    stop = threading.Event()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()

        def serve() -> None:
            link, _ = listener.accept()
            with link, suppress(OSError):
                link.recv(1000)
                if answer is None:
                    stop.wait(30)
                else:
                    link.sendall(answer)

        thread = threading.Thread(target=serve)
        thread.start()
        probe = Probe("/")
        probe.daemon()
        stop.set()
        thread.join(30)
    said = probe.found["files"][path.lstrip("/")]
    assert said == found or ("error" in found and "imeout" in said["error"])
