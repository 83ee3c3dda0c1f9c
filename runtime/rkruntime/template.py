"""A conversation as token ids: the one place where a chat template is rendered.

Contents are encoded as plain text wherever they stand, so what a person types cannot open or close a turn.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias

from rkruntime.bundle import Bundle
from rkruntime.errors import BundleError, UsageError
from rkruntime.tokenizer import Tokenizer

if TYPE_CHECKING:
    import jinja2

ROLES: Final = ("system", "user", "assistant")
BOS: Final = "<bos>"
START_OF_TURN: Final = "<start_of_turn>"
END_OF_TURN: Final = "<end_of_turn>"
_MAX_TEMPLATE: Final = 1 << 20

# Plain text, one control token, or ids that were generated and are kept as they are.
Part: TypeAlias = str | int | tuple[int, ...]


@dataclass(frozen=True)
class Message:
    """One message of a conversation.

    Attributes:
        role: one of ROLES.
        tokens: of an answer: the ids that were generated, which are rendered in place of `content`. Encoding the text
            again may give other ids, and then the KV cache no longer fits.
    """

    role: str
    content: str
    tokens: tuple[int, ...] | None = None


class Template(Protocol):
    """Renders a conversation."""

    def render(self, messages: Sequence[Message]) -> list[int]:
        """The whole prompt up to the place where the next answer begins, `<bos>` once.

        Raises:
            UsageError: the roles are not in an order that the template knows.
        """
        ...


def load_template(bundle: Bundle, tokenizer: Tokenizer) -> Template:
    """The template that fits the bundle's manifest. Raises BundleError if it cannot be used."""
    if bundle.manifest.system_role == "fold":
        return GemmaTemplate(tokenizer)
    if bundle.manifest.system_role != "native":
        raise BundleError(f"The manifest's system_role is {bundle.manifest.system_role!r}: it is 'fold' or 'native'.")
    try:
        source = bundle.template.read_bytes()[: _MAX_TEMPLATE + 1]
        if len(source) > _MAX_TEMPLATE:
            raise BundleError(f"{bundle.template} has over {_MAX_TEMPLATE:,} bytes; templates have a few thousand.")
        return JinjaTemplate(source.decode(), tokenizer)
    except (OSError, UnicodeDecodeError) as error:
        raise BundleError(f"{bundle.template} cannot be read: {error}.") from error


def _assemble(tokenizer: Tokenizer, parts: Sequence[Part]) -> list[int]:
    """Ids of the parts; neighbouring texts are encoded together, as transformers encodes the rendered string."""
    ids: list[int] = []
    text = ""
    for part in parts:
        if isinstance(part, str):
            text += part
            continue
        ids += tokenizer.encode(text) if text else ()
        ids += (part,) if isinstance(part, int) else part
        text = ""
    return ids + (tokenizer.encode(text) if text else [])


class GemmaTemplate:
    """Gemma's template: user and model in turn; a system message goes into the first user turn.

    The order is that of the `chat_template` in Gemma 2's tokenizer_config.json; the fold (system, empty line, user) is
    that of Gemma 3's, which is the same text for Gemma 2.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        missing = [text for text in (BOS, START_OF_TURN, END_OF_TURN) if text not in tokenizer.control]
        if missing:
            raise BundleError(f"The tokenizer has no control token {missing[0]}: Gemma's template cannot be rendered.")
        self._bos, self._start, self._end = (tokenizer.control[text] for text in (BOS, START_OF_TURN, END_OF_TURN))

    def render(self, messages: Sequence[Message]) -> list[int]:
        """See `Template.render`."""
        return _assemble(self._tokenizer, [self._bos, *self._turns(fold_system(messages)), self._start, "model\n"])

    def _turns(self, messages: Sequence[Message]) -> list[Part]:
        parts: list[Part] = []
        for at, message in enumerate(messages):
            if message.role != ("assistant" if at % 2 else "user"):
                raise UsageError(
                    f"Message {at + 1} of this conversation is from {message.role!r}: after an optional system "
                    "message, user and assistant take turns, and the user begins.",
                    hint="Join neighbouring messages of one role, and put system text first.",
                )
            content = message.content.strip() if message.tokens is None else message.tokens
            role = "user\n" if message.role == "user" else "model\n"
            parts += [self._start, role, content, self._end, "\n"]
        if len(messages) % 2 == 0:
            raise _no_question(messages)
        return parts


def _no_question(messages: Sequence[Message]) -> UsageError:
    last = f"the last of its {len(messages)} messages is an answer" if messages else "it is empty"
    return UsageError(f"This conversation asks nothing: {last}.", hint="End it with a message of the user.")


def fold_system(messages: Sequence[Message]) -> Sequence[Message]:
    """The system message put before the first user's, for templates without a system role."""
    if len(messages) < 2 or messages[0].role != "system" or messages[1].role != "user":
        return messages
    system, first = messages[0].content.strip(), messages[1].content.strip()
    return [Message("user", f"{system}\n\n{first}" if system else first), *messages[2:]]


class _Slot(str):
    """Stands for a content while Jinja renders: a mark that no text holds, found again in what was rendered.

    Templates strip contents, ask whether they are empty and what is in them; that is answered from the content itself.
    """

    __slots__ = ("_slots", "content")

    content: str
    _slots: list[str | tuple[int, ...]]

    def __new__(cls, slots: list[str | tuple[int, ...]], content: str, kept: tuple[int, ...] | None = None) -> _Slot:
        slot = super().__new__(cls, f"{_OPEN}{len(slots)}{_CLOSE}")
        slots.append(content if kept is None else kept)
        slot.content, slot._slots = content, slots
        return slot

    def strip(self, chars: str | None = None, /) -> str:
        kept = self._slots[int(self[1:-1])]
        return _Slot(self._slots, self.content.strip(chars), kept if isinstance(kept, tuple) else None)

    def __contains__(self, text: object) -> bool:
        return isinstance(text, str) and text in self.content

    def __bool__(self) -> bool:
        return bool(self.content)


# Noncharacters, which a template's text never has a use for.
_OPEN: Final = "\ufdd0"
_CLOSE: Final = "\ufdd1"


class JinjaTemplate:
    """A bundle's own template, for models that were taught a system role.

    It is rendered in Jinja's sandbox, by the settings of transformers' `apply_chat_template`, with a mark in the place
    of each content. The template's own text may hold control tokens; contents are put in afterwards, as plain text.
    """

    def __init__(self, source: str, tokenizer: Tokenizer) -> None:
        import jinja2

        self._tokenizer = tokenizer
        if BOS not in tokenizer.control:
            raise BundleError(f"The tokenizer has no control token {BOS}.")
        try:
            self._template = template_environment().from_string(source)
        except jinja2.TemplateError as error:
            raise BundleError(f"chat_template.jinja is not a template: {error}") from error

    def render(self, messages: Sequence[Message]) -> list[int]:
        """See `Template.render`."""
        import jinja2

        if not messages or messages[-1].role != "user":
            raise _no_question(messages)
        for message in messages:
            if message.role not in ROLES:
                raise UsageError(f"There is no role {message.role!r}.", hint=f"Roles are {', '.join(ROLES)}.")
        slots: list[str | tuple[int, ...]] = []
        plain = [{"role": item.role, "content": _Slot(slots, item.content, item.tokens)} for item in messages]
        try:
            text = self._template.render(messages=plain, add_generation_prompt=True, bos_token=BOS, eos_token="<eos>")  # noqa: S106
        except jinja2.TemplateError as error:
            raise UsageError(
                f"The model's template refuses this conversation: {error}", hint="Change the order of its roles."
            ) from error
        except Exception as error:  # A template can do anything that Python can do wrong.
            raise BundleError(f"chat_template.jinja failed: {type(error).__name__}: {error}") from error
        bos = self._tokenizer.control[BOS]
        ids = self._fill(text, slots)
        first = next((at for at, index in enumerate(ids) if index != bos), len(ids))
        return [bos, *ids[first:]]

    def _fill(self, text: str, slots: Sequence[str | tuple[int, ...]]) -> list[int]:
        parts: list[Part] = []
        for at, piece in enumerate(text.split(_OPEN)):
            number, mark, rest = piece.partition(_CLOSE) if at else ("0", _CLOSE, piece)
            if not mark or not number.isdecimal() or int(number) >= len(slots) or _CLOSE in rest:
                raise BundleError("chat_template.jinja cuts or changes a message's content, so it cannot be used.")
            parts += [slots[int(number)]] if at else []
            parts += self._tokenizer.split_template(rest)
        return _assemble(self._tokenizer, parts)


def template_environment() -> jinja2.Environment:
    """Jinja as transformers' `apply_chat_template` sets it up, in its sandbox."""
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    environment: Any = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"], autoescape=False
    )
    environment.globals["raise_exception"] = refuse
    checked: jinja2.Environment = environment
    return checked
