"""The answer of a plan in one sentence."""

from __future__ import annotations

from rkconvert.plan.planner import Plan


def answer(plan: Plan) -> str:
    """Say whether the model will run, with how much memory, and how fast, from whose figures; or why not."""
    verdict = plan.verdict
    enough = [choice.gib for choice in plan.ram if choice.fits]
    if verdict.status not in ("ok", "warn") or not enough or plan.prediction is None:
        others = [other.type for other in plan.verdicts if other.status == "ok" and other.type != plan.kind.name]
        instead = f" {others[0]} would." if others else ""
        return f"No: {verdict.reason.rstrip('.')}.{instead}"
    memory = f"{min(enough):g} GiB of board memory"
    on = f"with {memory}" if plan.request.ram_gib is not None else f"from {memory} on"
    source = "predicted" if plan.evidence == "predicted" else "the vendor's figure"
    speed = f"about {plan.prediction.decode_tokens_per_s:.1f} tokens/s ({source} for RKLLM {plan.costs.release})"
    return f"{'Yes' if verdict.status == 'ok' else 'Probably'}, {on}: {speed}."
