"""The outer optimizer: applies the merged pseudo-gradient to the global model.

The pseudo-gradient is `theta_t - mean_k theta_k`, so every optimizer here *descends* along it, with the semantics of
`torch.optim` (and of Zaheer et al. 2018 for Yogi, which torch lacks).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from photon.config import FederationConfig
from photon.errors import StateError


class Yogi(torch.optim.Optimizer):
    """Adam whose second moment moves by `(1 - beta2) * sign(v - g^2) * g^2`; bias-corrected like Adam."""

    def __init__(self, params: list[nn.Parameter], lr: float, betas: tuple[float, float], eps: float) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]  # no loss to return
        """One update from the `.grad` of each parameter."""
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for parameter in group["params"]:
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.zeros(())
                    state["exp_avg"] = torch.zeros_like(parameter)
                    state["exp_avg_sq"] = torch.zeros_like(parameter)
                gradient, mean, square = parameter.grad, state["exp_avg"], state["exp_avg_sq"]
                state["step"] += 1
                steps = state["step"].item()
                mean.lerp_(gradient, 1 - beta1)
                squared = gradient.square()
                square.sub_(torch.sign(square - squared) * squared, alpha=1 - beta2)
                root = (square / (1 - beta2**steps)).sqrt_().add_(group["eps"])
                parameter.addcdiv_(mean, root, value=-group["lr"] / (1 - beta1**steps))


class OuterOptimizer:
    """Holds the global model (CPU parameters by name) and moves it once a round."""

    def __init__(self, weights: Mapping[str, Tensor], federation: FederationConfig) -> None:
        self._parameters = {name: nn.Parameter(tensor.clone()) for name, tensor in weights.items()}
        self._optimizer = _build(list(self._parameters.values()), federation)

    def weights(self) -> dict[str, Tensor]:
        """The global model; views of what `step` moves."""
        return {name: parameter.detach() for name, parameter in self._parameters.items()}

    def step(self, pseudo_gradient: Mapping[str, Tensor]) -> None:
        """theta_{t+1} from the merged pseudo-gradient of round t."""
        for name, parameter in self._parameters.items():
            parameter.grad = pseudo_gradient[name]
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)

    def export_state(self) -> dict[str, Tensor]:
        """Optimizer state as named tensors, `parameter/state`."""
        state: dict[str, Tensor] = {}
        for name, parameter in self._parameters.items():
            for key, value in self._optimizer.state.get(parameter, {}).items():
                if value is not None:
                    state[f"{name}/{key}"] = torch.as_tensor(value).clone()
        return state

    def import_state(self, state: Mapping[str, Tensor]) -> None:
        """Replace all optimizer state by what `export_state` gave. Raises StateError on unknown names or shapes."""
        self._optimizer.state.clear()
        for key, value in state.items():
            name, _, kind = key.rpartition("/")
            parameter = self._parameters.get(name)
            if parameter is None or (value.dim() and value.shape != parameter.shape):
                raise StateError(f"outer optimizer state {key!r} does not fit the model")
            entry: dict[str, Any] = self._optimizer.state[parameter]
            entry[kind] = value.clone()


def _build(parameters: list[nn.Parameter], federation: FederationConfig) -> torch.optim.Optimizer:
    lr, momentum = federation.outer_lr, federation.outer_momentum
    match federation.outer:
        case "fedavg":
            return torch.optim.SGD(parameters, lr=lr)
        case "none":  # the centralised baseline: the only node's weights become the global model
            return torch.optim.SGD(parameters, lr=1.0)
        case "momentum":
            return torch.optim.SGD(parameters, lr=lr, momentum=momentum)
        case "nesterov":
            return torch.optim.SGD(parameters, lr=lr, momentum=momentum, nesterov=True)
        case "adam":
            return torch.optim.Adam(parameters, lr=lr, betas=federation.outer_betas, eps=federation.outer_eps)
        case "yogi":
            return Yogi(parameters, lr, federation.outer_betas, federation.outer_eps)
