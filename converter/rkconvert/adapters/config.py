"""adapter_config.json of a peft LoRA: whether it can be merged, and each module's rank and factor."""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from rkconvert.adapters.patterns import are_safe
from rkconvert.tensors.shards import read_json
from rkruntime.errors import AdapterError
from rkruntime.files import read_error

FILE: Final = "adapter_config.json"
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
# Limits on a list of module names (27B's matrices by full name are 322), and on the characters of one name.
_MAX_NAMES: Final = 10_000
_MAX_NAME: Final = 300
_MERGE_FIRST: Final = "Merge it with peft (merge_and_unload, then save_pretrained), and convert the merged checkpoint."
# peft's types that change a model's inputs or activations, not its weights: peft cannot merge them either.
_NOT_WEIGHTS: Final = (
    "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT", "CARTRIDGE",
    "POLY", "XLORA",
)  # fmt: skip
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
            # An empty table means the feature with its defaults.
            if self.raw.get(key) or self.raw.get(key) == {}:
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
        self._check_layers()

    def _check_layers(self) -> None:
        """Raise AdapterError for settings that peft does not load together (LoraConfig.__post_init__)."""
        pattern, layers = (self.raw.get(key) for key in ("layers_pattern", "layers_to_transform"))
        by_pattern = isinstance(self.raw.get("target_modules"), str)
        if by_pattern and (pattern is not None or layers is not None):
            refused = "a text as target_modules with layers_to_transform or layers_pattern"
        elif pattern and layers is None:
            refused = "layers_pattern without layers_to_transform"
        else:
            return
        raise AdapterError(
            f"{self.path} has {refused}, which peft refuses.",
            hint="It was edited: use the one saved with the adapter.",
        )

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

    def names(self, key: str) -> list[str]:
        """Return the names of modules under a key, empty if there are none."""
        names = self.raw.get(key) or []
        names_only = isinstance(names, list) and all(isinstance(n, str) and 0 < len(n) <= _MAX_NAME for n in names)
        if not names_only or len(names) > _MAX_NAMES:
            raise AdapterError(f"{self.path}: {key} is {str(names)[:80]}; it must list names of modules.")
        return list(names)

    @property
    def layers(self) -> Collection[int] | None:
        """Indices of the changed layers; None for all."""
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

    def rank(self, module: str) -> int:
        """Return the rank of a module's matrices."""
        value = self._setting("rank_pattern", "r", module)
        if not isinstance(value, int):
            raise AdapterError(f"{self.path}: the rank of {module} is {value}; it must be a whole number.")
        return value

    def scaling(self, module: str) -> float:
        """Return the factor of B @ A: alpha / rank, or alpha / sqrt(rank) for rsLoRA."""
        rank, alpha = self.rank(module), self._setting("alpha_pattern", "lora_alpha", module)
        return alpha / math.sqrt(rank) if self.raw.get("use_rslora") else alpha / rank

    def _setting(self, patterns: str, default: str, module: str) -> int | float:
        """Return a module's own rank or alpha: the first matching pattern's, as in peft's get_pattern_key."""
        value = self.raw.get(default)
        value = next((own for pattern, own in self._patterns(patterns) if pattern.match(module)), value)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
            raise AdapterError(f"{self.path}: {default} of {module} is {value!r}; it must be a positive number.")
        return value

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
