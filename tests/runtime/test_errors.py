"""Each class of the error tree speaks for itself."""

import importlib
import json
import pkgutil
import re

import rkboard
import rkconvert
import rkruntime
from rkruntime import errors
from rkruntime.errors import RKEdgeError


def tree(kind: type[RKEdgeError]) -> list[type[RKEdgeError]]:
    return [kind, *(found for child in kind.__subclasses__() for found in tree(child))]


def test_every_class_has_a_hint_an_exit_code_and_a_place_in_the_drawing() -> None:
    drawn = re.findall(r"(\w+Error)\b", errors.__doc__ or "")
    for kind in tree(RKEdgeError):
        if kind.__module__ != errors.__name__:
            continue
        assert kind.__name__ in drawn, f"{kind.__name__} is not drawn in the module's docstring"
        assert kind.__doc__
        assert kind("what").hint.endswith((".", "?"))
        assert 0 < kind.exit_code < 128
        assert kind.exit_code != 1 or kind is RKEdgeError


def test_no_other_module_adds_to_the_tree() -> None:
    # a class elsewhere would escape the drawing, and the test above
    for package in (rkruntime, rkconvert, rkboard):
        for module in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)
    assert {kind.__module__ for kind in tree(RKEdgeError)} == {errors.__name__}


def test_hints_hold_wherever_an_error_is_raised() -> None:
    """The same classes come from commands, from the Python API and, as a response, from the daemon."""
    for kind in (errors.UsageError, errors.BodyError):
        assert "--" not in kind("It is wrong.").hint


def test_as_dict_is_json() -> None:
    error = errors.LoadError("no", hint="h", details={"lines": ["a"]})
    assert json.loads(json.dumps(error.as_dict())) == {
        "error": "LoadError",
        "message": "no",
        "hint": "h",
        "details": {"lines": ["a"]},
    }
