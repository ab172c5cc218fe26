"""K of P nodes, distinct, uniformly, the same from the same seed, whoever else is registered."""

from __future__ import annotations

import hashlib
import math
import random
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import combinations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support import tiny_recipe

from photon.aggregator.sampling import DROPPED_OUT, draw_round, drop_outs, sample_nodes, sample_with_spares

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


# Drop-outs

DropOuts = Callable[[int, int, Sequence[str], float], list[str]]


def by_rank(seed: int, round_index: int, sampled: Sequence[str], dropout: float) -> list[str]:
    """A mutant: the share of the sampled that drops out is fixed, who it is is drawn. Their number is no chance."""
    gone = round(dropout * len(sampled))
    return sorted(random.Random(f"{seed}/{round_index}").sample(list(sampled), min(gone, len(sampled) - 1)))


def without_a_round(seed: int, round_index: int, sampled: Sequence[str], dropout: float) -> list[str]:
    """A mutant: the same nodes drop out of every round."""
    return drop_outs(seed, 0, sampled, dropout)


def with_the_samplers_hash(seed: int, round_index: int, sampled: Sequence[str], dropout: float) -> list[str]:
    """A mutant: one hash samples and drops out, so those that are sampled first never stay."""
    draws = {
        name: int.from_bytes(hashlib.blake2b(f"{seed}/{round_index}/{name}".encode(), digest_size=16).digest())
        for name in sampled
    }
    gone = {name for name, draw in draws.items() if draw < dropout * 2**128}
    return sorted(gone - {max(draws, key=draws.__getitem__)})


def drops_at_the_rate(drop: DropOuts, dropout: float, count: int) -> bool:
    """Each node that is sampled (`count` of 8) drops out as often as chance has it, within 4 standard deviations.

    Where all of n would, one stays: each of them drops out with p - p^n / n.
    """
    sampled = {t: sample_nodes(7, t, NAMES, count) for t in range(ROUNDS)}
    gone = Counter(name for t, names in sampled.items() for name in drop(7, t, names, dropout))
    asked = Counter(name for names in sampled.values() for name in names)
    share = dropout - dropout**count / count
    return all(abs(gone[n] - asked[n] * share) <= 4 * math.sqrt(asked[n] * share * (1 - share)) for n in NAMES)


def are_independent(drop: DropOuts, dropout: float, lag: int) -> bool:
    """Drop-outs of pairs of nodes in the same round (`lag` 0), or of a node `lag` rounds on, meet by chance alone."""
    gone = {t: frozenset(drop(7, t, NAMES, dropout)) for t in range(ROUNDS + lag)}
    share = dropout - dropout ** len(NAMES) / len(NAMES)
    pairs = list(combinations(NAMES, 2)) if lag == 0 else [(name, name) for name in NAMES]
    expected, sigma = ROUNDS * share**2, math.sqrt(ROUNDS * share**2 * (1 - share**2))
    met = [sum(a in gone[t] and b in gone[t + lag] for t in range(ROUNDS)) for a, b in pairs]
    return all(abs(count - expected) < 4 * sigma for count in met)


@pytest.mark.parametrize("dropout", [0.125, 0.5, 0.875])
@pytest.mark.parametrize("count", [1, 3, 8])
def test_each_sampled_node_drops_out_at_the_rate(dropout: float, count: int) -> None:
    assert drops_at_the_rate(drop_outs, dropout, count)


def test_wrong_rates_are_rejected() -> None:
    assert not drops_at_the_rate(without_a_round, 0.5, 3)
    assert not drops_at_the_rate(with_the_samplers_hash, 0.5, 3)
    assert not drops_at_the_rate(by_rank, 0.125, 3)


def test_drop_outs_are_independent_between_nodes_and_between_rounds() -> None:
    for lag in (0, 1, 2):
        assert are_independent(drop_outs, 0.25, lag)
    assert not are_independent(without_a_round, 0.25, 1)
    assert not are_independent(by_rank, 0.25, 0)  # with two of eight gone, others are less often


@settings(deadline=None)
@given(st.integers(0, 2**63 - 1), st.integers(0, 10**6), names, st.floats(0, 1, exclude_max=True), st.randoms())
def test_at_least_one_stays_whatever_the_order(
    seed: int, round_index: int, names: list[str], dropout: float, rng: random.Random
) -> None:
    gone = drop_outs(seed, round_index, names, dropout)
    assert gone == sorted(set(gone))
    assert set(gone) <= set(names)
    assert len(gone) < max(1, len(names)) or not names
    rng.shuffle(names)
    assert drop_outs(seed, round_index, names, dropout) == gone
    assert drop_outs(seed, round_index, names, 0.0) == []
    assert set(gone) <= set(drop_outs(seed, round_index, names, (1 + dropout) / 2))  # who is gone stays gone


@settings(deadline=None)
@given(st.integers(0, 2**32), names, st.floats(0, 0.9))
def test_a_drop_out_does_not_depend_on_who_else_was_sampled(seed: int, names: list[str], dropout: float) -> None:
    """Nor on how many: but for the one that stays where all would go."""
    gone = set(drop_outs(seed, 3, names, dropout))
    for leaver in names:
        others = [name for name in names if name != leaver]
        fewer = set(drop_outs(seed, 3, others, dropout))
        assert fewer <= gone - {leaver}
        assert len(gone - {leaver} - fewer) <= (len(fewer) == len(others) - 1)


def test_drop_outs_are_fixed_across_versions() -> None:
    """A run that is resumed with another version of Photon must lose the same nodes."""
    assert drop_outs(1337, 6, ["ada", "bob", "cyd", "dan"], 0.5) == ["ada", "cyd", "dan"]


def test_a_draw_without_dropout_is_the_sample_and_k_is_k() -> None:
    recipe = tiny_recipe(NAMES, federation={"oversample": 0.5})
    draw = draw_round(recipe, 3, NAMES, 4)
    assert (draw.asked, draw.dropped, draw.nodes) == (sample_with_spares(5, 3, NAMES, 4, 0.5), {}, 4)


@settings(deadline=None)
@given(st.integers(0, 50), st.integers(1, 8), st.integers(1, 8), st.floats(0, 0.9), st.sampled_from([0.0, 0.5, 2.0]))
def test_k_is_of_those_that_are_left(
    round_index: int, count: int, present: int, dropout: float, oversample: float
) -> None:
    """Spares stand in for drop-outs; whoever is absent still counts against the quorum."""
    recipe = tiny_recipe(NAMES, federation={"oversample": oversample, "dropout": dropout})
    here = NAMES[:present]
    draw = draw_round(recipe, round_index, here, count)
    sampled = sample_with_spares(recipe.seed, round_index, here, count, oversample)
    assert [name for name in sampled if name not in draw.dropped] == draw.asked
    assert list(draw.dropped) == drop_outs(recipe.seed, round_index, sampled, dropout)
    assert set(draw.dropped.values()) <= {DROPPED_OUT}
    assert 1 <= draw.nodes <= count
    absent = max(0, count - present)
    assert draw.nodes == min(count, len(draw.asked) + absent)
