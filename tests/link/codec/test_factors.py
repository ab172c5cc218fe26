"""Packing of factors, and the one order in which a matrix is rebuilt from them."""

from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from photon.errors import WireError
from photon.link.codec.factors import dense, matrix_shape, pack, rebuild, saves, unpack


def random(*shape: int, seed: int = 0, spread: float = 0.0) -> Tensor:
    """Float32 of magnitudes spread over 10^+-spread."""
    generator = torch.Generator().manual_seed(seed)
    powers = (torch.rand(shape, generator=generator, dtype=torch.float64) - 0.5) * 2 * spread
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * 10**powers).float()


def exact_reference(left: Tensor, right: Tensor) -> np.ndarray:
    """Each entry in rational numbers, rounded to float64 after every component and to float32 at the end."""
    out = np.zeros((left.shape[0], right.shape[1]), np.float32)
    for i, row in enumerate(left.tolist()):
        for j, column in enumerate(right.T.tolist()):
            total = 0.0
            for a, b in zip(row, column, strict=True):
                total = float(Fraction(total) + Fraction(a) * Fraction(b))
            out[i, j] = np.float32(total)
    return out


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return bool((a.view(np.uint32) == b.view(np.uint32)).all())


@given(st.integers(1, 6), st.integers(1, 9), st.integers(1, 6), st.integers(0, 99), st.sampled_from([0.0, 5.0, 18.0]))
@settings(deadline=None, max_examples=60)
def test_rebuild_equals_rational_arithmetic_to_the_last_bit(m: int, k: int, n: int, seed: int, spread: float) -> None:
    left, right = random(m, k, seed=seed, spread=spread), random(k, n, seed=seed + 100, spread=spread)
    assert same_bits(rebuild(left, right).numpy(), exact_reference(left, right))


@pytest.mark.parametrize(("m", "k", "n"), [(600, 5, 601), (3, 2, 300_001), (300_001, 2, 1), (1, 1, 1)])
def test_rebuild_of_many_chunks_equals_one_loop_over_components(m: int, k: int, n: int) -> None:
    left, right = random(m, k), random(k, n, seed=1)
    total = np.zeros((m, n))
    for component in range(k):
        total += np.outer(left[:, component].numpy().astype(np.float64), right[component].numpy())
    assert same_bits(rebuild(left, right).numpy(), total.astype(np.float32))
    as_it_arrives = left.T.contiguous().T  # component by component, like what `unpack` returns
    assert torch.equal(rebuild(as_it_arrives, right), rebuild(left, right))


def test_mutants_of_another_precision_or_order_give_other_bits() -> None:
    left, right = random(40, 30), random(30, 40, seed=1)
    truth = exact_reference(left, right)
    assert same_bits(rebuild(left, right).numpy(), truth)
    assert not same_bits((left @ right).numpy(), truth)  # a float32 product
    cancelling_left, cancelling_right = torch.tensor([[1.0, 1e30, -1e30]]), torch.tensor([[1.0], [1.0], [1.0]])
    assert rebuild(cancelling_left, cancelling_right).item() == 0.0
    assert rebuild(cancelling_left.flip(1), cancelling_right.flip(0)).item() == 1.0  # the order is the format


def test_rebuild_of_nothing_is_exactly_zero() -> None:
    assert torch.equal(rebuild(torch.empty(3, 0), torch.empty(0, 4)), torch.zeros(3, 4))
    assert rebuild(torch.empty(0, 2), torch.empty(2, 4)).shape == (0, 4)


@given(st.integers(1, 8), st.integers(1, 5), st.integers(1, 8), st.integers(0, 99))
@settings(deadline=None, max_examples=50)
def test_packed_factors_have_the_same_product(m: int, k: int, n: int, seed: int) -> None:
    left, right = random(m, k, seed=seed, spread=3).double(), random(k, n, seed=seed + 1, spread=3).double()
    values = pack(left, right)
    assert values.dtype == torch.float32
    assert values.shape == (k * (m + n),)
    a, b = unpack(values, k, m, n)
    assert torch.allclose(a.norm(dim=0), b.norm(dim=1), rtol=1e-5)
    assert (rebuild(a, b) - left @ right).abs().max() <= 1e-6 * (left.abs() @ right.abs()).max()


@pytest.mark.parametrize("scale", [1e38, 1e-38, 1e-44])
def test_packing_holds_what_float32_holds(scale: float) -> None:
    left, right = torch.full((50, 1), 0.02).double(), torch.full((1, 50), 50.0).double() * scale
    values = pack(left, right)
    assert values.isfinite().all()
    assert torch.allclose(rebuild(*unpack(values, 1, 50, 50)).double(), left @ right, rtol=1e-5, atol=1.5e-45)
    assert (pack(left, right * 0) == 0).all()
    assert (pack(left * 0, right) == 0).all()


def test_packing_puts_components_side_by_side() -> None:
    left, right = torch.tensor([[1.0, 3.0], [1.0, 3.0]]).double(), torch.tensor([[1.0, 1.0], [3.0, 3.0]]).double()
    assert torch.allclose(pack(left, right), torch.tensor([1.0, 1, 3, 3, 1, 1, 3, 3]))


def test_wrong_counts_and_dtypes_are_refused() -> None:
    for count in (0, 9, 11):
        with pytest.raises(WireError, match="expected 10 float32 values"):
            unpack(torch.zeros(count), 2, 3, 2)
    with pytest.raises(WireError, match="float64"):
        unpack(torch.zeros(10, dtype=torch.float64), 2, 3, 2)
    with pytest.raises(WireError, match="expected 6 float32 values"):
        dense(torch.zeros(5), (2, 3))
    assert dense(torch.arange(6.0), (2, 3)).shape == (2, 3)


def test_which_shapes_are_matrices() -> None:
    assert matrix_shape((3, 4)) == (3, 4)
    assert matrix_shape((8, 3, 5, 5)) == (8, 75)
    for shape in ((), (0,), (7,), (0, 5), (5, 0), (1, 9), (2, 2)):
        assert not saves(1, *matrix_shape(shape))
    assert saves(1, 3, 3)
    assert not saves(2, 4, 4)  # as many numbers are not fewer
