from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from photon.data.shards import ShardReader
from photon.data.stream import CYCLE_LIMIT, Stream
from photon.errors import DataError

LENGTH = 4
Batch = Callable[[int, int], NDArray[np.int64]]
Make = Callable[..., ShardReader]
reuse_fixture = settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])


def identity(batch: NDArray[np.int64]) -> list[int]:
    """Which sequence each row is, by its first token (sources start at multiples of a million)."""
    return (batch[:, 0] // LENGTH).tolist()


def check_purity(batch: Batch, position: int, first: int, second: int) -> None:
    whole = batch(position, first + second)
    parts = np.concatenate([batch(position, first), batch(position + first, second)])
    np.testing.assert_array_equal(whole, parts)


def check_epochs(batch: Batch, sequences: int, epochs: int) -> None:
    """Every epoch holds each sequence once, in an order of its own."""
    orders = []
    for epoch in range(epochs):
        seen = identity(batch(epoch * sequences, sequences))
        assert sorted(seen) == list(range(sequences))
        orders.append(tuple(seen))
    assert len(set(orders)) == epochs


@pytest.fixture
def one(numbered: Make) -> Stream:
    return Stream([numbered(31 * LENGTH + 1)], None, LENGTH, seed=7, node="a")


@pytest.fixture
def three(numbered: Make) -> list[ShardReader]:
    return [numbered(n * LENGTH + 1, first=i * 1_000_000) for i, n in enumerate((31, 7, 101))]


def test_rows_are_whole_windows_that_overlap_by_one_token(one: Stream) -> None:
    batch = one.batch(0, 31)
    assert batch.dtype == np.int64
    assert batch.shape == (31, LENGTH + 1)
    np.testing.assert_array_equal(np.diff(batch, axis=1), 1)
    # The targets of an epoch are every token but the first, each exactly once.
    assert sorted(batch[:, 1:].ravel().tolist()) == list(range(1, 31 * LENGTH + 1))


def test_no_sequence_comes_twice_in_an_epoch(one: Stream) -> None:
    check_epochs(one.batch, 31, 4)


def test_the_epoch_check_rejects_mutants(one: Stream) -> None:
    def with_replacement(position: int, size: int) -> NDArray[np.int64]:
        draws = [np.random.default_rng(p).integers(31) for p in range(position, position + size)]
        return np.array(draws)[:, None] * LENGTH

    def same_order_every_epoch(position: int, size: int) -> NDArray[np.int64]:
        return np.concatenate([one.batch(p % 31, 1) for p in range(position, position + size)])

    for mutant in (with_replacement, same_order_every_epoch):
        with pytest.raises(AssertionError):
            check_epochs(mutant, 31, 2)


@reuse_fixture
@given(position=st.integers(0, 500), first=st.integers(0, 40), second=st.integers(0, 40))
def test_a_batch_does_not_depend_on_how_the_stream_is_cut(
    three: list[ShardReader], position: int, first: int, second: int
) -> None:
    check_purity(Stream(three, [0.5, 0.2, 0.3], LENGTH, seed=1, node="a").batch, position, first, second)


def test_the_purity_check_rejects_mutants(three: list[ShardReader]) -> None:
    stream = Stream(three, None, LENGTH, seed=1, node="a")

    def restarts_the_epoch(position: int, size: int) -> NDArray[np.int64]:
        return stream.batch(0, size)

    def draws_per_batch(position: int, size: int) -> NDArray[np.int64]:
        order = np.random.default_rng(position).permutation(size)
        return stream.batch(position, size)[order]

    for mutant in (restarts_the_epoch, draws_per_batch):
        with pytest.raises(AssertionError):
            check_purity(mutant, 10, 8, 8)


def test_a_new_stream_resumes_from_the_position_alone(three: list[ShardReader]) -> None:
    def fresh() -> Stream:
        return Stream(three, [1.0, 2.0, 3.0], LENGTH, seed=1, node="a")

    running = fresh()
    rows = np.concatenate([running.batch(p, 16) for p in range(0, 160, 16)])
    np.testing.assert_array_equal(rows[96:], fresh().batch(96, 64))
    far = 3 * 10**12  # a position says all, however far
    np.testing.assert_array_equal(fresh().batch(far, 4)[2:], fresh().batch(far + 2, 2))


def test_order_depends_on_seed_node_and_source(numbered: Make) -> None:
    reader = numbered(50 * LENGTH + 1)
    same_text = [reader, reader]
    orders = {
        (seed, node): tuple(identity(Stream([reader], None, LENGTH, seed, node).batch(0, 50)))
        for seed in (0, 1, 11)
        for node in ("a", "b", "1a")
    }
    assert len(set(orders.values())) == 9
    both = identity(Stream(same_text, [1, 1], LENGTH, 0, "a").batch(0, 100))
    assert both[::2] != both[1::2]
    assert sorted(both[::2]) == sorted(both[1::2]) == list(range(50))


@reuse_fixture
@given(
    weights=st.lists(st.integers(0, 50), min_size=3, max_size=3).filter(any),
    position=st.integers(0, 10_000),
)
def test_mixing_is_exact_over_a_cycle_and_near_everywhere(
    three: list[ShardReader], weights: list[int], position: int
) -> None:
    stream = Stream(three, [w / 100 for w in weights], LENGTH, seed=1, node="a")
    total = sum(weights)
    assert stream.counts(total * 7).tolist() == [7 * w for w in weights]
    shares = position * np.array(weights) / total
    assert np.abs(stream.counts(position) - shares).max() < len(weights)


def test_counts_are_what_the_batches_hold(three: list[ShardReader]) -> None:
    stream = Stream(three, [0.62, 0.0, 0.38], LENGTH, seed=1, node="a")
    sources = np.array(stream.batch(0, 500)[:, 0] // 1_000_000)
    for position in (0, 1, 49, 50, 51, 499, 500):
        assert stream.counts(position).tolist() == np.bincount(sources[:position], minlength=3).tolist()
    assert stream.counts(500).tolist() == [310, 0, 190]


def test_a_source_of_a_mixture_is_seen_whole_before_it_repeats(three: list[ShardReader]) -> None:
    rows = Stream(three, [1.0, 5.0, 1.0], LENGTH, seed=1, node="a").batch(0, 700)
    small = [row // LENGTH for row in rows[:, 0].tolist() if 1_000_000 <= row < 2_000_000]
    assert len(small) == 500
    for epoch in range(500 // 7):
        assert len(set(small[epoch * 7 : epoch * 7 + 7])) == 7


def test_default_weights_finish_all_sources_together(three: list[ShardReader]) -> None:
    stream = Stream(three, None, LENGTH, seed=1, node="a")
    rows = stream.batch(0, 139)
    assert len(np.unique(rows[:, 0])) == 139
    assert stream.counts(139).tolist() == [31, 7, 101]
    assert stream.epoch(139) == 1.0
    assert stream.epoch(0) == 0.0


def test_awkward_weights_are_met_to_the_stated_resolution(three: list[ShardReader]) -> None:
    weights = [0.123456789, 1e-9, 0.7]
    stream = Stream(three, weights, LENGTH, seed=1, node="a")
    counts = stream.counts(CYCLE_LIMIT)
    shares = [float(Fraction(w) / sum(map(Fraction, weights))) for w in weights]
    assert counts.sum() == CYCLE_LIMIT
    assert counts[1] == 1  # wanted at all, so read at all
    assert np.abs(counts / CYCLE_LIMIT - shares).max() <= 1 / CYCLE_LIMIT


def test_a_source_without_a_sequence_is_refused_by_name(numbered: Make) -> None:
    with pytest.raises(DataError, match=r"numbered-0-4-.*4 training tokens.*no sequence of 4"):
        Stream([numbered(LENGTH)], None, LENGTH, 0, "a")


@pytest.mark.parametrize("weights", [[0.0], [-1.0]])
def test_weights_without_a_positive_one_are_refused(numbered: Make, weights: list[float]) -> None:
    with pytest.raises(DataError, match="not all zero"):
        Stream([numbered(100)], weights, LENGTH, 0, "a")


def test_a_weight_per_source_is_required(numbered: Make) -> None:
    with pytest.raises(DataError, match="silo a: 2 weights for 1 sources"):
        Stream([numbered(100)], [0.5, 0.5], LENGTH, 0, "a")
