"""Jinja's sandbox, set up as in transformers' `apply_chat_template`, for plain and for tracked text.

A template is rendered twice. The prompt is, by definition, what plain Jinja makes of plain texts. The second rendering
tells where each character came from (`rkruntime.text.tracked`), and counts only if the characters are the same.
"""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, Final

import jinja2
from jinja2 import nodes
from jinja2.compiler import CodeGenerator, Frame
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension
from jinja2.filters import do_join
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace, concat

from rkruntime.text.tracked import OWN, Tracked, joined

_EMPTY: Final = Tracked("", OWN)


class Refusal(jinja2.TemplateError):
    """The template called raise_exception. `said` is its message, Tracked if the text being rendered was."""

    def __init__(self, said: object) -> None:
        super().__init__(str(said))
        self.said = said


class UnfollowedError(Exception):
    """The rendering over tracked text differs from plain Jinja's."""


class Program:
    """A compiled chat template. Raises jinja2.TemplateError if `source` is not a valid one."""

    def __init__(self, source: str) -> None:
        self._plain = _Environment().from_string(source)
        self._tracking = _TrackingEnvironment().from_string(source)

    def render(
        self,
        messages: Sequence[Mapping[str, str]],
        variables: Mapping[str, str],
        *,
        add_generation_prompt: bool = True,
    ) -> Tracked:
        """Render the prompt.

        Args:
            messages: `role` and `content` of each message.
            variables: Special tokens by name, such as `bos_token`.

        Raises:
            Refusal: The template does not accept this conversation.
            UnfollowedError: The template does something that cannot be tracked, or differs between two renderings.
            Exception: A template can fail in any way that Python can.
        """
        now = datetime.now()
        given: dict[str, Any] = {"tools": None, "documents": None, "add_generation_prompt": add_generation_prompt}
        given["strftime_now"] = now.strftime
        try:
            text = self._plain.render(messages=messages, **variables, **given)
        except Refusal:
            # The rendering over tracked text, below, tells whose words the message contains.
            text = None
        tracked = [
            {"role": Tracked(item["role"], OWN), "content": Tracked(item["content"], number, 0)}
            for number, item in enumerate(messages)
        ]
        own = {name: Tracked(value, OWN) for name, value in variables.items()}
        try:
            followed: Any = self._tracking.render(messages=tracked, **own, **given)
        except (Refusal, MemoryError):
            raise
        except Exception as error:  # A template can fail in any way that Python can.
            raise UnfollowedError(f"{type(error).__name__}: {error}") from error
        if text is None or str.__ne__(followed, text):
            raise UnfollowedError("two renderings differ")
        assert isinstance(followed, Tracked)
        return followed


def line_of(error: BaseException) -> int | None:
    """Return the line of the template in which an error arose, from 1."""
    if isinstance(error, jinja2.TemplateSyntaxError):
        return error.lineno
    frames = traceback.extract_tb(error.__traceback__)
    return next((frame.lineno for frame in reversed(frames) if frame.filename == "<template>"), None)


class _Namespace(Namespace):
    """As in transformers: a namespace without access to names that begin with underscores."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        self, *given = args
        values = dict(*given, **kwargs)
        Namespace.__init__(self, {_public(name): value for name, value in values.items()})

    def __setitem__(self, name: str, value: Any) -> None:
        super().__setitem__(_public(name), value)


def _public(name: str) -> str:
    if name.startswith("_"):
        raise SecurityError(f"a namespace cannot hold {name!r}")
    return name


class _Generation(Extension):
    """`{% generation %}`, which marks answers for training and renders its contents."""

    tags = {"generation"}  # noqa: RUF012 - as Extension declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_body"), [], [], body).set_lineno(line)

    def _body(self, caller: Callable[[], str]) -> str:
        return caller()


class _Environment(ImmutableSandboxedEnvironment):
    def __init__(self, **options: Any) -> None:
        extensions = ["jinja2.ext.loopcontrols", _Generation]
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=extensions, autoescape=False, **options)
        self.globals.update(raise_exception=_refuse, namespace=_Namespace)
        self.filters["tojson"] = _to_json


def _refuse(message: object) -> None:
    raise Refusal(message)


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    # Jinja's own `tojson` also escapes for HTML.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class _TrackingGenerator(CodeGenerator):
    """Compile a template's own texts to tracked ones, and join only with `environment.concat`."""

    def visit_Const(self, node: nodes.Const, frame: Frame) -> None:
        if isinstance(node.value, str):
            self.write(_own(node.value))
        else:
            super().visit_Const(node, frame)

    def visit_TemplateData(self, node: nodes.TemplateData, frame: Frame) -> None:
        self.write(_own(node.data))

    def _output_const_repr(self, group: Iterable[Any]) -> str:
        return _own(concat(group))

    def visit_Concat(self, node: nodes.Concat, frame: Frame) -> None:
        self.write("environment.concat(map(str, (")
        for item in node.nodes:
            self.visit(item, frame)
            self.write(", ")
        self.write(")))")


def _own(text: str) -> str:
    return f"environment.own({text!r})"


class _TrackingEnvironment(_Environment):
    code_generator_class = _TrackingGenerator
    concat = staticmethod(joined)

    def __init__(self) -> None:
        # Unoptimized, because constant folding would turn tracked text into plain constants.
        super().__init__(optimized=False)
        self.filters["join"] = _join

    @staticmethod
    def own(text: str) -> Tracked:
        """Mark a text as the template's own."""
        return Tracked(text, OWN)


@jinja2.pass_eval_context
def _join(context: nodes.EvalContext, value: Iterable[Any], d: str = _EMPTY, attribute: Any = None) -> str:
    text: str = do_join(context, value, d, attribute)
    return text
