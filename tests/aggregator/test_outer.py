"""Outer optimizers equal torch.optim traces on the pseudo-gradient; the wrong ones of the paper's code do not."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from photon.aggregator.outer import OuterOptimizer, Yogi
from photon.config import FederationConfig
from photon.errors import StateError

ROUNDS = 6


def federation(outer: str, **changes: object) -> FederationConfig:
    return FederationConfig.model_validate({"outer": outer, "outer_lr": 0.7, "outer_momentum": 0.9} | changes)


def pseudo_gradients() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "w": torch.randn(3, 2, generator=generator, dtype=torch.float64) * 0.1,
            "b": torch.randn(4, generator=generator),
        }
        for _ in range(ROUNDS)
    ]


def start() -> dict[str, Tensor]:
    return {"w": torch.ones(3, 2, dtype=torch.float64), "b": torch.zeros(4)}


def trace(optimizer: OuterOptimizer) -> list[Tensor]:
    out = []
    for gradient in pseudo_gradients():
        optimizer.step(gradient)
        out.append(optimizer.weights()["w"].clone())
    return out


def torch_trace(build: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> list[Tensor]:
    parameter = nn.Parameter(start()["w"])
    optimizer = build([parameter])
    out = []
    for gradient in pseudo_gradients():
        parameter.grad = gradient["w"]
        optimizer.step()
        out.append(parameter.detach().clone())
    return out


REFERENCES: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "fedavg": lambda p: torch.optim.SGD(p, lr=0.7),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.7, momentum=0.9),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.7, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=0.7, betas=(0.9, 0.99), eps=1e-8),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_equals_torch(name: str) -> None:
    ours = trace(OuterOptimizer(start(), federation(name)))
    assert all(torch.equal(a, b) for a, b in zip(ours, torch_trace(REFERENCES[name]), strict=True))


@pytest.mark.parametrize("name", REFERENCES)
def test_no_two_are_the_same_optimizer(name: str) -> None:
    """The mutants: heavy ball sold as Nesterov, momentum dropped, ..."""
    ours = trace(OuterOptimizer(start(), federation(name)))
    for other, build in REFERENCES.items():
        if other != name:
            assert not torch.allclose(ours[-1], torch_trace(build)[-1], atol=1e-3)


def test_nesterov_by_hand() -> None:
    """v <- mu v + delta; theta <- theta - lr (delta + mu v)."""
    theta, velocity = start()["w"], torch.zeros(3, 2, dtype=torch.float64)
    for gradient in pseudo_gradients():
        velocity = 0.9 * velocity + gradient["w"]
        theta = theta - 0.7 * (gradient["w"] + 0.9 * velocity)
    assert (trace(OuterOptimizer(start(), federation("nesterov")))[-1] - theta).abs().max() < 1e-14


def test_yogi_by_hand() -> None:
    theta, mean, square = 1.0, 0.0, 0.0
    parameter = nn.Parameter(torch.tensor([1.0], dtype=torch.float64))
    optimizer = Yogi([parameter], lr=0.1, betas=(0.9, 0.99), eps=1e-3)
    for step, gradient in enumerate([0.5, -0.25, 2.0, 0.1, 0.1], start=1):
        mean = 0.9 * mean + 0.1 * gradient
        square = square - 0.01 * ((square > gradient**2) - (square < gradient**2)) * gradient**2
        theta -= 0.1 * (mean / (1 - 0.9**step)) / ((square / (1 - 0.99**step)) ** 0.5 + 1e-3)
        parameter.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
        assert abs(parameter.item() - theta) < 1e-12


@pytest.mark.parametrize("name", ["fedavg", "momentum", "nesterov", "adam", "yogi", "none"])
def test_every_optimizer_moves_towards_the_nodes(name: str) -> None:
    """delta = base - local: descending along it must bring the base nearer to the nodes. (The paper's code ascends.)"""
    local = torch.full((3,), 0.5)
    optimizer = OuterOptimizer({"w": torch.ones(3)}, federation(name, outer_lr=0.1))
    optimizer.step({"w": torch.ones(3) - local})
    moved = optimizer.weights()["w"]
    assert torch.all((moved - local).abs() < (torch.ones(3) - local).abs())


def test_first_momentum_step_does_not_blow_up_the_weights() -> None:
    """The paper's FedMom multiplies weights by 1 + momentum in round 1."""
    optimizer = OuterOptimizer({"w": torch.ones(2)}, federation("momentum", outer_lr=1.0))
    optimizer.step({"w": torch.zeros(2)})
    assert torch.equal(optimizer.weights()["w"], torch.ones(2))


@pytest.mark.parametrize("name", ["fedavg", "momentum", "nesterov", "adam", "yogi", "none"])
def test_zero_pseudo_gradient_leaves_the_first_round_bit_identical(name: str) -> None:
    optimizer = OuterOptimizer(start(), federation(name))
    optimizer.step({"w": torch.zeros(3, 2, dtype=torch.float64), "b": torch.zeros(4)})
    assert all(torch.equal(optimizer.weights()[key], value) for key, value in start().items())


@pytest.mark.parametrize("name", ["fedavg", "momentum", "nesterov", "adam", "yogi"])
def test_state_committed_and_restored_continues_bit_for_bit(name: str) -> None:
    whole = trace(OuterOptimizer(start(), federation(name)))
    gradients = pseudo_gradients()
    first = OuterOptimizer(start(), federation(name))
    for gradient in gradients[:3]:
        first.step(gradient)
    second = OuterOptimizer(first.weights(), federation(name))
    second.import_state(first.export_state())
    forgetful = OuterOptimizer(first.weights(), federation(name))  # the mutant: state not restored
    for gradient in gradients[3:]:
        second.step(gradient)
        forgetful.step(gradient)
    assert torch.equal(second.weights()["w"], whole[-1])
    assert name == "fedavg" or not torch.equal(forgetful.weights()["w"], whole[-1])


def test_fedavg_uses_the_configured_learning_rate() -> None:
    """The paper's code hard-codes 1.0."""
    optimizer = OuterOptimizer({"w": torch.ones(1)}, federation("fedavg", outer_lr=0.25))
    optimizer.step({"w": torch.ones(1)})
    assert optimizer.weights()["w"].item() == 0.75


def test_a_foreign_state_is_refused() -> None:
    with pytest.raises(StateError, match="does not fit"):
        OuterOptimizer(start(), federation("adam")).import_state({"other/exp_avg": torch.zeros(3)})
    with pytest.raises(StateError, match="does not fit"):
        OuterOptimizer(start(), federation("adam")).import_state({"w/exp_avg": torch.zeros(3)})
