"""The merge against numpy, in every order, to the last bit; and the wrong merges it must not be."""

import itertools
import weakref

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from photon.aggregator.merge import MAX_ABS_UPDATE, Merge

Updates = dict[str, dict[str, Tensor]]


def merge(
    updates: Updates, weights: dict[str, int], order: list[str], max_weight: int | None = None
) -> dict[str, Tensor]:
    merged = Merge(next(iter(updates.values())), max_weight or sum(weights.values()))
    for node in order:
        merged.fold(updates[node].items(), weights[node])
    return dict(merged.result())


def reference(updates: Updates, weights: dict[str, int]) -> dict[str, np.ndarray]:
    total = sum(weights.values())
    names = next(iter(updates.values())).keys()
    return {
        name: sum(np.float64(weights[node]) * updates[node][name].double().numpy() for node in updates) / total
        for name in names
    }


def random_updates(nodes: int, dtype: torch.dtype, scale: float = 1e-2) -> Updates:
    generator = torch.Generator().manual_seed(nodes)
    return {
        f"n{k}": {
            "w": (torch.randn(7, 5, generator=generator, dtype=dtype) * scale * 10.0 ** (k % 5 - 2)),
            "b": torch.randn(3, generator=generator, dtype=dtype) * scale,
            "empty": torch.zeros(0, dtype=dtype),
        }
        for k in range(nodes)
    }


WEIGHTS = {"n0": 65_536, "n1": 16_384, "n2": 1, "n3": 70_001}


def test_token_weights_equal_numpy_and_uniform_weights_do_not() -> None:
    updates = random_updates(4, torch.float64)
    expected = reference(updates, WEIGHTS)
    merged = merge(updates, WEIGHTS, list(WEIGHTS))
    uniform = merge(updates, dict.fromkeys(WEIGHTS, 1), list(WEIGHTS))
    for name, value in expected.items():
        assert np.abs(merged[name].numpy() - value).max(initial=0) < 1e-15
    assert np.abs(uniform["w"].numpy() - expected["w"]).max() > 1e-3  # the mutant


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_the_result_is_the_quotient_of_the_sums_rounded_once(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is written over the sums, piece by piece; the reference divides a copy of them, whole."""
    monkeypatch.setattr("photon.aggregator.merge._CHUNK_ELEMENTS", 8)
    updates = random_updates(4, dtype)
    merged = Merge(updates["n0"], sum(WEIGHTS.values()))
    for node, weight in WEIGHTS.items():
        merged.fold(updates[node].items(), weight)
    divisor = merged.weight * 2.0**merged._scale_bits
    expected = {name: (total.double() / divisor).to(dtype) for name, total in merged._sums.items()}
    assert max(float(value.double().abs().max()) for value in expected.values() if value.numel()) > 1e-3
    for name, value in merged.result():
        assert value.dtype == dtype
        assert torch.equal(value, expected[name])


def test_a_tensor_lies_where_its_sums_were_and_goes_with_its_reader() -> None:
    """Law 4: neither the whole update nor a second copy of anything is in memory."""
    updates = random_updates(2, torch.float32)
    merged = Merge(updates["n0"], 2)
    merged.fold(updates["n0"].items(), 1)
    places = {name: total.data_ptr() for name, total in merged._sums.items()}
    result = merged.result()
    name, value = next(result)
    assert value.data_ptr() == places[name]
    assert name not in merged._sums
    storage = weakref.ref(value.untyped_storage())
    assert storage() is not None
    del value
    assert storage() is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_arrival_order_does_not_matter_to_the_last_bit(dtype: torch.dtype) -> None:
    updates = random_updates(4, dtype)
    results = [merge(updates, WEIGHTS, list(order)) for order in itertools.permutations(WEIGHTS)]
    assert all(torch.equal(result[name], results[0][name]) for result in results for name in result)


def test_the_obvious_running_sum_does_depend_on_order() -> None:
    """The mutant: what a plain floating-point fold would do with the same updates."""
    updates = random_updates(4, torch.float32)

    def plain(order: tuple[str, ...]) -> Tensor:
        total = torch.zeros(7, 5)
        for node in order:
            total += WEIGHTS[node] * updates[node]["w"]
        return total / sum(WEIGHTS.values())

    results = [plain(order) for order in itertools.permutations(WEIGHTS)]
    assert any(not torch.equal(result, results[0]) for result in results)


@given(
    st.lists(
        st.tuples(
            st.integers(1, 2**34),
            st.lists(st.floats(-MAX_ABS_UPDATE, MAX_ABS_UPDATE, width=32), min_size=4, max_size=4),
        ),
        min_size=1,
        max_size=8,
    ),
    st.integers(0, 2**20),
)
def test_any_weights_and_values_stay_within_the_grid_of_the_exact_mean(
    nodes: list[tuple[int, list[float]]], unused_weight: int
) -> None:
    """`unused_weight`: tokens of nodes that never answered; they widen the grid's bound and nothing else."""
    from fractions import Fraction

    updates = {f"n{i}": {"w": torch.tensor(values, dtype=torch.float64)} for i, (_, values) in enumerate(nodes)}
    weights = {f"n{i}": weight for i, (weight, _) in enumerate(nodes)}
    total = sum(weights.values())
    merged = merge(updates, weights, list(updates), total + unused_weight)["w"]
    for index in range(4):
        exact = sum(Fraction(values[index]) * weight for weight, values in nodes) / total
        size = float(sum(abs(Fraction(values[index])) * weight for weight, values in nodes) / total)
        # The grid; and products of more than 53 bits, and the division, are rounded as any float64 is.
        bound = 2.0**-52 * (total + unused_weight) / total * len(nodes) + size * 2.0**-51
        assert abs(float(merged[index]) - float(exact)) <= bound


def test_the_largest_allowed_values_do_not_overflow() -> None:
    for value in (MAX_ABS_UPDATE, -MAX_ABS_UPDATE):
        updates = {f"n{i}": {"w": torch.full((2,), value)} for i in range(3)}
        merged = merge(updates, {"n0": 2**33, "n1": 1, "n2": 2**30}, list(updates))["w"]
        assert torch.equal(merged, torch.full((2,), value))


def test_missing_nodes_do_not_divide() -> None:
    """Sampled and answered nodes divide the sum, not registered or asked ones."""
    updates = random_updates(1, torch.float32)
    merged = merge(updates, {"n0": 100}, ["n0"], max_weight=400)
    assert torch.allclose(merged["w"], updates["n0"]["w"], rtol=1e-6, atol=1e-12)
    assert not torch.allclose(merged["w"], updates["n0"]["w"] / 4, rtol=1e-2, atol=1e-12)


def test_zero_updates_merge_to_zero_bits() -> None:
    updates = {f"n{i}": {"w": torch.zeros(5)} for i in range(3)}
    merged = merge(updates, {"n0": 3, "n1": 5, "n2": 7}, list(updates))["w"]
    assert torch.equal(merged, torch.zeros(5))


def test_more_weight_than_declared_is_refused() -> None:
    merged = Merge({"w": torch.zeros(2)}, 10)
    merged.fold([("w", torch.ones(2))], 8)
    with pytest.raises(ValueError, match="does not fit"):
        merged.fold([("w", torch.ones(2))], 3)
    with pytest.raises(ValueError, match="does not fit"):
        merged.fold([("w", torch.ones(2))], 0)


def test_nothing_folded_is_an_error() -> None:
    with pytest.raises(ValueError, match="nothing"):
        Merge({"w": torch.zeros(2)}, 10).result()


def test_tensors_larger_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    updates = random_updates(4, torch.float32)
    whole = merge(updates, WEIGHTS, list(WEIGHTS))
    monkeypatch.setattr("photon.aggregator.merge._CHUNK_ELEMENTS", 8)
    pieces = merge(updates, WEIGHTS, list(WEIGHTS))
    assert all(torch.equal(whole[name], pieces[name]) for name in whole)
