"""Whether the daemon on a board says what the bundle's float model said, and how fast."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from rkboard.deploy.session import Session, names_of
from rkruntime.bundle.manifest import Bundle
from rkruntime.errors import ServiceError
from rkruntime.text.prompt_process import PromptProcess

_PATIENCE_S: Final = 600.0
_LONG_ANSWER: Final = "Count from 1 to 100, one number on each line."
_MOST_TOKENS: Final = 64


@dataclass(frozen=True)
class Trial:
    """What came of it.

    Attributes:
        right: Questions of the self-test that were answered word for word as the float model did.
        asked: All of them; 0 for a bundle without a self-test.
        greedy: Whether the runtime let a request ask for its likeliest tokens; if not, no answer proves anything.
        tokens_per_s: Of an answer; 0 if it was too short.
        tokens: How many tokens that answer had.
    """

    right: int
    asked: int
    greedy: bool
    tokens_per_s: float
    tokens: int


def try_out(session: Session, bundle: Bundle) -> Trial:
    """Ask the daemon on a board, through its socket there.

    Raises:
        BundleError: The bundle's tokenizer or self-test cannot be read.
        ServiceError: The daemon does not answer.
    """
    expected = bundle.read_selftest()
    right, greedy, asked = 0, True, list(expected.prompts) if expected else []
    if asked:
        prompts = PromptProcess(bundle)
        try:
            decode = prompts.vocabulary.decode
            wanted = [(item.question, decode(item.ids[: len(item.ids) - item.ends]), len(item.ids)) for item in asked]
        finally:
            prompts.close()
        for question, text, count in wanted:
            answer, ignored = _ask(session, question, count)
            greedy = greedy and not ignored
            right += _text(answer).strip() == text.strip()
    answer, _ = _ask(session, _LONG_ANSWER, _MOST_TOKENS)
    said, nanoseconds = (_number(answer, key) for key in ("eval_count", "eval_duration"))
    rate = (said - 1) / nanoseconds * 1e9 if said > 1 and nanoseconds else 0.0
    return Trial(right, len(asked), greedy, rate, int(said))


def _ask(session: Session, question: str, tokens: int) -> tuple[dict[str, Any], bool]:
    body = {
        "messages": [{"role": "user", "content": question}],
        "stream": False,
        "options": {"temperature": 0, "num_predict": tokens},
    }
    reply = session.call("ask", path="/api/chat", body=body, patience=_PATIENCE_S)
    answer = names_of(reply, "answer")
    if reply.get("status") != 200:
        said = str(answer.get("error") or answer)[:500]
        raise ServiceError(f"The daemon on {session.destination} answers with an error: {said}")
    ignored = {name.lower(): value for name, value in names_of(reply, "headers").items()}.get("x-rkedge-ignored", "")
    return answer, "temperature" in str(ignored)


def _text(answer: dict[str, Any]) -> str:
    return str(names_of(answer, "message").get("content", ""))


def _number(answer: dict[str, Any], key: str) -> float:
    found = answer.get(key)
    return found if isinstance(found, int | float) and 0 <= found < 1e18 else 0.0
