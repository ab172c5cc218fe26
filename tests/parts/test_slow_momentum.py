"""The slow momentum against QHAdam written out, alone and with its state averaged."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.support import CPU, Federation, Text, largest_difference, new_model, tiny_recipe, weights
from torch import Tensor, nn

from photon.config import Recipe
from photon.errors import ConfigError
from photon.node.optimizers import build_optimizer
from photon.parts.method import Method
from photon.parts.slow_momentum import QuasiHyperbolicAdamW, SlowMomentum

NODES = ("ada", "bob", "cyd")
BETA, NU = 0.97, 0.6
PART = f"slow_momentum(beta={BETA}, nu={NU})"
# An epsilon well above the grid of the merge (2e-16): the root of a second moment of 1e-16 would show it.
ADAMW = {"optimizer": "adamw", "lr": 0.01, "betas": (0.8, 0.95), "eps": 1e-4, "batch_size": 2, "weight_decay": 0.1}


def recipe(*parts: str, rounds: int = 3, **node: Any) -> Recipe:
    return tiny_recipe(node=ADAMW | node, federation={"rounds": rounds, "tau": 2, "parts": list(parts)})


class QHAdam:
    """Ma and Yarats 2019, algorithm 2 with nu2 = 1, decoupled decay. `mutant` names what is wrong with it."""

    def __init__(self, recipe: Recipe, model: nn.Module, mutant: str) -> None:
        groups = build_optimizer(model, recipe.node, CPU).param_groups
        self.decay = {p: group["weight_decay"] for group in groups for p in group["params"]}
        self.node, self.mutant = recipe.node, mutant
        self.m = {p: torch.zeros_like(p) for p in self.decay}
        self.v = {p: torch.zeros_like(p) for p in self.decay}
        self.steps = 0

    @torch.no_grad()
    def step(self) -> None:
        self.steps += 1
        beta2, lr = self.node.betas[1], self.node.lr
        nu = 1 - NU if self.mutant == "nu on the wrong term" else NU
        for p, decay in self.decay.items():
            assert p.grad is not None
            self.m[p] = BETA * self.m[p] + (1 - BETA) * p.grad
            self.v[p] = beta2 * self.v[p] + (1 - beta2) * p.grad**2
            slow = self.m[p] if self.mutant == "momentum not corrected" else self.m[p] / (1 - BETA**self.steps)
            if self.mutant == "all of the numerator corrected":
                numerator = ((1 - nu) * p.grad + nu * self.m[p]) / (1 - BETA**self.steps)
            else:
                numerator = (1 - nu) * p.grad + nu * slow
            root = (self.v[p] / (1 - beta2**self.steps)).sqrt() + self.node.eps
            p.sub_(lr * (numerator / root + decay * p))


def plain_loop(recipe: Recipe, shares: bool, mutant: str = "") -> dict[str, Tensor]:
    """K models, averaged each round, with `shares` their moments too."""
    tau = recipe.federation.tau
    models = {name: new_model(recipe, torch.float64) for name in NODES}
    optimizers = {name: QHAdam(recipe, model, mutant) for name, model in models.items()}
    for index in range(recipe.federation.rounds):
        for name, model in models.items():
            for step in range(index * tau, (index + 1) * tau):
                batch = torch.from_numpy(Text(name).batch(step * 2, 2))
                model.zero_grad()
                torch.autograd.backward(model.loss(batch[:, :-1], batch[:, 1:]))
                optimizers[name].step()
        with torch.no_grad():
            for group in zip(*(model.parameters() for model in models.values()), strict=True):
                mean = torch.stack([p.detach() for p in group]).mean(0)
                for moments in ("m", "v") if shares else ():
                    all_of = [getattr(o, moments) for o in optimizers.values()]
                    value = torch.stack([of[p] for of, p in zip(all_of, group, strict=True)]).mean(0)
                    for of, p in zip(all_of, group, strict=True):
                        of[p] = value.clone()
                for p in group:
                    p.copy_(mean)
    return {name: parameter.detach() for name, parameter in models["ada"].named_parameters()}


def trained(folder: Path, recipe: Recipe) -> dict[str, Tensor]:
    state = Federation(folder, recipe, dtype=torch.float64).run()
    return {name: tensor for name, tensor in weights(state).items() if "/" not in name}


@pytest.mark.parametrize("shares", [False, True])
def test_it_is_qhadam_at_each_node(tmp_path: Path, shares: bool) -> None:
    asked = recipe(PART, *(["share"] if shares else []))
    ours = trained(tmp_path, asked)
    assert largest_difference(ours, plain_loop(asked, shares)) < 1e-7
    assert largest_difference(ours, plain_loop(asked, not shares)) > 1e-6
    for mutant in ("nu on the wrong term", "momentum not corrected", "all of the numerator corrected"):
        assert largest_difference(ours, plain_loop(asked, shares, mutant)) > 1e-5, mutant


def test_all_of_the_momentum_is_adamw(tmp_path: Path) -> None:
    ours = trained(tmp_path / "ours", recipe("slow_momentum(beta=0.8, nu=1)"))
    theirs = trained(tmp_path / "theirs", recipe())
    assert largest_difference(ours, theirs) < 1e-14
    assert largest_difference(ours, trained(tmp_path / "other", recipe("slow_momentum(beta=0.8, nu=0.9)"))) > 1e-6


def test_none_of_it_is_adamw_without_momentum(tmp_path: Path) -> None:
    ours = trained(tmp_path / "ours", recipe("slow_momentum(beta=0.9, nu=0)"))
    theirs = trained(tmp_path / "theirs", recipe(betas=(0.0, 0.95)))
    assert largest_difference(ours, theirs) < 1e-8


def test_it_forgets_by_half_in_the_half_life() -> None:
    """ln(0.5) / ln(beta) steps after a single gradient, half of what it left in the momentum is there."""
    parameter = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    group = {"params": [parameter], "lr": 0.0, "betas": (0.99, 0.9), "eps": 1e-8, "weight_decay": 0.0}
    optimizer = QuasiHyperbolicAdamW([group], 0.5)
    half_life = round(np.log(0.5) / np.log(0.99))
    kept = []
    for step in range(half_life + 1):
        parameter.grad = torch.full((1,), 1.0 if step == 0 else 0.0, dtype=torch.float64)
        optimizer.step()
        kept.append(float(optimizer.state[parameter]["exp_avg"]))
    assert kept[-1] / kept[0] == pytest.approx(0.5, rel=1e-2)


def longest_step(beta: float, beta2: float) -> float:
    """In learning rates, after one gradient of size 1 and many that are next to nothing."""
    parameter = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    group = {"params": [parameter], "lr": 1.0, "betas": (beta, beta2), "eps": 1e-12, "weight_decay": 0.0}
    optimizer, moved = QuasiHyperbolicAdamW([group], 0.7), []
    for step in range(400):
        before = parameter.item()
        parameter.grad = torch.full((1,), 1e-6 if step else 1.0, dtype=torch.float64)
        optimizer.step()
        moved.append(abs(parameter.item() - before))
    return max(moved)


def test_a_gradient_is_not_remembered_for_longer_than_its_size() -> None:
    """Above beta^2 = beta2 steps grow without bound, and so such recipes are refused; the preset's stay below 1."""
    assert longest_step(0.999, 0.95) > 5
    assert longest_step(0.999, 0.999) <= 1 + 1e-9
    assert longest_step(0.995, 0.999) <= 1 + 1e-9
    Method.of(recipe("slow_momentum(beta=0.97)", betas=(0.9, 0.941)))
    with pytest.raises(ConfigError, match=r"beta\^2 = 0.9409; 0.999 suits"):
        Method.of(recipe("slow_momentum(beta=0.97)", betas=(0.9, 0.94)))
    Method.of(recipe("slow_momentum(beta=0.97, nu=0)", betas=(0.9, 0.94)))  # it keeps a momentum and does not use it


@pytest.mark.parametrize("parts", [[PART], [PART, "share(first=2, second=3)"]])
def test_it_goes_on_after_a_stop_as_if_there_had_been_none(tmp_path: Path, parts: list[str]) -> None:
    whole = Federation(tmp_path / "whole", recipe(*parts, rounds=5)).run()
    Federation(tmp_path / "parts", recipe(*parts, rounds=2)).run()
    assert Federation(tmp_path / "parts", recipe(*parts, rounds=5)).run().model_sha256 == whole.model_sha256


def test_what_cannot_be_is_refused() -> None:
    for parameters in ({"beta": 1.0}, {"nu": 1.5}, {"nu": -0.1}):
        with pytest.raises(ValueError, match="slow_momentum"):
            SlowMomentum(**parameters)
    with pytest.raises(ConfigError, match="adamw"):
        Method.of(recipe(PART, optimizer="muon"))
