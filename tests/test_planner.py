"""The formulas: the paper's table, exact properties, a simulation that shares no code, and wrong versions of them."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from photon import plan_answer, planner
from photon.config import Recipe
from photon.devices import ideal_speed
from photon.plan_answer import Baseline, Question, answer, with_bandwidth, with_tau
from photon.plan_bytes import RoundBytes
from photon.plan_exchange import LinkSpeed, Topology, collective_s, star_bits_per_s, step_exchange_s, transfer_s
from photon.plan_paper import ROWS
from photon.planner import (
    MachineSpeed,
    RoundPrediction,
    compare,
    predict_round,
    tau_for_utilisation,
)

GBIT = 1e9
nodes_counts = st.integers(1, 200)
payloads = st.floats(0, 1e12)
bandwidths = st.floats(1e3, 1e12)
round_trips = st.floats(0, 2)
topologies = st.sampled_from(["ps", "allreduce", "ring"])
slightly_more = 1 + 1e-9  # sums in another order


def recipe_of(nodes: int = 4, rounds: int = 3, tau: int = 10, **federation: Any) -> Recipe:
    return Recipe.model_validate(
        {
            "data": {"sequence_length": 100},
            "node": {"batch_size": 2, "optimizer": "sgd"},
            "federation": {"rounds": rounds, "tau": tau, **federation},
            "evaluation": {"sequences": 6, "every": 2},
            "silo": [{"name": f"n{i}"} for i in range(nodes)],
        }
    )


def link_of(bits_per_s: float, round_trip_s: float = 0.0) -> LinkSpeed:
    return LinkSpeed(bits_per_s, bits_per_s, bits_per_s, round_trip_s)


def question_of(recipe: Recipe, link: LinkSpeed, **changes: Any) -> Question:
    machine = MachineSpeed(1e4, 3e4, 1e9, 2e9, 5e8, 4e8, 7e8, control_s=0.5)
    return Question(recipe, 10**6, RoundBytes(4 * 10**6, 2 * 10**6, 4 * 10**6), machine, link, **changes)


def paper_question(name: str, nodes: int, rounds: int) -> Question:
    row, tokens = ROWS[name], 200
    size = 2 * row.parameters
    return Question(
        recipe_of(nodes, rounds, tau=500),
        row.parameters,
        RoundBytes(size, size, size),
        ideal_speed(row.steps_per_s * tokens),
        replace(link_of(10 * GBIT), handshakes=0, control_round_trips=0),
        topology="ring",
        baseline=Baseline(1.0, row.baseline_steps, row.baseline_steps_per_s),
    )


PAPER = {  # hours as the paper's inputs give them: compute, exchange, total; the same for the central run
    "paper-1.3b": (8, 19, "17.95", ".019", "17.97", "6.53", "20.22", "26.76", "0.67", "2.75", 17.7),
    "paper-3b": (4, 26, "25.08", ".046", "25.12", "16.10", "40.48", "56.59", "0.44", "1.56", 45.1),
    "paper-7b": (4, 22, "95.49", ".098", "95.58", "50.71", "97.25", "147.97", "0.646", "1.88", 21.7),
}


def check_paper(name: str) -> None:
    nodes, rounds, *expected, gbit_per_s = PAPER[name]
    plan = answer(paper_question(name, nodes, rounds))
    base = plan.baseline
    numbers = [
        *(seconds / 3600 for seconds in (plan.train_s, plan.exchange_s, plan.total_s)),
        *(seconds / 3600 for seconds in (base.compute_s, base.exchange_s, base.total_s)),
        plan.total_s / base.total_s,
        base.compute_ratio,
    ]
    for number, text in zip(numbers, expected, strict=True):
        digits = len(text.partition(".")[2])
        assert abs(number - float(text)) <= 0.51 * 10**-digits, (number, text)
    assert plan.break_even.bits_per_s is not None
    assert plan.break_even.bits_per_s / GBIT == pytest.approx(gbit_per_s, abs=0.051)


@pytest.mark.parametrize("name", PAPER)
def test_the_papers_table_and_break_even_bandwidths(name: str) -> None:
    check_paper(name)


def test_every_source_of_an_owner_is_scored() -> None:
    """The owner with most sources is waited for: it was planned with one."""
    recipe = recipe_of(2)
    many = recipe.silo[0].model_copy(update={"text": ["a", "b", "c"]})
    one, three = (
        answer(question_of(changed, link_of(GBIT))).phases_s["evaluate"]
        for changed in (recipe, recipe.model_copy(update={"silo": [many, recipe.silo[1]]}))
    )
    assert three == pytest.approx(3 * one)


def test_the_exchange_formulas() -> None:
    """By hand: S = 1000 bytes over 8000 bit/s takes a second."""
    assert transfer_s(1000, 8000, 0, 3) == 1
    assert collective_s("allreduce", 1000, 5, 8000, 0) == 4
    assert collective_s("ring", 1000, 5, 8000, 0) == pytest.approx(2 * 4 / 5)
    assert 1000 * 8 / star_bits_per_s(8000, 8000, 5) == pytest.approx(5)  # K S / B where the links are alike
    assert 1000 * 8 / star_bits_per_s(8000, 80_000, 5) == pytest.approx(1)  # S / B_node where the server has room
    assert step_exchange_s("ps", 1000, 5, link_of(8000)) == pytest.approx(10)  # 2 K S / B


def test_slow_start_by_hand() -> None:
    """1 MB at 80 Mbit/s, 100 ms: windows of 14.6, 29.2 ... kB a round trip, until one fills the link (1 MB a trip)."""
    windows = [14_600 * 2**i for i in range(7)]
    left, waited = 10_000_000 - sum(windows), 0.1 * len(windows)
    assert transfer_s(10_000_000, 80e6, 0.1, 2) == pytest.approx(0.2 + waited + left / 1e7)
    assert transfer_s(1000, 80e6, 0.1, 2) == pytest.approx(0.2 + 1000 / 1e7)  # one window holds it


@given(payloads, nodes_counts, bandwidths, round_trips)
def test_alone_a_collective_takes_nothing_and_two_make_a_ring_an_all_reduce(
    payload: float, nodes: int, bits_per_s: float, round_trip_s: float
) -> None:
    assert collective_s("ring", payload, 1, bits_per_s, round_trip_s) == 0
    assert collective_s("allreduce", payload, 1, bits_per_s, round_trip_s) == 0
    ring, whole = (collective_s(t, payload, 2, bits_per_s, 0) for t in ("ring", "allreduce"))  # type: ignore[arg-type]
    assert ring == pytest.approx(whole)
    if nodes > 2:
        ring, whole = (collective_s(t, payload, nodes, bits_per_s, 0) for t in ("ring", "allreduce"))  # type: ignore[arg-type]
        assert ring <= whole


@given(payloads, bandwidths, st.floats(1, 1e3), round_trips, st.floats(0, 1))
def test_a_better_link_never_takes_longer(
    payload: float, bits_per_s: float, factor: float, round_trip_s: float, shorter: float
) -> None:
    before = transfer_s(payload, bits_per_s, round_trip_s, 3)
    assert transfer_s(payload, bits_per_s * factor, round_trip_s, 3) <= before * slightly_more
    assert transfer_s(payload, bits_per_s, round_trip_s * shorter, 3) <= before * slightly_more
    assert before >= payload * 8 / bits_per_s


@settings(deadline=None)  # the first example waits for torch
@given(topologies, st.integers(1, 12), bandwidths, round_trips, st.floats(1.001, 100), st.integers(2, 500))
def test_what_can_only_get_better(
    topology: Topology, nodes: int, bits_per_s: float, round_trip_s: float, factor: float, tau: int
) -> None:
    question = question_of(recipe_of(nodes), link_of(bits_per_s, round_trip_s), topology=topology)
    plan, faster = answer(question), answer(with_bandwidth(question, bits_per_s * factor))
    assert faster.round_s <= plan.round_s * slightly_more
    assert faster.utilisation >= plan.utilisation / slightly_more
    assert faster.baseline.total_s <= plan.baseline.total_s * slightly_more
    assert plan.baseline.overlapped_total_s <= plan.baseline.total_s
    longer = answer(with_tau(question, 10 * tau))
    assert longer.bytes.day_bytes <= plan.bytes.day_bytes * slightly_more
    assert longer.bytes.round_up_bytes == plan.bytes.round_up_bytes
    assert longer.utilisation >= plan.utilisation / slightly_more
    assert longer.baseline.total_s == pytest.approx(plan.baseline.total_s)


@given(st.floats(0, 0.999), st.floats(1e-3, 1e3), st.floats(0, 1e4))
def test_tau_for_a_utilisation_is_the_least_that_reaches_it(wanted: float, step_s: float, rest_s: float) -> None:
    tau = tau_for_utilisation(wanted, step_s, rest_s)

    def share(steps: int) -> float:
        return steps * step_s / (steps * step_s + rest_s)

    assert share(tau) >= wanted - 1e-9
    assert tau == 1 or share(tau - 1) < wanted + 1e-9


def test_impossible_utilisations_are_refused() -> None:
    for wanted in (1.0, -0.1, math.nan):
        with pytest.raises(ValueError, match="utilisation"):
            tau_for_utilisation(wanted, 1, 1)


def test_the_planned_tau_reaches_the_wanted_utilisation() -> None:
    question = question_of(recipe_of(), link_of(1e8, 0.05), wanted_utilisation=0.95)
    plan = answer(question)
    assert answer(with_tau(question, plan.tau_for_utilisation)).utilisation >= 0.95
    assert answer(with_tau(question, plan.tau_for_utilisation - 1)).utilisation < 0.95


@pytest.mark.parametrize("taus", [[40, None], [3, 3], [None, 200], [1, None]], ids=str)
def test_an_owners_own_tau_keeps_its_ratio_when_another_tau_is_planned(taus: list[int | None]) -> None:
    recipe = recipe_of(nodes=2, rounds=1000)
    silos = [silo.model_copy(update={"tau": tau}) for silo, tau in zip(recipe.silo, taus, strict=True)]
    recipe = recipe.model_copy(update={"silo": silos})
    question = question_of(recipe, link_of(1e8, 0.05), wanted_utilisation=0.9)
    plan = answer(question)
    same, thrice = answer(with_tau(question, 10)), answer(with_tau(question, 30))
    assert (same.tokens, same.train_s, same.baseline) == (plan.tokens, plan.train_s, plan.baseline)
    assert [silo.tau for silo in with_tau(question, 30).recipe.silo] == [tau and 3 * tau for tau in taus]
    assert thrice.phases_s["train"] == pytest.approx(3 * plan.phases_s["train"])
    assert [silo.tau for silo in with_tau(question, 1).recipe.silo] == [tau and max(1, round(tau / 10)) for tau in taus]
    # The planned tau reaches the wanted share of training; a mutant that forgets the owners' own takes another.
    assert answer(with_tau(question, plan.tau_for_utilisation)).utilisation == pytest.approx(0.9, abs=2e-3)
    forgetful = replace(question, recipe=recipe_of(nodes=2, rounds=1000))
    if max(tau or 10 for tau in taus) > 10:
        assert answer(forgetful).tau_for_utilisation > 2 * plan.tau_for_utilisation


@pytest.mark.parametrize("parts", [[], ["tau_ramp(first=4)"]], ids=str)
@given(tau=st.integers(5, 400), again=st.integers(5, 400))
@settings(deadline=None, max_examples=20)
def test_the_run_keeps_its_tokens_whatever_tau(parts: list[str], tau: int, again: int) -> None:
    """Rounds that are not all full train no more than the run does: the last one is shorter."""
    question = question_of(recipe_of(rounds=40, parts=parts), link_of(1e8, 0.05))
    plan, other = answer(question), with_tau(question, tau)
    for found in (answer(other), answer(with_tau(other, again))):
        assert found.tokens == plan.tokens == 40 * 10 * 4 * 2 * 100
        assert found.train_s == pytest.approx(plan.train_s)
        assert found.baseline.compute_ratio == pytest.approx(plan.baseline.compute_ratio)
        rest_s = found.round_s - found.phases_s["train"]
        assert found.total_s == pytest.approx(plan.train_s + found.rounds * rest_s)
    if not parts:
        assert answer(other).rounds == math.ceil(400 / tau)
        assert answer(other).phases_s["train"] == pytest.approx(tau * 2 * 100 / 1e4)  # of a full round


def test_virtual_nodes_queue() -> None:
    recipe, link = recipe_of(nodes=5), link_of(GBIT)
    node_bytes = RoundBytes(10, 10, 10)
    alone = MachineSpeed(1e4, 3e4, 1e9, 1e9, 1e9, 1e9, 1e9, 0.0)
    free, queued = (predict_round(recipe, 1000, node_bytes, m, link) for m in (alone, replace(alone, at_once=2)))
    assert queued.phases_s["train"] == pytest.approx(3 * free.phases_s["train"])
    assert queued.phases_s["merge"] == free.phases_s["merge"]


def test_money_is_devices_by_hours_and_bytes_sent() -> None:
    prices = plan_answer.Prices(device_hour=2.0, traffic_gb=0.1)
    plan = answer(question_of(recipe_of(), link_of(1e8), prices=prices, devices_per_node=8))
    assert plan.money is not None
    assert plan.money.devices == pytest.approx(4 * 8 * 2.0 * plan.total_s / 3600)
    assert plan.money.traffic == pytest.approx(0.1 * (plan.bytes.run_down_bytes + plan.bytes.run_up_bytes) / 1e9)
    assert plan.money.baseline_traffic == pytest.approx(0.1 * 30 * 2 * 4 * 2e6 / 1e9)
    assert answer(question_of(recipe_of(), link_of(1e8))).money is None


def test_predicted_beside_measured() -> None:
    phases = dict.fromkeys(planner.PHASES, 1.0)
    rows = compare(RoundPrediction(phases, RoundBytes(1, 1, 1)), {"assembly": 0.5, "nodes": 16.0, "outer": 2.0})
    assert [(row.phase, row.predicted_s, row.measured_s) for row in rows] == [
        ("assembly", None, 0.5),
        ("nodes", 8.0, 16.0),
        ("outer", 1.0, 2.0),
        ("merge", 1.0, None),
        ("commit", 1.0, None),
    ]
    assert [row.ratio for row in rows] == [None, 2.0, 2.0, None, None]
    finer = compare(RoundPrediction(phases, RoundBytes(1, 1, 1)), {"train": 3.0, "nodes": 8.0})
    assert [(row.phase, row.predicted_s) for row in finer[:2]] == [("train", 1.0), ("nodes", 7.0)]


# A round simulated, without a formula: transfers share a link as a fluid does, everything else waits its turn.


@dataclass
class Flow:
    left_bits: float
    node: int


def simulate_transfers(
    sizes: Mapping[int, float], node_bits_per_s: float, shared_bits_per_s: float
) -> dict[int, float]:
    """When each transfer that begins now ends; capacity is dealt out anew whenever one has ended."""
    flows, now, ended = [Flow(8 * size, node) for node, size in sizes.items()], 0.0, {}
    while flows:
        rate = min(node_bits_per_s, shared_bits_per_s / len(flows))
        wait = min(flow.left_bits for flow in flows) / rate
        now += wait
        for flow in flows:
            flow.left_bits -= wait * rate
        done = [flow for flow in flows if flow.left_bits <= 1e-6]
        ended |= {flow.node: now for flow in done}
        flows = [flow for flow in flows if flow not in done]
    return ended


def simulate_round(
    nodes: int, node_bytes: RoundBytes, model_bytes: int, state_bytes: int, machine: MachineSpeed, link: LinkSpeed
) -> float:
    everyone = dict.fromkeys(range(nodes), float(node_bytes.down_bytes))
    received = simulate_transfers(everyone, link.node_down_bits_per_s, link.aggregator_bits_per_s)
    ready: list[float] = []
    for began in received.values():
        when = began + (model_bytes + state_bytes) / machine.decode_bytes_per_s
        when += 3 * 100 / machine.evaluation_tokens_per_s  # six sequences every other round
        for _ in range(10):
            when += 2 * 100 / machine.tokens_per_s
        when += model_bytes / machine.encode_bytes_per_s
        ready.append(when + node_bytes.up_bytes / machine.disk_bytes_per_s)
    assert max(ready) - min(ready) < 1e-6
    uploads = dict.fromkeys(range(nodes), float(node_bytes.up_bytes))
    arrivals = simulate_transfers(uploads, link.node_up_bits_per_s, link.aggregator_bits_per_s)
    saved = state_bytes / machine.disk_bytes_per_s  # beside the way up; a node replies when both are done
    queue = [max(ready) + max(wait, saved) for wait in arrivals.values()]
    heapq.heapify(queue)
    free = 0.0
    while queue:
        free = max(free, heapq.heappop(queue)) + model_bytes / machine.merge_bytes_per_s
    return free + model_bytes / machine.outer_bytes_per_s + model_bytes / machine.disk_bytes_per_s + machine.control_s


def check_against_simulation(nodes: int, up: float, down: float, shared: float, momentum: float = 0.9) -> None:
    machine = MachineSpeed(1e4, 3e4, 1e9, 2e9, 5e8, 4e8, 7e8, control_s=0.5)
    link, node_bytes = LinkSpeed(up, down, shared), RoundBytes(4 * 10**6, 10**6, 4 * 10**6)
    recipe = recipe_of(nodes)
    recipe = recipe.model_copy(update={"node": recipe.node.model_copy(update={"momentum": momentum})})
    state_bytes = 4 * 10**6 if momentum else 0
    predicted = planner.predict_round(recipe, 10**6, node_bytes, machine, link).round_s
    simulated = simulate_round(nodes, node_bytes, 4 * 10**6, state_bytes, machine, link)
    assert predicted == pytest.approx(simulated, rel=1e-6)


@settings(deadline=None)
@given(
    st.integers(1, 30),
    st.floats(1e6, 1e10),
    st.floats(1e6, 1e9),
    st.floats(1e6, 1e11),
    st.sampled_from([0.0, 0.9]),
)
def test_a_simulated_round_takes_as_long(nodes: int, up: float, down: float, shared: float, momentum: float) -> None:
    check_against_simulation(nodes, up, down, shared, momentum)


# Rounds that overlap


def simulate_overlap(nodes: int, machine: MachineSpeed, link: LinkSpeed, node_bytes: RoundBytes, rounds: int) -> float:
    """Seconds of a late round, by events: nodes, the way up, the Aggregator and the way down each do one thing at a
    time; a node hears of a base when the round before it has begun, which is when that before is merged."""
    model_bytes, state_bytes = 4e6, 8e6
    train_s = 10 * 2 * 100 / machine.tokens_per_s + 3 * 100 / machine.evaluation_tokens_per_s
    train_s += (model_bytes + state_bytes) / machine.decode_bytes_per_s + model_bytes / machine.encode_bytes_per_s
    train_s += (state_bytes + node_bytes.up_bytes) / machine.disk_bytes_per_s
    down_s = max(simulate_transfers(
        dict.fromkeys(range(nodes), float(node_bytes.down_bytes)), link.node_down_bits_per_s, link.aggregator_bits_per_s
    ).values())  # fmt: skip
    up_s = max(simulate_transfers(
        dict.fromkeys(range(nodes), float(node_bytes.up_bytes)), link.node_up_bits_per_s, link.aggregator_bits_per_s
    ).values())  # fmt: skip
    up_s = max(0.0, up_s - state_bytes / machine.disk_bytes_per_s)
    outer_s = model_bytes / machine.outer_bytes_per_s + model_bytes / machine.disk_bytes_per_s
    merge_s = nodes * model_bytes / machine.merge_bytes_per_s
    commit_s = 2 * model_bytes / machine.disk_bytes_per_s  # momentum, and what is held back
    given, base_here = {0: 0.0, 1: None}, {0: down_s, 1: down_s + outer_s}
    trained = base_here[0] + train_s
    merged: list[float] = []
    for number in range(rounds):
        asked = given[number] or 0.0
        sent = max(trained, asked + machine.control_s) + up_s  # nothing leaves before it is asked for
        merged.append(sent + merge_s + outer_s + commit_s)
        given[number + 1] = merged[-1]
        base_here[number + 2] = merged[-1] + outer_s + machine.control_s + down_s
        begins = max(trained, base_here[number + 1])
        trained = begins + train_s
    return (merged[-1] - merged[-21]) / 20


def overlapping(nodes: int, up: float, down: float, shared: float, tokens_per_s: float) -> tuple[float, float]:
    """(predicted, simulated) seconds of a round."""
    machine = MachineSpeed(tokens_per_s, 3e4, 1e9, 2e9, 5e8, 4e8, 7e8, control_s=0.5)
    link, node_bytes = LinkSpeed(up, down, shared), RoundBytes(4 * 10**6, 4 * 10**6, 4 * 10**6)
    recipe = recipe_of(nodes, parts=["eager"], outer="nesterov")
    plan = planner.predict_round(recipe, 10**6, node_bytes, machine, link)
    assert plan.overlaps
    return plan.round_s, simulate_overlap(nodes, machine, link, node_bytes, 60)


@settings(deadline=None)
@given(
    st.integers(1, 8),
    st.floats(1e5, 1e10),
    st.floats(1e5, 1e10),
    st.floats(1e6, 1e11),
    st.floats(10, 1e5),
)
def test_simulated_rounds_that_overlap_take_as_long(
    nodes: int, up: float, down: float, shared: float, tokens_per_s: float
) -> None:
    predicted, simulated = overlapping(nodes, up, down, shared, tokens_per_s)
    assert simulated == pytest.approx(predicted, rel=1e-6)


def test_where_nothing_is_known_early_nothing_overlaps() -> None:
    for federation in (
        {"parts": []},
        {"parts": ["eager"], "balance": "time"},
        {"parts": ["eager", "tau_by_agreement"]},
    ):
        plan = answer(question_of(recipe_of(4, outer="nesterov", **federation), link_of(GBIT)))
        assert plan.hidden_s == 0
    at_once = question_of(recipe_of(4, outer="nesterov", parts=["eager"]), link_of(GBIT))
    here = replace(at_once, machine=replace(at_once.machine, at_once=2))
    assert (answer(at_once).hidden_s > 0, answer(here).hidden_s) == (True, 0)


@settings(deadline=None)
@given(st.floats(0.05, 0.99), st.floats(1e5, 1e10), st.floats(10, 1e6))
def test_tau_for_a_utilisation_of_rounds_that_overlap(wanted: float, bits_per_s: float, tokens_per_s: float) -> None:
    machine = MachineSpeed(tokens_per_s, 3e4, 1e9, 2e9, 5e8, 4e8, 7e8, control_s=0.5)
    node_bytes, link = RoundBytes(4 * 10**6, 4 * 10**6, 4 * 10**6), link_of(bits_per_s)

    def utilisation(tau: int) -> float:
        recipe = recipe_of(4, tau=tau, parts=["eager"], outer="nesterov")
        return planner.predict_round(recipe, 10**6, node_bytes, machine, link).utilisation

    plan = planner.predict_round(recipe_of(4, parts=["eager"], outer="nesterov"), 10**6, node_bytes, machine, link)
    found = max(1, plan.tau_for(wanted, plan.phases_s["train"] / 10))
    assert utilisation(found) >= wanted - 1e-9
    assert found == 1 or utilisation(found - 1) < wanted + 1e-9


# Wrong versions


def test_who_forgets_that_a_base_is_two_merges_old_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The longer of the node's part and the network's is what one expects; half-hidden rounds take longer."""
    (right, simulated), line = overlapping(2, 1e7, 1e7, 1e11, 600), (2, 1e7, 1e7, 1e11, 600)
    assert simulated == pytest.approx(right, rel=1e-6)
    bounds = RoundPrediction._bounds_s.fget
    assert bounds is not None
    monkeypatch.setattr(RoundPrediction, "_bounds_s", property(lambda plan: bounds(plan)[:2]))
    assert overlapping(*line)[0] < 0.95 * simulated


def congested_by_root(node_bits_per_s: float, aggregator_bits_per_s: float, nodes: int) -> float:
    """The notebook's slip: beyond some number of nodes the divisor is the root of the bandwidth."""
    return 8 * math.sqrt(aggregator_bits_per_s / 8) if nodes > 3 else min(node_bits_per_s, aggregator_bits_per_s)


def without_nodes(node_bits_per_s: float, aggregator_bits_per_s: float, nodes: int) -> float:
    return min(node_bits_per_s, aggregator_bits_per_s)


def exchange_in_every_step(*arguments: Any) -> RoundPrediction:
    right = predict_round(*arguments)
    tau = arguments[0].federation.tau
    scaled = {phase: s * tau if phase in ("upload", "download") else s for phase, s in right.phases_s.items()}
    return replace(right, phases_s=scaled)


def sent_after_saving(*arguments: Any) -> RoundPrediction:
    right = predict_round(*arguments)
    hidden = 4 * 10**6 / arguments[3].disk_bytes_per_s  # of a million parameters with momentum
    return replace(right, phases_s={**right.phases_s, "upload": right.phases_s["upload"] + hidden})


def ring_without_halves(topology: str, payload: float, nodes: int, bits_per_s: float, round_trip_s: float) -> float:
    return payload * (nodes - 1) * 8 / (nodes * bits_per_s)


MUTANTS: dict[str, tuple[Any, str, Callable[..., object], Callable[[], None]]] = {
    "root of the bandwidth": (
        planner, "star_bits_per_s", congested_by_root, lambda: check_against_simulation(8, 1e8, 1e8, 1e9),
    ),
    "parameter server without K": (
        planner, "star_bits_per_s", without_nodes, lambda: check_against_simulation(8, 1e8, 1e8, 1e8),
    ),
    "tau exchanges a round": (
        plan_answer, "predict_round", exchange_in_every_step, lambda: check_paper("paper-7b"),
    ),
    "an update that is sent after saving": (
        planner, "predict_round", sent_after_saving, lambda: check_against_simulation(8, 1e8, 1e8, 1e9),
    ),
    "a ring that only reduces": (planner, "collective_s", ring_without_halves, lambda: check_paper("paper-7b")),
}  # fmt: skip


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_are_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, function, wrong, check = MUTANTS[name]
    check()
    monkeypatch.setattr(module, function, wrong)
    with pytest.raises(AssertionError):
        check()
