"""Recipes against the command whose options they hold."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Literal, get_origin

import click
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rkconvert.commands.convert import run as convert
from rkconvert.conversion import recipes
from rkconvert.plan import ModelSource, PlanRequest, plan_for, require
from rkconvert.rules.quantized_types import Verdict
from rkruntime import cli
from rkruntime.errors import UsageError

CONFIGS = json.loads((Path(__file__).parents[2] / "data" / "gemma_configs.json").read_text())

# A right value for each kind of parameter, other than any default.
VALUES = {bool: True, int: 96, float: 0.5, str: "text", Path: "some/path"}


def options_of(command):
    """Long names in the command's --help, as a person reads them there; what switches one off is not another one."""
    context = click.Context(command)
    records = [item.get_help_record(context) for item in command.params]
    text = " ".join(record[0].partition(" / ")[0] for record in records if record)
    return {word.strip(",").lstrip("-") for word in text.split() if word.startswith("--")}


def example(item):
    kind = recipes.kind_of(item)
    repeated = getattr(kind, "__origin__", None) is tuple
    kind = kind.__args__[0] if repeated else kind
    value = kind.__args__[-1] if get_origin(kind) is Literal else VALUES[getattr(kind, "__origin__", kind)]
    if isinstance(item.type, click.IntRange | click.FloatRange):
        value = kind((item.type.min + item.type.max) / 2)
    return [value, value] if repeated else value


@pytest.fixture
def recipe(tmp_path):
    def write(content) -> Path:
        path = tmp_path / "recipe.yaml"
        path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
        return path

    return write


@pytest.fixture
def parse():
    """The parameters that a command line and its recipe give; the command itself is not run."""

    def parse(*args):
        with convert.make_context("convert", [str(arg) for arg in args]) as context:
            return context.params

    return parse


def test_the_keys_are_the_commands_options():
    arguments = {item.name for item in convert.params if isinstance(item, click.Argument)}
    named = {key.replace("_", "-") for key in recipes.keys(convert)}
    assert named == (options_of(convert) | arguments) - {"recipe", "matrix"}


def test_a_recipe_of_every_option_is_the_same_as_the_command_line(recipe, parse):
    options = recipes.keys(convert)
    values = {key: example(item) for key, item in options.items()}
    line = []
    for key, item in options.items():
        value = values[key] if isinstance(values[key], list) else [values[key]]
        paths = isinstance(item.type, click.Path) or key in ("checkpoint", "lora")
        texts = [str(recipe("").parent / part) if paths else str(part) for part in value]
        if isinstance(item, click.Argument):
            line += texts
        else:
            line += [f"--{key.replace('_', '-')}"] if value == [True] else []
            line += [f"--{key.replace('_', '-')}={text}" for text in texts if value != [True]]
    assert parse("--recipe", recipe(values)) == parse(*line)


def test_the_command_line_wins(recipe, parse):
    path = recipe({"checkpoint": "there", "dtype": "fp32", "max_context": 64, "lora": ["one", "two"]})
    given = parse("here", "--recipe", path, "--dtype", "w8a8_g128", "--lora", "three")
    assert (given["checkpoint"], given["dtype"], given["loras"]) == ("here", "w8a8_g128", ("three",))
    assert given["max_context"] == 64


def test_paths_begin_at_the_recipe_and_hub_ids_stay(recipe, parse, tmp_path):
    content = {"checkpoint": "google/gemma-2-2b-it", "lora": ["../lora=0.5", "me/lora", "/abs/lora"], "output": "out"}
    path = recipe(content)
    given = parse("--recipe", path)
    assert given["checkpoint"] == "google/gemma-2-2b-it"
    assert given["loras"] == (f"{tmp_path}/../lora=0.5", "me/lora", "/abs/lora")
    assert given["output"] == tmp_path / "out"
    (tmp_path / "google" / "gemma-2-2b-it").mkdir(parents=True)
    assert parse("--recipe", path)["checkpoint"] == f"{tmp_path}/google/gemma-2-2b-it"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"dtpye": "w8a8"}, r"unknown key dtpye \(did you mean dtype\?\)"),
        ({"max-context": 96}, r"unknown key max-context \(did you mean max_context\?\)"),
        ({"recipe": "other.yaml"}, "unknown key recipe"),
        ({"dtype": "w8a9"}, "dtype is 'w8a9'; it must be one of w8a8, "),
        ({"release": 1.3}, "release is float; it must be text"),
        ({"max_context": "4096"}, "max_context is str; it must be a whole number"),
        ({"max_context": True}, "max_context is bool"),
        ({"force_dtype": 1}, "force_dtype is int; it must be true or false"),
        ({"lora": "folder"}, "lora is str; it must be a list"),
        ({"lora": [["folder"]]}, r"lora\[0\] is list; it must be text"),
        ({"output": 3}, "output is int; it must be a path"),
        ("dtype: w8a8\ndtype: fp32", "the key 'dtype' occurs twice"),
        ("lora: &l [a]\ncheckpoint: *l", "aliases"),
        ("[w8a8]", "must be a mapping, not list"),
        ("1: 2", "a key that is not a string: 1"),
        ("", "it gives no option"),
        ("# checkpoint: here\n", "it gives no option"),
        ("{}", "it gives no option"),
        ("dtype:\nlora: ~", "it gives no option"),
        ("npu_cores: 1_0", "npu_cores is str"),
        ("npu_cores: [1_0]", "npu_cores is list"),
        ("max_context: 0o100", "max_context is str"),
        ("force_dtype: yes", "force_dtype is str"),
        ("hybrid_rate: .inf", "hybrid_rate is str"),
    ],
)
def test_wrong_recipes_name_the_key(recipe, parse, content, message):
    with pytest.raises(UsageError, match=rf"The recipe .*recipe\.yaml: .*{message}"):
        parse("x", "--recipe", recipe(content))


@pytest.mark.parametrize("key", sorted(recipes.keys(convert)))
def test_an_empty_value_is_refused_as_on_the_command_line(recipe, parse, tmp_path, key):
    """An empty path would be the recipe's folder: what a program makes of a variable that is not set."""
    values = {"checkpoint": str(tmp_path), key: [""] if recipes.keys(convert)[key].multiple else ""}
    with pytest.raises(UsageError, match=rf"recipe\.yaml: {key}.* is "):
        parse("--recipe", recipe(values))


def test_a_weight_that_is_no_number_is_refused_as_on_the_command_line(recipe, parse):
    with pytest.raises(UsageError, match="'half' is not a number"):
        parse("x", "--recipe", recipe({"lora": ["a=half"]}))


def test_an_unknown_name_is_told_the_nearest(parse):
    with pytest.raises(UsageError, match="no recipe 'gemma-2-2b'") as caught:
        parse("--recipe", "gemma-2-2b")
    assert "Did you mean gemma-2-2b-it?" in caught.value.hint
    with pytest.raises(UsageError, match=r"none\.yaml: cannot be read: No such file"):
        parse("--recipe", "none.yaml")


SHIPPED = ("gemma-2-2b-it", "gemma-2-9b-it", "gemma-2-27b-it")


def test_the_shipped_recipes_are_found_by_name():
    assert set(recipes.shipped()) == set(SHIPPED)
    assert recipes.find(SHIPPED[0]).samefile(recipes.shipped()[SHIPPED[0]])


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipes_are_conversions_that_are_not_refused(parse, name):
    given = parse("--recipe", name)
    assert given["checkpoint"] == f"google/{name}"
    assert (given["target"], given["platform"]) == ("toolkit", "rk3588")
    request = PlanRequest(name, board=given["platform"], dtype=given["dtype"], context=given["max_context"])
    plan = plan_for(ModelSource(name, CONFIGS[name]), request)
    require(plan)
    # Only the smallest is known to work; the others must say so where a person reads it.
    known = plan.judgement.verdict is Verdict.OK
    assert known == (name == "gemma-2-2b-it")
    assert known != ("NOT KNOWN TO WORK" in recipes.shipped()[name].read_text())


@pytest.mark.parametrize("name", SHIPPED)
def test_a_shipped_recipe_is_for_any_fine_tune_of_its_size(parse, tmp_path, name):
    given = parse("--recipe", name, tmp_path, "--lora", "mine=0.5", "--target", "emulator")
    assert (given["checkpoint"], given["loras"], given["target"]) == (str(tmp_path), ("mine=0.5",), "emulator")


@pytest.mark.parametrize(
    ("option", "values"),
    [("--hybrid-rate", ["nan", "inf", "-0.1", "1"]), ("--toolkit-patience", ["nan", "inf", "0", "-5", "1e9"]),
     ("--optimization-level", ["-1", "2"])],
)  # fmt: skip
def test_numbers_have_bounds(recipe, parse, option, values):
    for value in values:
        with pytest.raises(click.BadParameter, match=r"not in the range|not a number"):
            parse("x", f"{option}={value}")
        if value not in ("nan", "inf", "1e9"):
            with pytest.raises(click.BadParameter, match="not in the range"):
                parse("x", "--recipe", recipe(f"{option[2:].replace('-', '_')}: {value}"))


@settings(max_examples=300, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_whatever_stands_in_a_recipe_ends_in_a_documented_way(tmp_path, data):
    values = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.sampled_from(
        ["w8a8", "fp32", "toolkit", "emulator", "1.2.3", "a=0.5", "a=nan", "\0", "../..", "~", "me/none"]
    )  # fmt: skip
    values |= st.lists(values, max_size=3)
    content = data.draw(
        st.dictionaries(st.sampled_from([*recipes.keys(convert), "matrix", "x", ""]), values, max_size=4)
    )
    if data.draw(st.booleans()):
        content["matrix"] = data.draw(
            st.dictionaries(st.sampled_from([*recipes.keys(convert)]), st.lists(values, max_size=2), max_size=2)
        )
    content = {"checkpoint": "none", **content} | {"output": "no/such"}
    (tmp_path / "r.yaml").write_text(yaml.safe_dump(content, allow_unicode=True), errors="surrogatepass")
    err = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stderr(err), contextlib.redirect_stdout(err):
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr("rkconvert.output.publish.check_destination", lambda to: None)
        code = cli.main(["convert", "--matrix" if "matrix" in content else "--recipe", str(tmp_path / "r.yaml")])
    assert code in (2, 3, 4, 5), (code, err.getvalue())
    assert "defect" not in err.getvalue()
    assert "Traceback" not in err.getvalue()
