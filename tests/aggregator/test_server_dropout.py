"""Rounds that sampled nodes drop out of: who is left trains, divides and is waited for, and a resume loses the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.support import (
    LENGTH,
    Delivery,
    Federation,
    largest_difference,
    local_sgd,
    tiny_recipe,
    untrained,
    weights,
    without_timings,
)
from torch import Tensor

from photon.aggregator.sampling import DROPPED_OUT, drop_outs
from photon.config import Recipe
from photon.errors import RoundFailedError
from photon.fabric.base import Arrival, Lost
from photon.link.update import decode_message, expect_reply, expect_task

UNEQUAL = {"ada": {"batch_size": 1, "tau": 3}, "bob": {"batch_size": 4}, "cyd": {"tau": 1}}
SEQUENCES = {"ada": 3, "bob": 8, "cyd": 2}  # of a round, by UNEQUAL
NODES = sorted(UNEQUAL)
ROUNDS = 5


def recipe(**federation: Any) -> Recipe:
    return tiny_recipe(UNEQUAL, seed=10, federation={"rounds": ROUNDS, "dropout": 0.5, "suspend_after": 1} | federation)


def gone_in(recipe: Recipe, round_index: int) -> list[str]:
    return drop_outs(recipe.seed, round_index, NODES, recipe.federation.dropout)


def averaged(recipe: Recipe, *, divide_by_all: bool = False, move_on: bool = False) -> dict[str, Tensor]:
    """Federated averaging in numpy of those that are left in each round.

    Mutants: who dropped out divides too; who dropped out moves on in its text as if it had trained.
    """
    theta = weights(untrained(recipe, torch.float64))
    position: Counter[str] = Counter()
    for t in range(ROUNDS):
        left = [node for node in NODES if node not in gone_in(recipe, t)]
        deltas = {node: local_sgd(recipe, theta, node, position[node]) for node in left}
        divisor = sum(SEQUENCES[node] for node in (NODES if divide_by_all else left))
        theta = {
            name: value - sum(SEQUENCES[node] * torch.from_numpy(deltas[node][name]) for node in left) / divisor
            for name, value in theta.items()
        }
        position.update({node: SEQUENCES[node] for node in (NODES if move_on else left)})
    return theta


def asked(federation: Federation, round_index: int) -> list[str]:
    """Nodes that were sent anything in a round."""
    tasks = [expect_task(decode_message(message)) for _, message in federation.fabric.sent]
    return sorted(task.node for task in tasks if task.round == round_index)


def test_who_is_left_trains_and_divides_and_who_is_not_is_on_record(tmp_path: Path) -> None:
    options = recipe(quorum=1.0)
    federation = Federation(tmp_path, options, dtype=torch.float64)
    state = federation.run()
    gone = [gone_in(options, t) for t in range(ROUNDS)]
    assert {len(names) for names in gone} >= {0, 1, 2}, "the seed tries all that can happen"
    for t, event in enumerate(federation.rounds()):
        left = [node for node in NODES if node not in gone[t]]
        assert sorted(event.nodes) == left == asked(federation, t)
        assert event.missing == dict.fromkeys(gone[t], DROPPED_OUT)
        assert event.round_tokens == sum(SEQUENCES[node] for node in left) * LENGTH
        assert sorted(event.round_link) == left
    assert state.progress.charges == {}  # and nobody is suspended, though a single refusal would be enough
    assert largest_difference(weights(state), averaged(options)) < 1e-12
    assert largest_difference(weights(state), averaged(options, divide_by_all=True)) > 1e-3
    assert largest_difference(weights(state), averaged(options, move_on=True)) > 1e-3


def test_the_last_model_is_scored_by_everybody(tmp_path: Path) -> None:
    federation = Federation(tmp_path, recipe())
    federation.run()
    *before, last = federation.evaluations()
    assert sorted(last.silos) == NODES
    for event in before:  # who drops out of a round is not there for anything
        assert sorted(event.silos) == [node for node in NODES if node not in gone_in(recipe(), event.round)]


def test_a_resumed_run_loses_the_same_nodes(tmp_path: Path) -> None:
    options = recipe(quorum=1.0)
    whole = Federation(tmp_path / "whole", options)
    expected = whole.run().model_sha256

    def failing(arrivals: list[Arrival]) -> list[Delivery]:
        cut = expect_reply(decode_message(arrivals[0].message)).round == 2
        return [(0.0, Lost(arrival.node, "power cut") if cut else arrival) for arrival in arrivals]

    with pytest.raises(RoundFailedError):
        Federation(tmp_path / "stopped", options, failing).run()
    resumed = Federation(tmp_path / "stopped", options)
    assert resumed.run().model_sha256 == expected
    assert without_timings(resumed.rounds()) == without_timings(whole.rounds())


def run_one_round(folder: Path, lost: Sequence[str], **federation: Any) -> Federation:
    """A round of four of five that two drop out of, `lost` being cut off."""
    names = ["a", "b", "c", "d", "e"]
    options = {"rounds": 1, "dropout": 0.5, "nodes_per_round": 4, **federation}
    made = tiny_recipe(names, seed=3, federation=options)

    def network(arrivals: list[Arrival]) -> list[Delivery]:
        trained = [expect_reply(decode_message(arrival.message)).training is not None for arrival in arrivals]
        return [
            (0.0, Lost(arrival.node, "gone") if arrival.node in lost and trains else arrival)
            for arrival, trains in zip(arrivals, trained, strict=True)
        ]

    run = Federation(folder, made, network)
    run.run()
    return run


def test_the_quorum_is_of_those_that_are_left(tmp_path: Path) -> None:
    """Two of four are left: a quorum of a half is one of them, and all of them are enough for 1.0."""
    whole = run_one_round(tmp_path / "whole", [], quorum=1.0)
    (event,) = whole.rounds()
    left = sorted(event.nodes)
    assert len(left) == 2
    assert len([node for node, reason in event.missing.items() if reason == DROPPED_OUT]) == 2
    (idle,) = {"a", "b", "c", "d", "e"} - event.nodes.keys() - event.missing.keys()
    assert sorted(whole.evaluations()[0].silos) == sorted([*left, idle])  # who was not sampled cannot drop out
    half = run_one_round(tmp_path / "half", left[:1], quorum=0.5).rounds()[0]
    assert sorted(half.nodes) == left[1:]
    assert half.missing == event.missing | {left[0]: "gone"}
    with pytest.raises(RoundFailedError, match=r"of 2 nodes counted, federation\.quorum asks for 2"):
        run_one_round(tmp_path / "more", left[:1], quorum=0.75)


def test_the_baseline_never_drops_out(tmp_path: Path) -> None:
    """Its only trainer is the one that stays."""
    for t in range(50):
        assert drop_outs(5, t, ["pooled"], 0.99) == []
