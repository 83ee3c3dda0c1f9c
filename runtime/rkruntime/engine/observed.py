"""Observe in runs what a loaded library does where programs and reports contradict each other.

There is one such question: does the runtime put its chat template around token ids, which already contain ours? It then
reads more tokens than were sent, and is given an empty template from then on.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Final

from rkruntime.abi import since, within
from rkruntime.checks.preflight import Finding
from rkruntime.engine.generation import Finished, FinishReason, Request, TextPrompt
from rkruntime.errors import RunError

log = logging.getLogger("rkedge")

_SOURCE: Final = "public board programs differ on whether token input needs an empty chat template"


class Observed:
    """What the runs of one loaded model have shown.

    Attributes:
        findings: What the runs have shown, in order; each finding is logged once.
        wraps: Whether the runtime puts its template around token ids, or may do so unnoticed.
    """

    def __init__(self, release: str, max_context: int) -> None:
        self.findings: list[Finding] = []
        self._max_context = max_context
        self._can_empty = within(release, since("rkllm_set_chat_template"), "")
        # Releases that can have an empty template, but do not report how many tokens they read.
        self.wraps = self._can_empty and not within(release, since("RKLLMResult.perf"), "")
        self._certain = not self.wraps
        self._empty = self._paused = self._begun = self._fresh = False
        self._added = 0  # tokens that the runtime's template adds to a prompt, as far as runs have shown

    def template_set(self, *, empty: bool = False) -> None:
        """Note that a chat template is about to be set, or that an `empty` one was."""
        self._empty = empty

    def template_stays(self, error: RunError) -> None:
        """Note that the library refuses an empty template. Raises `error` if the template is known to be put on ids."""
        if self._certain:
            raise error
        self.wraps = False
        self._note(
            "template-not-emptied",
            "The runtime refuses an empty chat template. If it puts its own one around token ids, answers suffer.",
            "This release does not show whether it does: compare answers with those of another release.",
        )

    def empties_template(self, requests: Sequence[Request], *, fresh: bool) -> bool:
        """Whether the runtime's template must be emptied before this run, which clears the cache.

        Args:
            fresh: Whether the run does not continue a conversation, which emptying would erase.
        """
        if any(isinstance(request.prompt, TextPrompt) for request in requests):
            if self._empty:
                self._note(
                    "template-empty",
                    "This text gets no chat template: the runtime's own one was switched off for token ids.",
                    "Call set_chat_template, or load the model again, before runs with texts.",
                )
            return False
        return self.wraps and not self._empty and (fresh or not self._begun)

    def begins(self, *, fresh: bool) -> None:
        """Note that a run is about to begin; `fresh` as for `empties_template`."""
        self._begun, self._fresh = True, fresh

    def adds(self, request: Request) -> int:
        """Count the tokens that the runtime's template adds to this prompt, as far as runs have shown; 0 once empty."""
        return self._added if request.tokens and not self._empty else 0

    def finished(self, requests: Sequence[Request], end: Finished) -> None:
        """Compare the number of tokens that the runtime read with the number that it was sent."""
        after_pause, self._paused = self._paused, end.reason is FinishReason.PAUSE
        # A batch has one figure for all prompts. A run after a pause may also read the last token of the paused answer.
        whole = [request for request in requests if self._fresh or not request.keep_history]
        lengths = [request.length for request in whole if request.length is not None]
        if end.perf is not None and len(lengths) == len(requests) and not after_pause:
            self._read(sum(lengths), int(end.perf.prefill_tokens), len(lengths))

    def check_rows(self, request: Request, rows: int) -> None:
        """Check that a prompt's array has a row for each of its tokens.

        Raises:
            RunError: It does not. If `wraps` is now true, running it again may succeed.
        """
        sent = request.length
        if sent is None or request.keep_history or rows == sent:
            return
        if self._read(sent, rows):
            raise RunError(
                f"The runtime put its template around a prompt of {sent:,} tokens and returned {rows:,} rows.",
                hint="The template is switched off now: try again.",
                details={"rows": rows},
            )
        raise RunError(
            f"The runtime returned {rows:,} rows for a prompt of {sent:,} tokens.",
            hint="What is computed from them would be wrong. Try another release of librkllmrt.so.",
            details={"rows": rows},
        )

    def _read(self, sent: int, read: int, prompts: int = 1) -> bool:
        """Note how many tokens of the prompts were read; returns whether running them again may succeed."""
        # A figure far beyond the context is garbage: a library may leave the structure uninitialized.
        if not sent < read <= sent + self._max_context:
            return False
        what = f"The runtime read {read:,} tokens of a prompt of {sent:,}"
        if self._empty or not self._can_empty:
            self._note(
                "prompt-longer",
                f"{what}, and it is not its chat template that it adds.",
                "Answers may be worse than they could be. Try another release of librkllmrt.so.",
            )
            return False
        self.wraps = self._certain = True
        # Fewer are read if the cache already had the beginning.
        self._added = max(self._added, -(-(read - sent) // prompts))
        self._note(
            "token-input-wrapped",
            f"{what}: it puts its own chat template around token ids. This answer may be worse for it.",
            "Nothing needs to be done: the next run that does not continue a conversation has an empty template.",
        )
        return True

    def _note(self, code: str, message: str, hint: str) -> None:
        if all(finding.code != code for finding in self.findings):
            self.findings.append(Finding("warning", code, message, hint, _SOURCE))
            log.warning("%s %s", message, hint)
