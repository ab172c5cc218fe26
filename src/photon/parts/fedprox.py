"""FedProx (Li et al. 2020, arXiv 1812.06127): local losses with a proximal term, mu / 2 |theta - theta_t|^2.

Its gradient mu (theta - theta_t) pulls every local step back to the base of the round, before gradients are clipped.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from photon.parts.base import Part


@dataclass(frozen=True)
class FedProx(Part):
    """`mu` is the strength of the pull; 0 is FedAvg to the last bit."""

    mu: float = 0.01

    def __post_init__(self) -> None:
        if self.mu < 0:
            raise ValueError("fedprox: mu must be at least 0")

    @torch.no_grad()
    def correct(self, weights: Mapping[str, nn.Parameter], base: Mapping[str, Tensor]) -> None:
        """Add mu (theta - theta_t) to each gradient."""
        if not self.mu:
            return
        for name, weight in weights.items():
            if weight.grad is not None:
                weight.grad.add_(weight - base[name], alpha=self.mu)


PART = FedProx
