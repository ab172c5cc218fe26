"""Pieces: the size of a piece decides nothing, what is ordered is sorted, and memory is that of a piece."""

from __future__ import annotations

import pytest
import torch
from tests.parts.updates import Listed, difference, honest, merged, stacked

from photon.parts import pieces
from photon.parts.base import Part
from photon.parts.geometric_median import GeometricMedian
from photon.parts.median import Median
from photon.parts.norm_clipped_mean import NormClippedMean
from photon.parts.pieces import merged_by, ordered, summed_by
from photon.parts.trimmed_mean import TrimmedMean

PARTS = [Median(), TrimmedMean(), GeometricMedian(), NormClippedMean()]


@pytest.mark.parametrize("count", range(1, 34))
def test_ordered_is_sorted(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = torch.randn(count, 200, generator=torch.Generator().manual_seed(count), dtype=torch.float64)
    rows[:, ::7] = rows[:, ::7].round()  # ties
    assert torch.equal(torch.stack(ordered(rows.clone())), rows.sort(0).values)
    if count > 1:  # the mutant: a network that lacks its last exchange
        shorter = pieces._exchanges(count)[:-1]
        monkeypatch.setattr(pieces, "_exchanges", lambda count: shorter)
        assert not torch.equal(torch.stack(ordered(rows.clone())), rows.sort(0).values)


@pytest.mark.parametrize("part", PARTS, ids=lambda part: type(part).__name__)
def test_the_size_of_a_piece_decides_nothing(part: Part, monkeypatch: pytest.MonkeyPatch) -> None:
    updates = Listed(honest(5), [3, 1, 4, 1, 5])
    whole = merged(part, updates)
    monkeypatch.setattr(pieces, "VALUES_AT_A_TIME", 35)
    assert difference(merged(part, updates), whole) < 1e-14


@pytest.mark.parametrize("count", [3, 30])
def test_however_many_updates_there_are_no_more_values_are_computed_with(
    count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pieces, "VALUES_AT_A_TIME", 60)
    sizes: list[int] = []

    def rule(values: torch.Tensor) -> torch.Tensor:
        sizes.append(values.numel())
        return values[0]

    result = dict(merged_by(Listed(honest(count)), rule))
    assert 30 < max(sizes) <= 60
    assert all(torch.equal(result[name], tensor) for name, tensor in honest(count)[0].items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_result_is_rounded_once_to_the_dtype_of_its_parameter(dtype: torch.dtype) -> None:
    updates = honest(3, dtype=dtype)
    result = dict(merged_by(Listed(updates), lambda values: values.mean(0)))
    for name, tensor in result.items():
        assert tensor.dtype == dtype
        assert torch.equal(tensor, torch.stack([update[name].double() for update in updates]).mean(0).to(dtype))


def test_a_sum_goes_over_all_tensors() -> None:
    updates = honest(4)
    sums = summed_by(Listed(updates), lambda values: values.sum(1))
    assert difference(sums.numpy(), stacked(updates).sum(1)) < 1e-12


def test_updates_that_do_not_fit_together_are_an_error() -> None:
    with pytest.raises(ValueError, match="no update"):
        dict(merged_by(Listed([]), lambda values: values[0]))
    one, other = {"a": torch.zeros(2), "b": torch.zeros(2)}, {"b": torch.zeros(2), "a": torch.zeros(2)}
    with pytest.raises(ValueError, match="same place"):
        dict(merged_by(Listed([one, other]), lambda values: values[0]))
