"""FedLALR (Sun et al. 2023, arXiv 2309.09719): AMSGrad at every node, with rates of its own within a round.

A round begins with x, m and vhat of the Aggregator, and v = vhat. A local step is

    m = beta1 m + (1 - beta1) g,   v = beta2 v + (1 - beta2) g^2,   vhat = max(vhat, v),   x = x - lr m / sqrt(vhat)

without bias correction, and with nothing added to the root: vhat begins at eps^2, and neither maximum nor mean goes
below. The Aggregator takes the plain mean of x, m and vhat. So three tensors of the model's size travel each way; v
stays at its node, and not beyond the round. A coordinate that first meets a gradient far above eps moves by
lr (1 - beta1) / sqrt(1 - beta2) whatever the gradient's size: hence an eps above the usual, and a warm-up.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim.adamw import adamw

from photon.config import Recipe
from photon.errors import ConfigError
from photon.parts.base import Part
from photon.parts.optimizer import LocalOptimizer

# Torch's fused kernel divides by 1 - beta^step. At so late a step that is 1 for any beta up to 1 - 1e-7, and in
# float32 one more makes no difference.
_NO_BIAS_CORRECTION = 2.0**30
_LEAST_EPS = 1e-7  # the merge resolves 2e-16, and eps^2 has to be well above
_MOST_BETA = 1 - 1e-7
_BESIDE = frozenset({"fedlalr", "tau_ramp", "tau_by_agreement"})  # what changes nothing of the rule


class LocalAmsGrad(LocalOptimizer):
    """The local step, one pass over memory. State: `exp_avg` (m), `exp_avg_sq` (v), `max_exp_avg_sq` (vhat)."""

    copies: ClassVar[Mapping[str, str]] = {"exp_avg_sq": "max_exp_avg_sq"}

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(parameters, {"lr": lr, "initial_lr": lr, "betas": betas})
        self.floors = {"max_exp_avg_sq": eps * eps}

    def state_names(self, group: Mapping[str, Any]) -> list[str]:
        """Names of the state of a parameter."""
        return ["exp_avg", "exp_avg_sq", "max_exp_avg_sq"]

    def step_group(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """One call of the fused kernel."""
        states = [self._state_of(p) for p in parameters]
        late = torch.tensor(_NO_BIAS_CORRECTION, device=parameters[0].device)
        adamw(
            parameters,
            [p.grad for p in parameters if p.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [state["max_exp_avg_sq"] for state in states],
            [late] * len(parameters),
            fused=True,
            amsgrad=True,
            beta1=group["betas"][0],
            beta2=group["betas"][1],
            lr=group["lr"],
            weight_decay=0.0,
            eps=0.0,
            maximize=False,
        )

    def _state_of(self, parameter: Tensor) -> dict[str, Tensor]:
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            floor = self.floors["max_exp_avg_sq"]
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.full_like(parameter, floor)
            state["max_exp_avg_sq"] = torch.full_like(parameter, floor)
        return state


@dataclass(frozen=True)
class FedLalr(Part):
    """Local AMSGrad at `node.lr`, its m and vhat averaged beside the weights; `eps` is the root of vhat's floor."""

    beta1: float = 0.9
    beta2: float = 0.99
    eps: float = 1e-3

    def __post_init__(self) -> None:
        if not (0 <= self.beta1 <= _MOST_BETA and 0 <= self.beta2 <= _MOST_BETA):
            raise ValueError("fedlalr: beta1 and beta2 must be at least 0 and below 1")
        if not _LEAST_EPS <= self.eps <= 1:
            raise ValueError(f"fedlalr: eps is from {_LEAST_EPS:g}, as the mean of vhat has no finer grid, to 1")

    def check(self, recipe: Recipe) -> None:
        """The published rule and nothing beside it: what it does not have, the recipe must not ask for."""
        node, federation = recipe.node, recipe.federation
        wrong = {
            "node.optimizer = adamw, as whose peak node.lr is taken": node.optimizer != "adamw",
            "node.weight_decay = 0": node.weight_decay != 0,
            "node.clip_norm = 0": node.clip_norm != 0,
            "federation.weighting = uniform": federation.weighting != "uniform",
            "federation.outer = fedavg with outer_lr = 1": (federation.outer, federation.outer_lr) != ("fedavg", 1.0),
        }
        if needs := [what for what, is_wrong in wrong.items() if is_wrong]:
            raise ConfigError(f"federation.parts: fedlalr needs {'; '.join(needs)}")
        names = {text.partition("(")[0].strip() for text in federation.parts}
        if others := sorted(names - _BESIDE):
            raise ConfigError(
                f"federation.parts: fedlalr is a rule of its own, and does not go with {', '.join(others)}"
            )

    def shared_state(self) -> frozenset[str]:
        """m and vhat."""
        return frozenset({"exp_avg", "max_exp_avg_sq"})

    def optimizer(self, given: torch.optim.Optimizer) -> torch.optim.Optimizer:
        """Its own, for all that the model trains."""
        trainable = [parameter for group in given.param_groups for parameter in group["params"]]
        return LocalAmsGrad(trainable, given.param_groups[0]["initial_lr"], (self.beta1, self.beta2), self.eps)


PART = FedLalr
