"""The trimmed mean against one that is sorted by hand, against liars, and in a federation."""

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
    merged,
    one_round,
    plain_mean,
    stacked,
)
from tests.support import read_again, tiny_recipe

from photon.errors import ConfigError
from photon.parts.method import Method
from photon.parts.trimmed_mean import TrimmedMean


def trimmed(rows: np.ndarray, drop: int) -> np.ndarray:
    """Value by value in plain Python."""
    columns = [sorted(column) for column in rows.T.tolist()]
    return np.array([sum(column[drop : len(column) - drop]) / (len(column) - 2 * drop) for column in columns])


@pytest.mark.parametrize(
    ("share", "count", "drop"),
    [(0.2, 5, 1), (0.2, 9, 1), (0.2, 10, 2), (0.34, 3, 1), (0.25, 4, 1), (0.49, 7, 3), (0.2, 4, 0), (0.2, 1, 0)],
)
def test_it_leaves_out_the_share_at_both_ends(share: float, count: int, drop: int) -> None:
    updates = honest(count)
    rows = stacked(updates)
    ours = merged(TrimmedMean(share), Listed(updates, range(1, count + 1)))
    assert difference(ours, trimmed(rows, drop)) < 1e-14
    if drop:  # the mutants: the mean, one more left out, and one end alone
        assert difference(ours, rows.mean(0)) > 0.01
        assert difference(ours, np.sort(rows, axis=0)[drop:].mean(0)) > 0.01
        if count > 2 * drop + 2:
            assert difference(ours, trimmed(rows, drop + 1)) > 0.01


def test_a_share_is_the_decimal_that_was_written() -> None:
    assert int(0.29 * 100) == 28  # the mutant
    updates = honest(100)
    assert difference(merged(TrimmedMean(0.29), Listed(updates)), trimmed(stacked(updates), 29)) < 1e-14


@pytest.mark.parametrize(("share", "count", "liars"), [(0.34, 3, 1), (0.2, 5, 1), (0.4, 5, 2), (0.45, 9, 4)])
def test_no_more_liars_than_are_left_out_cannot_take_it_out_of_the_honest_range(
    share: float, count: int, liars: int
) -> None:
    truth = honest(count - liars)
    rows = stacked(truth)
    lies = [lying(update) for update in honest(liars, seed=9)]
    ours = merged(TrimmedMean(share), Listed([*lies, *truth]))
    assert (rows.min(0) <= ours).all()
    assert (ours <= rows.max(0)).all()
    fooled = plain_mean(stacked([*lies, *truth]), [])
    assert ((fooled < rows.min(0)) | (fooled > rows.max(0))).mean() > 0.9
    more = merged(TrimmedMean(share), Listed([lying(truth[0])] * (liars + 1) + truth))
    assert (np.abs(more) > np.abs(rows).max(0)).any()  # one liar more can: the bound is sharp


@pytest.mark.parametrize(("count", "liars"), [(5, 0), (5, 1), (7, 1)])
def test_a_round_is_the_trimmed_mean_of_its_updates(tmp_path: Path, count: int, liars: int) -> None:
    def reference(rows: np.ndarray, weights: Sequence[int]) -> np.ndarray:
        return trimmed(rows, 1)

    moved, expected, updates = one_round(tmp_path, "trimmed_mean(share=0.2)", reference, count, liars)
    assert difference(moved, expected) < 1e-12
    assert difference(moved, plain_mean(stacked(updates), [])) > 1e-3


def test_shared_moments_are_merged_alike(tmp_path: Path) -> None:
    adamw = {"optimizer": "adamw", "lr": 0.01, "eps": 1e-4}
    moved, expected, updates = one_round(
        tmp_path, "trimmed_mean", lambda rows, weights: trimmed(rows, 1), parts=["share"], node=adamw
    )
    assert {name.partition("/")[2] for name in updates[0]} == {"", "exp_avg", "exp_avg_sq"}
    assert difference(moved, expected) < 1e-12


def test_the_order_of_arrival_changes_no_bit(tmp_path: Path) -> None:
    assert len(in_every_order(tmp_path, "trimmed_mean(share=0.25)")) == 1


def test_what_leaves_out_nothing_or_all_is_refused() -> None:
    for share in (0.0, 0.5, -0.1, 1.0):
        with pytest.raises(ValueError, match="share"):
            TrimmedMean(share)
    with pytest.raises(ConfigError, match="leaves out nothing of 3 updates"):
        read_again(tiny_recipe(federation={"parts": ["trimmed_mean"]}))
    assert Method.of(tiny_recipe(federation={"parts": ["trimmed_mean(share=0.34)"]})).merged is not None
