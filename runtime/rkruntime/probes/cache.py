"""Probe the KV cache with rkllm_get_kv_cache_size (since 1.2.1): how full it is, and what it survives."""

from __future__ import annotations

from dataclasses import replace

from rkruntime.engine.generation import FinishReason, Request
from rkruntime.probes.trial import Observation, Trial, same, silence
from rkruntime.words import counted


def history(trial: Trial) -> Observation:
    """How full the cache is in a conversation that is continued: `grows`, or `stays` if the second turn replaced it."""
    engine = trial.model.engine
    request = trial.request(keep_history=True, max_new_tokens=4)
    engine.clear_cache()
    sizes = []
    for _ in range(2):
        trial.run(request)
        sizes.append(engine.cache_sizes()[0])
    engine.clear_cache()
    says = f"The cache holds {sizes[0]} tokens after one turn and {sizes[1]} after two."
    return Observation(says, {"sizes": sizes}, "grows" if sizes[1] > sizes[0] else "stays")


def pause(trial: Trial) -> Observation:
    """Whether the run after a paused one reads its own prompt.

    `reads`: a paused run can be left. `reads-on`: it reads more than its prompt, such as the last token before. A board
    was reported to ignore the prompt and to go on with the paused answer: that is an error here, without a result.
    """
    request = trial.request(max_new_tokens=8)
    paused, expected = _paused(trial, request)
    if paused is None:
        return Observation("Not answered: the run did not pause.", {"expected": expected})
    after = trial.run(request)
    trial.model.engine.clear_cache()
    again = trial.run(request)
    read = silence(trial).capitalize() if after.read is None else f"It read {counted(after.read, 'token')}"
    says = f"{read} of a prompt of {after.end.prompt_tokens}"
    result = "" if after.read is None else "reads-on" if after.read > after.end.prompt_tokens else "reads"
    says = f"{says}; once the cache is cleared, {same(again.ids == expected)}."
    return Observation(says, after.facts, result)


def pause_cache(trial: Trial) -> Observation:
    """Whether the cache survives a pause.

    `kept`: prompt and answer so far are in it, and ranges of it can be cut. `lost`: it is empty, so a pause saves
    nothing. `part`: something else is in it.
    """
    engine, request = trial.model.engine, trial.request(max_new_tokens=8)
    engine.clear_cache()
    paused, expected = _paused(trial, request)
    if paused is None:
        return Observation("Not answered: the run did not pause.", {"expected": expected})
    held = engine.cache_sizes()[0]
    engine.clear_cache()
    least = len(request.tokens) + paused - 1  # the last token may not have been read yet
    result = "kept" if held >= least else "lost" if held == 0 else "part"
    says = f"While a run is paused, the cache holds {counted(held, 'token')}; prompt and answer have {least + 1}."
    return Observation(says, {"held": held, "prompt_tokens": len(request.tokens), "answered": paused}, result)


def logits_cache(trial: Trial) -> Observation:
    """Whether a conversation's cache survives a run in logits mode that continues it.

    `appended`: it is kept, and what the run read is behind it, so that the next turn goes on after that. `kept`: it is
    as before, so logits can be asked for between two turns. `lost`: the conversation is gone, and must be read again.
    """
    engine = trial.model.engine
    engine.clear_cache()
    trial.run(trial.request(keep_history=True, max_new_tokens=4))
    before = engine.cache_sizes()[0]
    more = list(trial.request().tokens)[: before // 2]
    rows = len(engine.logits(trial.request(tokens=more, keep_history=True)))
    after = engine.cache_sizes()[0]
    engine.clear_cache()
    result = "kept" if after == before else "appended" if after > before else "lost"
    says = f"It held {before} tokens before a run in logits mode with {len(more)} more, and {after} after it."
    return Observation(says, {"before": before, "after": after, "read": len(more), "rows": rows}, result)


def _paused(trial: Trial, request: Request) -> tuple[int | None, list[int]]:
    """Pause a run at its third token; returns how many tokens it said, or None, and what it says without a pause."""
    expected = trial.run(request).ids
    trial.model.engine.clear_cache()
    paused = trial.run(replace(request, pause_tokens=frozenset(expected[:3][-1:])))
    return (len(paused.ids) if paused.end.reason is FinishReason.PAUSE else None), expected
