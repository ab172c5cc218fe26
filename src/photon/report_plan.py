"""Predicted beside measured: what the planner's formulas say of a run's rounds, and what they took."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from photon.config import Recipe
from photon.devices import assumed_speed
from photon.errors import ConfigError
from photon.estimate import Shared, evaluation_tokens
from photon.events import NodeRound, RoundDone, RunStarted
from photon.plan_bytes import FLOAT32_BYTES, RoundBytes, Turn
from photon.plan_exchange import LinkSpeed
from photon.planner import PhaseComparison, RoundPrediction, compare, predict_round
from photon.recipe import parse_recipe

_TRANSFER = "messages and transfer"
_COMMIT = "commit of the round before"
_WORDS = {
    _TRANSFER: "messages, transfer, waiting",
    "decode": "node: decode, load",
    "evaluate": "node: score held-out text",
    "train": "node: train",
    "encode": "node: encode the update",
    "save": "node: update and state to disk",
    "merge": "Aggregator: verify, merge",
    "outer": "Aggregator: outer step, new base",
    _COMMIT: "Aggregator: commit",
}
_FIRST_MEASURED = 3  # rounds; the first starts everything up, the second is what the prediction builds on
_ALIKE = 0.1  # rounds that exchange so much more or less than the second are told nothing by it


@dataclass(frozen=True)
class Comparison:
    """Rows by phase, then the round; and the last of the rounds that were measured; or why there are none."""

    rows: Sequence[PhaseComparison]
    last_round: int = 0
    why_not: str = ""


def predicted_and_measured(start: RunStarted, rounds: Mapping[int, RoundDone], recipe_text: str) -> Comparison | None:
    """A mean round from the third on. None where a run has too few rounds, or recorded no such phases.

    Of the rounds that are predicted only tau enters the prediction: speeds of training and scoring, and what messages
    and transfer take, are those of the second round; the rest follows from rates that `photon.devices` assumes. So does
    scoring where the second round has none, unless the first was faster.
    """
    later = [event for number, event in rounds.items() if number >= _FIRST_MEASURED]
    if not later or not {1, 2} <= rounds.keys() or any("merge" not in event.phases_s for event in rounds.values()):
        return None
    try:
        recipe = parse_recipe(recipe_text, "recipe.toml")
    except ConfigError:
        return Comparison([], why_not="no prediction: this version of Photon cannot read the recipe")
    if recipe.federation.outer == "none":
        return None  # the baseline: other owners' scoring happens beside the one that trains
    usual, mean_bytes = _exchanged_bytes(rounds[2]), fmean(map(_exchanged_bytes, later))
    if abs(mean_bytes - usual) > _ALIKE * usual:
        return Comparison(
            [],
            why_not="no prediction: rounds exchange different tensors in turn, and how long messages and transfer take "
            "is only known of the second round's",
        )
    at_once = start.workers if recipe.link.fabric == "local" else None
    measured = [phases_of(event, at_once) for event in later]
    mean = {phase: fmean(one[phase] for one in measured) for phase in measured[0]}
    tau = (later[-1].sequential_step - rounds[2].sequential_step) / (later[-1].round - 2)
    prediction = _prediction(recipe, start, rounds[1], rounds[2], at_once, tau)
    due = sum((event.round - 1) % recipe.evaluation.every == 0 for event in later)
    prediction.phases_s["evaluate"] *= recipe.evaluation.every * due / len(later)
    rows = [replace(row, phase=_WORDS[row.phase]) for row in compare(prediction, mean)]
    # Not the sum of the phases: the Aggregator checks one reply while other nodes still work.
    wall = fmean(math.fsum(event.phases_s.values()) for event in later)
    total = PhaseComparison("a round", prediction.round_s, wall)
    return Comparison([*rows, total], last_round=later[-1].round)


def phases_of(event: RoundDone, at_once: int | None = None) -> dict[str, float]:
    """Seconds of a recorded round by phase; the nodes' are those of the slowest, or of a whole queue of mean ones.

    `at_once`: how many nodes work at the same time; None: all. What is left of the time that the Aggregator waited for
    nodes is messages, transfer and waiting for each other.
    """
    nodes = list(event.nodes.values())
    waves = math.ceil(len(nodes) / at_once) if at_once else 1
    parts = [_parts(node) for node in nodes]
    if waves > 1:
        own = {phase: waves * fmean(part[phase] for part in parts) for phase in parts[0]}
    else:
        own = max(parts, key=lambda part: math.fsum(part.values()))
    waited = event.phases_s.get("assembly", 0.0) + event.phases_s["nodes"]
    aggregator = {phase: event.phases_s[phase] for phase in ("merge", "outer", _COMMIT)}
    return {_TRANSFER: max(0.0, waited - math.fsum(own.values())), **own, **aggregator}


def _parts(node: NodeRound) -> dict[str, float]:
    return {
        "decode": node.receive_s,
        "evaluate": node.evaluation_seconds,
        "train": node.seconds,
        "encode": node.encode_s,
        "save": node.save_s,
    }


def _prediction(
    recipe: Recipe, start: RunStarted, first: RoundDone, second: RoundDone, at_once: int | None, tau: float
) -> RoundPrediction:
    """`tau`: the mean over the rounds that are predicted; a part may have set another one for the second."""
    timed = phases_of(second, at_once)
    waves = math.ceil(len(second.nodes) / at_once) if at_once else 1
    second_tau = second.sequential_step - first.sequential_step
    steps = max((silo.tau or second_tau) * recipe.batch_size_of(silo) for silo in recipe.silo)
    assumed = assumed_speed(waves * steps * recipe.data.sequence_length / max(timed["train"], 1e-9))
    # The first round's scoring holds what starting up takes: it is at most so slow.
    scored_s = timed["evaluate"] or phases_of(first, at_once)["evaluate"]
    scoring = waves * evaluation_tokens(recipe) / max(scored_s, 1e-9)
    machine = replace(
        assumed,
        evaluation_tokens_per_s=scoring if timed["evaluate"] else max(scoring, assumed.evaluation_tokens_per_s),
        control_s=timed[_TRANSFER],
        at_once=at_once,
    )
    line = LinkSpeed(math.inf, math.inf, math.inf, handshakes=0.0, control_round_trips=0.0)  # its time is in control_s
    bodies = list(second.round_link.values())
    sends_differences, is_lossy = _downlink(recipe)
    down_bytes = max((traffic.down.body for traffic in bodies), default=0)
    up_bytes = 0 if at_once else max((traffic.up.body for traffic in bodies), default=0)  # here it stays in memory
    exchanged_bytes = _exchanged_bytes(second)
    sizes = RoundBytes(
        down_bytes=down_bytes,
        up_bytes=up_bytes,
        whole_bytes=start.payload_bytes,
        sends_differences=sends_differences,
        down_is_lossy=is_lossy,
        turns=(Turn(down_bytes, up_bytes, exchanged_bytes),) if exchanged_bytes else (),
        shared=_shared(recipe, start, first, exchanged_bytes),
    )
    return predict_round(recipe, start.parameters, sizes, machine, line, tau=tau)


def _exchanged_bytes(event: RoundDone) -> int:
    """An update as float32, shared optimizer state included. A node that replied twice has two on its account."""
    return min((link.up.raw for name, link in event.round_link.items() if name in event.nodes), default=0)


def _shared(recipe: Recipe, start: RunStarted, first: RoundDone, exchanged_bytes: int) -> Shared | None:
    """What the federation shares, by the ledger: the first round's base is whole, and counted so where nodes hold it.

    So the model need not be built, for which a plan needs torch's compiler, and some recipes the network.
    """
    told = [link.down.raw for link in first.round_link.values() if link.down.raw]
    if not told or not recipe.federation.parts:
        return None
    optimizer_bytes = _optimizer_bytes(recipe, start.parameters)
    return Shared(min(told) // FLOAT32_BYTES, exchanged_bytes // FLOAT32_BYTES, optimizer_bytes)


def _optimizer_bytes(recipe: Recipe, parameters: int) -> int | None:
    """What a part's own local optimizer keeps; None if the recipe's is used."""
    from photon.parts.base import changes  # here, because they bring torch
    from photon.parts.method import Method

    method = Method.of(recipe)
    if not any(changes(part, "optimizer") for part in method.parts):
        return None
    import torch

    from photon.node.optimizers import build_optimizer

    meta = torch.device("meta")
    model = torch.nn.ParameterList([torch.empty(parameters, device=meta)])
    optimizer = method.optimizer(build_optimizer(model, recipe.node, meta))
    names: list[str] = optimizer.state_names(optimizer.param_groups[0])  # type: ignore[attr-defined]  # see Part.optimizer
    return FLOAT32_BYTES * parameters * len(set(names) - {"step"})


def _downlink(recipe: Recipe) -> tuple[bool, bool]:
    """Whether it sends differences, and whether it is lossy."""
    if not recipe.link.down and not recipe.federation.parts:
        return False, False
    from photon.plan_sizes import link_codecs  # here, because it brings torch

    codecs = link_codecs(recipe)
    return codecs.sends_differences, codecs.down_is_lossy
