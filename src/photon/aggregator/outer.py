"""The outer optimizer: applies the merged pseudo-gradient to the global model, a piece of a tensor at a time.

The pseudo-gradient is `theta_t - mean_k theta_k`, so every rule here *descends* along it. The rules are those of
`torch.optim` to the last bit (and of Zaheer et al. 2018 for Yogi, which torch lacks), without its module: that brings
the compiler, 80 MB and three seconds, and would hold the whole pseudo-gradient at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from photon.aggregator.norms import squares_of
from photon.config import FederationConfig
from photon.errors import StateError
from photon.parts.method import is_state

_CHUNK_ELEMENTS = 2**16  # bounds the temporaries of a step to 512 KiB each, which a CPU's cache holds
_STEP = "step"
_HELD = "held"

State = Mapping[str, Tensor]
# Moves a flat piece of the weights, and of the state that belongs to it, along the same piece of the gradient.
Move = Callable[[Tensor, Tensor, State], None]


@dataclass(frozen=True)
class Rule:
    """A way to step. `state` names the tensors it keeps of each weight, with the value that they begin with.

    With `counts` it also finds the number of the step, from 1 on, as the scalar `step`.
    """

    move: Move
    state: Mapping[str, float]
    counts: bool = False

    @property
    def kinds(self) -> frozenset[str]:
        """Names of all state of a parameter."""
        return frozenset(self.state) | ({_STEP} if self.counts else set())


@dataclass(frozen=True)
class Stepped:
    """L2 norms, summed up in float64: of the pseudo-gradient, and of what the step changed in the weights."""

    gradient_norm: float
    moved_norm: float


class OuterOptimizer:
    """Holds the global model (CPU tensors by name, copied one after the other) and moves it once a round."""

    def __init__(self, weights: Iterable[tuple[str, Tensor]], federation: FederationConfig) -> None:
        self._weights = {name: _copy(tensor) for name, tensor in weights}
        self._rule = _rule(federation)
        self._names = frozenset(self._weights)
        self._averages = self._holds_back = False
        self._held: dict[str, Tensor] = {}
        self._state: dict[str, dict[str, Tensor]] = {}

    def weights(self) -> dict[str, Tensor]:
        """The global model; these tensors are what `step` moves."""
        return dict(self._weights)

    def follow(
        self, federation: FederationConfig, names: Iterable[str], averages: bool = False, holds_back: bool = False
    ) -> None:
        """How the next step is taken, and which tensors it moves; at first, as the recipe says, all of them.

        With `averages` the weights become the plain mean; the rule's state is what it would be had the rule moved them.
        With `holds_back` the pseudo-gradient is not stepped along, but kept for the step after this one.
        """
        self._rule = _rule(federation)
        self._averages, self._holds_back = averages, holds_back
        self._names = frozenset(names)

    @property
    def holds_back(self) -> bool:
        """Whether the next step leaves its own pseudo-gradient for the step after it."""
        return self._holds_back

    @torch.no_grad()
    def foreseen(self, name: str) -> Tensor:
        """A weight as the next step leaves it, whatever its pseudo-gradient: known where the step holds that back.

        A tensor of its own; nothing of the optimizer moves.
        """
        moved, held = self._weights[name].clone(), self._held.get(name)
        if held is not None:
            state = {kind: value.clone() for kind, value in self._begun(name, self._state.get(name, {})).items()}
            for piece in _pieces(moved):
                self._move(moved.view(-1)[piece], held.view(-1)[piece], _cut(state, piece))
        return moved

    def step(self, pseudo_gradient: Iterable[tuple[str, Tensor]]) -> Stepped:
        """theta_{t+1} from the merged pseudo-gradient of round t, which may be made one tensor at a time.

        What was held back is stepped along first, by the same rule, also of tensors that this pseudo-gradient lacks; if
        the new one is not held back too, the two count as one step. What is held takes 4 bytes a parameter, and the new
        takes the place of the old.

        Optimizer state that is shared becomes the mean of the nodes'. Raises ValueError unless it has every name once
        that is to be moved, KeyError on a name that the model lacks: the model is spoilt then. The norms are those of
        the weights.
        """
        gradient_squares, moved_squares = 0.0, self._step_along_held()
        seen: list[str] = []
        for name, gradient in pseudo_gradient:
            seen.append(name)
            weight, flat = self._weights[name].view(-1), gradient.reshape(-1)
            if is_state(name):
                _descend(1.0, weight, flat, {})
                continue
            state, held = self._state_of(name), self._held.pop(name, None)
            if self._holds_back:  # not the gradient itself: it lies in the place of its sums, which is twice as long
                self._held[name] = torch.empty_like(self._weights[name]) if held is None else held
            for piece in _pieces(weight):
                part, before = flat[piece], weight[piece].clone()
                kept = _cut(state, piece)
                if held is not None:
                    self._move(weight[piece], held.view(-1)[piece], kept)
                if self._holds_back:
                    self._held[name].view(-1)[piece] = part
                else:
                    self._move(weight[piece], part, kept)
                gradient_squares += squares_of(part)
                moved_squares += squares_of(before.sub_(weight[piece]))
        if sorted(seen) != sorted(self._names):
            raise ValueError("the pseudo-gradient does not have every tensor once that is to be moved")
        return Stepped(math.sqrt(gradient_squares), math.sqrt(moved_squares))

    def _step_along_held(self) -> float:
        """Take the steps held back of tensors that are not moved otherwise; the sum of what that changed, squared."""
        squares = 0.0
        for name in sorted(self._held.keys() - self._names):
            held, weight, state = self._held.pop(name).view(-1), self._weights[name].view(-1), self._state_of(name)
            for piece in _pieces(weight):
                before = weight[piece].clone()
                self._move(weight[piece], held[piece], _cut(state, piece))
                squares += squares_of(before.sub_(weight[piece]))
        return squares

    def _move(self, weight: Tensor, gradient: Tensor, state: State) -> None:
        """One step of a piece of a weight."""
        if self._averages:
            self._rule.move(weight.clone(), gradient, state)
            _descend(1.0, weight, gradient, {})
        else:
            self._rule.move(weight, gradient, state)

    def export_state(self) -> dict[str, Tensor]:
        """Optimizer state as named tensors, `parameter/state`: they lie where they are, and `step` moves them."""
        state = {f"{name}/{kind}": value for name, kept in self._state.items() for kind, value in kept.items()}
        return state | {f"{name}/{_HELD}": value for name, value in self._held.items()}

    def import_state(self, state: Mapping[str, Tensor]) -> None:
        """Replace all optimizer state by a copy of what `export_state` gave.

        State that this optimizer does not keep is left out: the recipe's `outer` may have changed since. What is held
        back is applied by any. Raises StateError on unknown names, wrong shapes, and state that is there in part.
        """
        self._state.clear()
        self._held.clear()
        for key, value in state.items():
            name, _, kind = key.rpartition("/")
            weight = self._weights.get(name)
            expected = torch.Size() if weight is None or kind == _STEP else weight.shape
            if weight is None or value.shape != expected:
                raise StateError(f"outer optimizer state {key!r} does not fit the model")
            if kind == _HELD:
                self._held[name] = _copy(value)
            elif kind in self._rule.kinds:
                self._state.setdefault(name, {})[kind] = _copy(value)
        for name, kept in self._state.items():
            if missing := sorted(self._rule.kinds - kept.keys()):
                raise StateError(f"outer optimizer state of {name!r} does not fit: it lacks {missing[0]!r}")

    def _state_of(self, name: str) -> dict[str, Tensor]:
        """The state of a parameter for its next step; new if this is its first."""
        self._state[name] = self._begun(name, self._state.get(name, {}))
        return self._state[name]

    def _begun(self, name: str, kept: State) -> dict[str, Tensor]:
        """State as the next step finds it: what is kept of the steps before, the number of this one."""
        state, weight = dict(kept), self._weights[name]
        for kind, value in self._rule.state.items():
            if kind not in state:
                state[kind] = torch.full_like(weight, value)
        if self._rule.counts:
            state[_STEP] = state.get(_STEP, torch.zeros(())) + 1
        return state


def _pieces(tensor: Tensor) -> Iterator[slice]:
    """Where a flat tensor is cut. The cuts decide the last bit: vectors and what is left of them round differently."""
    return (slice(begin, begin + _CHUNK_ELEMENTS) for begin in range(0, tensor.numel(), _CHUNK_ELEMENTS))


def _cut(state: State, piece: slice) -> dict[str, Tensor]:
    return {kind: value if kind == _STEP else value.view(-1)[piece] for kind, value in state.items()}


def _rule(federation: FederationConfig) -> Rule:
    lr, momentum = federation.outer_lr, federation.outer_momentum
    moments = {"exp_avg": 0.0, "exp_avg_sq": 0.0}
    # -0.0 is what changes no sum: momentum * -0.0 + g is g to the last bit, as if the buffer began as the gradient.
    velocity = {"momentum_buffer": -0.0}
    match federation.outer:
        case "fedavg":
            return Rule(partial(_descend, lr), {})
        case "none":  # the centralised baseline: the only node's weights become the global model
            return Rule(partial(_descend, 1.0), {})
        case "momentum":
            return Rule(partial(_momentum, lr, momentum), velocity)
        case "nesterov":
            return Rule(partial(_nesterov, lr, momentum), velocity)
        case "adam":
            return Rule(partial(_adam, lr, federation.outer_betas, federation.outer_eps), moments, counts=True)
        case "yogi":
            return Rule(partial(_yogi, lr, federation.outer_betas, federation.outer_eps), moments, counts=True)


# A rule's own settings come first. The operations are torch's, in its order: that decides the last bit.


def _descend(lr: float, weight: Tensor, gradient: Tensor, _: State) -> None:
    weight.add_(gradient, alpha=-lr)


def _momentum(lr: float, momentum: float, weight: Tensor, gradient: Tensor, state: State) -> None:
    """v <- mu v + g; theta <- theta - lr v."""
    velocity = state["momentum_buffer"].mul_(momentum).add_(gradient)
    weight.add_(velocity, alpha=-lr)


def _nesterov(lr: float, momentum: float, weight: Tensor, gradient: Tensor, state: State) -> None:
    """v <- mu v + g; theta <- theta - lr (g + mu v)."""
    velocity = state["momentum_buffer"].mul_(momentum).add_(gradient)
    weight.add_(gradient.add(velocity, alpha=momentum), alpha=-lr)


def _adam(lr: float, betas: tuple[float, float], eps: float, weight: Tensor, gradient: Tensor, state: State) -> None:
    """Kingma and Ba 2015, algorithm 1: both moments bias-corrected."""
    (beta1, beta2), steps = betas, state[_STEP].item()
    mean, square = state["exp_avg"], state["exp_avg_sq"]
    mean.lerp_(gradient, 1 - beta1)
    square.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    root = square.sqrt().div_((1 - beta2**steps) ** 0.5).add_(eps)
    weight.addcdiv_(mean, root, value=-lr / (1 - beta1**steps))


def _yogi(lr: float, betas: tuple[float, float], eps: float, weight: Tensor, gradient: Tensor, state: State) -> None:
    """Adam whose second moment moves by `(1 - beta2) * sign(v - g^2) * g^2`; bias-corrected like Adam."""
    (beta1, beta2), steps = betas, state[_STEP].item()
    mean, square = state["exp_avg"], state["exp_avg_sq"]
    mean.lerp_(gradient, 1 - beta1)
    squared = gradient.square()
    square.sub_(torch.sign(square - squared).mul_(squared), alpha=1 - beta2)
    root = (square / (1 - beta2**steps)).sqrt_().add_(eps)
    weight.addcdiv_(mean, root, value=-lr / (1 - beta1**steps))


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().clone(memory_format=torch.contiguous_format)
