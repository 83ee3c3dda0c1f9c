"""What a chat of twenty turns prefills, by the runtime's own count (perf.prefill_tokens), emulated behind the daemon.

The client sends the whole conversation with each turn, as clients of OpenAI's interface do. A token has to be prefilled
once if it was not generated; of an answer its last token too, which the run that gave it has not computed.
"""

from __future__ import annotations

import http.client
import json
import sys
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from tests.bench._report import Report, at_most
from tests.bench._servers import Server, our_daemon

from rkconvert.demo import questions

TURNS = 20
LIMITS = """
The count is the emulator's: the prompt's beginning is used again as the emulator models the vendor's cache, which does
not prove that a board's library does so. The aim has the answers' last tokens in it.
"""
_LONGEST_QUESTION = 40
_ANSWER_TOKENS = 12


@dataclass(frozen=True)
class Turn:
    """Tokens of one turn: of its prompt, of these how many were prefilled, and of its answer."""

    prompt: int
    prefilled: int
    generated: int


def _ask(server: Server, messages: list[dict[str, str]]) -> tuple[str, Turn]:
    parts = urlsplit(server.url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=120)
    body = json.dumps({"messages": messages, "max_tokens": _ANSWER_TOKENS})
    connection.request("POST", parts.path, body, {"Content-Type": "application/json"})
    response = connection.getresponse()
    answer: dict[str, Any] = json.loads(response.read())
    connection.close()
    if response.status != 200:
        raise SystemExit(f"{server.name} answered {response.status}: {answer}")
    usage = answer["usage"]
    prompt, reused = usage["prompt_tokens"], usage["prompt_tokens_details"]["cached_tokens"]
    return answer["choices"][0]["message"]["content"], Turn(prompt, prompt - reused, usage["completion_tokens"])


def chat(server: Server) -> list[Turn]:
    """The turns of one conversation."""
    asked = [row.question for row in questions() if len(row.question) < _LONGEST_QUESTION][:TURNS]
    messages: list[dict[str, str]] = []
    turns = []
    for question in asked:
        messages.append({"role": "user", "content": question})
        text, turn = _ask(server, messages)
        messages.append({"role": "assistant", "content": text})
        turns.append(turn)
    return turns


def main() -> int:
    """The sums, and what they would be without reuse."""
    report = Report("chat_prefill", __doc__, limits=LIMITS)
    with our_daemon() as server:
        turns = chat(server)
    before = turns[:-1]
    due = turns[-1].prompt - sum(turn.generated for turn in before)
    most = due + len(before)
    prefilled = sum(turn.prefilled for turn in turns)
    report.figure("tokens of the last prompt", "the chat", turns[-1].prompt, "")
    report.figure("of these not generated", "the chat", due, "")
    report.figure(f"prefilled in {len(turns)} turns", "rkedge serve", prefilled, "", at_most(most))
    report.figure(f"prefilled in {len(turns)} turns", "without reuse", sum(turn.prompt for turn in turns), "")
    return report.close()


if __name__ == "__main__":
    sys.exit(main())
