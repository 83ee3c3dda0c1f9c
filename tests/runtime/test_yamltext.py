"""What strangers' YAML may and may not do."""

from __future__ import annotations

import subprocess
import sys

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from rkruntime.errors import UsageError
from rkruntime.yamltext import load_yaml, read_mapping

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


@given(PLAIN)
def test_plain_data_is_read_as_pyyaml_reads_it(data):
    text = yaml.safe_dump(data, allow_unicode=True)
    if "*id" not in text:
        assert load_yaml(text) == yaml.safe_load(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3", "the key 'a' stands twice"),
        ('{"a": {"b": 1, "b": 1}}', "the key 'b' stands twice"),
        ("a: &x [1]\nb: *x", "aliases"),
        ("&x [*x]", "aliases"),
        ("[" * 40 + "]" * 40, "nested over 32 deep"),
        ("a: !!python/object/apply:os.system [echo]", "could not determine a constructor"),
        ("a: 2024-13-41", "month must be in 1..12"),
        ("a: [1", "flow sequence"),
        ("--- 1\n--- 2", "single document"),
        ("a: \0", "control characters|special characters"),
    ],
)
def test_what_is_refused(text, message):
    with pytest.raises(yaml.YAMLError, match=message):
        load_yaml(text)


def test_depth_ends_in_an_error_and_not_in_a_crash():
    # libyaml's loader overflows the stack on this text; a crash would take pytest along.
    program = "from rkruntime.yamltext import load_yaml\nload_yaml('[' * 200_000)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert "nested over 32 deep" in done.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- 1", "holds no keys: it is list"),
        (b"1: 2", "the key 1, which is no text"),
        (b"a: \xff", "is not YAML"),
        (b"#" * (1 << 20) + b"##", "more than 1 MiB"),
    ],
)
def test_files_that_hold_no_mapping(tmp_path, content, message):
    path = tmp_path / "file.yaml"
    path.write_bytes(content)
    with pytest.raises(UsageError, match=message):
        read_mapping(path, UsageError)


def test_files(tmp_path):
    (tmp_path / "file.yaml").write_text("a: {b: [1, x]}")
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert read_mapping(tmp_path / "file.yaml", UsageError) == {"a": {"b": [1, "x"]}}
    assert read_mapping(tmp_path / "empty.yaml", UsageError) == {}
    with pytest.raises(UsageError, match="cannot be read: No such file"):
        read_mapping(tmp_path / "none.yaml", UsageError)
