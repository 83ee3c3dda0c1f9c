"""W8A8 arithmetic simulated in torch, to train against it and to measure what it costs.

Weights are rounded to int8 per output channel, activations to int8 per token, both symmetric; the tied embedding is
rounded per row for the lookup and for the logits alike. This is what the emulator computes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

from torch import Tensor, nn
from torch.nn import functional


def round_int8(values: Tensor) -> Tensor:
    """Round each row of the last dimension to 127 steps on either side; gradients pass straight through."""
    scale = values.detach().abs().amax(dim=-1, keepdim=True).clamp_min(1e-12) / 127
    rounded = (values.detach() / scale).round() * scale
    return values + (rounded - values.detach())


@contextmanager
def simulated(model: nn.Module) -> Iterator[None]:
    """Compute every linear and embedding of `model` in W8A8, except the matrices of a LoRA."""
    linears = [m for name, m in model.named_modules() if isinstance(m, nn.Linear) and "lora_" not in name]
    # A row's scale follows the row, so rounding what was looked up is rounding the table.
    lookups = [
        module.register_forward_hook(lambda _module, _inputs, rows: round_int8(rows))
        for module in model.modules()
        if isinstance(module, nn.Embedding)
    ]
    try:
        for linear in linears:
            linear.forward = partial(_linear, linear)  # type: ignore[method-assign]
        yield
    finally:
        for linear in linears:
            del linear.forward
        for hook in lookups:
            hook.remove()


def _linear(module: nn.Linear, values: Tensor) -> Tensor:
    return functional.linear(round_int8(values), round_int8(module.weight), module.bias)
