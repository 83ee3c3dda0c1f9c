"""The manifest: what it refuses, and that a changed byte shows."""

import dataclasses
import os
import resource
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from rkruntime.bundle.manifest import MANIFEST, FileRecord, Manifest, Source, open_bundle
from rkruntime.errors import BundleError
from rkruntime.files import sha256_file


def make(folder: Path, data: bytes = b"weights" * 100) -> Manifest:
    folder.mkdir()
    model = folder / "model.rkemu"
    model.write_bytes(data)
    manifest = Manifest(
        name=folder.name,
        family="gemma2",
        size="2B",
        parameters=2_614_341_888,
        source=Source("google/gemma-2-2b-it", "abc"),
        adapters=(Source("pirate"),),
        target="emulator",
        platform="rk3588",
        dtype="w8a8",
        npu_cores=3,
        max_context=4096,
        toolkit_version="1.2.3",
        model_file="model.rkemu",
        bos_token_id=2,
        stop_token_ids=(1, 107),
        files={"model.rkemu": FileRecord(len(data), sha256_file(model))},
        options={"dtype": "w8a8", "lora": ["x"]},
    )
    (folder / MANIFEST).write_text(manifest.to_yaml())
    return manifest


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


def test_written_and_read_again(tmp_path: Path) -> None:
    manifest = make(tmp_path / "b")
    bundle = open_bundle(tmp_path / "b")
    assert bundle.manifest == manifest
    bundle.verify()


def test_a_key_that_says_nothing_is_left_out(tmp_path: Path) -> None:
    """Earlier releases refuse keys that they do not know, and hashes of manifests name answers that may be resumed."""
    manifest = make(tmp_path / "b")
    assert "vocab_size" not in manifest.to_yaml()
    padded = replace(manifest, vocab_size=256064)
    assert Manifest.from_yaml(padded.to_yaml()) == padded
    assert padded.fingerprint != manifest.fingerprint


def test_a_changed_byte_shows_even_after_it_was_right_once(tmp_path: Path) -> None:
    make(tmp_path / "b")
    bundle = open_bundle(tmp_path / "b")
    bundle.verify()
    data = bytearray(bundle.model.read_bytes())
    data[13] ^= 1
    bundle.model.write_bytes(data)
    with pytest.raises(BundleError, match="SHA-256"):
        bundle.verify()


def test_a_changed_byte_shows_when_size_and_time_are_put_back(tmp_path: Path) -> None:
    manifest = make(tmp_path / "b")
    bundle = open_bundle(tmp_path / "b")
    bundle.verify()
    bundle.verify()
    before = bundle.model.stat()
    with bundle.model.open("r+b") as file:
        file.write(b"W")
    os.utime(bundle.model, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert (bundle.model.stat().st_mtime_ns, bundle.model.stat().st_ino) == (before.st_mtime_ns, before.st_ino)
    with pytest.raises(BundleError, match="SHA-256"):
        bundle.verify()
    assert manifest.files["model.rkemu"].size == bundle.model.stat().st_size


@pytest.mark.parametrize("stranger", ["fifo", "/dev/zero"])
def test_a_file_that_is_none(tmp_path: Path, stranger: str) -> None:
    make(tmp_path / "b")
    bundle = open_bundle(tmp_path / "b")
    bundle.model.unlink()
    if stranger == "fifo":
        os.mkfifo(bundle.model)
    else:
        bundle.model.symlink_to(stranger)
    with pytest.raises(BundleError, match="has no file"):
        bundle.verify()


def test_a_manifest_of_20_gb_is_not_read(tmp_path: Path) -> None:
    make(tmp_path / "b")
    with (tmp_path / "b" / MANIFEST).open("r+b") as file:
        file.truncate(20 << 30)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(BundleError, match="more than 1,048,576 bytes"):
        open_bundle(tmp_path / "b")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # kB


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("max_context", 10**12),
        ("max_context", -5),
        ("max_context", 0),
        ("npu_cores", -1),
        ("npu_cores", 10**9),
        ("parameters", -1),
        ("bos_token_id", -1),
        ("bos_token_id", 1 << 31),
        ("stop_token_ids", [1, 1 << 40]),
    ],
)
def test_numbers_have_their_bounds(tmp_path: Path, key: str, value: object) -> None:
    make(tmp_path / "b")
    path = tmp_path / "b" / MANIFEST
    data = yaml.safe_load(path.read_text()) | {key: value}
    path.write_text(yaml.safe_dump(data))
    with pytest.raises(BundleError, match=rf"{key}.* is -?[\d,]+; it must be from"):
        open_bundle(tmp_path / "b")


TEXTS = [
    *("name", "family", "size", "target", "platform", "dtype", "toolkit_version", "model_file", "system_role"),
    *("created_by", "licence", "source.name", "source.revision", "source.sha256", "adapters.0.name", "notes.0"),
    *("special_tokens.eos_token", "files.model|rkemu.sha256", "schema", "x" * 100_000, "files." + "x" * 100_000),
]


@pytest.mark.parametrize("key", TEXTS, ids=[key[:20] for key in TEXTS])
def test_texts_have_their_bounds_and_so_do_messages(tmp_path: Path, key: str) -> None:
    """A manifest's texts come back in messages, logs and answers."""
    make(tmp_path / "b")
    path = tmp_path / "b" / MANIFEST
    data = yaml.safe_load(path.read_text())
    data["notes"], data["special_tokens"] = ["x"], {"eos_token": "x"}
    inner, (*folders, name) = data, [part.replace("|", ".") for part in key.split(".")]
    for folder in folders:
        inner = inner[int(folder)] if isinstance(inner, list) else inner[folder]
    inner[int(name) if isinstance(inner, list) else name] = "x" * 100_000
    path.write_text(yaml.safe_dump(data))
    with pytest.raises(BundleError) as caught:
        open_bundle(tmp_path / "b")
    assert len(caught.value.message) < 500


@pytest.mark.parametrize("sha256", ["", "0" * 63, "G" * 64, "../" * 21 + "x", "A" * 64])
def test_a_hash_is_one(tmp_path: Path, sha256: str) -> None:
    """It becomes part of a file's name in the cache."""
    make(tmp_path / "b")
    path = tmp_path / "b" / MANIFEST
    data = yaml.safe_load(path.read_text())
    data["files"]["model.rkemu"]["sha256"] = sha256
    path.write_text(yaml.safe_dump(data))
    with pytest.raises(BundleError, match="is not a SHA-256"):
        open_bundle(tmp_path / "b")


def test_a_cut_and_a_missing_file_show(tmp_path: Path) -> None:
    make(tmp_path / "b")
    bundle = open_bundle(tmp_path / "b")
    bundle.model.write_bytes(b"short")
    with pytest.raises(BundleError, match="5 bytes"):
        bundle.verify()
    bundle.model.unlink()
    with pytest.raises(BundleError, match=r"no file model\.rkemu"):
        bundle.verify()


def test_a_link_out_of_the_bundle_is_not_followed(tmp_path: Path) -> None:
    make(tmp_path / "b")
    model = tmp_path / "b" / "model.rkemu"
    model.rename(tmp_path / "elsewhere")
    model.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleError, match="has no file"):
        open_bundle(tmp_path / "b").verify()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"schema": "rkedge-bundle/9"}, "schema"),
        ({"npu_cores": "three"}, "npu_cores"),
        ({"max_context": True}, "max_context"),
        ({"model_file": "other"}, "not among its files"),
        ({"surprise": 1}, "unknown key surprise"),
        ({"files": {"../../etc/passwd": {"size": 1, "sha256": ""}}}, "outside"),
        ({"files": {"/etc/passwd": {"size": 1, "sha256": ""}}}, "outside"),
        ({"files": {"a": {"size": 1}}}, r"files\.a\.sha256 is missing"),
        ({"source": ["x"]}, "source"),
        ({"stop_token_ids": ["1"]}, r"stop_token_ids\[0\]"),
    ],
)
def test_wrong_manifests_name_the_key(tmp_path: Path, change: dict[str, object], message: str) -> None:
    make(tmp_path / "b")
    path = tmp_path / "b" / MANIFEST
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **change}))
    with pytest.raises(BundleError, match=message):
        open_bundle(tmp_path / "b")


@pytest.mark.parametrize("text", ["[" * 100_000, "schema: &a [1]\nname: *a", "schema: a\nschema: b"])
def test_manifests_that_would_crash_grow_or_say_two_things(tmp_path: Path, text: str) -> None:
    make(tmp_path / "b")
    (tmp_path / "b" / MANIFEST).write_text(text)
    with pytest.raises(BundleError, match=r"is not YAML: .*(nested|alias|twice)"):
        open_bundle(tmp_path / "b")


def test_every_required_key_is_missed(tmp_path: Path) -> None:
    make(tmp_path / "b")
    path = tmp_path / "b" / MANIFEST
    data = yaml.safe_load(path.read_text())
    for item in dataclasses.fields(Manifest):
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        path.write_text(yaml.safe_dump({key: value for key, value in data.items() if key != item.name}))
        if required:
            with pytest.raises(BundleError, match=item.name):
                open_bundle(tmp_path / "b")


@given(st.binary(max_size=300))
def test_any_bytes_are_a_manifest_or_a_clear_error(tmp_path_factory: pytest.TempPathFactory, data: bytes) -> None:
    folder = tmp_path_factory.mktemp("b")
    (folder / MANIFEST).write_bytes(data)
    with pytest.raises(BundleError):
        open_bundle(folder)


def test_not_a_bundle(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no folder"):
        open_bundle(tmp_path / "nothing")
    with pytest.raises(BundleError, match="not a bundle"):
        open_bundle(tmp_path)


def test_a_changed_byte_shows_with_its_time_put_back(tmp_path: Path) -> None:
    make(tmp_path / "b")
    bundle = open_bundle(tmp_path / "b")
    bundle.verify()
    state = bundle.model.stat()
    with bundle.model.open("r+b") as file:
        file.write(b"W")
    os.utime(bundle.model, ns=(state.st_atime_ns, state.st_mtime_ns))
    with pytest.raises(BundleError, match="SHA-256"):
        bundle.verify()
