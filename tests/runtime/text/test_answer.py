"""Events to text: stop strings over token borders, whole characters, counts and reasons."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rkruntime.engine.generation import Finished, FinishReason, Perf, Request, Token
from rkruntime.errors import RunError
from rkruntime.text.answer import Answer, AnswerReader, StopStrings, astream_answer, stream_answer
from rkruntime.text.tokenizer import Tokenizer

small = st.text("ab", min_size=1, max_size=4)


@given(pieces=st.lists(st.text("abc", max_size=4), max_size=12), stops=st.lists(small, max_size=3))
def test_stop_strings_cut_at_the_first_of_them(pieces: list[str], stops: list[str]) -> None:
    cutter = StopStrings(stops)
    out = "".join(cutter.push(piece) for piece in pieces) + cutter.finish()
    # The whole of the pieces up to the one that completes a stop string is what a reader has seen by then.
    seen = ""
    for piece in pieces:
        seen += piece
        if any(stop in seen for stop in stops):
            break
    hits = [seen.index(stop) for stop in stops if stop in seen]
    assert out == (seen[: min(hits)] if hits else seen)
    assert (cutter.found is not None) == bool(hits)


@given(text=st.text("ab ", max_size=20), stops=st.lists(small, max_size=3))
def test_nothing_is_held_back_longer_than_needed(text: str, stops: list[str]) -> None:
    cutter = StopStrings(stops)
    out = "".join(cutter.push(character) for character in text)
    if cutter.found is None:
        held = text[len(out) :]
        assert not held or any(stop.startswith(held) and stop != held for stop in stops)


def collect(engine: Any, tokenizer: Tokenizer, stop: tuple[str, ...] = (), **request: Any) -> tuple[list[str], Answer]:
    *pieces, answer = stream_answer(engine, Request([1, 2, 3], **request), tokenizer, stop)
    assert isinstance(answer, Answer)
    return [piece for piece in pieces if isinstance(piece, str)], answer


def test_an_answer_with_an_emoji(fake_engine: Any, tokenizer: Tokenizer) -> None:
    pieces, answer = collect(fake_engine("Fine 🙂 thanks"), tokenizer)
    assert "".join(pieces) == answer.text == "Fine 🙂 thanks"
    assert answer.tokens == tuple(tokenizer.encode("Fine 🙂 thanks"))
    assert (answer.reason, answer.prompt_tokens) == (FinishReason.STOP, 3)


def test_a_stop_string_over_several_tokens_aborts_the_run(fake_engine: Any, tokenizer: Tokenizer) -> None:
    engine = fake_engine("One. Two 🙂. Three.")
    pieces, answer = collect(engine, tokenizer, ("wo 🙂. T", "Three"))
    assert "".join(pieces) == answer.text == "One. T"
    assert answer.reason is FinishReason.STOP
    assert engine.aborted == 1
    assert tokenizer.decode(answer.tokens).startswith("One. Two 🙂. T")


def test_the_limit_is_a_reason(fake_engine: Any, tokenizer: Tokenizer) -> None:
    _, answer = collect(fake_engine("a b c d e f"), tokenizer, max_new_tokens=3)
    assert (len(answer.tokens), answer.reason) == (3, FinishReason.LENGTH)


def test_an_answer_cut_inside_a_character(fake_engine: Any, tokenizer: Tokenizer) -> None:
    pieces, answer = collect(fake_engine("🙂"), tokenizer, max_new_tokens=2)
    assert "".join(pieces) == answer.text == "\ufffd"


def test_text_held_back_for_a_stop_string_comes_at_the_end(fake_engine: Any, tokenizer: Tokenizer) -> None:
    pieces, answer = collect(fake_engine("the end"), tokenizer, ("end of turn",))
    assert "".join(pieces) == answer.text == "the end"


def test_closing_early_aborts(fake_engine: Any, tokenizer: Tokenizer) -> None:
    engine = fake_engine("one two three four")
    stream = stream_answer(engine, Request([1]), tokenizer)
    next(iter(stream))
    stream.close()
    assert engine.aborted == 1


def test_an_unfinished_answer_is_an_abort(tokenizer: Tokenizer) -> None:
    reader = AnswerReader(tokenizer, 5)
    for index in tokenizer.encode("half 🙂")[:-1]:
        reader.feed(Token(index))
    answer = reader.answer()
    assert (answer.text, answer.reason, answer.prompt_tokens) == ("half \ufffd", FinishReason.ABORT, 5)


def test_perf_is_passed_on(tokenizer: Tokenizer) -> None:
    reader = AnswerReader(tokenizer, 5)
    reader.feed(Finished(FinishReason.STOP, 7, 0, Perf(1.0, 7, 2.0, 0, 3.0)))
    assert reader.done
    assert reader.answer().perf == Perf(1.0, 7, 2.0, 0, 3.0)
    assert reader.answer().prompt_tokens == 7


def test_errors_of_the_run_pass_through(fake_engine: Any, tokenizer: Tokenizer) -> None:
    with pytest.raises(RunError):
        collect(fake_engine([*tokenizer.encode("well"), RunError("it broke")]), tokenizer)


def test_asyncio_gives_the_same(fake_engine: Any, tokenizer: Tokenizer) -> None:
    async def gather() -> list[str | Answer]:
        return [piece async for piece in astream_answer(fake_engine("a 🙂 b"), Request([1]), tokenizer, ["b"])]

    assert asyncio.run(gather()) == list(stream_answer(fake_engine("a 🙂 b"), Request([1]), tokenizer, ["b"]))


@pytest.mark.parametrize("beyond", [0, 1, 99_999_999])
def test_an_id_that_the_model_does_not_have(tokenizer: Tokenizer, beyond: int) -> None:
    last = tokenizer.vocab_size - 1
    reader = AnswerReader(tokenizer, 3)
    reader.feed(Token(last))
    with pytest.raises(RunError, match="the model has"):
        reader.feed(Token(last + 1 + beyond))
    assert reader.answer().tokens == (last,)
