"""A schedule of the outer learning rate: its values, and a run against a plain loop with the same rates."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.support import Federation, largest_difference, local_sgd, tiny_recipe, untrained, weights
from torch import Tensor

from photon.config import FederationConfig, Recipe
from photon.parts.base import Moment
from photon.parts.outer_lr_schedule import Kind, OuterLrSchedule

NODES = ("ada", "bob", "cyd")


def recipe(*parts: str) -> Recipe:
    return tiny_recipe(federation={"rounds": 4, "tau": 2, "outer_lr": 0.8, "parts": list(parts)})


def plain_loop(asked: Recipe, rates: list[float]) -> dict[str, Tensor]:
    theta = weights(untrained(asked, torch.float64))
    for index, rate in enumerate(rates):
        deltas = [local_sgd(asked, theta, node, index * 4) for node in NODES]
        theta = {name: t - rate * torch.from_numpy(np.mean([d[name] for d in deltas], 0)) for name, t in theta.items()}
    return theta


@pytest.mark.parametrize(
    ("kind", "rates"),
    [
        ("linear", [0.8, 0.65, 0.5, 0.35]),
        ("cosine", [0.2 + 0.6 * (1 + math.cos(math.pi * x)) / 2 for x in (0, 0.25, 0.5, 0.75)]),
    ],
)
def test_a_run_steps_with_the_rates_of_its_schedule(tmp_path: Path, kind: Kind, rates: list[float]) -> None:
    asked = recipe(f"outer_lr_schedule(last=0.25, kind={kind})")
    ours = weights(Federation(tmp_path, asked, dtype=torch.float64).run())
    assert largest_difference(ours, plain_loop(asked, rates)) < 1e-12
    # The mutants: none, one that reaches its end a round early, one that takes `last` for the rate itself.
    assert largest_difference(ours, plain_loop(asked, [0.8] * 4)) > 1e-3
    assert largest_difference(ours, plain_loop(asked, [0.8, 0.6, 0.4, 0.2])) > 1e-4
    assert largest_difference(ours, plain_loop(asked, [0.8, 0.6625, 0.525, 0.3875])) > 1e-4


def test_it_follows_steps_and_not_rounds() -> None:
    part, federation = OuterLrSchedule(last=0.0), FederationConfig(outer_lr=0.5)
    assert part.federation(federation, Moment(1, 75, 100)).outer_lr == 0.125
    assert part.federation(federation, Moment(99, 75, 100)).outer_lr == 0.125


def test_it_begins_and_ends_within_the_run() -> None:
    part, federation = OuterLrSchedule(last=2.0, begin=0.4, end=0.9), FederationConfig(outer_lr=0.5)
    rates = [part.federation(federation, Moment(0, step, 100)).outer_lr for step in (0, 39, 40, 65, 90, 99)]
    assert rates == pytest.approx([0.5, 0.5, 0.5, 0.75, 1.0, 1.0])


@pytest.mark.parametrize(("begin", "end"), [(-0.1, 1.0), (0.5, 0.5), (0.6, 0.5), (0.0, 1.1)])
def test_an_empty_stretch_or_one_beyond_the_run_is_refused(begin: float, end: float) -> None:
    with pytest.raises(ValueError, match="begin before end"):
        OuterLrSchedule(begin=begin, end=end)


@pytest.mark.parametrize("last", [-0.1, 1.1e6, math.nan])
def test_a_negative_rate_or_one_beyond_use_is_refused(last: float) -> None:
    with pytest.raises(ValueError, match="last"):
        OuterLrSchedule(last=last)
