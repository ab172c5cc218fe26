"""A growing tau: its law, the steps it keeps, and a run of it against a plain loop with the same numbers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.support import Federation, largest_difference, local_sgd, tiny_recipe, untrained, weights
from torch import Tensor

from photon.config import FederationConfig, Recipe
from photon.errors import ConfigError
from photon.parts.base import Moment
from photon.parts.method import Method
from photon.parts.tau_ramp import TauRamp

NODES = ("ada", "bob", "cyd")


def recipe(*parts: str, rounds: int = 4, tau: int = 4, **sections: Any) -> Recipe:
    return tiny_recipe(federation={"rounds": rounds, "tau": tau, "parts": list(parts)}, **sections)


def taus(part: TauRamp, rounds: int, tau: int) -> list[int]:
    federation, step, found = FederationConfig(rounds=rounds, tau=tau), 0, []
    for index in range(rounds):
        found.append(Method((part,)).federation(federation, Moment(index, step, rounds * tau)).tau)
        step += found[-1]
    return found


@pytest.mark.parametrize(
    ("first", "last", "rounds", "tau"),
    [(8, 0, 30, 16), (8, 0, 7, 13), (2, 512, 100, 64), (1, 0, 5, 2), (8, 40, 11, 30), (4, 4, 3, 4), (64, 8, 50, 32)],
)
def test_all_rounds_together_take_exactly_the_steps_of_a_fixed_tau(
    first: int, last: int, rounds: int, tau: int
) -> None:
    found = taus(TauRamp(first, last), rounds, tau)
    assert sum(found) == rounds * tau
    assert min(found) >= 1
    # The law by a midpoint sum: independent of the integral that the part has in closed form.
    end = last or 2 * tau - first
    power = (end - tau) / (tau - first) if first != tau else 1.0
    fine = (np.arange(rounds * 1000) + 0.5) / (rounds * 1000)
    law = (first + (end - first) * fine**power).reshape(rounds, 1000).mean(1)
    assert np.abs(np.cumsum(found) - np.cumsum(law)).max() <= 0.51
    # The mutant: each round rounded for itself, and from its first step.
    if (first, last) == (8, 0) and rounds == 30:
        assert sum(round(first + (end - first) * index / rounds) for index in range(rounds)) != rounds * tau


def test_without_last_it_is_a_line() -> None:
    found = taus(TauRamp(8), 8, 16)
    assert found == [9, 11, 13, 15, 17, 19, 21, 23]


def test_a_run_takes_that_many_steps_in_each_round(tmp_path: Path) -> None:
    asked = recipe("tau_ramp(first=1)")
    federation = Federation(tmp_path, asked, dtype=torch.float64)
    ours = weights(federation.run())
    steps = [event.nodes["ada"].steps for event in federation.rounds()]
    assert steps == taus(TauRamp(1), 4, 4) == sorted(steps)
    assert federation.rounds()[-1].sequential_step == asked.federation.sequential_steps == sum(steps)
    assert largest_difference(ours, plain_loop(asked, steps)) < 1e-12
    assert largest_difference(ours, plain_loop(asked, [4] * 4)) > 1e-4
    assert largest_difference(ours, plain_loop(asked, steps[::-1])) > 1e-4


def plain_loop(asked: Recipe, steps: list[int]) -> dict[str, Tensor]:
    theta, done = weights(untrained(asked, torch.float64)), 0
    for tau in steps:
        fixed = asked.model_copy(update={"federation": asked.federation.model_copy(update={"tau": tau})})
        deltas = [local_sgd(fixed, theta, node, done * 2) for node in NODES]
        theta = {name: t - torch.from_numpy(np.mean([d[name] for d in deltas], 0)) for name, t in theta.items()}
        done += tau
    return theta


def test_it_goes_on_after_a_stop_as_if_there_had_been_none(tmp_path: Path) -> None:
    asked = recipe("tau_ramp(first=1)")
    whole = Federation(tmp_path / "whole", asked).run()
    begun = Federation(tmp_path / "parts", asked)
    begun.aggregator._commit()
    for _ in range(2):
        begun.aggregator._round()
        begun.aggregator._commit()
    assert Federation(tmp_path / "parts", asked).run().model_sha256 == whole.model_sha256


def test_what_cannot_be_is_refused() -> None:
    for parameters in ({"first": 0}, {"last": -1}, {"last": 10**400}):
        with pytest.raises(ValueError, match="tau_ramp"):
            TauRamp(**parameters)
    with pytest.raises(ConfigError, match="must lie between"):
        Method.of(recipe("tau_ramp(first=4, last=8)", tau=2))
    with pytest.raises(ConfigError, match="must lie between"):
        Method.of(recipe("tau_ramp(first=9)", tau=4))
    with pytest.raises(ConfigError, match="tau of its own"):
        Method.of(recipe("tau_ramp(first=2)").model_copy(update={"silo": tiny_recipe({"ada": {"tau": 1}}).silo}))
    with pytest.raises(ConfigError, match="give one of them"):
        Method.of(recipe("tau_ramp(first=2)", "tau_by_agreement"))
