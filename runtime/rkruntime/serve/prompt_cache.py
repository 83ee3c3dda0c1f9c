"""Track which prompt is in the KV cache on the NPU, and keep prompt cache files for other conversations.

Since 1.2.0 the runtime itself reuses the longest prefix that a prompt shares with its KV cache. Before that, and for
several conversations in turn, prompt cache files serve the purpose: the runtime writes one at the end of a run, and
reuses the longest common prefix of the file that is loaded.

Files only help and are never required: if a file or the folder fails, the answer is given without it, one line is
logged, and no file is tried for a while.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from rkruntime.abi import within
from rkruntime.engine.generation import Event, Finished, FinishReason, Request, Token
from rkruntime.errors import ModelError, RKEdgeError, RunError, UnsupportedCallError, WorkerError
from rkruntime.files import atomic_file
from rkruntime.text.answer import Answer
from rkruntime.threads import in_thread

if TYPE_CHECKING:
    from rkruntime.model import Model

log = logging.getLogger("rkedge")

PREFIX_REUSE: Final = "1.2.0"
# Default quota without the runtime's own reuse: files are then the only reuse, so it is not 0.
_QUOTA_WITHOUT_REUSE_MB: Final = 512.0
# Seconds without files after a failure: long enough not to fill the log, short enough to notice free space again.
_PAUSE_S: Final = 600.0


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """Return the length of the common prefix."""
    length = min(len(one), len(other))
    if one[:length] == other[:length]:
        return length
    return next(at for at in range(length) if one[at] != other[at])


class PromptCaches:
    """Choose, for each run, which file to load before it and whether to write one after it.

    Args:
        folder: Folder of the files. Each has a JSON file next to it with its token ids and model.
        max_mb: Disk quota; None means 0 if the runtime reuses its cache itself, else 512.
        min_tokens: Fewest saved tokens for which loading a file is worth the time.
    """

    def __init__(self, folder: Path, max_mb: float | None, min_tokens: int) -> None:
        self._folder = folder
        self._max_mb = max_mb
        self._min_tokens = min_tokens
        self._files: OrderedDict[Path, list[int]] | None = None
        self._on_npu: list[int] = []
        self._loaded = False
        self._paused_until = 0.0
        self._crashed: set[str] = set()

    def forget(self) -> None:
        """Forget everything, because another model or none is loaded."""
        self._on_npu, self._files, self._loaded = [], None, False

    def forget_position(self) -> None:
        """Forget what the KV cache held: neither the last run's nor a restored file's tokens are there (see Runner)."""
        self._on_npu, self._loaded = [], False

    async def prepare(self, model: Model, request: Request) -> Request:
        """Load the file that saves the most, if any; returns the request, with a file to write if worthwhile."""
        if not self._quota(model) or time.monotonic() < self._paused_until or _identity(model) in self._crashed:
            return request
        try:
            return await self._prepared(model, request)
        except OSError as error:
            self._pause(error)
            return request

    async def _prepared(self, model: Model, request: Request) -> Request:
        tokens = list(request.tokens)
        held, best, saved = await in_thread(self._found, model, tokens)
        if best and saved - held >= self._min_tokens and await self._load(model, best):
            self._known(model).move_to_end(best)
            self._on_npu = self._known(model)[best]
            held = saved
        if len(tokens) - max(held if not self._reuses(model) else 0, saved) < self._min_tokens:
            return request
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return replace(request, save_prompt_cache=self._file(model, tokens))

    async def deliver(self, model: Model, request: Request, take: Callable[[list[Event]], bool]) -> None:
        """See `Engine.deliver`. A run that fails with a file to write is continued without it."""
        if request.save_prompt_cache is None:
            return await model.engine.deliver(request, take)
        said: list[int] = []

        def noted(events: list[Event]) -> bool:
            said.extend(event.token_id for event in events if isinstance(event, Token))
            return take(events)

        try:
            return await model.engine.deliver(request, noted)
        except WorkerError:
            self._drop(Path(request.save_prompt_cache))
            self._switch_off(model)
            raise
        except RunError as error:
            left = request.max_new_tokens - len(said) if request.max_new_tokens > 0 else -1
            failure = error
        self._drop(Path(request.save_prompt_cache))

        def whole(events: list[Event]) -> bool:
            said.extend(event.token_id for event in events if isinstance(event, Token))
            if not isinstance(events[-1], Finished):
                return take(events)
            self._pause(failure)  # it succeeded without the file, so the file was at fault
            end = replace(events[-1], prompt_tokens=len(request.tokens), generated_tokens=len(said))
            return take([*events[:-1], end])

        if left == 0:
            whole([Finished(FinishReason.LENGTH, len(request.tokens), len(said))])
            return None
        again = replace(request, tokens=[*request.tokens, *said], max_new_tokens=left, save_prompt_cache=None)
        return await model.engine.deliver(again, whole)

    def _switch_off(self, model: Model) -> None:
        """Use no files for this model until the daemon restarts: a board is reported to crash with them."""
        if _identity(model) not in self._crashed:
            self._crashed.add(_identity(model))
            log.warning("the runtime was lost in a call with a prompt cache file: no more of them for this model")

    def _pause(self, error: OSError | RKEdgeError) -> None:
        self._files, self._paused_until = None, time.monotonic() + _PAUSE_S
        reason = error.message if isinstance(error, RKEdgeError) else str(error)
        log.warning("no prompt cache files for %g minutes, answers continue without: %s", _PAUSE_S / 60, reason)

    def _found(self, model: Model, tokens: list[int]) -> tuple[int, Path | None, int]:
        """Return how many of the prompt's tokens are on the NPU, the file with the most, and how many it has."""
        held = common_prefix(self._on_npu, tokens) if self._reuses(model) else 0
        files = self._known(model)
        best = max(files, key=lambda path: common_prefix(files[path], tokens), default=None)
        return held, best, common_prefix(files[best], tokens) if best else 0

    async def finished(self, model: Model, request: Request, answer: Answer) -> int:
        """Note what is in the KV cache now, and enforce the quota; returns how many prompt tokens were reused."""
        if request.save_prompt_cache is None:  # there is no file to read or write
            return self._finished(model, request, answer)
        return await in_thread(self._finished, model, request, answer)

    def _finished(self, model: Model, request: Request, answer: Answer) -> int:
        held = common_prefix(self._on_npu, list(request.tokens))
        # Without the runtime's own reuse, the next run can use only what a file restores.
        self._on_npu = [*request.tokens, *answer.tokens] if self._reuses(model) else []
        if request.save_prompt_cache is not None:
            path = Path(request.save_prompt_cache)
            try:
                if path.is_file():
                    self._keep(model, path, list(request.tokens))
            except (OSError, RKEdgeError) as error:
                self._drop(path)
                self._pause(error)
        if answer.perf is not None and answer.perf.prefill_tokens > 0:
            return max(0, len(request.tokens) - answer.perf.prefill_tokens)
        # At least the last token is computed; releases before 1.2.1 give no figures.
        return min(held, len(request.tokens) - 1)

    async def _load(self, model: Model, path: Path) -> bool:
        try:
            if self._loaded:
                await in_thread(model.engine.release_prompt_cache)
            await in_thread(model.engine.load_prompt_cache, path)
        except (ModelError, UnsupportedCallError) as error:
            log.warning("prompt cache %s: %s", path.name, error.message)
            self._drop(path)
            if isinstance(error, WorkerError):
                self._switch_off(model)
            return False
        self._loaded = True
        return True

    @staticmethod
    def _reuses(model: Model) -> bool:
        return within(model.engine.info.release, PREFIX_REUSE, "")

    def _quota(self, model: Model) -> float:
        if self._max_mb is not None:
            return self._max_mb * 1e6
        return 0.0 if self._reuses(model) else _QUOTA_WITHOUT_REUSE_MB * 1e6

    def _file(self, model: Model, tokens: Sequence[int]) -> Path:
        digest = hashlib.sha256(json.dumps([_identity(model), *tokens]).encode()).hexdigest()
        return self._folder / f"{digest[:32]}.kv"

    def _known(self, model: Model) -> OrderedDict[Path, list[int]]:
        """Return the files for exactly this model, least recently used first; the folder is read once."""
        if self._files is None:
            for path in self._folder.glob("*.partial-*"):
                # Left by a daemon that was killed while it wrote the file.
                path.unlink(missing_ok=True)
            found = [(path, _read_index(path, _identity(model))) for path in self._folder.glob("*.kv")]
            found.sort(key=lambda item: item[0].stat().st_mtime)
            self._files = OrderedDict((path, tokens) for path, tokens in found if tokens)
        return self._files

    def _keep(self, model: Model, path: Path, tokens: list[int]) -> None:
        files = self._known(model)
        with atomic_file(path.with_suffix(".json")) as partial:
            partial.write_text(json.dumps({"model": _identity(model), "tokens": tokens}))
        files[path] = tokens
        files.move_to_end(path)
        # A longer prompt of the same conversation replaces the shorter one.
        for other in [item for item, ids in files.items() if item != path and tokens[: len(ids)] == ids]:
            self._drop(other)
        self._make_room(self._quota(model))

    def _make_room(self, quota: float) -> None:
        paths = sorted(self._folder.glob("*.kv"), key=lambda path: path.stat().st_mtime)
        total = sum(path.stat().st_size for path in paths)
        for path in paths:
            if total <= quota:
                break
            total -= path.stat().st_size
            self._drop(path)

    def _drop(self, path: Path) -> None:
        if self._files is not None:
            self._files.pop(path, None)
        for name in (path, path.with_suffix(".json")):
            with suppress(OSError):
                name.unlink()


def _identity(model: Model) -> str:
    """Return an id of model file and release, for which alone a KV cache is valid."""
    manifest = model.bundle.manifest
    return f"{manifest.files[manifest.model_file].sha256}/{model.engine.info.release}"


def _read_index(path: Path, identity: str) -> list[int]:
    try:
        data: Any = json.loads(path.with_suffix(".json").read_bytes())
        if data["model"] == identity and all(type(token) is int for token in data["tokens"]):
            return list(data["tokens"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        # Not a file of ours, truncated or gone: treat it as missing.
        pass
    return []
