"""The pages' commands, as a newcomer types them: in order, as written, on the demo model.

Commands stand in blocks of their own kind (```sh). What needs something that is not in the repository says so in a
comment, `# needs ...`, behind the line or, as a line of its own, for the rest of its block. All others must succeed.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
from tests.pages import PAGES as WRITTEN

from rkconvert.demo import adapter, checkpoint
from rkruntime.background import Background
from rkruntime.folders import own_folder

ROOT = Path(__file__).parents[1]
PAGES = [path for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))] if path.name not in WRITTEN]
# What a line may need, and a sign of that in the line or its block: a command that works anywhere is not to be marked.
NEEDS = {
    "a board": r"@board|rkedge bench board:|/usr/lib/|sudo|/opt/|rkedge doctor|rkedge clocks -|docker compose",
    "the hub": r"\w+/[\w.-]+|--recipe",
    "the toolkit": r"toolkit|--recipe",
    "the network": r"pip",
    "root": r"sudo",
    "debhelper": r"make deb",
    "the packages for training": r"train_lora",
    "a log": r"\.log",
    "a program": r"your_program",
    "programs of others": r"conformance",
    "several boards": r"rkedge fleet",
    "a proxy of others": r"litellm|nginx",
}
# What people have: models and adapters by the names that pages use.
CHECKPOINTS = ("gemma-2-2b-it", "gemma-2-9b-it", "my-fine-tune")
ADAPTERS = ("my-adapter", "my-lora", "a", "b", "pirate", "polite")
# A daemon runs until somebody ends it; `make demo` would install what is installed here.
RUN = r"""
run() {
    case "$1" in
    "rkedge serve "*)
        bash -c "exec $1" & local pid=$!
        until rkedge chat < /dev/null 2> /dev/null; do kill -0 $pid || return; done
        kill $pid && wait $pid ;;
    "make demo") rkedge demo ;;
    *) eval "$1" < /dev/null ;;
    esac
}
"""


class Line(NamedTuple):
    """A command, what it needs according to the page, and the block that it stands in."""

    command: str
    needs: str
    block: str


def blocks(text: str, kind: str) -> Iterator[str]:
    for indent, body in re.findall(rf"^( *)```{kind}\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL):
        yield "\n".join(line.removeprefix(indent) for line in body.splitlines())


def lines(text: str) -> Iterator[Line]:
    for block in blocks(text, "sh"):
        for_all = ""
        for line in re.split(r"\n(?![ '])", block):
            command, _, comment = (part.strip() for part in f"{line} # ".partition(" # "))
            named = re.match(rf"#? *needs ({'|'.join(NEEDS)})\b", line if line.startswith("#") else comment)
            if line.startswith("#"):
                for_all = named[1] if named else for_all
            else:
                yield Line(command, named[1] if named else for_all, block)


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Mapping[str, str]]:
    """A new user's, with this rkedge in the place of what `make demo` installs, and the emulator built already.

    As there, torch is missing.
    """
    (tmp_path / "base").mkdir()
    hidden = "import sys\nsys.modules.update(dict.fromkeys(('torch', 'transformers', 'peft', 'gguf')))\n"
    (tmp_path / "base" / "sitecustomize.py").write_text(hidden)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "base"))
    cache = tmp_path / "cache" / "rkedge"
    cache.mkdir(parents=True)
    (cache / "emulator").symlink_to(own_folder("cache") / "emulator")
    for kind in ("CACHE", "CONFIG", "DATA", "STATE"):
        monkeypatch.setenv(f"XDG_{kind}_HOME", str(tmp_path / kind.lower()))
    for variable, value in {"RKEDGE_SOCKET": str(tmp_path / "socket"), "HF_HUB_OFFLINE": "1"}.items():
        monkeypatch.setenv(variable, value)
    yield {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    assert not Background().stop()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A clone, as far as pages use one, with a person's own files."""
    clone = tmp_path / "clone"
    clone.mkdir()
    (clone / ".venv").symlink_to(sys.prefix)
    for name in ("converter", "Makefile"):
        (clone / name).symlink_to(ROOT / name)
    return clone


def give(folder: Path, page: str) -> None:
    """What the page takes for granted."""
    for name in CHECKPOINTS:
        (folder / name).symlink_to(checkpoint())
    for name in ADAPTERS:
        (folder / name).symlink_to(adapter())
    shutil.copy(checkpoint() / "config.json", folder)
    for name, text in re.findall(r"^    # (\w+\.yaml)\n((?:    .*\n)+)", page, re.MULTILINE):
        (folder / name).write_text(re.sub("^    ", "", text, flags=re.MULTILINE))


def play(commands: list[str], python: list[str], folder: Path, environment: Mapping[str, str]) -> None:
    steps = "".join(f"echo {_quoted(f'$ {one}')}\nrun {_quoted(one)} || exit\n" for one in commands)
    done = subprocess.run(
        ["bash", "-c", RUN + steps],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "Traceback" not in done.stderr
    for program in python:
        done = subprocess.run(
            [sys.executable, "-c", program], cwd=folder, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr


def _quoted(text: str) -> str:
    return "'" + text.replace("'", "'\\''") + "'"


def runnable(page: Path) -> list[str]:
    """The page's commands that need nothing. Links to the demo's weights, for whoever has no others, come first."""
    found = [line.command for line in lines(page.read_text()) if not line.needs]
    return sorted((one for one in found if one != "make test"), key=lambda one: not one.startswith("ln -s"))


@pytest.mark.parametrize(
    "page", [page for page in PAGES if runnable(page) or "```python" in page.read_text()], ids=lambda page: page.name
)
def test_what_a_page_says_to_type_works(page: Path, folder: Path, environment: Mapping[str, str]) -> None:
    commands, python = runnable(page), list(blocks(page.read_text(), "python"))
    if page.name != "README.md":
        give(folder, page.read_text())
        if any("my-bundle" in one for one in [*commands, *python]):
            commands.insert(0, "rkedge convert ./gemma-2-2b-it -q -o my-bundle")
    play(commands, python, folder, environment)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_marks_are_where_they_belong(page: Path) -> None:
    text = page.read_text()
    for line in lines(text):
        if line.needs:
            assert re.search(NEEDS[line.needs], line.command), line
    marks = re.findall(r"# needs .*", "\n".join(blocks(text, "sh")))
    assert [mark for mark in marks if not re.match(rf"# needs ({'|'.join(NEEDS)})\b", mark)] == []
    # Indented lines are text, output or settings. (The steps for other projects' CI have a test of their own.)
    rest = text.split("## In another project's CI")[0]
    assert re.findall(r"^ {4,}(?:rkedge|sudo|make|pip|uv) .*", rest, re.MULTILINE) == []


def test_marks_are_read() -> None:
    page = "```sh\nrkedge a # needs root: x\nrkedge b # c\n# needs a board\nd\nx '\n  y'\n```\n   ```sh\n   z\n   ```\n"
    assert [(line.command, line.needs) for line in lines(page)] == [
        ("rkedge a", "root"), ("rkedge b", ""), ("d", "a board"), ("x '\n  y'", "a board"), ("z", ""),
    ]  # fmt: skip


def test_a_line_that_fails_is_noticed(folder: Path, environment: Mapping[str, str]) -> None:
    with pytest.raises(AssertionError, match="rkedge inspect none"):
        play(["rkedge inspect none", "true"], [], folder, environment)


def has_an_index() -> bool:
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", os.devnull, "click"]
    return b"No matching distribution" not in subprocess.run(command, capture_output=True, check=False).stderr


@pytest.mark.long
def test_a_fresh_clone(tmp_path: Path) -> None:
    """With `make demo` as it is, in an environment and a home of its own."""
    if not has_an_index():
        pytest.skip("pip reaches no index")
    clone = tmp_path / "clone"
    subprocess.run(["git", "clone", "--quiet", "--local", ROOT, clone], check=True)
    commands = [one for one in runnable(clone / "README.md") if one != "make demo"]
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "PIP_INDEX_URL") if name in os.environ}
    home = {**kept, "HOME": str(tmp_path), "RKEDGE_SOCKET": str(tmp_path / "socket"), "PYTHON": sys.executable}
    play(["make demo >&2", *commands], [], clone, home)
