"""The median against numpy's, against liars, and in a federation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
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
from photon.parts.median import Median
from photon.parts.method import Method


def reference(rows: np.ndarray, weights: Sequence[int]) -> np.ndarray:
    return np.median(rows, axis=0)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 13])
def test_it_is_numpys_whatever_the_weights(count: int) -> None:
    updates = honest(count)
    ours = merged(Median(), Listed(updates, range(1, count + 1)))
    assert difference(ours, np.median(stacked(updates), axis=0)) == 0
    if count > 2:
        assert difference(ours, plain_mean(stacked(updates), [])) > 0.01
    if count % 2 == 0:  # the mutant that torch.median is: of an even number the lower one of the middle two
        assert difference(ours, torch.from_numpy(stacked(updates)).median(0).values.numpy()) > 0.01


def test_in_float32_it_is_rounded_like_numpys() -> None:
    updates = honest(6, dtype=torch.float32)
    assert difference(merged(Median(), Listed(updates)), np.median(stacked(updates).astype(np.float32), axis=0)) == 0


@pytest.mark.parametrize(("count", "liars"), [(3, 1), (4, 1), (5, 2), (8, 3), (9, 4)])
def test_fewer_than_half_liars_cannot_take_it_out_of_the_honest_range(count: int, liars: int) -> None:
    truth = honest(count - liars)
    rows = stacked(truth)
    lies = [lying(update) for update in honest(liars, seed=9)]
    ours = merged(Median(), Listed([*lies, *truth]))
    assert (rows.min(0) <= ours).all()
    assert (ours <= rows.max(0)).all()
    fooled = plain_mean(stacked([*lies, *truth]), [])
    assert ((fooled < rows.min(0)) | (fooled > rows.max(0))).mean() > 0.9
    half = merged(Median(), Listed([lying(truth[0])] * len(truth) + truth))  # half liars can: the bound is sharp
    assert (np.abs(half) > np.abs(rows).max(0)).any()


@pytest.mark.parametrize(("count", "liars"), [(4, 0), (5, 0), (5, 2)])
def test_a_round_is_the_median_of_its_updates(tmp_path: Path, count: int, liars: int) -> None:
    moved, expected, updates = one_round(tmp_path, "median", reference, count, liars)
    assert difference(moved, expected) < 1e-12
    assert difference(moved, plain_mean(stacked(updates), [])) > 1e-3


def test_shared_moments_are_merged_alike(tmp_path: Path) -> None:
    adamw = {"optimizer": "adamw", "lr": 0.01, "eps": 1e-4}
    moved, expected, updates = one_round(tmp_path, "median", reference, parts=["share"], node=adamw)
    assert {name.partition("/")[2] for name in updates[0]} == {"", "exp_avg", "exp_avg_sq"}
    assert difference(moved, expected) < 1e-12
    assert difference(moved, plain_mean(stacked(updates), [])) > 1e-4


def test_the_order_of_arrival_changes_no_bit(tmp_path: Path) -> None:
    assert len(in_every_order(tmp_path, "median")) == 1


def test_what_a_lossy_codec_left_is_what_is_merged(tmp_path: Path) -> None:
    link = {"up": ["topk(density=0.3)", "int4"]}
    moved, expected, updates = one_round(tmp_path, "median", reference, link=link)
    assert difference(moved, expected) < 1e-12
    assert (stacked(updates) == 0).mean() > 0.5


def test_two_nodes_have_no_median() -> None:
    with pytest.raises(ConfigError, match="three nodes"):
        read_again(tiny_recipe(("ada", "bob"), federation={"parts": ["median"]}))
    with pytest.raises(ConfigError, match="three nodes"):
        read_again(tiny_recipe(federation={"parts": ["median"], "nodes_per_round": 2}))
    with pytest.raises(ConfigError, match="own merged"):
        Method.of(tiny_recipe(federation={"parts": ["median", "geometric_median"]}))
    assert Method.of(tiny_recipe(federation={"parts": ["median"]})).merged is not None


def test_tokens_weigh_nothing() -> None:
    updates = honest(3)
    assert difference(mean(stacked(updates), [1, 1, 98]), mean(stacked(updates), [1, 1, 1])) > 0.1  # as in the mean
    assert difference(merged(Median(), Listed(updates, [1, 1, 98])), merged(Median(), Listed(updates))) == 0
