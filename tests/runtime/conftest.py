"""The demo model's tokenizer, two that are meant to fool us, a library that misbehaves, and an engine without one."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from rkboard.emulator import build as emulator
from rkboard.emulator.abi_header import HEADER, header
from rkconvert.demo import questions
from rkconvert.demo import tokenizer as demo_tokenizer
from rkruntime.bundle.manifest import Bundle, FileRecord, Source
from rkruntime.files import sha256_file
from rkruntime.testing import FakeEngine, fake_manifest
from rkruntime.text.tokenizer import Tokenizer

GUESSED = frozenset(os.environ.get("RKEMU_GUESS", "").split(","))
DOUBLE = Path(__file__).parent / "engine" / "double.cc"


def pytest_runtest_setup(item: pytest.Item) -> None:
    marker = item.get_closest_marker("usual")
    other = GUESSED.intersection(marker.args if marker else ())
    if other:
        pytest.skip(f"is about the alternative to {', '.join(sorted(other))}")


class Interrupt(BaseException):
    """As KeyboardInterrupt, at which pytest would end the whole run."""


def interrupt(seconds: float, act: Callable[[], object]) -> None:
    """Act, and let a signal's handler raise after this time, if acting takes that long.

    A context manager could not catch what is raised while Python steps into its __exit__.
    """
    armed = [True]

    def leave(*_: object) -> None:
        if armed:
            raise Interrupt

    before = signal.signal(signal.SIGALRM, leave)
    try:
        try:
            signal.setitimer(signal.ITIMER_REAL, seconds)
            act()
        finally:
            armed.clear()
    except Interrupt:
        pass
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="session")
def tokenizer_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """tokenizer.json of the demo model, learnt anew: it needs no checkpoint."""
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    texts = [text for row in questions() for text in (row.question, row.answer, row.pirate)]
    demo_tokenizer.build(texts).save(str(path))
    return path


@pytest.fixture(scope="session")
def tokenizer(tokenizer_file: Path) -> Tokenizer:
    return Tokenizer.parse(tokenizer_file.read_bytes(), tokenizer_file)


@pytest.fixture(scope="session")
def gemma_like_file(tokenizer_file: Path) -> Path:
    """As Gemma 2's own file: most control tokens are not called special, and text is among the added tokens."""
    data = json.loads(tokenizer_file.read_text())
    for token in data["added_tokens"]:
        token["special"] = token["content"] in ("<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>")
    vocab = data["model"]["vocab"]
    for text in ("\n", "\n\n", "▁▁", "<table>", "</h1>", "[toxicity=0]"):
        index = vocab.setdefault(text, len(vocab))
        data["added_tokens"].append(
            {"id": index, "content": text, "special": False, "normalized": False}
            | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        )
    path = tokenizer_file.parent / "gemma-like.json"
    path.write_text(json.dumps(data))
    return path


@pytest.fixture(scope="session")
def treacherous_file(tokenizer_file: Path) -> Path:
    """Merges that end in control tokens, and a normalizer that turns other characters into theirs."""
    data = json.loads(tokenizer_file.read_text())
    vocab, merges = data["model"]["vocab"], []
    for target in ("<eos>", "<end_of_turn>", "<unused7>"):
        for character in target:
            vocab.setdefault(character, len(vocab))
        for end in range(2, len(target) + 1):
            vocab.setdefault(target[:end], len(vocab))
            merges.append([target[: end - 1], target[end - 1]])
    data["model"]["merges"] = merges + data["model"]["merges"]
    data["normalizer"] = {"type": "Sequence", "normalizers": [{"type": "NFKC"}, data["normalizer"]]}
    for token in data["added_tokens"]:
        token["normalized"] = True
        token["special"] = token["content"] not in ("<unused7>", "<mask>")
    path = tokenizer_file.parent / "treacherous.json"
    path.write_text(json.dumps(data))
    return path


def build_double(release: str, folder: Path, arch: str | None = None) -> Path:
    """The misbehaving library of a release, made in `folder`, for this machine or another."""
    library = folder / "librkllmrt.so"
    (folder / HEADER).write_text(header(release))
    command = [*emulator.find_compiler(arch).command, "-std=c++17", "-O1", "-fPIC", "-shared", f"-I{folder}"]
    subprocess.run([*command, "-o", library, DOUBLE], check=True)
    return library


@pytest.fixture(scope="session")
def double(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Builds the misbehaving library of a release, for this machine or another."""

    @functools.cache
    def build(release: str, arch: str | None = None) -> Path:
        return build_double(release, tmp_path_factory.mktemp("double"), arch)

    return build


@pytest.fixture
def fake_engine(tokenizer: Tokenizer) -> Callable[..., FakeEngine]:
    """Makes a FakeEngine from the answers it shall give."""
    return lambda *answers, **facts: FakeEngine(list(answers), tokenizer.encode, **facts)


def with_file(bundle: Bundle, name: str, content: str | bytes | None) -> Bundle:
    """The bundle with another content of a file, or without it, and a manifest that says so."""
    files = {key: record for key, record in bundle.manifest.files.items() if key != name}
    path = bundle.path / name
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        files[name] = FileRecord(path.stat().st_size, sha256_file(path))
    manifest = replace(bundle.manifest, files=files)
    (bundle.path / "rkedge.yaml").write_text(manifest.to_yaml())
    return Bundle(bundle.path, manifest)


@pytest.fixture
def fake_bundle(tmp_path: Path, tokenizer_file: Path, tokenizer: Tokenizer) -> Bundle:
    """A bundle with a real tokenizer and no model worth the name."""
    folder = tmp_path / "demo-rk3588-w8a8-1.2.3"
    folder.mkdir()
    shutil.copy(tokenizer_file, folder / "tokenizer.json")
    (folder / "generation_config.json").write_text('{"do_sample": false}')
    (folder / "model.rkemu").write_bytes(b"none")
    files = {
        path.name: FileRecord(path.stat().st_size, sha256_file(path)) for path in folder.iterdir() if path.is_file()
    }
    manifest = fake_manifest(
        name=folder.name,
        size="1M",
        parameters=1_116_288,
        source=Source("demo"),
        max_context=512,
        bos_token_id=tokenizer.control["<bos>"],
        stop_token_ids=(tokenizer.control["<eos>"], tokenizer.control["<end_of_turn>"]),
        files=files,
    )
    (folder / "rkedge.yaml").write_text(manifest.to_yaml())
    return Bundle(folder, manifest)
