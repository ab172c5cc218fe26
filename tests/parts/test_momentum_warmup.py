"""The momentum that is gathered first: plain averaging at the start, then Nesterov with a buffer that is not empty."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.support import Federation, largest_difference, local_sgd, tiny_recipe, untrained, weights
from torch import Tensor

from photon.aggregator.outer import OuterOptimizer
from photon.config import FederationConfig, Recipe
from photon.errors import ConfigError
from photon.parts.method import Method
from photon.parts.momentum_warmup import MomentumWarmup

NODES = ("ada", "bob", "cyd")
MOMENTUM, LR = 0.8, 0.6


def recipe(*parts: str, outer: str = "nesterov", rounds: int = 4) -> Recipe:
    options = {"outer": outer, "outer_lr": LR, "outer_momentum": MOMENTUM}
    return tiny_recipe(federation={"rounds": rounds, "parts": list(parts)} | options)


def plain_loop(asked: Recipe, averaged: int, mutant: str = "") -> dict[str, Tensor]:
    """The first `averaged` rounds move to the plain mean. `mutant` names what is wrong with it."""
    theta = weights(untrained(asked, torch.float64))
    velocity = {name: torch.zeros_like(tensor) for name, tensor in theta.items()}
    for index in range(asked.federation.rounds):
        deltas = [local_sgd(asked, theta, node, index * 4) for node in NODES]
        merged = {name: torch.from_numpy(np.mean([d[name] for d in deltas], 0)) for name in theta}
        is_first = index < averaged
        if not (is_first and mutant == "nothing is gathered"):
            velocity = {name: MOMENTUM * velocity[name] + merged[name] for name in theta}
        rate = LR if mutant == "averages with the outer rate" else 1.0
        steps = {n: rate * g if is_first else LR * (g + MOMENTUM * velocity[n]) for n, g in merged.items()}
        theta = {name: theta[name] - steps[name] for name in theta}
    return theta


def test_it_averages_and_gathers_and_then_hands_over(tmp_path: Path) -> None:
    asked = recipe("momentum_warmup(share=0.5)")
    ours = weights(Federation(tmp_path, asked, dtype=torch.float64).run())
    assert largest_difference(ours, plain_loop(asked, 2)) < 1e-12
    for averaged in (0, 1, 3, 4):
        assert largest_difference(ours, plain_loop(asked, averaged)) > 1e-3
    for mutant in ("nothing is gathered", "averages with the outer rate"):
        assert largest_difference(ours, plain_loop(asked, 2, mutant)) > 1e-3


def test_no_share_is_the_outer_optimizer_to_the_last_bit(tmp_path: Path) -> None:
    with_it = Federation(tmp_path / "with", recipe("momentum_warmup(share=0)")).run()
    assert with_it.model_sha256 == Federation(tmp_path / "without", recipe()).run().model_sha256


@pytest.mark.parametrize("stop", [1, 2, 3])
def test_it_goes_on_after_a_stop_as_if_there_had_been_none(tmp_path: Path, stop: int) -> None:
    asked = recipe("momentum_warmup(share=0.5)", "outer_momentum_schedule(first=0.9, last=0.5, begin=0.5)")
    whole = Federation(tmp_path / "whole", asked).run()
    begun = Federation(tmp_path / "parts", asked)
    begun.aggregator._commit()
    for _ in range(stop):
        begun.aggregator._round()
        begun.aggregator._commit()
    assert Federation(tmp_path / "parts", asked).run().model_sha256 == whole.model_sha256


@pytest.mark.parametrize("outer", ["momentum", "nesterov", "adam", "yogi"])
def test_every_rule_gathers_its_state_while_weights_are_averaged(outer: str) -> None:
    federation = FederationConfig.model_validate({"outer": outer, "outer_lr": 0.3})
    start = {"w": torch.linspace(-1, 1, 70_000, dtype=torch.float64)}  # of more than one piece
    gathers, moves = OuterOptimizer(start.items(), federation), OuterOptimizer(start.items(), federation)
    gathers.follow(federation, start, averages=True)
    total = torch.zeros_like(start["w"])
    for seed in range(3):
        gradient = torch.randn(70_000, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        gathers.step([("w", gradient)])
        moves.step([("w", gradient)])
        total += gradient
    assert largest_difference(gathers.weights(), {"w": start["w"] - total}) < 1e-12
    assert largest_difference(moves.weights(), {"w": start["w"] - total}) > 1e-2
    theirs = moves.export_state()
    assert all(torch.equal(value, theirs[name]) for name, value in gathers.export_state().items())


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match="share"):
        MomentumWarmup(share=1.5)
    with pytest.raises(ConfigError, match="momentum or nesterov"):
        Method.of(recipe("momentum_warmup", outer="fedavg"))
