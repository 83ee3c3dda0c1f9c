"""Build calibration data for one model from conversations: render them in its template, answer, drop unfit ones."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

from rkconvert.calibrate.chats import Dialogue
from rkconvert.calibrate.dataset import Sample, TokenCounter
from rkconvert.model.chat_template import ChatTemplate
from rkruntime.errors import CalibrationError, CheckpointError
from rkruntime.text.tokenizer import Tokenizer
from rkruntime.words import counted

# Fewer rows than in the vendor's own example (19) say little about the range of activations.
FEW_ROWS: Final = 16

_CONTROL: Final = "with control tokens in their text"
_OTHER_ENDING: Final = "for which the template ends the prompt in another way than usual"

Answer = Callable[[Sequence[int]], str]


@dataclass(frozen=True)
class Built:
    """The rows, and the number of conversations left out by reason."""

    rows: tuple[Sample, ...]
    left_out: Counter[str]


@dataclass(frozen=True)
class Builder:
    """Builds rows for one model.

    Attributes:
        max_context: Most tokens in a row.
        answer: Function that lets the float model answer a prompt of token ids; None to use the chats' own answers.
    """

    template: ChatTemplate
    tokenizer: Tokenizer
    count: TokenCounter
    max_context: int
    answer: Answer | None = None

    def build(self, chats: Sequence[Dialogue], on_row: Callable[[int], None]) -> Built:
        """Build a row from each conversation; `on_row` is called with the number done so far.

        Raises:
            CalibrationError: The template refuses a conversation, or nothing is left.
        """
        rows: list[Sample] = []
        left_out: Counter[str] = Counter()
        # Render all prompts before the first answer, which may take minutes: the template's refusals come at once.
        prompts = [self._render(chat) for chat in chats]
        for number, (chat, prompt) in enumerate(zip(chats, prompts, strict=True), start=1):
            row = self._row(chat, prompt)
            if isinstance(row, Sample):
                rows.append(row)
            else:
                left_out[row] += 1
            on_row(number)
        if not rows:
            reasons = ", ".join(f"{many} {reason}" for reason, many in left_out.items())
            raise CalibrationError(
                f"Nothing is left of {counted(len(chats), 'conversation')}: {reasons}.",
                hint="Give chats with answers (--chats), or install torch and transformers so that the model answers.",
            )
        return Built(tuple(rows), left_out)

    def _row(self, chat: Dialogue, text: str | None) -> Sample | str:
        """Return the row of a prompt, or the reason why there is none."""
        too_long = f"with more than {self.max_context} tokens"
        if text is None:
            return _CONTROL
        if not text.endswith(self.template.ending):
            return _OTHER_ENDING
        prompt = self.count.encode(text)
        if len(prompt) >= self.max_context:
            return too_long
        target = self.answer(prompt) if self.answer else chat.answer.strip()
        if not target:
            return "without an answer"
        if self._has_control(target):
            return _CONTROL
        return Sample(text, target) if len(prompt) + self.count(target) <= self.max_context else too_long

    def _render(self, chat: Dialogue) -> str | None:
        """Return the prompt as text; None if a message contains a control token: the toolkit encodes the text as a
        whole, and would take it for one of the template's own.
        """
        messages = self.template.messages(chat.messages)
        if any(self._has_control(message["content"]) for message in messages):
            return None
        try:
            # With <bos>, as from the vendor's own generator: a second one does less harm to Gemma than none.
            return self.template.prompts([messages])[0]
        except CheckpointError as error:
            hint = "Let user and assistant take turns."
            raise CalibrationError(f"{chat.origin}: {error.message}", hint=hint) from error

    def _has_control(self, text: str) -> bool:
        return any(token in text for token in self.tokenizer.control)
