"""The geometric median against a Weiszfeld iteration over whole vectors, against liars, and in a federation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from tests.parts.updates import (
    Listed,
    difference,
    honest,
    in_every_order,
    lying,
    mean,
    merged,
    one_round,
    plain_mean,
    stacked,
)
from tests.support import read_again, tiny_recipe

from photon.errors import ConfigError
from photon.parts.geometric_median import GeometricMedian
from photon.parts.method import Method

WEIGHTS = [30, 10, 40, 10, 50]


def weiszfeld(
    rows: np.ndarray, weights: Sequence[int], iterations: int = 100, smoothing: float = 1e-6, root: bool = True
) -> np.ndarray:
    """Pillutla et al. 2022, algorithm 2, on the vectors themselves. Without `root`: divided by the squared distance."""
    point = np.average(rows, axis=0, weights=weights)
    for _ in range(iterations):
        distances = np.maximum(np.linalg.norm(rows - point, axis=1), smoothing)
        factors = np.array(weights) / (distances if root else distances**2)
        point = factors @ rows / factors.sum()
    return point


def objective(point: np.ndarray, rows: np.ndarray, weights: Sequence[int]) -> float:
    return float(np.array(weights) @ np.linalg.norm(rows - point, axis=1))


@pytest.mark.parametrize("iterations", [1, 3, 8, 100])
def test_it_is_weiszfelds_iteration(iterations: int) -> None:
    updates = honest(5)
    rows = stacked(updates)
    ours = merged(GeometricMedian(iterations), Listed(updates, WEIGHTS))
    assert difference(ours, weiszfeld(rows, WEIGHTS, iterations)) < 1e-11
    # The mutants: the mean, equal weights, squared distances, one iteration less.
    assert difference(ours, mean(rows, WEIGHTS)) > 0.01
    assert difference(ours, weiszfeld(rows, [1] * 5, iterations)) > 0.01
    assert difference(ours, weiszfeld(rows, WEIGHTS, iterations, root=False)) > 0.01
    if iterations < 8:
        assert difference(ours, weiszfeld(rows, WEIGHTS, iterations - 1)) > 1e-6


def test_it_is_where_the_sum_of_distances_is_least() -> None:
    updates = honest(5)
    rows = stacked(updates)
    ours = merged(GeometricMedian(1000), Listed(updates, WEIGHTS))
    assert difference(ours, weiszfeld(rows, WEIGHTS, 10_000)) < 1e-6
    least, random = objective(ours, rows, WEIGHTS), np.random.default_rng(1)
    for size in (1e-3, 1e-2, 0.1, 1.0):
        for _ in range(20):
            assert objective(ours + size * random.normal(size=ours.shape), rows, WEIGHTS) > least
    for other in (mean(rows, WEIGHTS), np.median(rows, axis=0)):
        assert objective(other, rows, WEIGHTS) > least


def test_where_updates_are_close_together_their_distances_are_not_lost() -> None:
    """As late in training: they have nearly all in common. The mutant takes distances from inner products."""
    common = honest(1, seed=3)[0]
    updates = [{n: 1e3 * common[n] + 1e-4 * own for n, own in update.items()} for update in honest(5)]
    rows = stacked(updates)
    ours = merged(GeometricMedian(), Listed(updates, WEIGHTS))
    centre = rows.mean(0)
    expected = weiszfeld(rows - centre, WEIGHTS)
    assert difference(ours - centre, expected) < 1e-9
    products = rows @ rows.T
    squares = np.diag(products)[:, None] + np.diag(products)[None] - 2 * products
    exact = np.square(rows[:, None] - rows[None]).sum(2)
    assert np.abs(squares - exact).max() > 1e-2 * exact.max()


@pytest.mark.parametrize(("count", "liars"), [(3, 1), (4, 1), (5, 2), (7, 3)])
@pytest.mark.parametrize("scale", [-1000.0, 1e6])
def test_fewer_than_half_liars_move_it_only_so_far(count: int, liars: int, scale: float) -> None:
    """Lopuhaa and Rousseeuw 1991: from any point of reference, by 2 n / (n - 2 m) times the farthest honest update."""
    truth, lies = honest(count - liars), [lying(honest(1, seed=9)[0], scale)] * liars
    rows = stacked(truth)
    centre = rows.mean(0)
    radius = np.linalg.norm(rows - centre, axis=1).max()
    bound = radius * 2 * (count - liars) / (count - 2 * liars)
    ours = merged(GeometricMedian(), Listed([*lies, *truth]))
    assert np.linalg.norm(ours - centre) <= bound
    everyone = stacked([*lies, *truth])
    assert np.linalg.norm(plain_mean(everyone, []) - centre) > 10 * bound
    if count == 7:  # the paper's few iterations are not enough then
        assert np.linalg.norm(weiszfeld(everyone, [1] * count, 8) - centre) > bound


def test_an_update_that_all_agree_on_is_the_result() -> None:
    update = honest(1)[0]
    assert difference(merged(GeometricMedian(), Listed([update] * 4)), stacked([update])[0]) < 1e-12
    assert difference(merged(GeometricMedian(), Listed([update])), stacked([update])[0]) < 1e-12


@pytest.mark.parametrize(("count", "liars"), [(4, 0), (5, 2)])
@pytest.mark.parametrize("weighting", ["tokens", "uniform"])
def test_a_round_is_the_geometric_median_of_its_updates(tmp_path: Path, count: int, liars: int, weighting: str) -> None:
    federation = {"weighting": weighting}
    moved, expected, updates = one_round(tmp_path, "geometric_median", weiszfeld, count, liars, federation=federation)
    assert difference(moved, expected) < 1e-8
    assert difference(moved, plain_mean(stacked(updates), [])) > 1e-4
    if weighting == "tokens":
        assert difference(moved, weiszfeld(stacked(updates), [1] * count)) > 1e-5


def test_shared_moments_belong_to_the_vector(tmp_path: Path) -> None:
    adamw = {"optimizer": "adamw", "lr": 0.01, "eps": 1e-4}
    moved, expected, updates = one_round(tmp_path, "geometric_median", weiszfeld, parts=["share"], node=adamw)
    assert {name.partition("/")[2] for name in updates[0]} == {"", "exp_avg", "exp_avg_sq"}
    assert difference(moved, expected) < 1e-8


def test_the_order_of_arrival_changes_no_bit(tmp_path: Path) -> None:
    assert len(in_every_order(tmp_path, "geometric_median")) == 1


def test_what_cannot_be_is_refused() -> None:
    for parameters in ({"iterations": 0}, {"smoothing": 0.0}, {"smoothing": -1.0}, {"smoothing": 1e-305}):
        with pytest.raises(ValueError, match="geometric_median"):
            GeometricMedian(**parameters)
    with pytest.raises(ConfigError, match="three nodes"):
        read_again(tiny_recipe(("ada", "bob"), federation={"parts": ["geometric_median"]}))
    assert Method.of(tiny_recipe(federation={"parts": ["geometric_median(iterations=8)"]})).merged is not None
