"""Scores are sums over tokens before they are means."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from photon.aggregator.scores import Tally, scores_of
from photon.link.update import EvaluationReport


def report(nats: float, tokens: int, text_bytes: float = 10.0, unigram_nats: float = 0.0) -> EvaluationReport:
    return EvaluationReport(nats=nats, tokens=tokens, text_bytes=text_bytes, unigram_nats=unigram_nats, seconds=1.5)


def tally(reports: dict[str, EvaluationReport]) -> Tally:
    out = Tally()
    for name, item in reports.items():
        out.add(name, item)
    return out


def test_by_hand() -> None:
    """400 tokens of 2 nats and 100 of 7, together 1500 nats over 500 tokens: 3, not the mean of means 4.5."""
    reports = {"large": report(800.0, 400, 1600.0, 1200.0), "small": report(700.0, 100, 400.0, 800.0)}
    pooled = tally(reports).pooled()
    assert pooled.loss == 3.0
    assert pooled.loss != (2.0 + 7.0) / 2
    assert pooled.perplexity == pytest.approx(math.exp(3.0), rel=1e-15)
    assert pooled.bits_per_byte == pytest.approx(1500.0 / math.log(2) / 2000.0, rel=1e-15)
    assert pooled.unigram_excess == pytest.approx(3.0 - 2000.0 / 500.0, rel=1e-15)
    assert pooled.tokens == 500
    assert {name: scores.loss for name, scores in tally(reports).silos().items()} == {"large": 2.0, "small": 7.0}


def test_a_single_silo_is_its_own_pool() -> None:
    only = tally({"ada": report(30.0, 10)})
    assert only.silos()["ada"] == only.pooled()


reports = st.lists(
    st.builds(
        report, st.floats(0, 1e9), st.integers(1, 10**9), st.floats(1e-3, 1e12), st.floats(0, 1e9)
    ),
    min_size=1,
    max_size=6,
)  # fmt: skip


@given(reports, st.randoms())
def test_the_order_of_the_owners_does_not_matter_and_the_pool_lies_among_them(reports: list, rng) -> None:
    named = {f"n{i}": item for i, item in enumerate(reports)}
    pooled, names = tally(named).pooled(), list(named)
    rng.shuffle(names)
    assert tally({name: named[name] for name in names}).pooled() == pooled
    assert list(tally({name: named[name] for name in names}).silos()) == sorted(names)
    losses = [scores_of([item]).loss for item in reports]
    assert min(losses) * (1 - 1e-12) <= pooled.loss <= max(losses) * (1 + 1e-12)


@given(reports)
def test_splitting_a_silo_changes_no_pooled_score(reports: list) -> None:
    """The same windows told by two owners instead of one."""
    parts = [report(r.nats / 2, r.tokens, r.text_bytes / 2, r.unigram_nats / 2) for r in reports for _ in range(2)]
    whole = [report(r.nats, 2 * r.tokens, r.text_bytes, r.unigram_nats) for r in reports]
    ours, theirs = scores_of(parts).model_dump(), scores_of(whole).model_dump()
    assert ours == pytest.approx(theirs, rel=1e-9, abs=1e-12)


def test_a_model_beyond_hope_has_a_finite_perplexity() -> None:
    assert math.isfinite(scores_of([report(1e6, 1)]).perplexity)


def test_an_owner_that_reports_twice_counts_once() -> None:
    twice = tally({"ada": report(30.0, 10)})
    twice.add("ada", report(20.0, 10))
    assert twice.pooled().tokens == 10


def test_seconds_and_emptiness() -> None:
    assert Tally().is_empty
    one = tally({"ada": report(1.0, 1)})
    assert (one.is_empty, one.seconds("ada"), one.seconds("bob")) == (False, 1.5, 0.0)
