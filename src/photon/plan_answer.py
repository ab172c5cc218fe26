"""From a question (recipe, machine, link, prices) to the whole plan, as plain numbers with units in their names."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from photon.config import Recipe
from photon.estimate import expected_nodes, memory_estimate, tokens_per_round
from photon.plan_bytes import ENVELOPE_BYTES, RoundBytes, run_down_bytes, run_tasks, run_up_bytes
from photon.plan_course import Course, course_of
from photon.plan_exchange import LinkSpeed, Topology, step_exchange_s
from photon.planner import (
    BreakEven,
    MachineSpeed,
    RoundPrediction,
    baseline_s,
    break_even,
    predict_round,
)

_DAY_S = 86_400.0
_HOUR_S = 3600.0
_GB = 1e9


@dataclass(frozen=True)
class Baseline:
    """Per-step data-parallel training to compare with. What is None follows from the federation.

    `compute_ratio` is the federation's training time over the baseline's at the same loss: federated training needs
    more tokens. The paper's own numbers give 2.75 (1.3B), 1.56 (3B) and 1.88 (7B). At 1 both take the same steps.
    """

    compute_ratio: float = 1.0
    steps: float | None = None
    steps_per_s: float | None = None
    gradient_bytes_per_parameter: float = 2.0  # bfloat16, as is common


@dataclass(frozen=True)
class Prices:
    """Money, in any currency; None: not asked for."""

    device_hour: float | None = None
    traffic_gb: float | None = None


@dataclass(frozen=True)
class Question:
    """All that a plan follows from."""

    recipe: Recipe
    parameters: int
    node_bytes: RoundBytes
    machine: MachineSpeed
    link: LinkSpeed
    topology: Topology = "ps"
    baseline: Baseline = Baseline()
    prices: Prices = Prices()
    wanted_utilisation: float = 0.9
    devices_per_node: int = 1
    device_memory_bytes: int | None = None
    stage_bytes: Mapping[str, Mapping[str, int]] = field(default_factory=dict)  # "up", "down": by stage
    assumptions: tuple[str, ...] = ()
    steps: int | None = None  # of the run, where its last round is shorter; None: all rounds are full

    @property
    def sequential_steps(self) -> int:
        """Steps after which the run is over."""
        return self.steps or self.recipe.federation.sequential_steps

    @property
    def trained_rounds(self) -> float:
        """How many full rounds of training the run has."""
        return self.course.rounds * self.sequential_steps / self.recipe.federation.sequential_steps

    @cached_property
    def course(self) -> Course:
        """The rounds of the run and their local steps."""
        return course_of(self.recipe)


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes. The first five are on a node's devices; `fits` says whether they do, None where that is not known."""

    weights_bytes: int
    gradients_bytes: int
    optimizer_bytes: int
    activations_bytes: int
    method_bytes: int
    node_device_bytes: int
    node_main_memory_bytes: int
    node_disk_bytes: int
    aggregator_bytes: int
    device_memory_bytes: int | None
    fits: bool | None


@dataclass(frozen=True)
class BytesPlan:
    """Bodies of messages; `is_exact` false: at most so many. All nodes together, unless it says `node_`.

    Of a round they are the mean over the run, `largest` those of the round with most, each way.
    """

    is_exact: bool
    node_down_is_exact: bool
    node_up_is_exact: bool
    node_down_bytes: float
    node_up_bytes: float
    node_largest_down_bytes: float
    node_largest_up_bytes: float
    round_down_bytes: float
    round_up_bytes: float
    run_down_bytes: float
    run_up_bytes: float
    run_envelope_at_most_bytes: int
    day_bytes: float
    per_token_bytes: float
    stage_bytes: Mapping[str, Mapping[str, int]]


@dataclass(frozen=True)
class BaselinePlan:
    """Per-step data-parallel training on the same links, exchanging in every step."""

    steps: float
    compute_s: float
    exchange_s: float
    total_s: float
    overlapped_total_s: float
    sent_bytes: float
    compute_ratio: float


@dataclass(frozen=True)
class MoneyPlan:
    """What the given prices come to, per-step training without overlap beside it."""

    devices: float
    traffic: float
    total: float
    baseline_devices: float
    baseline_traffic: float
    baseline_total: float


@dataclass(frozen=True)
class Plan:
    """The answer."""

    recipe: str
    parameters: int
    nodes: int
    rounds: int
    tau: int
    mean_tau: float
    least_tau: int
    most_tau: int
    topology: Topology
    tokens: float
    memory: MemoryPlan
    bytes: BytesPlan
    phases_s: dict[str, float]
    round_s: float
    hidden_s: float
    utilisation: float
    total_s: float
    train_s: float
    exchange_s: float
    baseline: BaselinePlan
    break_even: BreakEven
    break_even_overlapped: BreakEven
    wanted_utilisation: float
    tau_for_utilisation: int
    money: MoneyPlan | None
    assumptions: tuple[str, ...]


def answer(question: Question) -> Plan:
    """Work the whole plan out."""
    recipe, federation = question.recipe, question.recipe.federation
    course = question.course
    question = replace(question, node_bytes=question.node_bytes.over(course.rounds))
    prediction = _prediction(question, question.link)
    run_s = prediction.run_s(course.rounds, question.trained_rounds)
    train_s = prediction.phases_s["train"]
    # Where tau varies, in other rounds, but as many steps.
    tokens = round(tokens_per_round(recipe) * question.sequential_steps / federation.tau)
    traffic = _bytes(question, prediction.round_s, tokens)
    baseline = _baseline(question, train_s)
    return Plan(
        recipe=recipe.name,
        parameters=question.parameters,
        nodes=recipe.nodes_per_round,
        rounds=course.rounds,
        tau=federation.tau,
        mean_tau=course.mean_tau,
        least_tau=min(course.taus),
        most_tau=max(course.taus),
        topology=question.topology,
        tokens=tokens,
        memory=_memory(question),
        bytes=traffic,
        phases_s=prediction.phases_s,
        round_s=prediction.round_s,
        hidden_s=prediction.hidden_s,
        utilisation=prediction.utilisation,
        total_s=run_s,
        train_s=question.trained_rounds * train_s,
        exchange_s=course.rounds * (prediction.phases_s["download"] + prediction.phases_s["upload"]),
        baseline=baseline,
        break_even=_break_even(question, baseline, overlapped=False),
        break_even_overlapped=_break_even(question, baseline, overlapped=True),
        wanted_utilisation=question.wanted_utilisation,
        # A step of the federation's tau: if an owner has a tau of its own, that grows in ratio (see `with_tau`).
        tau_for_utilisation=prediction.tau_for(question.wanted_utilisation, train_s / course.mean_tau),
        money=_money(question, run_s, traffic, baseline),
        assumptions=(*question.assumptions, *_told_of_course(course)),
    )


def with_tau(question: Question, tau: int) -> Question:
    """The same steps, and tokens, in rounds of another length; the last round is shorter where they do not divide.

    An owner with a tau of its own keeps its ratio to the federation's. Per-step training, which knows no tau, stays as
    it was. Raises ConfigError if a part does not suit that tau.
    """
    baseline = _baseline(question, _prediction(question, question.link).phases_s["train"])
    same = replace(question.baseline, steps=baseline.steps, steps_per_s=baseline.steps / baseline.compute_s)
    federation = question.recipe.federation
    steps = question.sequential_steps
    rounds = math.ceil(steps / tau)
    changed = federation.model_copy(update={"tau": tau, "rounds": rounds})
    silos = [
        silo.model_copy(update={"tau": silo.tau and max(1, round(silo.tau * tau / federation.tau))})
        for silo in question.recipe.silo
    ]
    recipe = question.recipe.model_copy(update={"federation": changed, "silo": silos})
    if changed.parts:
        from photon.parts.method import Method  # here, because it brings torch

        Method.of(recipe)
    return replace(question, recipe=recipe, baseline=same, steps=steps)


def with_bandwidth(question: Question, up_bits_per_s: float) -> Question:
    """All links scaled so that a node's upward one has this bandwidth."""
    return replace(question, link=question.link.scaled(up_bits_per_s / question.link.node_up_bits_per_s))


def _prediction(question: Question, link: LinkSpeed) -> RoundPrediction:
    return predict_round(
        question.recipe,
        question.parameters,
        question.node_bytes,
        question.machine,
        link,
        question.topology,
        question.course.mean_tau,
    )


def _told_of_course(course: Course) -> tuple[str, ...]:
    if not course.follows_nodes:
        return ()
    fewest, most = sorted(course.rounds_at_ends)
    return (
        f"tau follows how far the nodes agree, which nobody knows before the run: planned are {course.rounds} rounds, "
        f"as if they neither agreed nor differed; it may be {fewest} to {most}",
    )


def _memory(question: Question) -> MemoryPlan:
    estimate = memory_estimate(question.recipe, question.parameters, question.node_bytes.shared)
    available = question.device_memory_bytes
    return MemoryPlan(
        weights_bytes=estimate.weights_bytes,
        gradients_bytes=estimate.gradients_bytes,
        optimizer_bytes=estimate.optimizer_bytes,
        activations_bytes=estimate.activations_bytes,
        method_bytes=estimate.method_bytes,
        node_device_bytes=estimate.node_bytes,
        node_main_memory_bytes=estimate.update_bytes + estimate.codec_bytes,
        node_disk_bytes=estimate.disk_bytes,
        aggregator_bytes=estimate.aggregator_bytes,
        device_memory_bytes=available,
        fits=None if available is None else estimate.node_bytes <= available * question.devices_per_node,
    )


def _bytes(question: Question, round_s: float, tokens: float) -> BytesPlan:
    """Of all nodes."""
    recipe, node, rounds = question.recipe, question.node_bytes, question.course.rounds
    nodes, largest = expected_nodes(recipe), node.largest
    if question.topology == "ps":
        round_down, round_up = nodes * node.down_bytes, nodes * node.up_bytes
        run_down, run_up = run_down_bytes(recipe, node, rounds), run_up_bytes(recipe, node, rounds)
        envelopes = 2 * run_tasks(recipe, rounds) * ENVELOPE_BYTES
    else:  # what a node sends is what another receives: counted once, as up
        shares = nodes - 1 if question.topology == "allreduce" else 2 * (nodes - 1) / nodes
        round_down, round_up = 0.0, nodes * shares * node.up_bytes
        run_down, run_up, envelopes = 0.0, rounds * round_up, 0
    return BytesPlan(
        is_exact=node.is_exact,
        node_down_is_exact=node.down_is_exact,
        node_up_is_exact=node.up_is_exact,
        node_down_bytes=node.down_bytes,
        node_up_bytes=node.up_bytes,
        node_largest_down_bytes=largest.down_bytes,
        node_largest_up_bytes=largest.up_bytes,
        round_down_bytes=round_down,
        round_up_bytes=round_up,
        run_down_bytes=run_down,
        run_up_bytes=run_up,
        run_envelope_at_most_bytes=envelopes,
        day_bytes=(round_down + round_up) * _DAY_S / round_s,
        per_token_bytes=(run_down + run_up) / tokens,
        stage_bytes=question.stage_bytes,
    )


def _baseline(question: Question, train_s: float) -> BaselinePlan:
    """Steps and their time as asked, or from the federation's: its training time over `compute_ratio`."""
    asked = question.baseline
    federated_s = question.trained_rounds * train_s
    # In the federation's order: as many steps in all, fewer of them by the ratio.
    steps = asked.steps if asked.steps is not None else question.sequential_steps / asked.compute_ratio
    step_s = 1 / asked.steps_per_s if asked.steps_per_s is not None else federated_s / asked.compute_ratio / steps
    exchange_s = _step_exchange_s(question, question.link)
    return BaselinePlan(
        steps=steps,
        compute_s=steps * step_s,
        exchange_s=steps * exchange_s,
        total_s=baseline_s(steps, step_s, exchange_s, overlapped=False),
        overlapped_total_s=baseline_s(steps, step_s, exchange_s, overlapped=True),
        sent_bytes=steps * _step_sent_bytes(question),
        compute_ratio=federated_s / (steps * step_s),
    )


def _step_exchange_s(question: Question, link: LinkSpeed) -> float:
    gradient_bytes = question.parameters * question.baseline.gradient_bytes_per_parameter
    return step_exchange_s(question.topology, gradient_bytes, question.recipe.nodes_per_round, link)


def _step_sent_bytes(question: Question) -> float:
    """What all senders put on the links in one step of the baseline."""
    nodes = question.recipe.nodes_per_round
    copies = {"ps": 2 * nodes if nodes > 1 else 0, "allreduce": nodes * (nodes - 1), "ring": 2 * (nodes - 1)}
    return copies[question.topology] * question.parameters * question.baseline.gradient_bytes_per_parameter


def _break_even(question: Question, baseline: BaselinePlan, overlapped: bool) -> BreakEven:
    """With overlap per-step training takes as long as its longer part, so whoever beats either part beats it."""
    link, up_bits_per_s = question.link, question.link.node_up_bits_per_s

    def federated_s(link: LinkSpeed) -> float:
        return _prediction(question, link).run_s(question.course.rounds, question.trained_rounds)

    def exchange_s(link: LinkSpeed) -> float:
        return baseline.steps * _step_exchange_s(question, link)

    if overlapped:
        beaten = [break_even(federated_s, part, link) for part in (exchange_s, lambda _: baseline.compute_s)]
    else:
        beaten = [break_even(federated_s, lambda link: baseline.compute_s + exchange_s(link), link)]
    up_to, from_on = max(even[0] for even in beaten), min(even[1] for even in beaten)
    if up_to >= from_on:
        return BreakEven(None, always=True)
    return BreakEven(up_to * up_bits_per_s or None, False, from_on * up_bits_per_s if from_on < math.inf else None)


def _money(question: Question, run_s: float, traffic: BytesPlan, baseline: BaselinePlan) -> MoneyPlan | None:
    """Devices x hours, and every byte that a node or the Aggregator sends. The Aggregator's machine is not in it."""
    prices = question.prices
    if prices.device_hour is None and prices.traffic_gb is None:
        return None
    hour = (prices.device_hour or 0.0) * question.recipe.nodes_per_round * question.devices_per_node
    devices, baseline_devices = hour * run_s / _HOUR_S, hour * baseline.total_s / _HOUR_S
    gb = prices.traffic_gb or 0.0
    sent = gb * (traffic.run_down_bytes + traffic.run_up_bytes) / _GB
    baseline_sent = gb * baseline.sent_bytes / _GB
    return MoneyPlan(devices, sent, devices + sent, baseline_devices, baseline_sent, baseline_devices + baseline_sent)
