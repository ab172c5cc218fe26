from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from photon.data.permutation import permute

Permutation = Callable[[NDArray[np.int64], int, int], NDArray[np.int64]]


def check_bijection(permutation: Permutation, size: int, key: int) -> None:
    out = permutation(np.arange(size), size, key)
    assert sorted(out.tolist()) == list(range(size))


def check_looks_random(permutation: Permutation, size: int, key: int) -> None:
    """Of a uniform permutation: neighbours are unrelated, and about one point stays in place."""
    out = permutation(np.arange(size), size, key)
    steps = np.diff(out)
    assert len(np.unique(steps)) > size // 2
    assert abs(np.corrcoef(np.arange(size), out)[0, 1]) < 5 / np.sqrt(size)
    assert np.count_nonzero(out == np.arange(size)) < 12


def stride(index: NDArray[np.int64], size: int, key: int) -> NDArray[np.int64]:
    """Mutant: multiplication by an odd number is a bijection of powers of two only."""
    return (index * (2 * key + 3) + key) % size


def rotation(index: NDArray[np.int64], size: int, key: int) -> NDArray[np.int64]:
    """Mutant: a bijection, but no shuffle."""
    return (index + key) % size


@given(size=st.integers(1, 2000), key=st.integers(0, 2**64 - 1))
def test_every_index_appears_exactly_once(size: int, key: int) -> None:
    check_bijection(permute, size, key)


def test_the_bijection_check_rejects_a_colliding_stride() -> None:
    with pytest.raises(AssertionError):
        check_bijection(stride, 15, 1)


@pytest.mark.parametrize("size", [997, 4096, 50_000])
def test_order_looks_random(size: int) -> None:
    for key in range(5):
        check_looks_random(permute, size, key)
    with pytest.raises(AssertionError):
        check_looks_random(rotation, size, 7)


@settings(max_examples=30)
@given(size=st.integers(1, 2**50), key=st.integers(0, 2**64 - 1), data=st.data())
def test_huge_domains_stay_inside_and_distinct(size: int, key: int, data: st.DataObject) -> None:
    some = data.draw(st.lists(st.integers(0, size - 1), max_size=50, unique=True))
    out = permute(np.array(some, dtype=np.int64), size, key)
    assert len(set(out.tolist())) == len(some)
    assert all(0 <= value < size for value in out.tolist())


def test_one_index_alone_goes_where_it_goes_in_company() -> None:
    together = permute(np.arange(1000), 1000, 5)
    assert [int(permute(i, 1000, 5)) for i in range(1000)] == together.tolist()
    assert permute(np.arange(6).reshape(2, 3), 1000, 5).tolist() == together[:6].reshape(2, 3).tolist()


def test_keys_name_different_orders() -> None:
    orders = {tuple(permute(np.arange(100), 100, key).tolist()) for key in range(200)}
    assert len(orders) == 200


def test_first_place_is_uniform_over_keys() -> None:
    size, keys = 10, 5000
    counts = np.bincount([int(permute(0, size, key * 0x9E3779B97F4A7C15 % 2**64)) for key in range(keys)], minlength=10)
    chi_squared = float(((counts - keys / size) ** 2 / (keys / size)).sum())
    assert chi_squared < 33.7  # 9 degrees of freedom, one in ten thousand


@pytest.mark.parametrize(("index", "size"), [(5, 5), (-1, 5), (0, 0)])
def test_an_index_outside_is_refused(index: int, size: int) -> None:
    with pytest.raises(ValueError, match="outside"):
        permute(index, size, 1)
