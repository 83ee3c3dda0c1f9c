"""Hold an adapter's file against its settings: what peft would miss, ignore or mix up is refused or noted."""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Final

from rkconvert.adapters.targets import Targets
from rkconvert.model.family import EMBEDDING, HEAD
from rkruntime.errors import AdapterError

# The part of a module that has its individually trained tokens.
TOKENS: Final = "token_adapter.trainable_tokens_delta"
_PAIR_SIDES: Final = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")
_HEAD: Final = HEAD.removesuffix(".weight")
_EMBEDDING: Final = EMBEDDING.removesuffix(".weight")
_USE_ITS_OWN: Final = "Its adapter_config.json was edited or belongs to another adapter: use the one saved with it."
_NAME_THEM: Final = (
    "Use the adapter_config.json that was saved with it; if another tool wrote one with a fixed list, name all of its"
    " modules in target_modules."
)
_IN_ONE_WAY: Final = (
    "peft merges such an adapter wrongly, or not at all: train each module in one way, and the two sides of a tied"
    " embedding in the same. If its adapter_config.json was edited, use the one saved with it."
)
_NO_TARGETS: Final = "dummy-target-modules"  # what peft writes for an adapter without matrices


def check_contents(targets: Targets, found: Mapping[str, Container[str]]) -> tuple[str, ...]:
    """Compare settings with the parts of each module in the adapter's file.

    Returns:
        Notes for the user.

    Raises:
        AdapterError: The settings fit no module of the base, or the file lacks what peft requires, or has what peft
            would not use.
    """
    wanted = {module: targets.are_targeted(module) for module in targets.modules}
    _refuse_double(targets, wanted)
    _refuse_lacking(targets, found)
    _refuse_strange_targets(targets, wanted)
    pairs = {module for module in targets.modules if any(side in found.get(module, ()) for side in _PAIR_SIDES)}
    unused = sorted(module for module in pairs if wanted[module] is False)
    if unused:
        raise AdapterError(
            f"The adapter has matrices for {unused[0]} ({len(unused)} such modules) that its settings do not"
            " target: peft would ignore them.",
            hint=_NAME_THEM,
        )
    lacking = sorted(module for module, answer in wanted.items() if answer and module not in pairs)
    for module in lacking:
        if "weight" in found.get(module, ()):
            raise AdapterError(
                f"The adapter has {module} as a whole, but its settings target it for matrices: peft would ignore it.",
                hint=_USE_ITS_OWN,
            )
    name = targets.config.path.parent.resolve().name
    notes = [
        f"a pattern in {key} of the adapter {name} is too complex to be tried safely: whether peft would leave out"
        " some of its matrices was not checked"
        for key in targets.untried
    ]
    if lacking:
        notes.append(
            f"{name} targets {lacking[0]} but has no matrices for it"
            f" ({len(lacking)} such modules): they stay as in the base"
        )
    return tuple(notes)


def _refuse_double(targets: Targets, wanted: Mapping[str, bool | None]) -> None:
    for module, answer in wanted.items():
        kinds = {
            "target_modules": answer,
            "modules_to_save": targets.is_saved(module),
            "trainable_token_indices": module in targets.tokens,
        }
        named = [key for key, does in kinds.items() if does]
        if len(named) > 1:
            raise AdapterError(f"The adapter's settings name {module} in {' and in '.join(named)}.", hint=_IN_ONE_WAY)
        if len(saved := targets.saved_as(module)) > 1:
            raise AdapterError(
                f"The adapter's settings name {saved[0]} in modules_to_save, and {saved[1]} in it: peft does not load"
                " it.",
                hint=_USE_ITS_OWN,
            )


def _refuse_lacking(targets: Targets, found: Mapping[str, Container[str]]) -> None:
    for module in targets.with_weights:
        if targets.is_saved(module) and "weight" not in found.get(module, ()):
            raise AdapterError(f"The adapter's settings name {module} in modules_to_save, but its file lacks it.")
    ids = targets.tokens
    for module in ids:
        of_embedding = targets.tied and module == _HEAD and ids.get(_EMBEDDING) == ids[_HEAD]
        if not of_embedding and TOKENS not in found.get(module, ()):
            raise AdapterError(
                f"The adapter's settings name trainable_token_indices, but its file lacks their rows of {module}."
            )
    for module in (_EMBEDDING, _HEAD) if targets.tie == "target_modules" else ():
        if not any(side in found.get(module, ()) for side in _PAIR_SIDES):
            raise AdapterError(
                "The adapter's settings tie the matrices of the head to the embedding's (ensure_weight_tying), but its"
                f" file lacks those of {module}: peft saves both."
            )


def _refuse_strange_targets(targets: Targets, wanted: Mapping[str, bool | None]) -> None:
    named = targets.config.raw.get("target_modules")
    if named != _NO_TARGETS and all(answer is False for answer in wanted.values()):
        names = ", ".join([named] if isinstance(named, str) else named or ())[:200]
        which = f"targets {names}, but the base model has no such module" if names else "has no target_modules"
        raise AdapterError(
            f"The adapter {which}.",
            hint=f"It was trained on another architecture: give its own base{targets.config.base_hint}.",
        )
    others = [module for module, answer in wanted.items() if answer and module not in targets.matrices]
    if others:
        raise AdapterError(
            f"The adapter targets {others[0]}, which is not a matrix: peft does not load it.", hint=_USE_ITS_OWN
        )
