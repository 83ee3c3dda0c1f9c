"""What a loaded library turns out to do in its runs, where programs and reports differ on what boards do.

One question: does the runtime put its chat template around token ids, which already contain ours? Such a prompt is read
as more tokens than were sent. From then on, the runtime's template is empty.
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
        findings: In the order in which they were made; each is logged once.
        wraps: Whether the runtime puts its template around token ids, or may do so and would not show it.
    """

    def __init__(self, release: str, max_context: int) -> None:
        self.findings: list[Finding] = []
        self._max_context = max_context
        self._can_empty = within(release, since("rkllm_set_chat_template"), "")
        # Nothing would show it on these releases.
        self.wraps = self._can_empty and not within(release, since("RKLLMResult.perf"), "")
        self._certain = not self.wraps
        self._empty = self._paused = self._begun = self._fresh = False
        self._added = 0  # by its template, to one prompt, as far as a run has shown it

    def template_set(self, *, empty: bool = False) -> None:
        """Note that a chat template is about to be set, or that an `empty` one was."""
        self._empty = empty

    def template_stays(self, error: RunError) -> None:
        """Note that the library refuses an empty template. Raises the error if it is known to matter."""
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
            fresh: Whether no conversation is continued that this would erase.
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
        """Tokens that the runtime's template adds to this prompt, as far as runs have shown it; 0 once it is empty."""
        return self._added if request.tokens and not self._empty else 0

    def finished(self, requests: Sequence[Request], end: Finished) -> None:
        """Compare what the runtime read with what it was sent."""
        after_pause, self._paused = self._paused, end.reason is FinishReason.PAUSE
        # A batch has one figure for all. A run after a pause may read the last token of the answer before.
        whole = [request for request in requests if self._fresh or not request.keep_history]
        lengths = [request.length for request in whole if request.length is not None]
        if end.perf is not None and len(lengths) == len(requests) and not after_pause:
            self._read(sum(lengths), int(end.perf.prefill_tokens), len(lengths))

    def check_rows(self, request: Request, rows: int) -> None:
        """Check that a prompt's array has a row for each of its tokens.

        Raises:
            RunError: It does not. If `wraps` has become true, another run can go better.
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
        """Note how many tokens of the prompts were read; returns whether another run can go better."""
        # Figures far beyond the context are none: a library may leave the structure untouched.
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
        # Less where the cache already had the beginning.
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
