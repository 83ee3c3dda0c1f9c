"""Try out a bundle on a board: its self-test there, and the daemon's decode rate."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from rkboard.deploy.session import Session, list_of, names_of, text_of
from rkruntime.bundle.manifest import Bundle
from rkruntime.errors import ServiceError

_PATIENCE_S: Final = 1500.0
_QUESTION: Final = "Count from 1 to 100, one number on each line."
_MOST_TOKENS: Final = 64
_MOST_PROBLEMS: Final = 8
_SAME: Final = "same"


@dataclass(frozen=True)
class Trial:
    """The outcome.

    Attributes:
        verdict: The verdict of `rkedge run --selftest`; empty for a bundle without a self-test.
        problems: What the self-test found.
        tokens_per_s: The decode rate of an answer of the daemon; 0 if the answer was too short.
        tokens: The number of tokens in that answer.
    """

    verdict: str
    problems: tuple[str, ...]
    tokens_per_s: float
    tokens: int

    @property
    def fine(self) -> bool:
        """Whether nothing speaks against the bundle there, as for a bundle without a self-test."""
        return self.verdict in ("same", "undecided") or not (self.verdict or self.problems)


def try_out(session: Session, bundle: Bundle) -> Trial:
    """Run the self-test while the daemon's model is unloaded, then ask the daemon a question.

    Raises:
        BundleError: The bundle's self-test cannot be read.
        ServiceError: The daemon does not answer.
    """
    has_one = bundle.read_selftest() is not None
    found = names_of(session.call("selftest"), "result") if has_one else {}
    problems = [item for item in list_of(found, "problems") if isinstance(item, dict)]
    said = tuple(filter(None, (text_of(item, "message") for item in problems[:_MOST_PROBLEMS])))
    if has_one and not said and text_of(found, "verdict") != _SAME:
        said = (text_of(found, "message") or "It has not said what it found.",)
    body = {
        "model": "rkedge",
        "messages": [{"role": "user", "content": _QUESTION}],
        "stream": False,
        "options": {"temperature": 0, "num_predict": _MOST_TOKENS},
    }
    reply = session.call("ask", path="/api/chat", body=body, patience=_PATIENCE_S)
    answer = names_of(reply, "answer")
    if reply.get("status") != 200:
        raise ServiceError(f"The daemon on {session.destination} answers with an error: {text_of(answer, 'error')}")
    tokens, nanoseconds = (_number(answer, key) for key in ("eval_count", "eval_duration"))
    rate = (tokens - 1) / nanoseconds * 1e9 if tokens > 1 and nanoseconds else 0.0
    return Trial(text_of(found, "verdict"), said, rate, int(tokens))


def _number(answer: dict[str, Any], key: str) -> float:
    found = answer.get(key)
    return found if isinstance(found, int | float) and 0 <= found < 1e18 else 0.0
