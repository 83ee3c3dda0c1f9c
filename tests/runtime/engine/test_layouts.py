"""The wrong layout, on purpose: refused, or a typed error in the parent, which lives; and never a changed answer."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rkboard.emulator import build as emulator
from rkruntime.abi import CALLABLE, RELEASES
from rkruntime.engine.engine import Engine, LoadOptions
from rkruntime.engine.generation import Request
from rkruntime.errors import LibraryError, ModelError, RKEdgeError
from rkruntime.library.identify import Identity, identify

LIBRARIES = ("1.1.4", "1.2.0", "1.2.1b1", "1.2.3", "1.3.0")
LAYOUTS = (*LIBRARIES, "1.3.1")
PAIRS = [(library, layout) for library in LIBRARIES for layout in LAYOUTS if library != layout]

# What a caller of token prompts cannot tell apart: the layouts differ in the multimodal input alone.
SAME_FOR_TOKENS = {("1.2.0", "1.2.1b1"), ("1.2.1b1", "1.2.0"), ("1.3.0", "1.3.1")}
PROMPT = [2, 5, 9, 30, 31, 32, 33]


@pytest.mark.parametrize(("library", "layout"), PAIRS)
def test_a_forced_layout_is_refused(options: Callable[..., LoadOptions], library: str, layout: str) -> None:
    with pytest.raises(LibraryError, match=f"release {library}, whose layout is not that of {layout}"):
        Engine.load(options(library, release=layout))


def renamed(library: Path, version: str, folder: Path) -> Path:
    """The library with a version text that nobody knows, so that --release has a say."""
    data = library.read_bytes()
    old, new = f"(version: {version} ".encode(), b"(version: 9.9.9".ljust(len(version) + 11)
    assert len(old) == len(new)
    assert data.count(old) == 1
    copy = folder / "librkllmrt.so"
    copy.write_bytes(data.replace(old, new))
    return copy


@pytest.mark.parametrize(("library", "layout"), PAIRS)
def test_an_unknown_release_with_the_wrong_layout(
    options: Callable[..., LoadOptions], tmp_path: Path, library: str, layout: str
) -> None:
    """What a person does with a library of tomorrow: names a release that it is not."""
    unknown = renamed(emulator.build(library), library, tmp_path)
    forced = options(library, library=unknown, release=layout, load_timeout=30.0, token_timeout=30.0)
    if (library, layout) in SAME_FOR_TOKENS:
        assert answer(forced) == answer(options(library))
    else:
        with pytest.raises(RKEdgeError):
            answer(forced)
    # The right name works.
    assert answer(options(library, library=unknown, release=library)) == answer(options(library))


@pytest.mark.parametrize(("library", "layout"), PAIRS)
def test_a_wrong_layout_without_any_check_of_the_file(
    options: Callable[..., LoadOptions], monkeypatch: pytest.MonkeyPatch, library: str, layout: str
) -> None:
    """Even if identification were wrong, nothing but an error reaches the parent."""

    def wrong(path: Path, release: str | None = None) -> Identity:
        return dataclasses.replace(identify(path, release), release=RELEASES[layout])

    expected = answer(options(library))
    with monkeypatch.context() as patch:
        patch.setattr("rkruntime.engine.engine.identify", wrong)
        if (library, layout) in SAME_FOR_TOKENS:
            assert answer(options(library)) == expected
        else:
            with pytest.raises((LibraryError, ModelError)):
                answer(options(library))
    assert answer(options(library)) == expected  # and the next load works


def answer(options: LoadOptions) -> list[Any]:
    with Engine.load(options) as engine:
        return list(engine.generate(Request(PROMPT, max_new_tokens=4)))[:-1]


def test_the_matrix_is_whole() -> None:
    assert {RELEASES[version].layout for version in LAYOUTS} == {RELEASES[version].layout for version in CALLABLE}
    assert len(PAIRS) == 25
