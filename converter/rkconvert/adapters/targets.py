"""Which modules an adapter's settings mean, by peft's rules (release 0.21: tuners/tuners_utils.py, utils/other.py).

peft gives each targeted module a pair of matrices and looks for them in the file. What the settings do not target, it
drops without a word; so a file is held against its settings before it is merged.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final

from rkconvert.adapters.config import AdapterConfig
from rkconvert.adapters.patterns import are_safe
from rkconvert.model.family import EMBEDDING, HEAD
from rkruntime.errors import AdapterError

_EMBEDDING: Final = EMBEDDING.removesuffix(".weight")
_HEAD: Final = HEAD.removesuffix(".weight")
# The last part of both names, by which peft recognizes what may be tied (EMBEDDING_LAYER_NAMES in utils/constants.py).
_SIDES: Final = ("embed_tokens", "lm_head")
# Modules of transformers' Gemma that have no weights, for each layer of the base and once.
_IN_EACH_LAYER: Final = "mlp.act_fn"
_ONCE: Final = ("model.rotary_emb", _HEAD)
_LAYER: Final = re.compile(r"model\.layers\.\d+")
# What peft targets in Gemma 1 and 2 if the settings name nothing (utils/constants.py), and its word for all matrices.
_DEFAULT_TARGETS: Final = ("q_proj", "v_proj")
_ALL_LINEAR: Final = "all-linear"
# From so many names on, peft replaces them by the shortest endings that mean the same modules
# (MIN_TARGET_MODULES_FOR_OPTIMIZATION). These are no longer full names, to which `layers_to_transform` does not apply.
_MANY: Final = 20
# Where the layer's number stands, if `layers_pattern` does not say so.
_ANY_LAYER: Final = r".*?\.[^.]*\.(?P<idx>\d+)\."
# A name that means nearly the same as text and as a regular expression: peft takes modules_to_save as both.
_PLAIN: Final = re.compile(r"[A-Za-z0-9_.-]+")


def modules_of(base: Iterable[str]) -> tuple[str, ...]:
    """Return the names of all modules of a base, given the names of its tensors; the head is one even if it is tied."""
    found = dict.fromkeys(_ONCE)
    for name in base:
        module = name.removesuffix(".weight")
        found |= dict.fromkeys(_wholes(module))
    layers = [module for module in found if _LAYER.fullmatch(module)]
    return (*found, *(f"{layer}.{_IN_EACH_LAYER}" for layer in layers))


def _wholes(module: str) -> list[str]:
    """Return a module and all that it is a part of."""
    parts = module.split(".")
    return [".".join(parts[:end]) for end in range(1, len(parts) + 1)]


def _ends(name: str) -> list[str]:
    """Return the ends of a name at its dots, the shortest first and the whole name last."""
    parts = name.split(".")
    return [".".join(parts[at:]) for at in reversed(range(len(parts)))]


@dataclass(frozen=True)
class _Names:
    """Modules listed by the ends of their names."""

    names: frozenset[str]

    @cached_property
    def _ends(self) -> tuple[str, ...]:
        return tuple(f".{name}" for name in self.names)

    def match(self, module: str) -> bool:
        return module in self.names or module.endswith(self._ends)


@dataclass(frozen=True)
class _Pattern:
    """Modules whose whole name matches a pattern; `pattern` is None if that is not safe to try."""

    pattern: re.Pattern[str] | None

    def match(self, module: str) -> bool | None:
        return None if self.pattern is None else self.pattern.fullmatch(module) is not None


@dataclass(frozen=True, eq=False)
class Targets:
    """An adapter's settings, applied to the modules of a base.

    Attributes:
        modules: All modules of the base.
        with_weights: Those of them that have a tensor.
        matrices: Those of them that can have a pair of matrices.
        tied: Whether the base ties its head to the embedding.
        untried: Settings with a pattern that was not safe to try.

    Raises:
        AdapterError: peft does not load such settings, or what they mean is unclear.
    """

    config: AdapterConfig
    modules: tuple[str, ...]
    with_weights: tuple[str, ...]
    matrices: frozenset[str]
    tied: bool
    untried: dict[str, None] = field(default_factory=dict, init=False)

    @classmethod
    def of(cls, config: AdapterConfig, base: Mapping[str, tuple[int, ...]]) -> Targets:
        """Return the targets of an adapter in a base, given by its tensors' names and shapes."""
        with_weights = tuple(dict.fromkeys([*(name.removesuffix(".weight") for name in base), _HEAD]))
        matrices = frozenset(name.removesuffix(".weight") for name, shape in base.items() if len(shape) == 2)
        return cls(config, modules_of(base), with_weights, matrices | {_HEAD}, HEAD not in base)

    @cached_property
    def tie(self) -> str | None:
        """The setting by which the adapter of a tied base has one update for embedding and head; None if it has two.

        Either `modules_to_save` or `target_modules`, as in peft's _check_tied_modules.
        """
        if not (self.tied and self.config.raw.get("ensure_weight_tying")):
            return None
        if any(name.split(".")[-1] in _SIDES for name in self._named_to_save):
            return "modules_to_save"
        targets = self.config.raw.get("target_modules")
        if isinstance(targets, str):
            named = any(self._compiled("target_modules", targets).match(side) is not False for side in _SIDES)
        else:
            named = any(name.split(".")[-1] in _SIDES for name in self.config.names("target_modules"))
        return "target_modules" if named else None

    def are_targeted(self, module: str) -> bool | None:
        """Whether peft gives a module a pair of matrices; None if that takes a pattern that is not safe to try."""
        if self.tie == "target_modules" and module == _HEAD:
            return True
        if self._is_kept_out(module):
            return False
        excluded, named = self._excluded.match(module), self._is_named(module)
        if excluded or named is False:
            return False
        return None if excluded is None else named

    def is_saved(self, module: str) -> bool:
        """Whether peft loads a module as a whole, itself or as part of another (_set_trainable in utils/other.py)."""
        if self.tie == "modules_to_save" and module == _HEAD:
            return True
        return bool(self.saved_as(module))

    def saved_as(self, module: str) -> list[str]:
        """Return those of a module and all that it is a part of which modules_to_save names."""
        return [whole for whole in _wholes(module) if whole.endswith(self._to_save)]

    @cached_property
    def tokens(self) -> dict[str, list[int]]:
        """The ids of individually trained tokens, by module. Those of a tied embedding are the head's, too."""
        value = self.config.raw.get("trainable_token_indices")
        named = {} if value is None else value if isinstance(value, dict) else {_EMBEDDING: value}
        found: dict[str, list[int]] = {}
        for name, ids in named.items():
            if not isinstance(ids, list) or not ids or any(type(index) is not int for index in ids):
                raise AdapterError(
                    f"{self.config.path}: trainable_token_indices is {str(ids)[:80]}; it must list token ids."
                )
            meant = [module for module in self.modules if module.endswith(name)]
            if not meant or found.keys() & set(meant) or not {_EMBEDDING, _HEAD}.issuperset(meant):
                raise AdapterError(
                    f"{self.config.path}: trainable_token_indices has tokens of {name[:80]!r}, which does not mean the"
                    " embedding or the head, or means one of them again.",
                    hint="Their names are embed_tokens and lm_head.",
                )
            found |= dict.fromkeys(meant, ids)
        if self.tied and _EMBEDDING in found:
            found.setdefault(_HEAD, found[_EMBEDDING])
        return found

    def _is_kept_out(self, module: str) -> bool:
        """Whether modules_to_save keeps a module from being targeted; in the names, a dot is any character."""
        return any(pattern.match(module) for pattern in self._kept_out)

    @cached_property
    def _kept_out(self) -> tuple[re.Pattern[str], ...]:
        return tuple(re.compile(rf"(^|.*\.){name}($|\..*)") for name in self._to_save)

    @cached_property
    def _named_to_save(self) -> tuple[str, ...]:
        names = self.config.names("modules_to_save")
        for name in names:
            if not _PLAIN.fullmatch(name):
                raise AdapterError(
                    f"{self.config.path}: modules_to_save has {name[:80]!r}, which is not a plain name: peft takes it"
                    " as text in one place and as a regular expression in another.",
                    hint="Write the names of modules.",
                )
        return tuple(names)

    @cached_property
    def _to_save(self) -> tuple[str, ...]:
        """Names of modules to save, as peft changes them for tied embeddings (_add_modules_to_save_to_tie)."""
        names = list(self._named_to_save)
        if self.tie == "modules_to_save":
            names += [] if _EMBEDDING in names else [_EMBEDDING]
            of_head = [name for name in names if re.match(rf"(^|.*\.){name}($|\..*)", _HEAD)]
            for name in of_head[:1]:
                names.remove(name)
        return tuple(names)

    @cached_property
    def _excluded(self) -> _Names | _Pattern:
        value = self.config.raw.get("exclude_modules")
        if isinstance(value, str) and value:
            return self._compiled("exclude_modules", value)
        return _Names(frozenset(self.config.names("exclude_modules")))

    @cached_property
    def _named(self) -> _Names | _Pattern:
        value = self.config.raw.get("target_modules")
        if isinstance(value, str) and value.lower() != _ALL_LINEAR:
            found: _Names | _Pattern = self._compiled("target_modules", value)
        elif isinstance(value, str):
            found = _Names(self.matrices - {_EMBEDDING, _HEAD})
        else:
            names = frozenset(_DEFAULT_TARGETS if value is None else self.config.names("target_modules"))
            # The head of tied matrices is no longer one of the names (_add_targets_to_tie).
            found = _Names(names if self.tie != "target_modules" else (names | {_EMBEDDING}) - {_HEAD})
        if isinstance(found, _Names) and len(found.names) >= _MANY:
            return min(found, _Names(self._shortest(found)), key=lambda one: len(one.names))
        return found

    def _shortest(self, listed: _Names) -> frozenset[str]:
        """Return the shortest endings that mean the same modules as a list (peft's _find_minimal_target_modules)."""
        others = {end for module in self.modules if not listed.match(module) for end in _ends(module)} | {""}
        found: set[str] = set()
        for ends in sorted(map(_ends, listed.names)):
            for end in ends:
                if end not in found and end not in others and found.isdisjoint(ends[:-1]):
                    found.add(end)
                    break
        return frozenset(found) or listed.names

    def _is_named(self, module: str) -> bool | None:
        named = self._named.match(module)
        if isinstance(self._named, _Pattern):
            return True if self.tie == "target_modules" and module == _EMBEDDING else named
        if not named or module in self._named.names:
            return named
        layers = self.config.layers
        return True if layers is None else self._is_in(layers, module)

    def _is_in(self, layers: Collection[int], module: str) -> bool | None:
        """Whether a module is in one of these layers, whose number is found as `layers_pattern` says."""
        if self._layer_patterns is None:
            return None
        match = next(filter(None, (pattern.match(module) for pattern in self._layer_patterns)), None)
        return match is not None and int(match["idx"]) in layers

    @cached_property
    def _layer_patterns(self) -> tuple[re.Pattern[str], ...] | None:
        value = self.config.raw.get("layers_pattern") or []
        names = [value] if isinstance(value, str) else self.config.names("layers_pattern")
        return self._safe("layers_pattern", [rf"(?:^|.*?\.){name}\.(?P<idx>\d+)\." for name in names] or [_ANY_LAYER])

    def _compiled(self, key: str, pattern: str) -> _Pattern:
        found = self._safe(key, [pattern])
        return _Pattern(found[0] if found else None)

    def _safe(self, key: str, patterns: list[str]) -> tuple[re.Pattern[str], ...] | None:
        """Compile the patterns of a setting; None, and a note, if they are not safe to try."""
        try:
            if are_safe(patterns):
                return tuple(map(re.compile, patterns))
        except re.error as error:
            raise AdapterError(f"{self.config.path}: {key} has what is not a regular expression: {error}.") from error
        self.untried[key] = None
        return None
