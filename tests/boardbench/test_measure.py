"""What is measured, against a library whose speed is known: it reads a token in 1 ms, and makes one in 100 ms."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rkboard.bench import measure
from rkboard.bench.measure import Bench, Line, spread
from rkboard.bench.workload import Row, workload
from rkruntime.engine.generation import Event, Finished, FinishReason, Perf, Request, Token
from rkruntime.errors import UnsupportedCallError
from rkruntime.model import Model
from rkruntime.testing import fake_model

READ_S, MAKE_S = 0.001, 0.1
OWN = 7  # the library's answer


class Library:
    """Keeps what it has read, as RKLLM does since 1.2.0, on a clock of its own.

    Args:
        reuses: Whether it keeps anything.
        counts: What it says of how many tokens it read, of how many it did; None for nothing.
        answers: How many tokens its answers have at most.
    """

    def __init__(self, release: str = "1.2.3", *, reuses: bool = True, counts: Any = int, answers: int = 10**6) -> None:
        model = fake_model("x")
        self.info = replace(model.engine.info, release=release, max_context=4096)
        self.now, self.cache, self.requests = 0.0, list[int](), list[Request]()
        self.reuses, self.counts, self.answers = reuses, counts, answers
        prompts = SimpleNamespace(prompt=model.prompts.prompt, encode=lambda text, _: list(text.encode()))
        self.bench = Bench(cast(Model, SimpleNamespace(engine=self, prompts=prompts, bundle=model.bundle)))

    def clear_cache(self) -> None:
        if self.info.release < "1.2.0":
            raise UnsupportedCallError("no")
        self.cache = []

    def generate(self, request: Request) -> Iterator[Event]:
        self.requests.append(request)
        prompt = list(request.tokens)
        kept = 0
        while self.reuses and kept < min(len(prompt) - 1, len(self.cache)) and prompt[kept] == self.cache[kept]:
            kept += 1
        read = len(prompt) - kept
        self.now += read * READ_S
        made = min(request.max_new_tokens, self.answers)
        for number in range(made):
            self.now += MAKE_S if number else 0.0
            yield Token(OWN)
        self.cache = [*prompt, *[OWN] * made]
        perf = None
        if self.counts and self.info.release >= "1.2.1":
            perf = Perf(0, self.counts(read), 0, made, 2779.0)
        yield Finished(FinishReason.LENGTH, len(prompt), made, perf)


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> Any:
    def make(*words: Any, **options: Any) -> Library:
        library = Library(*words, **options)
        monkeypatch.setattr(measure.time, "perf_counter", lambda: library.now)
        return library

    return make


def lines(library: Library, tests: Sequence[Row], repetitions: int = 3) -> dict[str, Line]:
    found = {test.name: Line(test) for test in tests}
    for line in found.values():
        library.bench.measure(line, repetitions)
    return found


USUAL = workload([128, 512], [64, 128], [0, 1024, 3400], 4096).tests


@pytest.mark.parametrize("release", ["1.2.1", "1.2.3", "1.3.0"])
def test_each_line_has_the_speed_of_the_library(made: Any, release: str) -> None:
    found = lines(made(release), USUAL)
    assert list(found) == [
        "tg64 @ d128", "pp128", "pp512", "tg64", "tg128", "pp128 @ d1024", "pp512 @ d1024", "tg64 @ d1024",
        "tg128 @ d1024", "pp128 @ d3400", "pp512 @ d3400", "tg64 @ d3400", "tg128 @ d3400",
    ]  # fmt: skip
    for name, line in found.items():
        assert line.problem == ""
        assert len(line.samples) == 3
        expected = 1 / READ_S if name.startswith("pp") else 1 / MAKE_S
        assert line.speeds == pytest.approx([expected] * 3), name
    assert found["tg64 @ d128"].first_ms == pytest.approx([128.0] * 3)


def test_prompts_and_answers_have_the_tokens_that_their_lines_name(made: Any) -> None:
    for test in USUAL:
        library = made()
        lines(library, [test], 1)
        request = library.requests[-1]
        if test.kind == "pp":
            assert (len(request.tokens), request.max_new_tokens) == (test.depth + test.tokens, 1)
        elif test.depth:
            assert (len(request.tokens), request.max_new_tokens) == (test.depth, test.tokens + 1)
        assert request.tokens[0] == library.bench._bos


def test_a_library_that_reads_all_again_is_not_taken_for_a_slow_one(made: Any) -> None:
    found = lines(made(reuses=False), USUAL)
    assert found["pp128"].speeds == pytest.approx([1000] * 3)
    assert "has read 1,152 tokens" in found["pp128 @ d1024"].problem
    assert found["tg64 @ d1024"].speeds == pytest.approx([10] * 3)


@pytest.mark.parametrize(("release", "reuses"), [("1.1.4", False), ("1.2.0", True)])
def test_without_its_word_on_what_it_read_a_prompt_at_a_depth_is_not_measured(
    made: Any, release: str, reuses: bool
) -> None:
    found = lines(made(release, reuses=reuses), USUAL)
    for name, line in found.items():
        at_depth = name.startswith("pp") and "@" in name
        assert bool(line.problem) == at_depth, name
        assert bool(line.samples) != at_depth


@pytest.mark.parametrize("lie", [0, -5, 1, 10**9])
def test_a_lie_about_what_it_read_is_not_a_speed(made: Any, lie: int) -> None:
    found = lines(made(counts=lambda _: lie), USUAL)
    for name, line in found.items():
        assert not (name.startswith("pp") and line.samples), name


def test_answers_that_end_early_add_up(made: Any) -> None:
    found = lines(made(answers=9), USUAL)
    for name in ("tg64", "tg128 @ d1024"):
        assert found[name].speeds == pytest.approx([10] * 3)
        assert found[name].samples[0].made == found[name].test.tokens
        assert found[name].samples[0].runs > 1


@pytest.mark.parametrize("answers", [0, 1, 2])
def test_answers_that_end_at_once_are_no_speed(made: Any, answers: int) -> None:
    found = lines(made(answers=answers), [Row("tg", 64), Row("tg", 64, 1024)])
    for line in found.values():
        assert line.samples == []
        assert "ended" in line.problem


def test_a_depth_that_is_less_than_the_question_is_not_measured_by_it(made: Any) -> None:
    found = lines(made(), [Row("tg", 64, 16), Row("pp", 64, 16)])
    assert "itself" in found["tg64 @ d16"].problem
    assert found["pp64 @ d16"].speeds == pytest.approx([1000] * 3)


TOKENS = st.lists(st.integers(1, 6000), max_size=4)


@given(TOKENS, TOKENS, st.lists(st.integers(0, 6000), max_size=4), st.integers(32, 1 << 16))
def test_every_test_fits_and_what_does_not_is_said(
    prompts: list[int], news: list[int], depths: list[int], context: int
) -> None:
    work = workload(prompts, news, depths, context)
    asked = {
        (kind, tokens, depth) for kind, those in (("pp", prompts), ("tg", news)) for tokens in those for depth in depths
    }
    for test in work.tests:
        # The context loses its last four places ("max context: 1020" for 1024), and one token comes out of a prompt.
        assert test.depth + test.tokens + 1 <= context - 4
        if test.kind != "vendor":
            assert any(
                kind == test.kind and tokens == test.tokens and depth >= test.depth for kind, tokens, depth in asked
            )
    whole = {(test.kind, test.tokens, test.depth) for test in work.tests}
    names = [test.name for test in work.tests if test.kind != "vendor"]
    assert len(names) == len(set(names))
    assert len(work.notes) == len(asked - whole)


def test_the_spread_is_that_of_a_sample() -> None:
    assert spread([1.0, 2.0, 3.0, 4.0]) == (2.5, pytest.approx(1.2909944487358056))  # numpy.std(ddof=1)
    assert spread([3.0]) == (3.0, 0.0)
