"""Where a federation pays: at every bandwidth what is said is what the plans for it say."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.test_planner import GBIT, link_of, paper_question, question_of, recipe_of

from photon.devices import ideal_speed
from photon.plan_answer import Baseline, answer, with_bandwidth
from photon.planner import break_even


def test_break_even_is_where_both_take_equally_long() -> None:
    question = paper_question("paper-7b", 4, 22)
    even = answer(question).break_even.bits_per_s
    assert even is not None
    plan = answer(with_bandwidth(question, even))
    assert plan.total_s == pytest.approx(plan.baseline.total_s)
    hidden = answer(question).break_even_overlapped.bits_per_s
    assert hidden is not None
    assert hidden < even
    plan = answer(with_bandwidth(question, hidden))
    assert plan.total_s == pytest.approx(plan.baseline.overlapped_total_s)


def test_break_even_at_the_ends() -> None:
    link = link_of(GBIT)
    assert break_even(lambda at: 1.0, lambda at: 2.0, link) == (math.inf, 0.0)
    assert break_even(lambda at: 2.0, lambda at: 1.0, link) == (0.0, math.inf)
    assert break_even(lambda at: 1.0, lambda at: 1e9 / at.node_up_bits_per_s, link) == pytest.approx((1.0, math.inf))
    assert break_even(lambda at: 1e9 / at.node_up_bits_per_s, lambda at: 1.0, link) == pytest.approx((0.0, 1.0))


# What a federation exchanges over what per-step training does: by steps of two bytes a parameter, by rounds of six.
@pytest.mark.parametrize(("tau", "ratio"), [(1, 0.5), (2, 0.9), (4, 0.9), (4, 0.99), (10, 0.5), (10, 0.99), (10, 2.0)])
@pytest.mark.parametrize("hidden", [False, True])
@given(bandwidth=st.floats(1e3, 1e12))
@settings(max_examples=30, deadline=None)
def test_a_federation_pays_where_its_plan_is_the_shorter_one(
    tau: int, ratio: float, hidden: bool, bandwidth: float
) -> None:
    link = replace(link_of(GBIT), handshakes=0, control_round_trips=0)
    question = replace(question_of(recipe_of(tau=tau), link, baseline=Baseline(ratio)), machine=ideal_speed(1e4))
    plan = answer(with_bandwidth(question, bandwidth))
    even = plan.break_even_overlapped if hidden else plan.break_even
    other_s = plan.baseline.overlapped_total_s if hidden else plan.baseline.total_s
    pays = even.always or bandwidth < (even.bits_per_s or 0) or bandwidth > (even.from_bits_per_s or math.inf)
    assert pays == (plan.total_s < other_s) or plan.total_s == pytest.approx(other_s, rel=1e-6)


def test_a_federation_that_trains_less_and_sends_more_pays_from_a_bandwidth_on() -> None:
    """A parameter and step it sends 6 bytes, per-step training 4.4; it trains nine tenths as long."""
    link = replace(link_of(GBIT), handshakes=0, control_round_trips=0)
    question = replace(question_of(recipe_of(tau=1), link, baseline=Baseline(0.9)), machine=ideal_speed(1e4))
    even = answer(question).break_even
    assert (even.bits_per_s, even.always) == (None, False)
    assert even.from_bits_per_s is not None
    plan = answer(with_bandwidth(question, even.from_bits_per_s))
    assert plan.total_s == pytest.approx(plan.baseline.total_s)


def test_between_two_bandwidths_hidden_exchange_is_the_faster_one() -> None:
    link = replace(link_of(GBIT), handshakes=0, control_round_trips=0)
    question = replace(question_of(recipe_of(tau=4), link, baseline=Baseline(0.9)), machine=ideal_speed(1e4))
    even = answer(question).break_even_overlapped
    assert even.bits_per_s is not None
    assert even.from_bits_per_s is not None
    assert even.bits_per_s < even.from_bits_per_s
