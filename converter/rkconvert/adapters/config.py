"""adapter_config.json of a peft LoRA: whether it can be merged, and each module's rank and factor."""

from __future__ import annotations

import math
import re
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from rkconvert.adapters.patterns import are_safe
from rkconvert.model.family import EMBEDDING, HEAD
from rkconvert.tensors.shards import read_json
from rkruntime.errors import AdapterError
from rkruntime.files import read_error

FILE: Final = "adapter_config.json"
# The part of a module that has its individually trained tokens.
TOKENS: Final = "token_adapter.trainable_tokens_delta"
# Settings under which the matrices mean something other than weight + factor * (B @ A).
_REFUSED: Final = {
    "lora_bias": "a bias in each module (lora_bias), but Gemma has no bias to add it to",
    "layer_replication": "repeated layers (layer_replication), which change the model's shape",
    "target_parameters": "parameters instead of modules (target_parameters)",
    "alora_invocation_tokens": "aLoRA, which is active only after certain tokens: no merged model can do that",
    "arrow_config": "Arrow, a router that chooses adapters for each token: no merged model can do that",
    "use_qalora": "QALoRA, which pools inputs in groups",
    "use_bdlora": "BD-LoRA, whose matrices are block-diagonal",
    "kasa_config": "KaSA, which removes singular values from the base model",
    "monteclora_config": "MonteCLoRA, whose matrices are sampled",
}
# Initializations that changed the base model too, so that the adapter alone is not the whole difference.
_CHANGED_BASE: Final = {
    "pissa": "PiSSA",
    "olora": "OLoRA",
    "corda": "CorDA",
    "loftq": "LoftQ",
    "lora_ga": "LoRA-GA",
}
# What peft targets in Gemma 1 and 2 if the settings name nothing (peft/utils/constants.py); its word for all matrices.
_DEFAULT_TARGETS: Final = ("q_proj", "v_proj")
_ALL_LINEAR: Final = "all-linear"
# Limits on a list of module names (27B's matrices by full name are 322), and on the characters of one name.
_MAX_NAMES: Final = 10_000
_MAX_NAME: Final = 300
_MERGE_FIRST: Final = "Merge it with peft (merge_and_unload, then save_pretrained), and convert the merged checkpoint."
# peft's types that change a model's inputs or activations, not its weights: peft cannot merge them either.
_NOT_WEIGHTS: Final = (
    "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT", "CARTRIDGE",
    "POLY", "XLORA",
)  # fmt: skip
_PAIR_SIDES: Final = ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B")
_PLAIN_STARTS: Final = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


def _no_adapter(folder: Path) -> AdapterError:
    """Return the error for a path that is not an adapter's folder."""
    if not folder.exists():
        return AdapterError(f"There is no adapter {folder}.", hint="Check the spelling of the path.")
    hint = None
    if folder.is_file() and (folder.parent / FILE).is_file():
        hint = f"Name the folder that it is in: {folder.parent}"
    elif (folder / "config.json").is_file():
        hint = "It is a model; --lora takes what peft's save_pretrained wrote."
    elif inner := sorted(found.parent for found in folder.glob(f"*/{FILE}")):
        hint = f"Name the folder inside it: {inner[0]}"
    return AdapterError(f"{folder} is not an adapter: it has no {FILE}.", hint=hint)


@dataclass(frozen=True)
class AdapterConfig:
    """A checked adapter_config.json."""

    path: Path
    raw: Mapping[str, Any]
    _compiled: dict[str, list[tuple[re.Pattern[str], Any]]] = field(default_factory=dict, init=False, compare=False)

    @classmethod
    def read(cls, folder: Path) -> AdapterConfig:
        """Read an adapter folder's settings. Raises AdapterError if they are missing or of an unsupported kind."""
        path = folder / FILE
        try:
            if not path.is_file():
                raise _no_adapter(folder)
        except OSError as error:
            raise read_error(folder, error, AdapterError) from error
        config = cls(path, read_json(path, AdapterError))
        config._check_kind()
        return config

    def _check_kind(self) -> None:
        kind = self.raw.get("peft_type")
        if kind != "LORA":
            raise AdapterError(
                f"The adapter is of peft's type {str(kind)[:40]!r}; only LORA is supported.",
                hint="No merged model can do what it does; train a LoRA." if kind in _NOT_WEIGHTS else _MERGE_FIRST,
            )
        for key, meaning in _REFUSED.items():
            if self.raw.get(key):
                raise AdapterError(f"The adapter is not a plain LoRA: it uses {meaning}.")
        start = self.raw.get("init_lora_weights")
        for prefix, name in _CHANGED_BASE.items():
            if isinstance(start, str) and start.lower().startswith(prefix):
                raise AdapterError(
                    f"The adapter was initialized as {name} (init_lora_weights={start!r}), which changed its base:"
                    " on the original base it gives a different model.",
                    hint="Save it as a plain LoRA (path_initial_model_for_weight_conversion of peft's save_pretrained),"
                    " or use the changed base that was saved with it and set init_lora_weights to true.",
                )
        if start not in _PLAIN_STARTS:
            raise AdapterError(f"{self.path}: init_lora_weights is {start!r}, which is unknown.")

    @property
    def base_name(self) -> str:
        """Base model that the adapter was trained on; empty if it names none."""
        return str(self.raw.get("base_model_name_or_path") or "")[:_MAX_NAME]

    @property
    def base_hint(self) -> str:
        """The base model's name, to append to a sentence; empty if it names none."""
        return f", {self.base_name}" if self.base_name else ""

    @property
    def dora(self) -> bool:
        """Whether each pair of matrices has magnitudes."""
        return bool(self.raw.get("use_dora"))

    @property
    def mica(self) -> bool:
        """Whether the adapter was initialized as MiCA, for which peft rounds the update before adding it."""
        return self.raw.get("init_lora_weights") == "mica"

    def saves_module(self, module: str) -> bool:
        """Whether a module was trained as a whole (modules_to_save), itself or as part of another."""
        parts = module.split(".")
        wholes = [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
        return any(whole.endswith(name) for name in self._list("modules_to_save") for whole in wholes)

    def _list(self, key: str) -> list[str]:
        """Return the names of modules under a key, empty if there are none."""
        names = self.raw.get(key) or []
        if not isinstance(names, list) or len(names) > _MAX_NAMES or not all(isinstance(n, str) and n for n in names):
            raise AdapterError(f"{self.path}: {key} is {str(names)[:80]}; it must list names of modules.")
        return names

    def rank(self, module: str) -> int:
        """Return the rank of a module's matrices."""
        value = self._setting("rank_pattern", "r", module)
        if not value.is_integer():
            raise AdapterError(f"{self.path}: the rank of {module} is {value:g}; it must be a whole number.")
        return int(value)

    def scaling(self, module: str) -> float:
        """Return the factor of B @ A: alpha / rank, or alpha / sqrt(rank) for rsLoRA."""
        rank, alpha = self.rank(module), self._setting("alpha_pattern", "lora_alpha", module)
        return alpha / math.sqrt(rank) if self.raw.get("use_rslora") else alpha / rank

    def _setting(self, patterns: str, default: str, module: str) -> float:
        """Return a module's own rank or alpha: the first matching pattern's, as in peft's get_pattern_key."""
        value = self.raw.get(default)
        value = next((own for pattern, own in self._patterns(patterns) if pattern.match(module)), value)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
            raise AdapterError(f"{self.path}: {default} of {module} is {value!r}; it must be a positive number.")
        return float(value)

    def _patterns(self, key: str) -> list[tuple[re.Pattern[str], Any]]:
        """Return the table under a key, with its patterns as peft matches them."""
        if key in self._compiled:
            return self._compiled[key]
        table = self.raw.get(key) or {}
        if not isinstance(table, dict):
            raise AdapterError(f"{self.path}: {key} is a {type(table).__name__}, not a table.")
        wholes = {rf"(.*\.)?({pattern})$": own for pattern, own in table.items()}
        try:
            safe = are_safe(wholes)
        except re.error as error:
            raise AdapterError(f"{self.path}: {key} has what is not a regular expression: {error}.") from error
        if not safe:
            raise AdapterError(
                f"{self.path}: the patterns of {key} are too complex to be matched safely.",
                hint="Write the names of modules, or fewer repeats and alternatives.",
            )
        return self._compiled.setdefault(key, [(re.compile(whole), own) for whole, own in wholes.items()])

    def token_indices(self, module: str) -> list[int]:
        """Return the ids of individually trained tokens, from a list or a table by module name."""
        found = self.raw.get("trainable_token_indices") or []
        if isinstance(found, dict):
            own = [ids for name, ids in found.items() if f".{module}".endswith(f".{name}")]
            # A tied head is saved under the embedding's tokens.
            found = own[0] if own else found.get("embed_tokens", [])
        if not isinstance(found, list) or any(type(index) is not int for index in found):
            raise AdapterError(f"{self.path}: trainable_token_indices is {str(found)[:80]}; it must list token ids.")
        return found

    def check_modules(
        self, base: Mapping[str, tuple[int, ...]], found: Mapping[str, Container[str]]
    ) -> tuple[str, ...]:
        """Compare the settings with the file's contents, as far as peft would complain or behave differently.

        Args:
            base: Tensors of the base model.
            found: Parts of each module in the adapter's file.

        Returns:
            Notes for the user.

        Raises:
            AdapterError: The settings fit no module of the base, or the file lacks what peft requires, or has
                what peft would not use.
        """
        modules = {name.removesuffix(".weight"): shape for name, shape in base.items()}
        modules.setdefault(HEAD.removesuffix(".weight"), (0, 0))
        for module in modules:
            if self.saves_module(module) and "weight" not in found.get(module, ()):
                raise AdapterError(f"The adapter's settings name {module} in modules_to_save, but its file lacks it.")
        sides = (EMBEDDING.removesuffix(".weight"), HEAD.removesuffix(".weight"))
        if any(map(self.token_indices, sides)) and not any(TOKENS in parts for parts in found.values()):
            raise AdapterError("The adapter's settings name trainable_token_indices, but its file lacks their rows.")
        matrices = {module: self._targets(module) for module, shape in modules.items() if len(shape) == 2}
        targets = self.raw.get("target_modules")
        if isinstance(targets, list) and targets and all(wanted is False for wanted in matrices.values()):
            raise AdapterError(
                f"The adapter targets {', '.join(targets)[:200]}, but the base model has no such module.",
                hint=f"It was trained on another architecture: give its own base{self.base_hint}.",
            )
        pairs = {module for module in modules if any(side in found.get(module, ()) for side in _PAIR_SIDES)}
        tied = {HEAD.removesuffix(".weight")} if self.raw.get("ensure_weight_tying") else set()
        unused = sorted(module for module in pairs - tied if matrices.get(module) is False)
        if unused:
            raise AdapterError(
                f"The adapter has matrices for {unused[0]} ({len(unused)} such modules) that its settings do not"
                " target: peft would ignore them.",
                hint="Its adapter_config.json was edited or belongs to another adapter: use the one saved with it.",
            )
        lacking = sorted(module for module, wanted in matrices.items() if wanted and module not in pairs | tied)
        if not lacking:
            return ()
        return (
            f"{self.path.parent.resolve().name} targets {lacking[0]} but has no matrices for it"
            f" ({len(lacking)} such modules): they stay as in the base",
        )

    def _targets(self, module: str) -> bool | None:
        """Whether the settings target a module by peft's rules; None if a pattern is not safe to try."""
        if self.saves_module(module):
            return False
        excluded, named = self._excludes(module), self._names_target(module)
        if excluded or named is False:
            return False
        return None if excluded is None else named

    def _excludes(self, module: str) -> bool | None:
        """Answer like `_targets`, whether the settings exclude a module."""
        pattern = self.raw.get("exclude_modules")
        return (
            _matches(pattern, module)
            if isinstance(pattern, str) and pattern
            else _names(self._list("exclude_modules"), module)
        )

    def _names_target(self, module: str) -> bool | None:
        """Answer like `_targets`, but without the exclusions."""
        targets = self.raw.get("target_modules")
        if isinstance(targets, str):
            if targets.lower() == _ALL_LINEAR:
                return f"{module}.weight" not in (EMBEDDING, HEAD)
            return _matches(targets, module)
        names = _DEFAULT_TARGETS if targets is None else self._list("target_modules")
        if module in names or not _names(names, module):
            return _names(names, module)
        layers = self._layers()
        return True if layers is None else self._is_in(layers, module)

    def _is_in(self, layers: Container[int], module: str) -> bool | None:
        """Whether a module is in one of these layers, whose number is found as `layers_pattern` says."""
        names = self.raw.get("layers_pattern") or "layers"
        names = [names] if isinstance(names, str) else self._list("layers_pattern")
        patterns = _safe(tuple(rf"(?:^|.*?\.){name}\.(?P<layer>\d+)\." for name in names))
        if patterns is None:
            return None
        match = next(filter(None, (pattern.match(module) for pattern in patterns)), None)
        return match is not None and int(match["layer"]) in layers

    def _layers(self) -> Container[int] | None:
        """Return the indices of the changed layers; None for all."""
        layers = self.raw.get("layers_to_transform")
        if type(layers) is int:
            return {layers}
        if layers is None or layers == []:
            return None
        if not isinstance(layers, list) or any(type(layer) is not int for layer in layers):
            raise AdapterError(
                f"{self.path}: layers_to_transform is {str(layers)[:80]}; it must list indices of layers."
            )
        return set(layers)


def _names(names: Iterable[str], module: str) -> bool:
    """Whether a module's name ends in one of the listed names."""
    return any(f".{module}".endswith(f".{name}") for name in names)


@lru_cache(maxsize=8)
def _safe(patterns: tuple[str, ...]) -> tuple[re.Pattern[str], ...] | None:
    """Compile patterns; None if one is not a regular expression, or they are not safe to try."""
    try:
        return tuple(map(re.compile, patterns)) if are_safe(patterns) else None
    except re.error:
        return None


def _matches(pattern: str, module: str) -> bool | None:
    """Whether a pattern matches a module's whole name; None if it is not safe to try."""
    found = _safe((pattern,))
    return None if found is None else found[0].fullmatch(module) is not None
