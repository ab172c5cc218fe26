"""K of P nodes, distinct, uniformly, the same from the same seed, whoever else is registered."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import combinations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from photon.aggregator.sampling import sample_nodes, sample_with_spares

Sample = Callable[[int, int, Sequence[str], int], list[str]]
NAMES = [f"node-{i}" for i in range(8)]
ROUNDS = 2000
names = st.lists(st.text("abcdefgh-._0123", min_size=1, max_size=6), unique=True, max_size=12)


@given(st.integers(0, 2**63 - 1), st.integers(0, 10**6), names, st.integers(1, 14), st.randoms())
def test_k_distinct_names_in_order_the_same_every_time(
    seed: int, round_index: int, names: list[str], count: int, rng: random.Random
) -> None:
    sampled = sample_nodes(seed, round_index, names, count)
    assert sampled == sorted(set(sampled))
    assert len(sampled) == min(count, len(names))
    assert set(sampled) <= set(names)
    rng.shuffle(names)
    assert sample_nodes(seed, round_index, [*names, *names[:3]], count) == sampled


@given(st.integers(0, 2**32), names, st.integers(1, 5))
def test_a_draw_does_not_depend_on_who_else_is_there(seed: int, names: list[str], count: int) -> None:
    """Who is sampled among all stays sampled when somebody who was not leaves."""
    sampled = sample_nodes(seed, 3, names, count)
    for leaver in set(names) - set(sampled):
        assert sample_nodes(seed, 3, [name for name in names if name != leaver], count) == sampled


def shuffled(seed: int, round_index: int, names: Sequence[str], count: int) -> list[str]:
    """A mutant: a seeded shuffle of the list as it was registered. Uniform, but it depends on the order."""
    return sorted(random.Random(f"{seed}/{round_index}").sample(list(names), count))


def windows(seed: int, round_index: int, names: Sequence[str], count: int) -> list[str]:
    """A mutant: a window that moves on. Every node equally often, but only neighbours ever meet."""
    return sorted(names[(round_index + seed + i) % len(names)] for i in range(count))


def without_round(seed: int, round_index: int, names: Sequence[str], count: int) -> list[str]:
    """A mutant: the same nodes every round."""
    return sample_nodes(seed, 0, names, count)


def depends_on_order(sample: Sample) -> bool:
    return any(sample(1, t, NAMES, 3) != sample(1, t, NAMES[::-1], 3) for t in range(20))


def is_uniform(sample: Sample, count: int, together: int) -> bool:
    """Each set of `together` nodes is sampled as often as chance has it, within 4 standard deviations."""
    seen = Counter(group for t in range(ROUNDS) for group in combinations(sample(7, t, NAMES, count), together))
    share = math.comb(len(NAMES) - together, count - together) / math.comb(len(NAMES), count)
    sigma = math.sqrt(ROUNDS * share * (1 - share))
    return all(abs(seen[group] - ROUNDS * share) < 4 * sigma for group in combinations(NAMES, together))


@pytest.mark.parametrize("count", [1, 3, 7])
def test_every_node_is_sampled_in_k_of_p_rounds(count: int) -> None:
    assert is_uniform(sample_nodes, count, 1)
    assert not is_uniform(without_round, count, 1)


def test_every_pair_meets_equally_often() -> None:
    assert is_uniform(sample_nodes, 3, 2)
    assert is_uniform(windows, 3, 1)
    assert not is_uniform(windows, 3, 2)


def test_the_order_of_registration_is_rejected_as_a_source_of_chance() -> None:
    assert not depends_on_order(sample_nodes)
    assert depends_on_order(shuffled)


def test_seeds_and_rounds_draw_anew() -> None:
    by_round = {tuple(sample_nodes(1, t, NAMES, 4)) for t in range(50)}
    by_seed = {tuple(sample_nodes(s, 0, NAMES, 4)) for s in range(50)}
    assert len(by_round) > 25
    assert len(by_seed) > 25
    # Not the same sequence one round later: seed and round are not simply added.
    assert [sample_nodes(1, t, NAMES, 4) for t in range(1, 20)] != [sample_nodes(2, t, NAMES, 4) for t in range(19)]


def test_a_draw_is_fixed_across_versions() -> None:
    """A run that is resumed with another version of Photon must sample the same nodes."""
    assert sample_nodes(1337, 5, ["ada", "bob", "cyd", "dan"], 2) == ["ada", "cyd"]


@given(st.integers(0, 2**32), names, st.integers(1, 6), st.floats(0, 4))
def test_spares_are_the_next_in_the_draw_and_come_last(
    seed: int, names: list[str], count: int, oversample: float
) -> None:
    asked = sample_with_spares(seed, 3, names, count, oversample)
    first = sample_nodes(seed, 3, names, count)
    assert asked[: len(first)] == first
    assert sorted(asked) == sample_nodes(seed, 3, names, len(asked))
    assert len(asked) == min(len(names), math.ceil(Fraction(str(oversample)) * count + count))


def test_an_oversample_that_is_a_whole_number_is_not_rounded_up() -> None:
    """(1 + 0.1) * 10 in floating point is a little more than 11."""
    many = [f"n{i}" for i in range(40)]
    assert [len(sample_with_spares(1, 0, many, 10, share)) for share in (0.0, 0.1, 0.11, 0.5, 4.0)] == [
        10, 11, 12, 15, 40,
    ]  # fmt: skip
