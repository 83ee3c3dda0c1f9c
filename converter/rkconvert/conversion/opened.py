"""Shared by the conversions of one run: each model is opened, each adapter read and each source hashed once."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from functools import cache

from rkconvert.adapters.merged_model import AdapterSource, MergedModel, merged_model
from rkconvert.adapters.reader import Adapter
from rkconvert.progress import Reporter
from rkconvert.sources.checkpoint import Checkpoint
from rkconvert.sources.open import open_source
from rkruntime.bundle.manifest import Source
from rkruntime.files import sha256_file


class OpenedModels:
    """Cache of models and hashes by request. For one run: files that change meanwhile are not noticed."""

    def __init__(self) -> None:
        self.checkpoint = cache(open_source)
        self._models: dict[tuple[int, tuple[AdapterSource, ...]], MergedModel] = {}
        self._sources: dict[int, Source] = {}

    def model(self, base: Checkpoint, loras: Sequence[AdapterSource]) -> MergedModel:
        """A checkpoint from this cache with adapters; see `merged_model` for what it raises."""
        key = id(base), tuple(loras)
        if key not in self._models:
            self._models[key] = merged_model(base, loras)
        return self._models[key]

    def source(self, item: Checkpoint | Adapter, reporter: Reporter) -> Source:
        """Name and revision, and one hash over the hashes of the weight files in the order of their names."""
        if id(item) not in self._sources:
            files = sorted(item.weight_files)
            with reporter.bar(f"hashing {item.name}", sum(file.stat().st_size for file in files)) as advance:
                hashes = "".join(sha256_file(file, advance) for file in files)
            self._sources[id(item)] = Source(item.name, item.revision, hashlib.sha256(hashes.encode()).hexdigest())
        return self._sources[id(item)]
