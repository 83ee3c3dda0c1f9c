"""`rkedge run --selftest`: whether a loaded bundle says what its float model said when it was converted.

A token that is not the expected one counts only if the float model considers it so much less likely that rounding does
not explain it (`SelfTest.tolerance`). After each difference, the model continues from the expected answer so far, so
that one early difference hides nothing that comes later.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Final, NamedTuple

from rkruntime.bundle.selftest import Question, SelfTest
from rkruntime.engine.generation import GREEDY, RESERVED, Finished, FinishReason, Request, Token
from rkruntime.errors import BundleError, ContextFullError, UsageError
from rkruntime.model import Model
from rkruntime.schema import check_value
from rkruntime.text.template import Message
from rkruntime.words import counted

# Clear differences after which the rest of an answer is skipped: each costs a run.
_ENOUGH: Final = 4
_MOST_TEXT: Final = 40
# What the engine finds when a library reads more than it was sent; see rkruntime.engine.observed.
_WRAPPED: Final = "token-input-wrapped"
_LONGER: Final = "prompt-longer"


@dataclass(frozen=True)
class Difference:
    """A token that is not the expected one.

    Attributes:
        position: Its number in the answer, from 1.
        expected, found: Ids; None if the answer ended there.
        expected_text, found_text: The tokens as a person reads them.
        gap: By how much the float model's logit of the found token is behind that of the expected one, at least.
        clear: Whether `gap` is more than rounding explains.
    """

    position: int
    expected: int
    found: int | None
    expected_text: str
    found_text: str
    gap: float
    clear: bool

    def __str__(self) -> str:
        found = f"it ends instead of {self.expected_text}"
        if self.found is not None:
            found = f"it is {self.found_text} instead of {self.expected_text}"
        return f"at token {self.position} {found} (margin {self.gap:.2f})"


@dataclass(frozen=True)
class QuestionResult:
    """How one question was answered.

    Attributes:
        question: Its text.
        sent: Number of tokens in the prompt; `read` is how many the library says it has read.
        compared: Number of tokens of the answer that were compared, out of `expected`.
        differences: In the order of the answer.
        as_converted: Whether the bundle's template and tokenizer still make the same tokens of the question.
        runs_on: Whether the library went on after the token that ends the answer, and nothing else ended it.
    """

    question: str
    sent: int
    read: int | None
    compared: int
    expected: int
    differences: tuple[Difference, ...]
    as_converted: bool
    runs_on: bool

    @property
    def clear(self) -> list[Difference]:
        """Differences that count."""
        return [item for item in self.differences if item.clear]

    def __str__(self) -> str:
        if self.clear:
            return f"differs clearly: {self.clear[0]}"
        if self.runs_on:
            return "the same, but it does not end"
        if self.differences:
            return f"the same within rounding: {self.differences[0]}"
        return "the same"


class Problem(NamedTuple):
    """What is wrong; `code` is `template`, `end`, `garbage`, `degraded`, or `undecided` if the test could not tell."""

    code: str
    message: str
    hint: str


@dataclass(frozen=True)
class SelfTestResult:
    """The result of a self-test.

    Attributes:
        tolerance: The largest gap between two logits that rounding explains.
        problems: The worst first; none if all is well.
        notes: Peculiarities of the library that were noticed and are worked around.
    """

    questions: tuple[QuestionResult, ...]
    tolerance: float
    problems: tuple[Problem, ...]
    notes: tuple[str, ...]
    release: str
    emulated: bool

    @property
    def verdict(self) -> str:
        """`same`, or the code of the worst problem."""
        return self.problems[0].code if self.problems else "same"

    def as_dict(self) -> dict[str, Any]:
        """Return the result as JSON types."""
        problems = [item._asdict() for item in self.problems]
        return {"verdict": self.verdict, **asdict(self), "problems": problems}


def run_selftest(model: Model, answered: Callable[[QuestionResult], None] | None = None) -> SelfTestResult:
    """Ask a model its bundle's own questions; the model must choose greedily: `SamplingOptions(temperature=0)`.

    Args:
        answered: Called with each question's result as it comes.

    Raises:
        BundleError: The bundle was made without a self-test, or its file is wrong.
        ContextFullError: The model was loaded with a context that is too small.
        UsageError: The model was loaded with another sampling.
        RunError, WorkerError: From the engine.
    """
    check_value("answered", Callable[..., object] | None, answered)
    test, engine = _expected(model), model.engine
    results: list[QuestionResult] = []
    for question in test.prompts:
        result = _asked(model, test, question)
        if _WRAPPED in _findings(model) and not results and result.read != result.sent:
            result = _asked(model, test, question)  # with an empty template
        results.append(result)
        if answered:
            answered(result)
    return SelfTestResult(
        questions=tuple(results),
        tolerance=test.tolerance,
        problems=tuple(_problems(model, test, results)),
        notes=tuple(_findings(model).values()),
        release=engine.info.release,
        emulated=engine.info.emulated,
    )


def _expected(model: Model) -> SelfTest:
    test = model.bundle.read_selftest()
    if test is None:
        raise BundleError(
            f"{model.bundle.path} has no self-test: it was made with --no-selftest or by an earlier release of rkedge.",
            hint="Convert it again: rkedge convert CHECKPOINT -o BUNDLE. Until then, rkedge firstrun asks the library.",
        )
    if model.sampling != GREEDY:
        raise UsageError(
            "A self-test needs a model that takes the most likely token.",
            hint="Open it with sampling=SamplingOptions(temperature=0).",
        )
    if test.highest >= model.prompts.vocabulary.vocab_size:
        raise BundleError(
            f"{model.bundle.path}: the self-test has the token {test.highest:,}, which the tokenizer does not have."
        )
    context = model.engine.info.max_context
    if context and test.longest + RESERVED > context:
        raise ContextFullError(
            f"The self-test needs a context of {test.longest + RESERVED:,} tokens; the model was loaded with"
            f" {context:,}.",
            hint="Leave --max-context out.",
        )
    return test


class _Run(NamedTuple):
    """The tokens of a run, with None for its end, and how many tokens of the prompt the library says it has read."""

    steps: list[int | None]
    read: int | None


def _run(model: Model, tokens: Sequence[int], most: int) -> _Run:
    *events, end = model.engine.generate(Request(tokens, most, model.stop_tokens))
    assert isinstance(end, Finished)
    ids: list[int | None] = [event.token_id for event in events if isinstance(event, Token)]
    # At the limit, an end may be due to the limit rather than the model.
    ended = end.reason is FinishReason.STOP and len(ids) < most
    return _Run([*ids, None] if ended else ids, end.perf.prefill_tokens if end.perf else None)


def _asked(model: Model, test: SelfTest, question: Question) -> QuestionResult:
    ids, last = question.ids, len(question.ids) - 1
    done, runs_on, read = 0, False, None
    differences: list[Difference] = []
    while done <= last and sum(item.clear for item in differences) < _ENOUGH:
        left = last - done + 1
        # One more token shows whether the answer goes on after its end.
        run = _run(model, [*question.tokens, *ids[:done]], left + 1)
        read = run.read if done == 0 else read
        runs_on = question.ends and len(run.steps) > left and run.steps[left] is not None
        for found in run.steps[:left] or [None]:  # a run without any token counts as an end
            done += 1
            if found != ids[done - 1] and not (found is None and question.ends and done > last):
                differences.append(_difference(model, test, question, done, found))
                break
    # `runs_on` is about what follows the expected end token, not another token in its place.
    runs_on = runs_on and done > last and not (differences and differences[-1].position == done)
    same = _tokens_now(model, question) == list(question.tokens)
    return QuestionResult(
        question.question, len(question.tokens), read, done, len(ids), tuple(differences), same, runs_on
    )


def _difference(model: Model, test: SelfTest, question: Question, position: int, found: int | None) -> Difference:
    step = question.answer[position - 1]
    # Which stop token ended the answer is not known, but it was not the expected token.
    gap = step.gap(found) if found is not None else step.gap(*(model.stop_tokens - {step.ids[0]}))
    return Difference(
        position=position,
        expected=step.ids[0],
        found=found,
        expected_text=_text(model, step.ids[0]),
        found_text="" if found is None else _text(model, found),
        gap=gap,
        clear=gap > test.tolerance or not test.knows(found),
    )


def _text(model: Model, token: int) -> str:
    """Return a token as a person reads it: its id, and its text in quotes."""
    vocabulary = model.prompts.vocabulary
    names = [name for name, known in vocabulary.control.items() if known == token]
    text = (names[0] if names else vocabulary.decode([token]))[:_MOST_TEXT]
    return f'{token} "{text}"' if text else str(token)


def _tokens_now(model: Model, question: Question) -> list[int]:
    """Return the tokens that the bundle's template and tokenizer now give for a question; empty if they refuse it."""
    try:
        return model.prompts.prompt([Message("user", question.question)], model.engine.info.max_context)[0]
    except (ContextFullError, UsageError):
        return []


def _findings(model: Model) -> dict[str, str]:
    """Return the messages of findings that runs (not the load) have made about the library, by code."""
    loaded = {finding.code for finding in model.engine.info.findings}
    return {item.code: item.message for item in model.engine.findings if item.code not in loaded}


def _problems(model: Model, test: SelfTest, results: Sequence[QuestionResult]) -> list[Problem]:
    """Return the problems that the results show together, the worst first."""
    clear = [item for result in results for item in result.clear]
    found = [] if all(result.as_converted for result in results) else [_OTHER_PROMPTS]
    if clear:
        found.append(_cause(model, test, results, clear))
    if any(result.runs_on for result in results):
        end = next(question.ids[-1] for question in test.prompts if question.ends)
        found.append(Problem("end", f"An answer goes on after its end token {end}.", _ENDLESS))
    decided = sum(step.margin > test.tolerance for prompt in test.prompts for step in prompt.answer)
    if not found and not decided:
        found.append(_UNDECIDED)
    return found


def _cause(model: Model, test: SelfTest, results: Sequence[QuestionResult], clear: Sequence[Difference]) -> Problem:
    """Return the problem that explains the clear differences."""
    findings, ids = _findings(model), {item.found for item in clear if item.found is not None}
    strange = [token for token in ids if not test.knows(token)]
    if strange:
        return Problem("garbage", f"The library returned the token {strange[0]}, which no such model has.", _LAYOUT)
    if _LONGER in findings:
        return Problem("template", f"The answers differ. {findings[_LONGER]}", _LIBRARY)
    if all(item.found is None for item in clear):
        return Problem("end", "An answer ends too early.", _EARLY_END)
    if all(result.clear and result.clear[0].position == 1 for result in results):
        if len(ids) == 1 and len(clear) > len(results):
            again = f"The library says the token {_text(model, ids.pop())} again and again."
            return Problem("garbage", again, _PRODUCTS)
        return Problem("garbage", "Every answer is wrong from its first token on.", _LAYOUT)
    pairs = list(zip(test.prompts, results, strict=True))
    if all(asked.ends and item.position == len(asked.ids) for asked, result in pairs for item in result.clear):
        return Problem("end", "An answer is right up to its end, and then goes on.", _MOVED_END)
    compared = sum(result.compared for result in results)
    return Problem("degraded", f"{len(clear)} of {counted(compared, 'token')} are clearly others.", _DEGRADED)


_OTHER_PROMPTS: Final = Problem(
    "template",
    "The bundle's template or tokenizer makes other tokens of the questions than when it was converted, so chats begin"
    " wrong.",
    "chat_template.jinja, tokenizer.json or rkedge.yaml was changed: copy the bundle again, or convert it again.",
)
_UNDECIDED: Final = Problem(
    "undecided",
    "The float model was not sure enough of any token to tell a difference from rounding.",
    "Ask questions whose answers you know: rkedge run BUNDLE PROMPT.",
)
_ENDLESS: Final = (
    "The library does not end answers there, and rkedge.yaml does not list this token in stop_token_ids: copy the"
    " bundle again, or convert it again."
)
_LIBRARY: Final = "Try another release of librkllmrt.so; rkedge firstrun BUNDLE shows what this one does."
_LAYOUT: Final = (
    "The library or --release does not fit the model file, or the file is of another model. Compare `rkedge inspect` of"
    " both, leave --release out, and copy the bundle again."
)
_PRODUCTS: Final = (
    "Its matrix products fail: run rkedge doctor for the driver, and dmesg | rkedge diagnose for what the kernel says."
)
_MOVED_END: Final = (
    "The end token lost to another one, as after a lossy quantization or fine-tuning with ends masked. Convert again"
    " with calibration texts (rkedge calibrate), or limit answers with --max-new-tokens."
)
_EARLY_END: Final = (
    "Compare stop_token_ids in rkedge.yaml with the checkpoint's generation_config.json, and copy the bundle again."
)
_DEGRADED: Final = (
    "This is more than rounding to 8 bits explains: the quantization has damaged the model, or it is not quite this"
    " one. Convert it again with calibration texts (rkedge calibrate), with --verify, or to w8a8 without groups."
)
