"""Reports without the paths of this machine."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rkconvert.output.paths import bytes_without_paths, without_paths


@pytest.mark.parametrize(
    ("text", "public"),
    [
        ("/home/alice/models/x.json: no", ".../x.json: no"),
        ("File '/mnt/My Models/x y.json'", "File '.../x y.json'"),
        ("file:///data/alice/x", ".../x"),
        ("/home/alice", "..."),
        ("PATH=/usr/local/bin:/opt/alice/bin", "PATH=.../bin:.../bin"),
        ("(/a/b/c,/d/e/f)", "(.../c,.../f)"),
        (
            "https://host/a/b and/or 3/4 </s> 12 examples/s /x a/b/c",
            "https://host/a/b and/or 3/4 </s> 12 examples/s /x a/b/c",
        ),
        ("", ""),
    ],
)
def test_texts(text: str, public: str) -> None:
    assert without_paths(text) == public
    assert without_paths({"a": [text]}) == {"a": [public]}


def test_known_folders_may_have_spaces() -> None:
    assert without_paths("in /srv/my work/deep er/f.txt now", [Path("/srv/my work")]) == "in .../deep er/f.txt now"
    assert bytes_without_paths(b"\xff /srv/my work/f \xfe", [Path("/srv/my work")]) == b"\xff .../f \xfe"


@given(
    st.lists(st.text("abcxyz_-0é", min_size=3), min_size=3, max_size=6),
    st.sampled_from(["{}", "'{}'", "E: {}:13:", "({})", "x={}"]),
)
def test_no_folder_stays(parts: list[str], around: str) -> None:
    text = without_paths(around.format("/" + "/".join(parts)))
    assert "/".join(parts[:-1]) not in text
    assert f".../{parts[-1]}" in text
    json.dumps(text)
