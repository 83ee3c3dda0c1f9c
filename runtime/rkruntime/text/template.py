"""Turn a conversation into a prompt: the one place where a chat template is rendered.

Message contents are always encoded as plain text, so what a user types cannot open or close a turn.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from rkruntime.errors import BundleError, UsageError
from rkruntime.printable import one_line
from rkruntime.schema import check_fields
from rkruntime.text.tracked import CHANGED, OWN, UNKNOWN, Tracked

if TYPE_CHECKING:
    from rkruntime.text.tokenizer import Part, Tokenizer

ROLES: Final = ("system", "user", "assistant")
BOS: Final = "<bos>"
START_OF_TURN: Final = "<start_of_turn>"
END_OF_TURN: Final = "<end_of_turn>"
# Names that a template may use, with their values unless the checkpoint overrides them.
SPECIAL_TOKENS: Final[Mapping[str, str]] = {
    "bos_token": BOS,
    "eos_token": "<eos>",
    "unk_token": "<unk>",
    "pad_token": "<pad>",
}
# Gemma 2's own template, which does not support a system role.
GEMMA: Final = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}"
    "{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
_MOST_SAID: Final = 500
_UNDEFINED: Final = re.compile(r"'[A-Za-z_]\w{0,80}' is undefined")


@dataclass(frozen=True)
class Message:
    """One message of a conversation.

    Attributes:
        role: One of ROLES.
        tokens: For an answer, the generated ids, which are used instead of `content` if they decode to exactly that.
            Encoding the text again may give different ids, and then the KV cache no longer matches.
    """

    role: str
    content: str
    tokens: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        check_fields(self)


class Template(Protocol):
    """Renders a conversation."""

    def parts(self, messages: Sequence[Message]) -> list[Part]:
        """Return the whole prompt up to the next answer, with `<bos>` once; no two texts are adjacent.

        Raises:
            UsageError: The template does not accept this order of roles.
            BundleError: The template does something that cannot be tracked.
        """
        ...


def load_template(
    source: str | None, system_role: str, special_tokens: Mapping[str, str], tokenizer: Tokenizer
) -> Template:
    """Load a bundle's template, or Gemma's if the bundle has none.

    Args:
        system_role: `native`, or `fold` if the template does not render system messages.
        special_tokens: Entries that differ from SPECIAL_TOKENS.

    Raises:
        BundleError: The template cannot be used.
    """
    if system_role not in ("fold", "native"):
        raise BundleError(f"The manifest's system_role is {system_role!r}; it must be 'fold' or 'native'.")
    if source is None or (source.strip() == GEMMA and system_role == "fold"):
        return GemmaTemplate(tokenizer)
    return JinjaTemplate(source, tokenizer, {**SPECIAL_TOKENS, **special_tokens}, fold=system_role == "fold")


class GemmaTemplate:
    """Gemma's template: user and model alternate; a system message goes into the first user turn.

    The format is that of the `chat_template` in Gemma 2's tokenizer_config.json, which trims every message; the folding
    (system, empty line, user) is Gemma 3's, and the resulting user turn is trimmed as a whole.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        missing = [text for text in (BOS, START_OF_TURN, END_OF_TURN) if text not in tokenizer.control]
        if missing:
            raise BundleError(f"The tokenizer has no control token {missing[0]}: Gemma's template cannot be rendered.")
        self._bos, self._start, self._end = (tokenizer.control[text] for text in (BOS, START_OF_TURN, END_OF_TURN))

    def parts(self, messages: Sequence[Message]) -> list[Part]:
        """See `Template.parts`."""
        return _merged([self._bos, *self._turns(fold_system(messages)), self._start, "model\n"])

    def _turns(self, messages: Sequence[Message]) -> list[Part]:
        parts: list[Part] = []
        for at, message in enumerate(messages):
            if message.role != ("assistant" if at % 2 else "user"):
                raise UsageError(
                    f"Message {at + 1} of this conversation is from {message.role!r}: after an optional system "
                    "message, user and assistant must alternate, starting with the user.",
                    hint="Join adjacent messages of the same role, and put system text first.",
                )
            content = message.content.strip() if message.tokens is None else message.tokens
            role = "user\n" if message.role == "user" else "model\n"
            parts += [self._start, role, content, self._end, "\n"]
        if len(messages) % 2 == 0:
            raise no_question(messages)
        return parts


def no_question(messages: Sequence[Message]) -> UsageError:
    """Return the error for a conversation whose last message is not a user's."""
    kinds = {"assistant": "an answer", "system": "a system prompt"}
    kind = kinds.get(messages[-1].role, f"of the role {messages[-1].role!r}") if messages else ""
    last = f"the last of its messages is {kind}" if messages else "it is empty"
    return UsageError(f"This conversation asks nothing: {last}.", hint="End it with a user message.")


def fold_system(messages: Sequence[Message]) -> Sequence[Message]:
    """Put the system message in front of the first user message, for templates without a system role.

    White space is kept in both; trimming the result is up to the template.
    """
    if len(messages) < 2 or messages[0].role != "system" or messages[1].role != "user":
        return messages
    system, first = messages[0].content, messages[1].content
    return [Message("user", f"{system}\n\n{first}" if system.strip() else first), *messages[2:]]


def _start(parts: Sequence[Part], bos: int) -> int:
    """Return the index of the first part after the leading `<bos>` tokens, which white space may precede."""
    start = 0
    for at, part in enumerate(parts, 1):
        if part == bos:
            start = at
        elif not isinstance(part, str) or part.strip():
            break
    return start


def _merged(parts: Sequence[Part]) -> list[Part]:
    """Join adjacent texts, since they are encoded together, and omit empty ones."""
    merged: list[Part] = []
    for part in parts:
        if isinstance(part, str) and merged and isinstance(merged[-1], str):
            merged[-1] += part
        elif part != "":
            merged.append(part)
    return merged


class JinjaTemplate:
    """A bundle's own template.

    The template's own text may contain control tokens; everything else in its output is plain text.

    Args:
        fold: Put system messages into the first user turn, for a template that does not render them.

    Raises:
        BundleError: `source` is not a valid template.
    """

    def __init__(
        self, source: str, tokenizer: Tokenizer, special_tokens: Mapping[str, str] = SPECIAL_TOKENS, *, fold: bool
    ) -> None:
        import jinja2

        from rkruntime.text.chat_jinja import Program

        self._tokenizer, self._special_tokens, self._fold = tokenizer, special_tokens, fold
        if BOS not in tokenizer.control:
            raise BundleError(f"The tokenizer has no control token {BOS}.")
        try:
            self._program = Program(source)
        except jinja2.TemplateError as error:
            raise BundleError(f"The chat template is not valid Jinja: {one_line(str(error))[:_MOST_SAID]}") from error
        except Exception as error:  # Compiling may overflow, nest too deeply, and more.
            raise BundleError(f"The chat template cannot be compiled: {type(error).__name__}.") from error

    def parts(self, messages: Sequence[Message]) -> list[Part]:
        """See `Template.parts`."""
        if not messages or messages[-1].role != "user":
            raise no_question(messages)
        for message in messages:
            if message.role not in ROLES:
                raise UsageError(f"Unknown role {message.role!r}.", hint=f"Roles are {', '.join(ROLES)}.")
        if self._fold:
            messages = fold_system(messages)
            if any(message.role == "system" for message in messages):
                raise UsageError(
                    "This model's template has no system role, and a system message comes after the first message.",
                    hint="Put system text first, before a user message.",
                )
        parts = _merged([*self._filled(self._rendered(messages), messages)])
        bos = self._tokenizer.control[BOS]
        return [bos, *parts[_start(parts, bos) :]]

    def _rendered(self, messages: Sequence[Message]) -> Tracked:
        from rkruntime.text.chat_jinja import Refusal, UnfollowedError

        plain = [{"role": message.role, "content": message.content} for message in messages]
        try:
            return self._program.render(plain, self._special_tokens)
        except Refusal as error:
            raise UsageError(
                f"The model's template refuses this conversation: {_own_words(error.said)}",
                hint="Change the order of its roles.",
            ) from None
        except UnfollowedError as error:
            raise BundleError(
                "The chat template processes messages in a way that cannot be tracked"
                f"{_place(error.__cause__)}, so it cannot be used.",
                hint="Use the chat_template.jinja of the base model.",
            ) from error
        except MemoryError:
            raise
        except Exception as error:  # A template can fail in any way that Python can.
            # Without the error's own text, which may quote the conversation.
            raise BundleError(
                f"The chat template failed{_place(error)}: {type(error).__name__}{_undefined(error)}.",
                hint="Use the chat_template.jinja of the base model.",
            ) from error

    def _filled(self, text: Tracked, messages: Sequence[Message]) -> Iterator[Part]:
        self._check_unknown(text, messages)
        for piece, source, offset in text._pieces():
            if source == OWN:
                yield from self._tokenizer.split_template(piece)
            elif source == UNKNOWN or offset == CHANGED:
                yield piece
            else:
                yield self._content(messages[source], piece, offset)

    @staticmethod
    def _content(message: Message, piece: str, offset: int) -> Part:
        """Return the message's generated ids if the template removed only white space from it, else `piece`."""
        outside = message.content[:offset] + message.content[offset + len(piece) :]
        return message.tokens if message.tokens is not None and not outside.strip() else piece

    def _check_unknown(self, text: Tracked, messages: Sequence[Message]) -> None:
        """Refuse a control token of which it is unclear whether the template or a message wrote it."""
        if all(source != UNKNOWN for _, source, _ in text._pieces()):
            return
        pattern = self._tokenizer.control_pattern
        for match in pattern.finditer(text):
            if all(source != UNKNOWN for _, source, _ in text._cut(*match.span())._pieces()):
                continue
            if any(pattern.search(message.content) for message in messages):
                raise UsageError(
                    f"A message contains the text {match.group()}, one of the model's control tokens, and this"
                    " model's template rewrites messages so that the two cannot be told apart.",
                    hint="Write it differently.",
                )
            raise BundleError(
                f"The chat template computes its control token {match.group()} in a way that cannot be tracked.",
                hint="Write control tokens as plain text in the template.",
            )


def _own_words(said: object) -> str:
    """Return a template's error message without its quotes from the conversation, which must not reach logs."""
    if not isinstance(said, Tracked):
        return "(no reason)"
    words = "".join(piece if source == OWN else "..." for piece, source, _ in said._pieces())
    return one_line(words)[:_MOST_SAID] or "(no reason)"


def _place(error: BaseException | None) -> str:
    from rkruntime.text.chat_jinja import line_of

    line = line_of(error) if error else None
    return f" in line {line}" if line else ""


def _undefined(error: Exception) -> str:
    """Return the part of an error that names an undefined variable: other errors may quote the conversation."""
    found = _UNDEFINED.fullmatch(str(error))
    return f", {found[0]}" if found else ""
