"""A schedule of the outer momentum: its values, and a run against Nesterov's equations with the same momenta."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from tests.support import Federation, largest_difference, local_sgd, tiny_recipe, untrained, weights
from torch import Tensor

from photon.config import FederationConfig, Recipe
from photon.errors import ConfigError
from photon.parts.base import Moment
from photon.parts.method import Method
from photon.parts.outer_momentum_schedule import OuterMomentumSchedule

NODES = ("ada", "bob", "cyd")
PART = "outer_momentum_schedule(first=0.9, last=0.1)"


def recipe(*parts: str, outer: str = "nesterov", rounds: int = 4) -> Recipe:
    return tiny_recipe(federation={"rounds": rounds, "outer": outer, "outer_lr": 0.7, "parts": list(parts)})


def nesterov(asked: Recipe, momenta: list[float]) -> dict[str, Tensor]:
    theta = weights(untrained(asked, torch.float64))
    velocity = {name: torch.zeros_like(tensor) for name, tensor in theta.items()}
    for index, momentum in enumerate(momenta):
        deltas = [local_sgd(asked, theta, node, index * 4) for node in NODES]
        merged = {name: torch.from_numpy(np.mean([d[name] for d in deltas], 0)) for name in theta}
        velocity = {name: momentum * velocity[name] + merged[name] for name in theta}
        theta = {name: theta[name] - 0.7 * (merged[name] + momentum * velocity[name]) for name in theta}
    return theta


def test_a_run_steps_with_the_momenta_of_its_schedule(tmp_path: Path) -> None:
    asked = recipe(PART)
    ours = weights(Federation(tmp_path, asked, dtype=torch.float64).run())
    assert largest_difference(ours, nesterov(asked, [0.9, 0.7, 0.5, 0.3])) < 1e-12
    assert largest_difference(ours, nesterov(asked, [0.9] * 4)) > 1e-3
    assert largest_difference(ours, nesterov(asked, [0.3, 0.5, 0.7, 0.9])) > 1e-3


def test_it_stands_still_outside_its_stretch() -> None:
    part, federation = OuterMomentumSchedule(0.95, 0.85, begin=0.2, end=0.4), FederationConfig(outer="nesterov")
    found = [part.federation(federation, Moment(0, step, 100)).outer_momentum for step in (0, 20, 30, 40, 99)]
    assert found == pytest.approx([0.95, 0.95, 0.9, 0.85, 0.85])


def test_what_cannot_be_is_refused() -> None:
    for first, last, begin, end in ((1.0, 0.5, 0, 1), (0.9, -0.1, 0, 1), (0.9, 0.5, 0.5, 0.5), (0.9, 0.5, 0, 1.5)):
        with pytest.raises(ValueError, match="outer_momentum_schedule"):
            OuterMomentumSchedule(first, last, begin, end)
    for outer in ("fedavg", "adam"):
        with pytest.raises(ConfigError, match="momentum or nesterov"):
            Method.of(recipe(PART, outer=outer))
