"""Next-token cross-entropy straight from hidden states, never holding more than a bounded piece of the logits.

Full logits are the largest tensor of a training step: 32 768 tokens of a 50 368-word vocabulary are 6.6 GB in
float32, and the backward pass holds them twice. Three forms of one formula, held to equal values and gradients by
the tests:

* whole: `cross_entropy(linear(...))`. Off the CPU, while the logits fit in `LOGITS_BYTES`: it compiles with the rest
  of the model.
* fused: `torch.nn.functional.linear_cross_entropy` (torch 2.13 and newer), which computes the gradients piece by
  piece inside the forward pass and keeps no logits. In float32: always on the CPU, where pieces that stay in the
  cache make it about twice as fast as whole at a width of 128; elsewhere where whole does not fit.
* chunked: the same method, ours. For older torch, and in bfloat16: torch's returns the loss in the inputs' precision,
  and bfloat16 has steps of 0.06 nats where training starts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

LOGITS_BYTES = 512 * 2**20  # float32 logits in flight, off the CPU
CPU_ROWS = 512  # tokens per piece on the CPU: fewer starve the matrix product, more leave the cache


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean cross-entropy in nats, scalar float32, of `hidden @ weight.T` against `targets`.

    `hidden`: [N, d]; `weight`: [V, d]; `targets`: int64 [N]. Under autocast the matrix products run in autocast's
    dtype, the softmax and the sums over pieces in float32. Differentiable once.
    """
    device = hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
    rows = CPU_ROWS if device == "cpu" else max(1, LOGITS_BYTES // (4 * weight.shape[0]))
    has_fused = hasattr(functional, "linear_cross_entropy") and dtype.itemsize >= 4
    with torch.autocast(device, enabled=False):  # the dtype is chosen here, once for all three
        if hidden.shape[0] <= rows and not (device == "cpu" and has_fused):
            return whole(hidden.to(dtype), weight.to(dtype), targets)
        if has_fused:
            return fused(hidden.to(dtype), weight.to(dtype), targets, rows)
        loss: Tensor = chunked(hidden, weight, targets, rows, dtype)
        return loss


def whole(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """All logits at once: the reference for the other two."""
    logits = functional.linear(hidden, weight)
    return functional.cross_entropy(logits.to(_at_least_float32(logits.dtype)), targets)


def fused(hidden: Tensor, weight: Tensor, targets: Tensor, rows: int) -> Tensor:
    """torch's operator, `rows` of N at a time."""
    options = torch.nn.LinearCrossEntropyOptions(
        batch_chunk_size=rows,
        allow_retain_graph=torch.compiler.is_compiling(),  # torch asks for it there, and it costs a buffer elsewhere
    )
    return functional.linear_cross_entropy(hidden, weight, targets, options=options)


def chunked(hidden: Tensor, weight: Tensor, targets: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """`rows` of N at a time, matrix products in `dtype`; `hidden` and `weight` as they are stored."""
    wants_gradients = torch.is_grad_enabled()  # inside `forward` it is always off
    loss: Tensor = _Chunked.apply(  # type: ignore[no-untyped-call]  # torch's stub has no types here
        hidden, weight, targets, rows, dtype, wants_gradients
    )
    return loss


class _Chunked(torch.autograd.Function):
    """Loss and gradients in one pass over the pieces: the gradients take the logits' place, none are kept."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, rows: int, dtype: torch.dtype, wants_gradients: bool
    ) -> Tensor:
        matrix = weight.to(dtype)
        total = torch.zeros((), dtype=_at_least_float32(dtype), device=hidden.device)
        hidden_grad = torch.empty_like(hidden if wants_gradients else hidden[:0])
        weight_grad = torch.zeros_like(weight if wants_gradients else weight[:0])
        for start in range(0, hidden.shape[0], rows):
            piece = hidden[start : start + rows].to(dtype)  # [r, d]
            answers = targets[start : start + rows, None]  # [r, 1]
            log_odds = (piece @ matrix.T).to(total.dtype).log_softmax(1)  # [r, V]
            total -= log_odds.gather(1, answers).sum()
            if wants_gradients:  # of the sum of losses, by the logits: softmax - one-hot
                minus_one = torch.full_like(answers, -1, dtype=total.dtype)
                logits_grad = log_odds.exp_().scatter_add_(1, answers, minus_one).to(dtype)
                hidden_grad[start : start + rows] = logits_grad @ matrix
                weight_grad += logits_grad.T @ piece
        ctx.save_for_backward(hidden_grad, weight_grad)
        ctx.count = hidden.shape[0]
        return total / hidden.shape[0]

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor, Tensor, None, None, None, None]:
        hidden_grad, weight_grad = ctx.saved_tensors
        scale = outer / ctx.count
        return scale * hidden_grad, scale * weight_grad, None, None, None, None


def _at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)
