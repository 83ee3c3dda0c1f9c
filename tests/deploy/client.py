"""`rkedge deploy` onto a tree behind sshd: python -m tests.deploy.client DESTINATION ROOT WHEELS BUNDLE [LIBRARY]."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from rkboard.deploy import work
from rkboard.deploy.session import Session
from rkboard.deploy.work import Done, Person
from rkruntime.bundle.manifest import open_bundle
from rkruntime.errors import RKEdgeError


class Willing:
    """Somebody who agrees."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.sent = 0

    def say(self, text: str) -> None:
        self.told.append(text)

    def agrees(self, missing: Any) -> bool:
        return True

    def progress(self, done: int, total: int) -> None:
        pass


def put(
    destination: str, root: str, wheels: dict[str, Path], bundle: Path, library: Path | None, person: Person
) -> Done:
    work.wheels_for = lambda *_: wheels
    work.own_wheel = lambda: ("", b"".join(path.read_bytes() for path in wheels.values()))
    with Session(destination, person.say, root) as session:
        return work.deploy(session, open_bundle(bundle), library, person, offline=True)


if __name__ == "__main__":
    to, tree, folder, path, *rest = sys.argv[1:]
    found = {each.name: each for each in sorted(Path(folder).iterdir())}
    try:
        put(to, tree, found, Path(path), Path(rest[0]) if rest else None, Willing())
    except RKEdgeError as error:
        sys.exit(f"{type(error).__name__}: {error.message} {error.details}")
