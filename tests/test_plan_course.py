"""The course of a run beside the rounds that a federation really has."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
from tests.support import Federation, tiny_recipe

from photon.config import Recipe
from photon.errors import ConfigError
from photon.plan_course import Course, course_of


def recipe_of(parts: Sequence[str], rounds: int = 6, tau: int = 3) -> Recipe:
    return tiny_recipe(
        federation={"rounds": rounds, "tau": tau, "parts": list(parts)}, node={"batch_size": 1, "lr": 1e-3}
    )


@pytest.mark.parametrize("parts", [["tau_ramp(first=1)"], ["tau_ramp(first=5, last=2)"], ["fedprox"], []], ids=str)
def test_rounds_are_those_of_the_run(tmp_path: Path, parts: list[str]) -> None:
    recipe = recipe_of(parts)
    federation = Federation(tmp_path, recipe)
    federation.run()
    steps = [0, *(event.sequential_step for event in federation.rounds())]
    course = course_of(recipe)
    assert list(course.taus) == [after - before for before, after in itertools.pairwise(steps)]
    assert course.mean_tau * course.rounds == recipe.federation.sequential_steps
    assert not course.follows_nodes
    assert (len(set(course.taus)) > 1) == ("tau_ramp" in str(parts))


def test_a_tau_that_follows_the_nodes_is_not_known_before() -> None:
    course = course_of(recipe_of(["tau_by_agreement(most=12)"], rounds=8, tau=3))
    # Nobody knows: 8 rounds of 3. All agree: 3, 6, then 12 but for the 3 that are left. Opposed: 3, then 1 each.
    assert course == Course((3,) * 8, (4, 22))
    assert course.follows_nodes


def test_a_part_that_does_not_suit_the_recipe_is_refused() -> None:
    with pytest.raises(ConfigError, match="tau_ramp"):
        course_of(recipe_of(["tau_ramp(first=2, last=2)"], tau=3))
