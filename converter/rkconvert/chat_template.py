"""A checkpoint's chat template: found, tried out in a sandbox, and split as the runtime's text prompts need it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from rkconvert.rendering import rendered_apart
from rkconvert.shards import read_json
from rkconvert.sources.memory_folder import Place
from rkruntime.errors import CheckpointError

# Gemma 2's own template, for base models, which have none. It knows no system role.
GEMMA: Final = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}"
    "{% endif %}{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
_MAX_TEMPLATE: Final = 1 << 20
_USER, _SYSTEM = "@@the user's words@@", "@@the system's words@@"


@dataclass(frozen=True)
class ChatTemplate:
    """A template and what it does.

    Attributes:
        source: the Jinja text.
        own: it came with the checkpoint.
        prefix, suffix: what stands before (without `<bos>`) and after a first user turn.
        system_role: `native` if it renders a system message, else `fold`.
    """

    source: str
    own: bool
    prefix: str
    suffix: str
    system_role: str


def read_template(folder: Place, bos_token: str) -> ChatTemplate:
    """The template of a checkpoint folder, or Gemma's own.

    Raises:
        CheckpointError: it cannot be rendered, or drops the user's words.
    """
    found = _find(folder)
    source = GEMMA if found is None else found
    user = {"role": "user", "content": _USER}
    text, with_system = rendered_apart(source, [[user], [{"role": "system", "content": _SYSTEM}, user]], bos_token)
    if text.count(_USER) != 1:
        raise CheckpointError("The chat template does not put the user's words into the prompt exactly once.")
    prefix, suffix = text.split(_USER)
    role = "native" if _SYSTEM in with_system else "fold"
    return ChatTemplate(source, found is not None, prefix.removeprefix(bos_token), suffix, role)


def _find(folder: Place) -> str | None:
    """chat_template.jinja (transformers since 4.50), else the key of tokenizer_config.json: a text or a named list."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        try:
            with file.open("rb") as stream:
                data = stream.read(_MAX_TEMPLATE + 1)
            if len(data) > _MAX_TEMPLATE:
                raise CheckpointError(f"The chat template has over {_MAX_TEMPLATE:,} bytes.")
            return data.decode()
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{file} cannot be read: {error}.") from error
    if not (folder / "tokenizer_config.json").is_file():
        return None
    found: Any = read_json(folder / "tokenizer_config.json", CheckpointError).get("chat_template")
    if isinstance(found, list):
        named = {item.get("name"): item.get("template") for item in found if isinstance(item, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None
