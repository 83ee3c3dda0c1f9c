"""Probe prompts and answers: how much is read, where answers end, what comes back for each token."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from rkruntime.engine.generation import FinishReason, Request
from rkruntime.errors import RunError, UnsupportedCallError
from rkruntime.probes.trial import NO_ROWS, Observation, Trial, same, silence
from rkruntime.words import counted

# Tokens: long enough for a small model's answer to end.
_LONG: Final = 160


def template(trial: Trial) -> Observation:
    """Whether token ids are read as they are sent.

    `plain`: they are. `bos`: it reads one more, so `<bos>` is doubled, as our prompts have it; answers may suffer.
    `wrapped`: it reads several more, its own chat template, and no longer once RKEdge has emptied that. One that does
    both is `bos`.
    """
    trial.empty()
    run = trial.run(trial.request())
    sent = run.end.prompt_tokens
    if run.read is None:
        return Observation(f"{silence(trial).capitalize()}.", run.facts)
    read = f"It read {run.read} tokens of a prompt of {sent}"
    wrapped = run.read > sent + 1
    if wrapped:
        trial.empty()
        run = trial.run(trial.request())  # with an empty template, where the release can
        read += f", and {run.read} of it after its template was emptied"
    if run.read is None or run.read < sent:
        return Observation(f"{read}: that decides nothing.", run.facts)
    if run.read == sent:
        kind = ("its own template", "wrapped") if wrapped else ("nothing", "plain")
        return Observation(f"{read}: it adds {kind[0]}.", run.facts, kind[1])
    return Observation(f"{read}: it adds another <bos>, or whatever has so many tokens.", run.facts, "bos")


def reuse(trial: Trial) -> Observation:
    """Whether a prompt that is in the cache is read again: `reused` or `read-again`. Both are right; one is slower."""
    request = trial.request()
    first, again = trial.run(request), trial.run(request)
    says = f"It gives {same(first.ids == again.ids)}"
    facts = {"first": first.facts, "again": again.facts}
    if again.read is None:
        return Observation(f"{says}; {silence(trial)}.", facts)
    kept = max(0, again.end.prompt_tokens - again.read)
    says = f"{says}; {counted(kept, 'token')} of {again.end.prompt_tokens} came from the cache."
    return Observation(says, facts, "reused" if kept else "read-again")


def end(trial: Trial) -> Observation:
    """Whether an answer ends at its end token without RKEdge's help.

    `ends` or `ends-shown` (and passes the token on before): a plain program would stop, too. `goes-on`: only RKEdge
    ends the answer.
    """
    request = trial.request(stop_tokens=frozenset(), max_new_tokens=_LONG)
    run = trial.run(request)
    stops = trial.model.stop_tokens
    shown = next((number for number in run.ids if number in stops), None)
    facts = {**run.facts, "stop_ids": sorted(stops)}
    if run.end.reason is FinishReason.LENGTH and shown is not None:
        says = f"It does not end at token {shown}, which it passes on: RKEdge ends answers there."
        return Observation(says, facts, "goes-on")
    if run.end.reason is FinishReason.LENGTH:
        return Observation(f"No answer ended within {counted(len(run.ids), 'token')}.", facts)
    if shown is not None:
        return Observation(f"It ends by itself, and passes token {shown} on before.", facts, "ends-shown")
    return Observation("It ends by itself, and does not pass the last token on.", facts, "ends")


def end_tokens(trial: Trial) -> Observation:
    """Which of the bundle's end tokens end an answer by themselves.

    For each one, a text is given after which the model says it: its own answer, then the tokens that come after its
    end. `all`: each that came up ended the answer. `some`: the others need RKEdge, and in a program without it answers
    go on after them. `none` likewise. A token that never came up is named, and decides nothing.
    """
    stops = trial.model.stop_tokens
    asked = trial.request(max_new_tokens=_LONG)
    answer = trial.run(asked).ids
    ends: dict[int, bool] = {}
    for more in ([], *([stop] for stop in sorted(stops))):
        text = [*asked.tokens, *answer, *more]
        rows = trial.logits(trial.request(tokens=text))
        if rows is None:
            return Observation(NO_ROWS)
        token = int(rows[-1].argmax())
        if token in stops:
            run = trial.run(trial.request(tokens=text, stop_tokens=frozenset(), max_new_tokens=4))
            ends[token] = ends.get(token, True) and run.end.reason is FinishReason.STOP and len(run.ids) < 4
    facts = {"ends": {str(token): found for token, found in ends.items()}, "stop_ids": sorted(stops)}
    unseen = sorted(stops - ends.keys())
    rest = f" Not seen: {', '.join(map(str, unseen))}." if unseen else ""
    if not ends:
        return Observation(f"The model said no end token.{rest}", facts)
    by = [[str(token) for token, found in sorted(ends.items()) if found is kind] for kind in (True, False)]
    says = "; ".join(
        f"{', '.join(tokens)} {'ends' if kind else 'does not end'} an answer"
        for tokens, kind in zip(by, (True, False), strict=True) if tokens
    )  # fmt: skip
    result = "none" if not by[0] else "some" if by[1] else "all"
    return Observation(f"{says}.{rest}", facts, result)


def abort(trial: Trial) -> Observation:
    """Whether a run that is aborted leaves the next one alone: `same`, or `other` if its answer has changed."""
    request = trial.request()
    expected = trial.run(request).ids
    events = trial.model.engine.generate(request)
    next(events)
    events.close()
    after = trial.run(request)
    equal = after.ids == expected
    return Observation(f"The next run gives {same(equal)}.", after.facts, "same" if equal else "other")


def hidden(trial: Trial) -> Observation:
    """Which of a prompt's tokens have hidden states: `all`, `last` (embeddings of texts only), or `other`."""
    return _rows(trial, trial.model.engine.hidden_states)


def logits(trial: Trial) -> Observation:
    """Which of a prompt's tokens have logits.

    `all`: a text's likelihood can be computed in one run. `last`: only the next token's, so that each takes a run.
    `other`: neither, and nothing should be computed from them.
    """
    found = _rows(trial, trial.model.engine.logits)
    if found.result != "all":
        return found
    likeliest = int(trial.model.engine.logits(trial.request())[-1].argmax())
    chosen = trial.run(trial.request(max_new_tokens=1)).ids
    fits = "the answer begins with the likeliest token" if chosen == [likeliest] else "the answer begins otherwise"
    facts = {**found.facts, "likeliest": likeliest, "chosen": chosen}
    return Observation(f"{found.says} By the last one, {fits}.", facts, found.result)


def _rows(trial: Trial, arrays: Callable[[Request], Any]) -> Observation:
    request = trial.request()
    rows = [_count(arrays, request) for _ in range(2)]
    whole = all(count == request.length for count in rows)
    says = "a row for each token, also the second time" if whole else f"{rows} rows for {request.length} tokens"
    result = "all" if whole else "last" if rows == [1, 1] else "other"
    return Observation(f"It returns {says}.", {"rows": rows, "prompt_tokens": request.length}, result)


def _count(arrays: Callable[[Request], Any], request: Request) -> int:
    try:
        return len(arrays(request))
    except UnsupportedCallError:
        raise
    except RunError as error:  # an unexpected number of rows, which is an answer here
        if "rows" not in error.details:
            raise
        return int(error.details["rows"])


def prompt_cache(trial: Trial) -> Observation:
    """Whether a saved prompt is used by another load, with the same answer: `same` or `other`."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "prompt.cache"
        expected = trial.run(trial.request(save_prompt_cache=path)).ids
        size = path.stat().st_size if path.exists() else 0
        trial.close()
        trial.run(trial.request(max_new_tokens=1))  # shows whether the template must be emptied
        trial.model.engine.load_prompt_cache(path)
        after = trial.run(trial.request())
    read = "" if after.read is None else f", with {counted(after.read, 'token')} read"
    equal = after.ids == expected
    says = f"With this file of {size:,} bytes, another load gives {same(equal)}{read}."
    return Observation(says, {"size": size, **after.facts}, "same" if equal else "other")
