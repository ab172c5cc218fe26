"""Muon for the hidden matrices, AdamW for everything else, behind one optimizer object.

Muon (Jordan et al. 2024, kellerjordan.github.io/posts/muon) replaces the momentum of a matrix by (nearly) the closest
semi-orthogonal matrix, found by a Newton-Schulz iteration. Two things differ from `torch.optim.Muon`: on a CPU the
iteration runs in float32, where bfloat16 products are several times slower, and matrices of one shape share a kernel.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from photon.parts.optimizer import LocalOptimizer

NEWTON_SCHULZ_STEPS = 5
# Coefficients of the original: the steepest slope at zero that still keeps values in a band. Five steps bring every
# singular value above 0.003 of the norm into [0.68, 1.21]. They do not converge to 1, and for training need not.
QUINTIC = (3.4445, -4.7750, 2.0315)
# Elements orthogonalised at once: bounds the extra memory (a few copies of this) however many layers share a shape.
# On a CPU a chunk stays within a core's cache; larger ones measured up to 15% slower.
CHUNK_ELEMENTS = {"cpu": 2**17, "mps": 2**24, "cuda": 2**26}


def orthogonalise(matrices: Tensor) -> Tensor:
    """Replace the singular values of each matrix by values in about [0.7, 1.2], keeping its singular vectors.

    `matrices`: float [count, rows, columns]; the result has the same shape and dtype. A zero matrix stays zero.
    Computed in bfloat16 on CUDA, elsewhere in the dtype that comes in.
    """
    a, b, c = QUINTIC
    x = matrices.bfloat16() if matrices.is_cuda else matrices
    tall = x.shape[-2] > x.shape[-1]
    if tall:  # the Gram matrix is then the smaller of the two
        x = x.mT
    # The Frobenius norm bounds the spectral norm, so all singular values start in [0, 1], where the quintic is tame.
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp_min(1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if tall else x).to(matrices.dtype)


class MuonAdamW(LocalOptimizer):
    """One optimizer with two kinds of parameter groups, told apart by the group's `algorithm`.

    `muon` (matrices only; keys `lr`, `momentum`, `weight_decay`): Nesterov momentum, orthogonalised, then scaled by
    sqrt(max(1, rows / columns)) as in the original, so a rate near 0.02 suits all shapes. State: `momentum_buffer`.
    `adamw` (keys `lr`, `betas`, `eps`, `weight_decay`): torch's fused AdamW. State: `step`, `exp_avg`, `exp_avg_sq`.
    Weight decay is decoupled in both and multiplied by the learning rate, so a rate of 0 changes nothing.
    """

    def __init__(self, groups: Iterable[dict[str, Any]]) -> None:
        super().__init__(groups, defaults={})
        for group in self.param_groups:
            for parameter in group["params"]:
                if group["algorithm"] == "muon" and parameter.ndim != 2:
                    raise ValueError(f"Muon takes matrices, not a parameter of shape {tuple(parameter.shape)}")

    def state_names(self, group: Mapping[str, Any]) -> list[str]:
        """Names of the state of a parameter."""
        return ["momentum_buffer"] if group["algorithm"] == "muon" else ["step", "exp_avg", "exp_avg_sq"]

    def step_group(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """By the group's own algorithm."""
        if group["algorithm"] == "muon":
            self._step_muon(parameters, group)
        else:
            self._step_adamw(parameters, group)

    def _step_muon(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        for alike in _chunks_of_one_shape(parameters):
            gradients = [p.grad for p in alike if p.grad is not None]
            momenta = [self._momentum_buffer(p) for p in alike]
            # An average rather than a sum of gradients: orthogonalisation forgets the scale, and so it stays bounded.
            torch._foreach_lerp_(momenta, gradients, 1.0 - group["momentum"])
            nesterov = torch._foreach_lerp(gradients, momenta, group["momentum"])
            updates = orthogonalise(torch.stack(nesterov)).unbind()
            rows, columns = alike[0].shape
            torch._foreach_mul_(alike, 1.0 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(alike, updates, alpha=-group["lr"] * max(1.0, rows / columns) ** 0.5)

    def _momentum_buffer(self, parameter: Tensor) -> Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        buffer: Tensor = state["momentum_buffer"]
        return buffer

    def _step_adamw(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        states = [self.adamw_state(p) for p in parameters]
        adamw(
            parameters,
            [p.grad for p in parameters if p.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def _chunks_of_one_shape(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """Parameters grouped by shape, each group cut into chunks of bounded size."""
    by_shape: defaultdict[torch.Size, list[Tensor]] = defaultdict(list)
    for parameter in parameters:
        by_shape[parameter.shape].append(parameter)
    for shape, alike in by_shape.items():
        size = max(1, CHUNK_ELEMENTS[alike[0].device.type] // shape.numel())
        for start in range(0, len(alike), size):
            yield alike[start : start + size]
