"""A bundle: one folder with everything a board needs and a manifest, `rkedge.yaml`."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Final

import yaml

from rkruntime.bundle.references import MAX_REFERENCES, REFERENCES, References
from rkruntime.bundle.selftest import MAX_SELFTEST, SELFTEST, SelfTest
from rkruntime.checks.preflight import Context, ModelFacts
from rkruntime.errors import BundleError
from rkruntime.files import AnyPath, as_path, read_error, read_regular, sha256_file
from rkruntime.folders import hint_if_hidden, own_folder
from rkruntime.schema import Between, Length, build, check_value
from rkruntime.words import counted
from rkruntime.yamltext import MAX_FILE, load_yaml

SCHEMA: Final = "rkedge-bundle/1"
MANIFEST: Final = "rkedge.yaml"
TOKENIZER: Final = "tokenizer.json"
_MODELS: Final = (".rkllm", ".rkemu", ".safetensors")
LORA: Final = "model_lora"  # with the model file's suffix
TEMPLATE: Final = "chat_template.jinja"
GENERATION_CONFIG: Final = "generation_config.json"
PLAN: Final = "report/plan.json"
_READ: Final = (TOKENIZER, TEMPLATE, GENERATION_CONFIG)
# Limits in bytes. Gemma's tokenizer.json takes 17 MB (merges as transformers 4 writes them) to 34 MB; the other files
# take a few thousand bytes.
MAX_TOKENIZER: Final = 128 << 20
MAX_TEMPLATE: Final = 1 << 20
_MAX_SETTINGS: Final = 1 << 20
# Most bundles to list in a message about the folder that holds them.
_MOST_NAMED: Final = 8


# Lengths in characters; converters write far less. Names appear in each message and in each event of a stream; a path
# of 4,096 bytes has 16,384 characters if none of its bytes is UTF-8.
_Name = Annotated[str, Length(1024)]
_Text = Annotated[str, Length(1 << 14)]


@dataclass(frozen=True)
class Source:
    """Where weights came from: `revision` is a commit on the hub, `sha256` the hash over its weight files' hashes."""

    name: _Text
    revision: _Name = ""
    sha256: _Name = ""


@dataclass(frozen=True)
class FileRecord:
    """Size in bytes and SHA-256 (hex) of a file in the bundle."""

    size: Annotated[int, Between(0, 1 << 48)]
    sha256: _Name


_TokenId = Annotated[int, Between(0, (1 << 31) - 1)]
_TokenCount = Annotated[int, Between(0, 1 << 20)]


@dataclass(frozen=True)
class Manifest:
    """The contents of `rkedge.yaml`.

    Attributes:
        name: The folder's name when the bundle was made.
        family: `gemma2` or `gemma`.
        size: `2B`, `9B` or `27B`; the parameter count for others.
        target: `emulator` or `toolkit`.
        platform: SoC in lower case, such as `rk3588`.
        dtype: Quantized type, such as `w8a8`.
        max_context: Limit built into the model file, in tokens.
        toolkit_version: Release of rkllm-toolkit that made the model file, or that an emulator file imitates.
        model_file: Name of the model file in the folder.
        stop_token_ids: Tokens that end an answer.
        system_role: `fold` (Gemma: the system prompt goes into the first user turn) or `native`.
        special_tokens: Special tokens by their names in templates, such as `eos_token`, if they differ from Gemma's.
        vocab_size: Ids of the model, if they are more than its tokenizer's: rows that fill up its embedding; else 0.
        files: Every file except the manifest, by its path in the folder.
        options: The conversion's exact options, for reading and for repeating it.
    """

    name: _Name
    family: _Name
    size: _Name
    parameters: Annotated[int, Between(0, 1 << 48)]
    source: Source
    target: _Name
    platform: _Name
    dtype: _Name
    npu_cores: Annotated[int, Between(1, 16)]
    max_context: Context
    toolkit_version: _Name
    model_file: _Name
    bos_token_id: _TokenId
    stop_token_ids: tuple[_TokenId, ...]
    files: dict[str, FileRecord]
    adapters: tuple[Source, ...] = ()
    system_role: _Name = "fold"
    special_tokens: dict[str, _Name] = field(default_factory=dict)
    vocab_size: _TokenCount = 0
    created_by: _Name = ""
    licence: _Text = ""
    notes: tuple[_Text, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    schema: _Name = SCHEMA

    def to_yaml(self) -> str:
        """Return the manifest as YAML, in field order."""
        plain = json.loads(json.dumps(self._plain()))
        return yaml.safe_dump({"schema": plain.pop("schema"), **plain}, sort_keys=False, allow_unicode=True)

    @property
    def size_bytes(self) -> int:
        """Size of all files that the manifest lists."""
        return sum(record.size for record in self.files.values())

    @cached_property
    def fingerprint(self) -> str:
        """A hash over the manifest and thereby its files: bundles of the same name may hold different models."""
        return hashlib.sha256(json.dumps(self._plain(), sort_keys=True).encode()).hexdigest()

    def _plain(self) -> dict[str, Any]:
        """Return the fields; without a key that releases before it refuse, where it says nothing."""
        return {key: value for key, value in asdict(self).items() if key != "vocab_size" or value}

    @classmethod
    def from_yaml(cls, text: str) -> Manifest:
        """Parse and check a manifest. Raises BundleError with the key that is wrong."""
        try:
            data = load_yaml(text)
        except yaml.YAMLError as error:
            raise BundleError(f"{MANIFEST} is not YAML: {str(error)[:500]}") from error
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            found = data.get("schema") if isinstance(data, dict) else type(data).__name__
            raise BundleError(f"{MANIFEST} has the schema {str(found)[:80]!r}; this release reads {SCHEMA!r}.")
        manifest = build(cls, data, lambda what: BundleError(f"{MANIFEST}: {what}."))
        for name, record in manifest.files.items():
            _check_name(name)
            if not re.fullmatch(r"[0-9a-f]{64}", record.sha256):
                raise BundleError(f"{MANIFEST}: {record.sha256[:80]!r}, given for {name[:80]}, is not a SHA-256.")
        if manifest.model_file not in manifest.files:
            raise BundleError(f"{MANIFEST}: model_file {manifest.model_file[:80]!r} is not among its files.")
        return manifest


def _check_name(name: str) -> None:
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts or "\\" in name or "\0" in name or str(path) != name:
        raise BundleError(f"{MANIFEST} names a file outside the bundle: {name[:80]!r}.")


@dataclass(frozen=True)
class Bundle:
    """A folder and its manifest."""

    path: Path
    manifest: Manifest

    @property
    def model(self) -> Path:
        """The model file."""
        return self.path / self.manifest.model_file

    @property
    def lora(self) -> Path | None:
        """The adapter file, if the adapter is not merged into the model (`--lora-mode runtime`)."""
        name = LORA + PurePosixPath(self.manifest.model_file).suffix
        return self.path / name if name in self.manifest.files else None

    @property
    def unlisted(self) -> list[str]:
        """Files that would be loaded if the manifest listed them, such as an adapter or a chat template.

        Raises:
            BundleError: The folder cannot be listed.
        """
        try:
            found = [path.name for path in self.path.iterdir() if path.suffix in _MODELS or path.name in _READ]
        except OSError as error:
            raise read_error(self.path, error, BundleError) from error
        return sorted(name for name in found if name not in self.manifest.files)

    @property
    def tokenizer(self) -> Path:
        """tokenizer.json."""
        return self.path / TOKENIZER

    @property
    def template(self) -> Path:
        """chat_template.jinja."""
        return self.path / TEMPLATE

    @property
    def known(self) -> ModelFacts:
        """What is known about the model before it is loaded, for preflight."""
        made = self.manifest
        size = made.files[made.model_file].size
        return ModelFacts(made.platform, made.toolkit_version, made.dtype, made.npu_cores, made.max_context, size)

    def read_tokenizer(self) -> bytes:
        """Return tokenizer.json. Raises BundleError as `verify` does."""
        return self._read(TOKENIZER, MAX_TOKENIZER)

    def read_template(self) -> str | None:
        """Return chat_template.jinja, or None if the bundle has none. Raises BundleError as `verify` does."""
        if TEMPLATE not in self.manifest.files:
            return None
        try:
            return self._read(TEMPLATE, MAX_TEMPLATE).decode()
        except UnicodeDecodeError as error:
            raise BundleError(f"{self.template} is not UTF-8: {error}.") from error

    def read_generation_config(self) -> Mapping[str, Any]:
        """Return generation_config.json; empty if the bundle has none. Raises BundleError as `verify` does."""
        if GENERATION_CONFIG not in self.manifest.files:
            return {}
        return self._read_object(GENERATION_CONFIG)

    def read_plan(self) -> Mapping[str, Any]:
        """Return the plan of the conversion; empty if the bundle has none. Raises BundleError as `verify` does."""
        return self._read_object(PLAN) if PLAN in self.manifest.files else {}

    def _read_object(self, name: str) -> Mapping[str, Any]:
        try:
            found = json.loads(self._read(name, _MAX_SETTINGS))
        except (ValueError, RecursionError) as error:
            raise BundleError(f"{self.path / name} is not JSON: {error}.") from error
        if not isinstance(found, dict):
            raise BundleError(f"{self.path / name} is not a JSON object.")
        return found

    def read_selftest(self) -> SelfTest | None:
        """Return what `rkedge run --selftest` expects, None without it. Raises BundleError as `verify` does."""
        if SELFTEST not in self.manifest.files:
            return None
        return SelfTest.from_json(self._read(SELFTEST, MAX_SELFTEST), self.path / SELFTEST)

    def read_references(self) -> References | None:
        """Return the references that probes compare with, or None without any. Raises BundleError as `verify` does."""
        if REFERENCES not in self.manifest.files:
            return None
        return References.from_json(self._read(REFERENCES, MAX_REFERENCES), self.path / REFERENCES)

    def forget(self) -> None:
        """Remove the stamps that `verify` left for these files; call it before removing the files themselves."""
        for name, record in self.manifest.files.items():
            with suppress(OSError):
                path = self.path / name
                _Stamp(path, path.stat(), record.sha256).forget()

    def _read(self, name: str, limit: int) -> bytes:
        """Read a file once and compare it with the manifest, so that what is returned is what was hashed."""
        record, path = self._record(name), self._place(name)
        if record.size > limit:
            raise BundleError(
                f"{path} is over {limit >> 20} MiB according to the manifest; such files are far smaller."
            )
        try:
            data = read_regular(path, record.size)
        except OSError as error:
            if error.errno == errno.EFBIG:
                raise _changed(path) from error
            raise read_error(path, error, BundleError) from error
        if len(data) != record.size or hashlib.sha256(data).hexdigest() != record.sha256:
            raise _changed(path)
        return data

    def _record(self, name: str) -> FileRecord:
        if name not in self.manifest.files:
            raise BundleError(f"{MANIFEST} does not list {name[:80]}.")
        return self.manifest.files[name]

    def _place(self, name: str) -> Path:
        path = self.path / name
        # realpath, as Path.resolve raises RuntimeError for a loop of links.
        folder, place = (os.path.realpath(each) for each in (self.path, path))
        try:
            if os.path.commonpath([folder, place]) == folder and path.is_file():
                return path
        except OSError as error:
            raise read_error(path, error, BundleError) from error
        raise BundleError(f"The bundle {self.path} has no file {name}, which its manifest lists.")

    def verify(
        self,
        names: Sequence[str] | None = None,
        *,
        trust_stamps: bool = True,
        progress: Callable[[int], None] | None = None,
    ) -> None:
        """Compare files with the manifest: the size always, the SHA-256 once per state of a file.

        Hashing gigabytes takes seconds, so a verified file is not read again while its path, size, modification and
        change times and inode stay the same (stamps in the user's cache folder); `trust_stamps=False` reads every file.
        `progress` gets the size of each block read, in bytes; an exception from it ends the check.

        Raises:
            BundleError: A file is missing, truncated or changed, or the manifest does not list it.
            UsageError: `names` is not a list of names.
        """
        check_value("names", Sequence[str] | None, names)
        check_value("progress", Callable[..., object] | None, progress)
        for name in self.manifest.files if names is None else names:
            self._verify_file(name, trust_stamps, progress)

    def _verify_file(self, name: str, trust_stamps: bool, progress: Callable[[int], None] | None) -> None:
        record, path = self._record(name), self._place(name)
        try:
            state = path.stat()
        except OSError as error:
            raise read_error(path, error, BundleError) from error
        if state.st_size != record.size:
            raise BundleError(
                f"{path} has {counted(state.st_size, 'byte')}; the manifest says {record.size:,}."
                " The copy is truncated or changed."
            )
        stamp = _Stamp(path, state, record.sha256)
        if trust_stamps and stamp.known():
            return
        try:
            found = sha256_file(path, progress)
        except OSError as error:
            raise read_error(path, error, BundleError) from error
        if found != record.sha256:
            raise _changed(path)
        stamp.remember()


def _changed(path: Path) -> BundleError:
    return BundleError(f"{path} does not have the size and SHA-256 listed in the manifest: it was changed or damaged.")


class _Stamp:
    """A note in the cache folder that a file in exactly this state has this hash."""

    def __init__(self, path: Path, state: os.stat_result, sha256: str) -> None:
        # The change time is set by the kernel only: anyone with write access to a file can reset its other attributes.
        times = (state.st_mtime_ns, state.st_ctime_ns)
        self._text = json.dumps([os.path.realpath(path), state.st_size, *times, state.st_dev, state.st_ino, sha256])
        self._file = own_folder("cache") / "verified" / f"{sha256[:32]}-{state.st_ino}"

    def known(self) -> bool:
        try:
            return self._file.read_text() == self._text
        except (OSError, UnicodeDecodeError):
            return False

    def remember(self) -> None:
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            self._file.write_text(self._text)
        except OSError:
            # A read-only home only costs time at the next load.
            pass

    def forget(self) -> None:
        self._file.unlink(missing_ok=True)


def bundles_in(folder: Path) -> list[Path]:
    """List the bundles in a folder, complete or not, by name. Raises OSError."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith(".") and is_bundle(path))


def is_bundle(path: Path) -> bool:
    """Whether there is a bundle at `path`, complete or not."""
    return os.path.isfile(path / MANIFEST)  # noqa: PTH113 - false for every name that no file can have


def _not_a_bundle(folder: Path) -> BundleError:
    """Return the error for a folder without a manifest: what the folder is, and what to name instead."""
    if (folder / "config.json").is_file():
        hint = "Convert it first: rkedge convert CHECKPOINT -o BUNDLE"
        return BundleError(f"{folder} is a checkpoint, not a bundle.", hint=hint)
    if (folder / "adapter_config.json").is_file():
        hint = "Convert its base model with it: rkedge convert CHECKPOINT --lora ADAPTER -o BUNDLE"
        return BundleError(f"{folder} is an adapter, not a bundle.", hint=hint)
    if within := bundles_in(folder):
        names = ", ".join(path.name for path in within[:_MOST_NAMED])
        more = f" and {len(within) - _MOST_NAMED} more" if len(within) > _MOST_NAMED else ""
        return BundleError(f"{folder} is a folder of bundles, not a bundle.", hint=f"Name one of them: {names}{more}.")
    return BundleError(f"{folder} is not a bundle: it has no {MANIFEST}.")


def open_bundle(path: AnyPath) -> Bundle:
    """Read a bundle's manifest; `Bundle.verify` compares the files.

    Raises:
        BundleError: It is not a bundle, or its manifest is wrong.
        UsageError: It is not a path.
    """
    path = as_path("bundle", path)
    manifest = path / MANIFEST
    try:
        if not path.is_dir():
            message = f"{path} is not a folder." if path.exists() else f"There is no folder {path}."
            what_to_name = "Name the folder that `rkedge convert` wrote."
            raise BundleError(message, hint=hint_if_hidden(path) or what_to_name)
        if not manifest.is_file():
            raise _not_a_bundle(path)
        return Bundle(path, Manifest.from_yaml(read_regular(manifest, MAX_FILE).decode()))
    except OSError as error:
        hint = hint_if_hidden(path)
        raise BundleError(f"{manifest} cannot be read: {error.strerror or error}.", hint=hint) from error
    except UnicodeDecodeError as error:
        raise BundleError(f"{manifest} is not UTF-8: {error}.") from error
