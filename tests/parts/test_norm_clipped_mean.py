"""The norm-clipped mean against one that is clipped by hand, against liars, and in a federation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from tests.parts.updates import Listed, difference, honest, in_every_order, lying, mean, merged, one_round, stacked
from tests.support import read_again, tiny_recipe

from photon.errors import ConfigError
from photon.parts.method import Method
from photon.parts.norm_clipped_mean import NormClippedMean

WEIGHTS = [30, 10, 40, 10, 50, 20]


def clipped(rows: np.ndarray, weights: Sequence[int], times: float = 1.0) -> np.ndarray:
    """By hand."""
    norms = [float(np.sqrt(sum(value * value for value in row))) for row in rows.tolist()]
    limit = times * float(np.median(norms))
    total = np.zeros(rows.shape[1])
    for row, norm, weight in zip(rows, norms, weights, strict=True):
        total += weight * row * (limit / norm if norm > limit else 1.0)
    return total / sum(weights)


@pytest.mark.parametrize("times", [0.5, 1.0, 1.5])
@pytest.mark.parametrize("count", [1, 3, 4, 5, 6])
def test_it_is_the_mean_of_updates_clipped_by_hand(count: int, times: float) -> None:
    updates = [{name: (1 + k) * tensor for name, tensor in update.items()} for k, update in enumerate(honest(count))]
    rows, weights = stacked(updates), WEIGHTS[:count]
    ours = merged(NormClippedMean(times), Listed(updates, weights))
    assert difference(ours, clipped(rows, weights, times)) < 1e-12
    if count > 1:  # the mutants: the mean, equal weights, weights of the clipped lengths, every update made that long
        norms = np.linalg.norm(rows, axis=1)
        scales = np.minimum(1, times * np.median(norms) / norms)
        assert difference(ours, mean(rows, weights)) > 0.01
        assert difference(ours, clipped(rows, [1] * count, times)) > 0.01
        assert difference(ours, mean(rows, list(weights * scales))) > 0.01
        if times == 1.0:
            unit = rows / norms[:, None] * np.median(norms)
            assert difference(ours, mean(unit, weights)) > 0.01


def test_where_nobody_is_too_long_it_is_the_weighted_mean() -> None:
    updates = honest(5)
    ours = merged(NormClippedMean(10.0), Listed(updates, WEIGHTS[:5]))
    assert difference(ours, mean(stacked(updates), WEIGHTS[:5])) < 1e-14
    nothing = [{name: 0 * tensor for name, tensor in update.items()} for update in updates]
    assert not merged(NormClippedMean(), Listed(nothing)).any()


@pytest.mark.parametrize(("count", "liars"), [(3, 1), (5, 1), (5, 2), (8, 3)])
def test_a_lie_moves_it_by_no_more_than_its_share_of_an_honest_norm(count: int, liars: int) -> None:
    """The median of the norms is no longer than an honest one, as long as more than half are (of eight, five)."""
    truth = honest(count - liars)
    lies = [lying(update) for update in honest(liars, seed=9)]
    everyone, longest = stacked([*lies, *truth]), np.linalg.norm(stacked(truth), axis=1).max()
    ours = merged(NormClippedMean(), Listed([*lies, *truth]))
    limit = np.median(np.linalg.norm(everyone, axis=1))
    assert limit <= longest
    truthful = sum(row * min(1.0, limit / np.linalg.norm(row)) for row in stacked(truth)) / count
    assert np.linalg.norm(ours - truthful) <= liars / count * longest * (1 + 1e-12)
    assert np.linalg.norm(everyone.mean(0)) > 10 * longest


@pytest.mark.parametrize(("count", "liars"), [(4, 0), (5, 2)])
@pytest.mark.parametrize("weighting", ["tokens", "uniform"])
def test_a_round_is_the_clipped_mean_of_its_updates(tmp_path: Path, count: int, liars: int, weighting: str) -> None:
    federation = {"weighting": weighting}
    moved, expected, updates = one_round(tmp_path, "norm_clipped_mean", clipped, count, liars, federation=federation)
    assert difference(moved, expected) < 1e-12
    assert difference(moved, mean(stacked(updates), [1] * count)) > 1e-4
    if weighting == "tokens":
        assert difference(moved, clipped(stacked(updates), [1] * count)) > 1e-5


def test_shared_moments_belong_to_the_vector(tmp_path: Path) -> None:
    adamw = {"optimizer": "adamw", "lr": 0.01, "eps": 1e-4}
    moved, expected, updates = one_round(tmp_path, "norm_clipped_mean", clipped, parts=["share"], node=adamw)
    assert {name.partition("/")[2] for name in updates[0]} == {"", "exp_avg", "exp_avg_sq"}
    assert difference(moved, expected) < 1e-12


def test_the_order_of_arrival_changes_no_bit(tmp_path: Path) -> None:
    assert len(in_every_order(tmp_path, "norm_clipped_mean")) == 1


def test_what_cannot_be_is_refused() -> None:
    for times in (0.0, -1.0):
        with pytest.raises(ValueError, match="times"):
            NormClippedMean(times)
    with pytest.raises(ConfigError, match="three nodes"):
        read_again(tiny_recipe(("ada", "bob"), federation={"parts": ["norm_clipped_mean"]}))
    assert Method.of(tiny_recipe(federation={"parts": ["norm_clipped_mean(times=2)"]})).merged is not None
