"""What strangers' YAML may and may not do."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from rkruntime.errors import UsageError
from rkruntime.yamltext import load_yaml, read_mapping

PLAIN = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(1 - (1 << 63), (1 << 63) - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
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
        ("a: 1\nb: 2\na: 3", "the key 'a' occurs twice"),
        ('{"a": {"b": 1, "b": 1}}', "the key 'b' occurs twice"),
        ("a: &x [1]\nb: *x", "aliases"),
        ("&x [*x]", "aliases"),
        ("[" * 40 + "]" * 40, "nested over 32 deep"),
        ("a: !!python/object/apply:os.system [echo]", "the tag '.*os.system'"),
        ("a: 1.0e+400", "line 1: '1.0e.400' is out of range"),
        ("a: 9223372036854775808", "out of range"),
        ("a: " + "9" * 900_000, "Exceeds the limit|out of range"),
        ("a: !!binary aGk=", "tags are not accepted"),
        ("a: !!set {b}", "tags are not accepted"),
        ("a: !!int 1_0", "tags are not accepted"),
        ("a: !x [1]", "tags are not accepted"),
        ("a: ! 12", "tags are not accepted"),
        ("a: [1", "flow sequence"),
        ("--- 1\n--- 2", "single document"),
        ("a: \0", "control characters|special characters"),
    ],
)
def test_what_is_refused(text, message):
    with pytest.raises(yaml.YAMLError, match=message):
        load_yaml(text)


# By YAML 1.1 (https://yaml.org/type/) numbers, truth values, dates and more; by YAML 1.2 other ones, or texts.
AMBIGUOUS = """
1_0 0b11 010 -017 0o17 0x1f 1:30 59:59.5 1_0.5 190:20:30.15 1e3 1.5e3 .inf -.INF .nan yes No ON off y n
2024-01-01 2001-12-14t21:59:43.10-05:00 = << 08 -_1 1__0 .5_0 +0b1 0x_f -.5_ 1,000 nan inf Infinity NaN
"""


@pytest.mark.parametrize("text", AMBIGUOUS.split())
def test_what_yaml_1_1_and_1_2_read_differently_is_a_text(text):
    assert load_yaml(f"{{a: {text}, b: [{text}]}}" if "," not in text else f"a: {text}\nb: [x]")["a"] == text
    assert list(load_yaml(f"? {text}\n: {{c: 1}}\n")) == [text]


@given(st.text("0123456789_:.+-eExob nyaif,~=<", min_size=1, max_size=9))
def test_a_number_is_one_that_every_reader_takes_for_the_same(text):
    try:
        found = load_yaml("a: " + text)
    except yaml.YAMLError:
        return
    value = found["a"] if isinstance(found, dict) else found
    if type(value) in (int, float):
        assert value == json.loads(str(yaml.safe_load(text))) == float(text.strip())
        assert not set(text) & set("_:xob")


def test_a_long_number_to_the_base_of_60_takes_no_time():
    """Its reading took time with the square of the length: 900 kB took minutes."""
    text = "59:" * 300_000 + "59"
    assert load_yaml(f"a: {text}") == {"a": text}
    assert load_yaml(f"a: {text}.5") == {"a": f"{text}.5"}


def test_json_and_plain_numbers():
    assert load_yaml('{"a": [-7, 0, 1.5, -0.25, 1.0e+3, 1.5E-1], b: [+7, .5, 5., ~, null, True, FALSE]}') == {
        "a": [-7, 0, 1.5, -0.25, 1000.0, 0.15], "b": [7, 0.5, 5.0, None, None, True, False],
    }  # fmt: skip


def test_dates_are_texts():
    """Nothing that JSON does not have comes out, so that whatever was read can be printed as JSON."""
    data = load_yaml("a: 2024-01-01\nb: 2024-13-41\nc: 2001-12-14t21:59:43.10-05:00\nd: [~, true, 1]")
    assert json.loads(json.dumps(data)) == data
    assert data["a"] == "2024-01-01"


@pytest.mark.parametrize("stranger", ["fifo", "/dev/zero", "folder", "sparse"])
def test_files_that_are_none(tmp_path, stranger):
    path = tmp_path / "file.yaml"
    if stranger == "fifo":
        os.mkfifo(path)
    elif stranger == "folder":
        path.mkdir()
    elif stranger == "sparse":
        with path.open("wb") as file:
            file.truncate(20 << 30)
    else:
        path.symlink_to(stranger)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(UsageError, match=r"cannot be read: (it is not a regular file|it has more than|Is a directory)"):
        read_mapping(path, UsageError)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 20_000  # kB


def test_depth_ends_in_an_error_and_not_in_a_crash():
    # libyaml's loader overflows the stack on this text; a crash would take pytest along.
    program = "from rkruntime.yamltext import load_yaml\nload_yaml('[' * 200_000)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 1
    assert "nested over 32 deep" in done.stderr


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- 1", "must be a mapping, not list"),
        (b"1: 2", "a key that is not a string: 1"),
        (b"a: \xff", "is not YAML"),
        (b"#" * (1 << 20) + b"##", "cannot be read: it has more than 1,048,576 bytes"),
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
