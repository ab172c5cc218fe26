"""A momentum whose memory is as long as a round: MT-DAO (Iacob et al. 2025, arXiv 2510.05361) with one momentum.

At tau steps between exchanges a momentum of half-life `ln(0.5) / ln(beta)` well below tau has forgotten, by the end of
a round, what the nodes agreed on. So beta is 0.995 to 0.999, and the numerator is quasi-hyperbolic: a step answers the
gradient at once, with weight 1 - nu, and the slow momentum with nu. That much is the paper's, for its case of a single
momentum, which costs no memory beyond AdamW's. The numbers of the step are those of QHAdam (Ma and Yarats 2019, arXiv
1810.06801) with nu2 = 1, and that is our reading, as is its default nu = 0.7:

    m = beta m + (1 - beta) g
    theta = theta - lr ((1 - nu) g + nu m / (1 - beta^t)) / (sqrt(v / (1 - beta2^t)) + eps)

Second moment, epsilon and decoupled weight decay are AdamW's. State has AdamW's names: beside `share` it is averaged.

A gradient must not be remembered for longer than its size. After one of size 1 and then small ones, m falls like beta^t
and the root of v like beta2^(t/2): with beta above the root of beta2 their ratio, and the step, grow without bound. At
beta 0.999 and AdamW's usual 0.95, updates of a small model grew by half from round to round, to a thousand times the
first. So beta^2 may be at most beta2, which is `node.betas[1]`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from photon.config import Recipe
from photon.errors import ConfigError
from photon.parts.base import Part
from photon.parts.optimizer import LocalOptimizer


class QuasiHyperbolicAdamW(LocalOptimizer):
    """AdamW with the numerator (1 - nu) g + nu m. Groups have `lr`, `betas`, `eps`, `weight_decay`."""

    def __init__(self, groups: list[dict[str, Any]], nu: float) -> None:
        super().__init__(groups, {})
        self.nu = nu

    def state_names(self, group: Mapping[str, Any]) -> list[str]:
        """Names of the state of a parameter."""
        return ["step", "exp_avg", "exp_avg_sq"]

    def step_group(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """The momentum's share by the fused kernel, then the gradient's."""
        states = [self.adamw_state(p) for p in parameters]
        gradients = [p.grad for p in parameters if p.grad is not None]
        squares, steps = [state["exp_avg_sq"] for state in states], [state["step"] for state in states]
        lr, (_, beta2) = group["lr"], group["betas"]
        if group["weight_decay"]:
            torch._foreach_mul_(parameters, 1 - lr * group["weight_decay"])
        adamw(  # the momentum's share of the step, and both moments
            parameters,
            gradients,
            [state["exp_avg"] for state in states],
            squares,
            [],
            steps,
            fused=True,
            amsgrad=False,
            beta1=group["betas"][0],
            beta2=beta2,
            lr=lr * self.nu,
            weight_decay=0.0,
            eps=group["eps"],
            maximize=False,
        )
        if self.nu < 1:  # the gradient's
            roots = torch._foreach_sqrt(squares)
            # Step counts lie beside the parameters: on a GPU nothing waits for them.
            log_beta2 = math.log(max(beta2, 1e-300))
            torch._foreach_div_(roots, [(-torch.expm1(step * log_beta2)).sqrt() for step in steps])
            torch._foreach_add_(roots, group["eps"])
            torch._foreach_addcdiv_(parameters, gradients, roots, value=-lr * (1 - self.nu))


@dataclass(frozen=True)
class SlowMomentum(Part):
    """AdamW of the recipe, its first beta replaced by `beta`, of whose momentum the numerator takes the share `nu`."""

    beta: float = 0.999
    nu: float = 0.7

    def __post_init__(self) -> None:
        if not 0 <= self.beta < 1:
            raise ValueError("slow_momentum: beta must be at least 0 and below 1")
        if not 0 <= self.nu <= 1:
            raise ValueError("slow_momentum: nu is a share, from 0 to 1")

    def check(self, recipe: Recipe) -> None:
        """It is a kind of AdamW."""
        if recipe.node.optimizer != "adamw":
            raise ConfigError(
                f"federation.parts: slow_momentum needs node.optimizer = adamw, not {recipe.node.optimizer}"
            )
        second = recipe.node.betas[1]
        if self.nu and self.beta**2 > second:
            raise ConfigError(
                f"federation.parts: slow_momentum(beta={self.beta:g}) remembers gradients for longer than AdamW their "
                f"size, so that steps grow without bound: the second of node.betas is {second:g}, and must be at least "
                f"beta^2 = {self.beta**2:.6g}; 0.999 suits any beta up to 0.9995"
            )

    def optimizer(self, given: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """AdamW's groups and rates."""
        kept = ("params", "lr", "initial_lr", "eps", "weight_decay")
        groups = [{key: group[key] for key in kept} for group in given.param_groups]
        for own, group in zip(groups, given.param_groups, strict=True):
            own["betas"] = (self.beta, group["betas"][1])
        return QuasiHyperbolicAdamW(groups, self.nu)


PART = SlowMomentum
