"""The releases of librkllmrt.so and the layout of each. To add a release, add a row to RELEASES (docs/abi.md).

Source of versions and layouts: the public headers `rkllm.h` of airockchip/rknn-llm, measured with four compilers
(tests/data/rkllm-abi); 1.3.1 from a public description of its one change.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from rkruntime.errors import LibraryError, UsageError

_BY_VALUE = (
    "releases 1.0.x take their parameters by value, have no token input and no multi-turn cache, "
    "and report success after a failed load"
)


@dataclass(frozen=True)
class Release:
    """One release.

    Attributes:
        version: As in the library's version text, such as `1.2.1b1`.
        layout: Releases with the same id have the same structures, enums, callbacks and prototypes.
        evidence: `measured` with compilers on the release's header, or `computed` from a description.
        refused: Why RKEdge does not call it; empty if it does.
        emulated: Whether the emulator can be built for it.
    """

    version: str
    layout: str
    evidence: str = "measured"
    refused: str = ""
    emulated: bool = True


RELEASES: Final[dict[str, Release]] = {
    release.version: release
    for release in (
        Release("1.0.0", "L1", refused=_BY_VALUE, emulated=False),
        Release("1.0.1", "L2", refused=_BY_VALUE, emulated=False),
        Release("1.0.2b", "L2", refused=_BY_VALUE, emulated=False),
        Release("1.1.0", "L3"),
        Release("1.1.1", "L3"),
        Release("1.1.2", "L3"),
        Release("1.1.3", "L3"),
        Release("1.1.4", "L3"),
        Release("1.2.0", "L4"),
        Release("1.2.1b1", "L5"),
        Release("1.2.1", "L6"),
        Release("1.2.2", "L6"),
        Release("1.2.3", "L6"),
        Release("1.3.0", "L7"),
        Release("1.3.1", "L8", evidence="computed", emulated=False),
    )
}
"""Every known release by its version, oldest first; `since` and `until` follow this order."""

LAYOUTS: Final[dict[str, tuple[str, ...]]] = {
    layout: tuple(item.version for item in RELEASES.values() if item.layout == layout)
    for layout in dict.fromkeys(item.layout for item in RELEASES.values())
}
"""The versions of each layout."""

OLDEST: Final = "1.0.0"
CALLABLE: Final = tuple(item.version for item in RELEASES.values() if not item.refused)
EMULATED: Final = tuple(item.version for item in RELEASES.values() if item.emulated)
DEFAULT_RELEASE: Final = "1.2.3"
_ORDER: Final = {version: at for at, version in enumerate(RELEASES)}


def within(version: str, since: str, until: str) -> bool:
    """Whether a release lies between two others, both included; an empty `until` means no upper limit."""
    return _ORDER[since] <= _ORDER[version] and (not until or _ORDER[version] <= _ORDER[until])


def check_release(version: str, among: Sequence[str] = CALLABLE, owner: str = "RKLLM") -> Release:
    """Return the release with exactly this version. Raises UsageError, which lists the releases in `among`."""
    if version in among:
        return RELEASES[version]
    refused = RELEASES[version].refused if version in RELEASES else ""
    reason = f": {refused}" if refused else "" if version in RELEASES else " that RKEdge knows"
    raise UsageError(f"{owner} has no release {version!r}{reason}.", hint=f"Use one of {', '.join(among)}.")


def release_named(version: str) -> Release:
    """Return the release that the user named. Raises LibraryError if it does not exist or is refused."""
    release = RELEASES.get(version)
    if release is None:
        raise LibraryError(
            f"There is no layout for librkllmrt.so {version}.", hint=f"Known releases: {', '.join(CALLABLE)}."
        )
    if release.refused:
        raise LibraryError(
            f"librkllmrt.so {version} is not supported: {release.refused}.",
            hint="Install librkllmrt.so 1.2.3, and use a model made by rkllm-toolkit 1.1.4 to 1.2.3.",
        )
    return release
