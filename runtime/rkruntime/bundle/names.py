"""Find bundles by name: in the current folder, among the user's own bundles, and among those of the demo."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path
from typing import Final, NamedTuple

from rkruntime.bundle.manifest import bundles_in, is_bundle
from rkruntime.errors import BundleError, UsageError
from rkruntime.folders import own_folder

# A name as `rkedge convert` makes it, gemma-2-2b-it-rk3588-w8a8-1.2.3: the model's, then SoC, type and release.
_MADE_FOR: Final = re.compile(r"(.+)-rk\d\w*-[a-z]+\d\w*-\d+\.[\w.]+")


class _Found(NamedTuple):
    """A bundle's path, and the place where it was found."""

    path: Path
    place: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def short(self) -> str:
        """The name without SoC, type and release."""
        made = _MADE_FOR.fullmatch(self.name)
        return made[1] if made else self.name


def own_bundles() -> Path:
    """Return the folder for the user's bundles; it may not exist."""
    return own_folder("data") / "bundles"


def _places() -> list[Path]:
    """Return the folders in which to look for bundles, in this order; of several demos, the newest first."""
    demos = [path for path in own_folder("cache").glob("demo-*") if path.is_dir()]
    return [Path(), own_bundles(), *sorted(demos, key=lambda path: path.stat().st_mtime, reverse=True)]


def _all() -> list[_Found]:
    """Return the bundles of all places, each once."""
    found: dict[str, _Found] = {}
    for place in _places():
        try:
            for path in bundles_in(place):
                found.setdefault(os.path.realpath(path), _Found(path, place))
        except OSError:  # noqa: PERF203 - a place need not be there, nor be readable
            continue
    return list(found.values())


def _called(name: str, bundles: list[_Found]) -> list[_Found]:
    """Return the bundles that a name means: the first of that name, else those of that short name in one place."""
    exact = [one for one in bundles if one.name == name]
    short = [one for one in bundles if one.short == name]
    return exact[:1] or [one for one in short if one.place == short[0].place]


def named_bundles() -> dict[str, Path]:
    """Return all bundles by the shortest text that finds each: its path if another bundle of its name hides it."""
    bundles = _all()

    def shortest(one: _Found) -> str:
        return next((name for name in (one.short, one.name) if _called(name, bundles) == [one]), str(one.path))

    return {shortest(one): one.path for one in bundles}


def name_of(path: Path) -> str:
    """Return the shortest text that finds the bundle at `path`."""
    same = (name for name, one in named_bundles().items() if os.path.realpath(one) == os.path.realpath(path))
    return next(same, str(path))


def find_bundle(named: str, what: str = "bundle", hint: str = "") -> Path:
    """Return the path of what the user named: a path, or a bundle's full or short name.

    A path comes first, but a folder that is not a bundle does not hide a bundle of the same name elsewhere.

    Args:
        what: What the user was to name, for messages.
        hint: What else the user can do, for the error's hint.

    Raises:
        BundleError: There is nothing of that name.
        UsageError: Several bundles have that name, or it is empty.
    """
    if not named:  # a variable that was not set would mean the current folder
        raise UsageError(f"The {what} has an empty name.", hint="Name it, or write . for the current folder.")
    path = Path(named)
    if is_bundle(path) or named != path.name:
        return path
    bundles = _all()
    match _called(named, bundles):
        case [one]:
            return one.path
        case [_, *_] as several:
            names = ", ".join(one.name for one in several)
            raise UsageError(f"Several bundles are called {named}.", hint=f"Name one of them in full: {names}.")
    if os.path.lexists(path):
        return path
    near = difflib.get_close_matches(named, [name for one in bundles for name in (one.short, one.name)], n=1)
    nearest = f"Did you mean {near[0]}? " if near else ""
    raise BundleError(
        f"There is no {what} {named}, neither here nor in {own_bundles()}.",
        hint=f"{nearest}`rkedge list` shows the bundles that there are; `rkedge demo` makes one to try. {hint}".strip(),
    )
