"""Bundles, libraries and programs, each in a folder of its own that appears when all its files are right."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from rkboard.deploy.there.ground import Ground, Refused, clear, make_folder, sha256, sync, write

RECORD = ".deploy.json"
KINDS = ("programs", "libraries", "bundles")
_HASH = re.compile(r"[0-9a-f]{64}")
_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,199}")
_BLOCK = 1 << 20
# Bytes of a disk to leave free, which the system itself needs to go on.
_SPARE = 64 << 20


class Store:
    """The complete parts below /opt/rkedge, and the files received for others."""

    def __init__(self, ground: Ground) -> None:
        self._ground = ground
        self.incoming = ground.home / "incoming"

    def place(self, kind: str, name: str) -> Path:
        """Return the folder of a part."""
        if kind not in KINDS or not _ID.fullmatch(name):
            raise Refused(f"{kind!r}, {name!r} cannot be the name of a folder.")
        return self._ground.home / kind / name

    def record(self, kind: str, name: str) -> dict[str, Any] | None:
        """Return the record of a complete part; None if it is not complete."""
        try:
            found: dict[str, Any] = json.loads((self.place(kind, name) / RECORD).read_text())
        except (OSError, ValueError, RecursionError):
            return None
        whole = isinstance(found, dict) and all(isinstance(found.get(key), dict) for key in ("files", "info"))
        return found if whole else None

    def parts(self) -> dict[str, dict[str, Any]]:
        """Return the records of all complete parts, by kind and name."""
        found: dict[str, dict[str, Any]] = {}
        for kind in KINDS:
            folder = self._ground.home / kind
            names = sorted(os.listdir(folder)) if folder.is_dir() else []
            records = {name: self.record(kind, name) for name in names if _ID.fullmatch(name)}
            found[kind] = {name: record for name, record in records.items() if record is not None}
        return found

    def is_whole(self, kind: str, name: str, *, hashed: bool) -> bool:
        """Whether a part is there with files of the right sizes, and with the right hashes if `hashed`."""
        record = self.record(kind, name)
        folder = self.place(kind, name)
        return record is not None and all(
            (folder / file).is_file()
            and (folder / file).stat().st_size == size
            and (not hashed or sha256(folder / file) == digest)
            for file, (size, digest) in record["files"].items()
        )

    def blob(self, digest: str) -> Path:
        """Return where a file with this hash is received."""
        if not _HASH.fullmatch(digest):
            raise Refused(f"{digest[:80]!r} is not a SHA-256.")
        return self.incoming / digest

    def held(self, files: Mapping[str, int]) -> dict[str, int]:
        """Return how many bytes of each file are here, given sizes by hash. A file that another part has is linked."""
        make_folder(self.incoming)
        os.chmod(self.incoming, 0o700)
        here = {
            digest: folder / file
            for kind, records in self.parts().items()
            for folder, record in ((self._ground.home / kind / name, record) for name, record in records.items())
            for file, (_, digest) in record["files"].items()
        }
        for digest in files:
            blob = self.blob(digest)
            if digest in here and not blob.exists() and here[digest].is_file() and sha256(here[digest]) == digest:
                os.link(here[digest], blob)
        found = {digest: self._size(digest, size) for digest, size in files.items()}
        need = sum(size - found[digest] for digest, size in files.items())
        free = shutil.disk_usage(self.incoming).free
        if need + _SPARE > free:
            raise Refused(
                f"{need / 1e9:.2f} GB are to come, and {free / 1e9:.2f} GB are free on the disk of /opt/rkedge.",
                "Remove a bundle that is not used (rkedge status names them): rkedge undeploy USER@BOARD --bundle NAME",
            )
        return found

    def _size(self, digest: str, size: int) -> int:
        blob = self.blob(digest)
        if not blob.exists():
            return 0
        if blob.stat().st_size > size:
            blob.unlink()
            return 0
        return blob.stat().st_size

    def receive(self, digest: str, size: int, offset: int, stream: BinaryIO) -> bool:
        """Append the rest of a file from a stream; return whether its hash is right. A wrong file is removed."""
        blob = self.blob(digest)
        held = blob.stat().st_size if blob.exists() else 0
        if offset != held or offset > size:
            raise Refused(f"{held} bytes of {digest[:12]} are here, not {offset}.")
        with blob.open("ab") as file:
            left = size - offset
            while left and (block := stream.read(min(_BLOCK, left))):
                file.write(block)
                left -= len(block)
            file.flush()
            os.fsync(file.fileno())
        if left:
            raise EOFError  # the connection is gone; the bytes received are kept
        if sha256(blob) == digest:
            return True
        blob.unlink()
        return False

    def put(self, kind: str, name: str, files: Mapping[str, tuple[int, str]], info: Mapping[str, Any]) -> None:
        """Make a part of received files: its folder appears when it is complete."""
        place = self.place(kind, name)
        building = self.incoming / f"{kind}-{name}"
        shutil.rmtree(building, ignore_errors=True)
        building.mkdir()
        for file, (size, digest) in files.items():
            path = building / _inside(file)
            path.parent.mkdir(parents=True, exist_ok=True)
            blob = self.blob(digest)
            if not blob.is_file() or blob.stat().st_size != size:
                raise Refused(f"{file} has not come.", "Start the same command again.")
            os.link(blob, path)
        write(building / RECORD, json.dumps({"files": files, "info": info}).encode(), 0o640)
        if kind == "bundles":
            self._ground.for_daemon(building)
        else:
            for file in files:
                os.chmod(building / file, 0o755)  # noqa: S103 - a library
            os.chmod(building, 0o755)  # noqa: S103 - for everybody to read
        for parent, _, _ in os.walk(building):
            sync(Path(parent))
        make_folder(place.parent)
        clear(place)
        building.rename(place)
        sync(place.parent)
        for _, digest in files.values():
            self.blob(digest).unlink(missing_ok=True)

    def drop(self, kind: str, name: str) -> None:
        """Remove a part, complete or not."""
        clear(self.place(kind, name))


def _inside(name: str) -> PurePosixPath:
    parts = PurePosixPath(name).parts
    if not parts or "\0" in name or "/".join(parts) != name or {"..", "/", RECORD} & set(parts):
        raise Refused(f"{name[:80]!r} is not a file within a bundle.")
    return PurePosixPath(name)
