"""Text that knows its source, against str and plain Jinja: the same characters, and none from nowhere."""

from __future__ import annotations

from functools import cache

import jinja2
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rkruntime.text.chat_jinja import Program, Refusal, UnfollowedError
from rkruntime.text.tracked import CHANGED, OWN, UNKNOWN, Tracked, joined

# Two alphabets: whatever is in Greek was said by somebody, and no template writes it.
said = st.text("αβςΣΐ \n", max_size=12)
ROLES = ("user", "assistant", "user")

# What templates do with a text `x`, and one more, `y`.
STEPS = (
    *("x.strip()", "x.lstrip()", "x.rstrip('\\n ')", "x | trim", "x[1:]", "x[:-1]", "x[::-1]", "x[2:5]", "x[-3:]"),
    *("x.upper()", "x | lower", "x | title", "x | capitalize", "x.swapcase()", "x.casefold()", "x.zfill(9)"),
    *("x.center(20, '*')", "x.ljust(9)", "x.expandtabs(2)", "x.replace('a', y)", "x.replace('', '-')"),
    *("x | replace(' ', y)", "x | replace(y, 'b', 1)", "x.replace(y, '')", "x.split() | join(y)", "x.split(' ')[-1]"),
    *("x.rsplit(None, 1)[0]", "x.split('a', 1) | last", "x.splitlines() | join('|')", "x.splitlines(true)[0]"),
    *("x.partition(' ')[2]", "x.rpartition(y)[0]", "x.removeprefix(y)", "x.removesuffix('a')", "x * 2", "x + y"),
    *("x ~ y ~ 1", "y + x + 'ab'", "'(%s)' % x", "'%s-%s%%' % (x, y)", "'%s, %s' | format(x, y)", "'%-9s|' % x"),
    *("'{} {}'.format(x, y)", "'{0:>9}'.format(x)", "y.join([x, 'a', x])", "[x, y] | join('ab')", "x | join(' ')"),
    *("x | list | join", "x | first", "x | last", "x | reverse", "x | string", "x | tojson", "[x] | tojson"),
    *("x | length ~ x", "x | indent(2)", "x | wordwrap(5)", "x | truncate(6)", "x | default(y)", "x | d('a', true)"),
    *("x | batch(2) | map('join') | join('/')", "x | unique | join", "x | sort | join", "x.translate({97: 'b'})"),
    *("x | safe", "x | e", "x | escape ~ y", "x + (y | safe)", "x | urlencode", "x | striptags", "x | wordcount ~ y"),
    *("(x in y) ~ x", "(x == y) ~ y", "(x < y) ~ x", "x.startswith(y) ~ x", "x.find(y) ~ x", "x.count('a') ~ x"),
    *("x if x else y", "x or y", "x and y", "(x is string) ~ x", "x.encode().decode()", "{x: y}[x]", "x | pprint"),
    *("[x, y] | sort | first", "[x, y] | max", "dict(a=x).a", "namespace(a=x).a", "x | center(9)"),
    *("x | urlize", "x | int ~ y", "x.isspace() ~ x", "x.format(y)", "x | map('upper') | join", "x | list"),
)
FRAMES = (
    "{{ STEP }}",
    "{% set z = STEP %}a{{ z }}b",
    "{% set z %}a{{ STEP }}b{% endset %}{{ z }}",
    "{% macro m(x, y) %}{{ STEP }}{% endmacro %}{{ m(x, y) }}",
    "{% set ns = namespace(z='') %}{% for x in [x, y] %}{% set ns.z = ns.z + x ~ (STEP) %}{% endfor %}{{ ns.z }}",
    "{% filter trim %}{{ STEP }}{% endfilter %}",
    "{% for z in STEP %}{{ z }}{% else %}none{% endfor %}",
    "{% generation %}{{ STEP }}{% endgeneration %}",
)


@cache
def program(source: str) -> Program:
    return Program("{% set x, y = messages[0].content, messages[1].content %}{% set v = 'ab <ab>' %}" + source)


def followed(source: str, *texts: str) -> Tracked | None:
    """The rendering; None if plain Jinja cannot do it either."""
    messages = [{"role": role, "content": text} for role, text in zip(ROLES, texts, strict=False)]
    try:
        return program(source).render(messages, {"bos_token": "<bos>"})
    except UnfollowedError:
        raise
    except Exception:
        return None


# Markup escapes what is put to it, and is not followed.
MARKUP = ("safe", "| e", "escape", "urlize")


def check(source: str, *texts: str) -> None:
    """`render` itself compares the characters with plain Jinja's, or raises UnfollowedError; here go the sources."""
    try:
        text = followed(source, *texts)
    except UnfollowedError:
        assert any(word in source for word in MARKUP)
        return
    for piece, origin, offset in text._pieces() if text is not None else ():
        if origin == OWN:
            assert piece.isascii(), "what somebody said is taken for the template's own"
        elif origin != UNKNOWN and offset != CHANGED:
            assert texts[origin][offset : offset + len(piece)] == piece


def chain(steps: list[str]) -> str:
    return "".join(f"{{% set x = {step} %}}" for step in steps[:-1]) + "{{ " + steps[-1] + " }}"


sources = st.builds(lambda frame, step: frame.replace("STEP", step), st.sampled_from(FRAMES), st.sampled_from(STEPS))
chains = st.lists(st.sampled_from(STEPS), min_size=2, max_size=4).map(chain)


@pytest.mark.parametrize("step", STEPS)
def test_all_that_templates_do(step: str) -> None:
    for first, second in (("αβ Σΐ\n", "β"), ("", " "), ("ΑΣ ασ Σ", "ασ"), ("\n", "\n\n")):
        check("{{ " + step + " }}", first, second)


@settings(max_examples=200)
@given(source=sources | chains, first=said, second=said)
def test_combinations(source: str, first: str, second: str) -> None:
    check(source, first, second)


@pytest.mark.long
@settings(max_examples=5000)
@given(source=sources | chains, first=said, second=said)
def test_many_combinations(source: str, first: str, second: str) -> None:
    check(source, first, second)


texts = st.text("ab \n,", max_size=10)


@given(pieces=st.lists(st.tuples(texts, st.integers(-2, 2)), max_size=5), data=st.data())
def test_parts_are_found_where_they_are(pieces: list[tuple[str, int]], data: st.DataObject) -> None:
    """Each character carries its place, so that a part which is right by chance shows."""
    whole = joined(Tracked(text, source, 0 if source >= 0 else CHANGED) for text, source in pieces)
    places = [at for at, _ in enumerate(whole)]
    marked = joined(Tracked(character, 0, at) for at, character in zip(places, str(whole), strict=True))
    sep = data.draw(st.sampled_from([None, ",", " ", "ab", "a", "aa", "\n"]))
    count = data.draw(st.integers(-1, 3))
    parts: list[str] = data.draw(
        st.sampled_from([marked.split(sep, count), marked.rsplit(sep, count), marked.splitlines(), [*marked]])
    )
    at = 0
    for part in parts:
        assert isinstance(part, Tracked)
        for piece, _, offset in part._pieces():
            assert offset >= at
            assert str.__getitem__(whole, slice(offset, offset + len(piece))) == piece
            at = offset + len(piece)
    if sep is not None:
        lost = [offset for _, _, offset in marked._pieces()]
        assert len(lost) <= 1  # one message, one span
        joined_again = Tracked(sep, OWN).join(marked.split(sep))
        assert joined_again == whole


def test_every_method_of_str_is_thought_of() -> None:
    """A new one in a later Python gives a plain str, of which nothing is known: that is safe. These are followed."""
    plain = {name for name in dir(str) if not name.startswith("_") and getattr(Tracked, name) is getattr(str, name)}
    asks = {name for name in plain if name.startswith("is")}
    assert plain - asks == {
        *("count", "encode", "endswith", "find", "format", "format_map", "index", "maketrans", "rfind", "rindex"),
        "startswith",
    }


@pytest.mark.parametrize("name", ["x._spans", "x._cut", "x | attr('_spans')", "x.content", "x['_spans']"])
def test_templates_cannot_reach_behind_the_text(name: str) -> None:
    messages = [{"role": "user", "content": "hi"}] * 2
    try:
        text = Program("{% set x = messages[0].content %}{{ " + name + " }}").render(messages, {})
    except jinja2.TemplateError:
        return
    assert text == ""


def test_a_refusal_says_whose_words_it_has() -> None:
    with pytest.raises(Refusal) as caught:
        program("{{ raise_exception('no: ' ~ x) }}").render([{"role": "user", "content": "secret"}] * 2, {})
    assert isinstance(caught.value.said, Tracked)
    assert [(piece, origin) for piece, origin, _ in caught.value.said._pieces()] == [("no: ", OWN), ("secret", 0)]
