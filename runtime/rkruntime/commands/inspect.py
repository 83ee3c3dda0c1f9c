"""`rkedge inspect`: what a bundle, a model file or a library is."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

import click

from rkruntime.cli.flags import json_option
from rkruntime.cli.options import BundleName
from rkruntime.errors import InputError, UsageError
from rkruntime.files import open_regular
from rkruntime.printable import one_line
from rkruntime.terminal import say, say_json

_ELF: Final = b"\x7fELF"


def _bundle(path: Path, verify: bool) -> dict[str, Any]:
    from rkruntime.bundle.manifest import open_bundle

    bundle = open_bundle(path)
    if verify:
        bundle.verify(trust_stamps=False)
    plain: dict[str, Any] = json.loads(json.dumps(asdict(bundle.manifest)))
    return {"kind": "bundle", "verified": verify, **plain}


def _rkemu(path: Path, verify: bool) -> dict[str, Any]:
    from rkruntime.bundle.rkemu import read_container

    container = read_container(path)
    if verify:
        for name in container.tensors:
            container.read(name)
    return {
        "kind": "model file of the emulator (.rkemu)",
        "verified": verify,
        "file_size": container.file_size,
        "tensors": len(container.tensors),
        "fingerprint": container.fingerprint,
        **{key: value for key, value in container.metadata.items() if not isinstance(value, (list, tuple))},
    }


def _rkllm(path: Path, _: bool) -> dict[str, Any]:
    from rkruntime.bundle.rkllm_file import read_rkllm

    return {"kind": "model file of the vendor's toolkit (.rkllm)", **read_rkllm(path).as_dict()}


def _library(path: Path, _: bool) -> dict[str, Any]:
    from rkruntime.library.identify import inspect_library

    library = inspect_library(path)
    kind = "RKLLM runtime library" if library.functions else "a program or another library"
    return {"kind": kind, **library.as_dict()}


def _reader(path: Path) -> Callable[[Path, bool], dict[str, Any]]:
    """Choose the reader for a folder or file by the file's first bytes, not by its name."""
    from rkruntime.bundle import rkemu

    if path.is_dir():
        return _bundle
    try:
        with open_regular(path) as file:
            head = file.read(8)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror or error}.") from error
    readers = {rkemu.MAGIC: _rkemu, _ELF: _library}
    # The reader of .rkllm files has a message for everything else.
    return next((reader for magic, reader in readers.items() if head.startswith(magic)), _rkllm)


def _lines(values: Mapping[str, Any], indent: str = "") -> list[str]:
    width = max(map(len, values), default=0)
    lines = []
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            lines += [f"{indent}{one_line(name)}", *_lines(value, indent + "  ")]
        else:
            lines.append(f"{indent}{one_line(name):{width}}  {_text(value)}")
    return lines


def _text(value: Any) -> str:
    if value is None or value in ("", [], {}):
        return "-"
    if isinstance(value, list):
        return ", ".join(map(_text, value))
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int):
        return f"{value:,}"
    return one_line(str(value))


@click.command("inspect")
@click.argument("path", metavar="PATH", type=BundleName("bundle or file"))
@click.option("--verify", is_flag=True, help="Read every byte and check it against the checksums.")
@json_option()
def run(path: Path, verify: bool, as_json: bool) -> None:
    """Say what PATH is: a bundle (also by its name), a model file (.rkemu, .rkllm) or a librkllmrt.so.

    Nothing is executed. A .rkllm file has no checksum; only its plain header fields are read.
    """
    reader = _reader(path)
    if verify and reader in (_rkllm, _library):
        raise UsageError(f"{path} does not contain a checksum.", hint="Verify the bundle that it belongs to.")
    values = reader(path, verify)
    if as_json:
        say_json({"path": str(path), **values})
    else:
        if values.get("verified") is False:
            values["verified"] = "not asked (--verify)"
        say("\n".join(_lines(values)))
