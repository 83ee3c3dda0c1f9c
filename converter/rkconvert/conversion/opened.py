"""Shared by the conversions of one run: each model is opened, each adapter read and each source hashed once."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from functools import cache

from rkconvert.adapters.merged_model import AdapterSource, MergedModel, merged_model
from rkconvert.adapters.reader import Adapter
from rkconvert.progress import Reporter
from rkconvert.sources.checkpoint import Checkpoint
from rkconvert.sources.open import open_source
from rkconvert.tensors.hashes_ahead import HashesAhead
from rkruntime.bundle.manifest import Source


class OpenedModels:
    """Cache of models and hashes by request. For one run: files that change meanwhile are not noticed."""

    def __init__(self) -> None:
        self.checkpoint = cache(open_source)
        self._models: dict[tuple[int, tuple[AdapterSource, ...]], MergedModel] = {}
        self._sources: dict[int, Source] = {}
        self._ahead = HashesAhead(())

    def model(self, base: Checkpoint, loras: Sequence[AdapterSource]) -> MergedModel:
        """Return a checkpoint from this cache with adapters; see `merged_model` for what it raises."""
        key = id(base), tuple(loras)
        if key not in self._models:
            self._models[key] = merged_model(base, loras)
        return self._models[key]

    @contextmanager
    def hashing(self, items: Sequence[Checkpoint | Adapter]) -> Iterator[None]:
        """Hash the weight files of these sources while the block does other work."""
        new = [file for item in items if id(item) not in self._sources for file in sorted(item.weight_files)]
        former = self._ahead
        with closing(HashesAhead(new)) as self._ahead:
            try:
                yield
            finally:
                self._ahead = former

    def source(self, item: Checkpoint | Adapter, reporter: Reporter) -> Source:
        """Return name, revision, and one hash over the hashes of the weight files in the order of their names.

        Raises:
            InputError: A file cannot be read.
        """
        files = sorted(item.weight_files)
        if id(item) in self._sources:
            return self._sources[id(item)]
        if not all(file in self._ahead for file in files):
            with self.hashing([item]):
                return self.source(item, reporter)
        with reporter.bar(f"hashing {item.name}", self._ahead.left(files)) as advance:
            hashes = "".join(self._ahead.of(file, advance) for file in files)
        self._sources[id(item)] = Source(item.name, item.revision, hashlib.sha256(hashes.encode()).hexdigest())
        return self._sources[id(item)]
