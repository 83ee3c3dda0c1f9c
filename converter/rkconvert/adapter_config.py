"""adapter_config.json of a peft LoRA: what can be merged, and each module's rank and factor."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from rkconvert.shards import read_json
from rkruntime.errors import AdapterError

FILE: Final = "adapter_config.json"
# Settings under which the matrices mean something else than weight + factor * (B @ A).
_REFUSED: Final = {
    "lora_bias": "a bias of its own in each module (lora_bias), and Gemma has no bias to add it to",
    "layer_replication": "repeated layers (layer_replication), a model of another shape",
    "target_parameters": "parameters instead of modules (target_parameters)",
    "alora_invocation_tokens": "aLoRA: it is active after certain tokens only, which no merged model can be",
    "arrow_config": "Arrow: a router chooses adapters for each token, which no merged model can do",
    "use_qalora": "QALoRA: its inputs are pooled in groups",
    "use_bdlora": "BD-LoRA: its matrices are block-diagonal",
    "kasa_config": "KaSA: it cuts singular values out of the base model",
    "monteclora_config": "MonteCLoRA: its matrices are sampled",
}
# Ways to begin that changed the base model too, so that the adapter alone is not the whole difference to it.
_CHANGED_BASE: Final = {
    "pissa": "PiSSA",
    "olora": "OLoRA",
    "corda": "CorDA",
    "loftq": "LoftQ",
    "lora_ga": "LoRA-GA",
}
_PLAIN_STARTS: Final = (True, False, None, "gaussian", "eva", "orthogonal", "mica")


@dataclass(frozen=True)
class AdapterConfig:
    """A checked adapter_config.json."""

    path: Path
    raw: Mapping[str, Any]

    @classmethod
    def read(cls, folder: Path) -> AdapterConfig:
        """Read an adapter folder's settings. Raises AdapterError if there are none, or of a kind that is refused."""
        path = folder / FILE
        if not path.is_file():
            raise AdapterError(f"{folder} is not an adapter: it has no {FILE}.")
        config = cls(path, read_json(path, AdapterError))
        config._check_kind()
        return config

    def _check_kind(self) -> None:
        kind = self.raw.get("peft_type")
        if kind != "LORA":
            raise AdapterError(f"The adapter is of peft's type {kind!r}; only LORA can be merged into the weights.")
        for key, meaning in _REFUSED.items():
            if self.raw.get(key):
                raise AdapterError(f"The adapter is not a plain LoRA. It has {meaning}.")
        start = self.raw.get("init_lora_weights")
        for prefix, name in _CHANGED_BASE.items():
            if isinstance(start, str) and start.lower().startswith(prefix):
                raise AdapterError(
                    f"The adapter began as {name} (init_lora_weights={start!r}), which changed the base model as well:"
                    " with the original base it gives another model.",
                    hint="Save it as a plain LoRA (path_initial_model_for_weight_conversion of peft's save_pretrained),"
                    " or use the changed base that was saved with it and set init_lora_weights to true.",
                )
        if start not in _PLAIN_STARTS:
            raise AdapterError(f"{self.path}: init_lora_weights is {start!r}, which is not known.")

    @property
    def base_name(self) -> str:
        """The base model that it was trained on, empty if it names none."""
        return str(self.raw.get("base_model_name_or_path") or "")

    @property
    def base_hint(self) -> str:
        """The base model's name for a sentence."""
        return f", {self.base_name}" if self.base_name else ""

    @property
    def ensure_weight_tying(self) -> bool:
        """Input embedding and output head were trained as one."""
        return bool(self.raw.get("ensure_weight_tying"))

    @property
    def mica(self) -> bool:
        """Began as MiCA, for which peft rounds the update before it adds it."""
        return self.raw.get("init_lora_weights") == "mica"

    def saves_module(self, *names: str) -> bool:
        """Whether one of these modules was trained as a whole."""
        saved = self.raw.get("modules_to_save") or []
        return any(str(module).split(".")[-1] in names for module in saved)

    def rank(self, module: str) -> int:
        """Rank of a module's matrices."""
        value = self._setting("rank_pattern", "r", module)
        if not value.is_integer():
            raise AdapterError(f"{self.path}: the rank of {module} is {value:g}; it must be a whole number.")
        return int(value)

    def scaling(self, module: str) -> float:
        """The factor of B @ A: alpha / rank, or alpha / sqrt(rank) for rsLoRA."""
        rank, alpha = self.rank(module), self._setting("alpha_pattern", "lora_alpha", module)
        return alpha / math.sqrt(rank) if self.raw.get("use_rslora") else alpha / rank

    def _setting(self, patterns: str, default: str, module: str) -> float:
        """A module's own rank or alpha: the first matching pattern, as peft's get_pattern_key does it."""
        value, table = self.raw.get(default), self.raw.get(patterns) or {}
        if not isinstance(table, dict):
            raise AdapterError(f"{self.path}: {patterns} is a {type(table).__name__}, not a table.")
        for pattern, own in table.items():
            if self._matches(pattern, module):
                value = own
                break
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
            raise AdapterError(f"{self.path}: {default} of {module} is {value!r}; it must be a positive number.")
        return float(value)

    def _matches(self, pattern: str, module: str) -> bool:
        # A repeated group, or many repeats, can make a search take for ever; patterns come from strangers.
        if re.search(r"\)[*+{]", pattern) or len(re.findall(r"[*+{]", pattern)) > 4 or len(pattern) > 1000:
            raise AdapterError(f"{self.path}: the pattern {pattern[:80]!r} is too complex to be searched for safely.")
        try:
            return re.match(rf"(.*\.)?({pattern})$", module) is not None
        except re.error as error:
            raise AdapterError(f"{self.path}: {pattern!r} is not a regular expression: {error}.") from error

    def token_indices(self, module: str) -> list[int]:
        """Ids of the tokens that were trained on their own: a list, or a table by module name."""
        found = self.raw.get("trainable_token_indices") or []
        if isinstance(found, dict):
            # A tied head is saved with the embedding's tokens.
            own = [ids for name, ids in found.items() if module.endswith(str(name))]
            found = own[0] if own else found.get("embed_tokens", [])
        if not isinstance(found, list) or any(type(index) is not int for index in found):
            raise AdapterError(f"{self.path}: trainable_token_indices is {str(found)[:80]}; it must list token ids.")
        return found

    def check_targets(self, base: Iterable[str]) -> None:
        """Compare target_modules with a base model's tensors; a regular expression shows in the matrices only."""
        targets = self.raw.get("target_modules")
        if not isinstance(targets, list):
            return
        modules = [name.removesuffix(".weight").split(".") for name in [*base, "lm_head.weight"]]
        known = {".".join(parts[at:]) for parts in modules for at in range(len(parts))}
        unknown = sorted(str(target) for target in targets if target not in known)
        if unknown:
            raise AdapterError(
                f"The adapter targets {', '.join(unknown)}, and the base model has no module of that name.",
                hint=f"It was trained on another architecture: give its own base{self.base_hint}.",
            )
