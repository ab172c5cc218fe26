"""What local optimizers of ours have in common: the shape of a step, and what a federation must know of their state."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from inspect import unwrap
from typing import Any, ClassVar, overload

import torch
from torch import Tensor

# A second moment that a lossy codec has made negative counts as zero.
FLOORS: Mapping[str, float] = {"exp_avg_sq": 0.0}


class LocalOptimizer(torch.optim.Optimizer, ABC):
    """Says how one group steps, and which state a parameter of it has.

    `floors` are the least values of kinds of state that may be shared, and what they begin at; `copies` says which
    kinds begin each round as a copy of which shared ones.
    """

    floors: Mapping[str, float] = FLOORS
    copies: ClassVar[Mapping[str, str]] = {}

    @abstractmethod
    def state_names(self, group: Mapping[str, Any]) -> Iterable[str]:
        """Names of the state that a parameter of the group has after its first step."""

    @abstractmethod
    def step_group(self, parameters: list[Tensor], group: dict[str, Any]) -> None:
        """Update the parameters of a group that have a gradient, at least one."""

    # torch wraps these two so that its compiler leaves them alone, and imports it for that: 4 s and 80 MB a process.

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As torch's."""
        unwrap(torch.optim.Optimizer.add_param_group)(self, param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As torch's."""
        unwrap(torch.optim.Optimizer.zero_grad)(self, set_to_none)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient. `closure`, if given, recomputes and returns the loss first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            if parameters := [p for p in group["params"] if p.grad is not None]:
                self.step_group(parameters, group)
        return loss

    def adamw_state(self, parameter: Tensor) -> dict[str, Tensor]:
        """State of a parameter under AdamW's names, made at its first step; the count of steps lies beside it."""
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state
