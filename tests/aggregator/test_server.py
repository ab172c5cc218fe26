"""The round loop end to end: whose tokens weigh what, who divides, what is recorded, what is counted."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.support import (
    LENGTH,
    Delivery,
    Federation,
    Text,
    largest_difference,
    local_sgd,
    new_model,
    tiny_recipe,
    untrained,
    weights,
)
from torch import Tensor

from photon.aggregator.server import Aggregator
from photon.config import Recipe
from photon.errors import RoundFailedError
from photon.events import NodeRound
from photon.fabric.base import Arrival, Lost, NodeInfo
from photon.link.tensors import decode_tensors
from photon.link.update import TrainingReport, decode_message, expect_reply, expect_task
from photon.model.build import load_weights

Updates = dict[str, dict[str, np.ndarray]]
UNEQUAL = {"ada": {"batch_size": 1, "tau": 3}, "bob": {"batch_size": 4}, "cyd": {"tau": 1}}
TOKENS = {"ada": 3 * LENGTH, "bob": 8 * LENGTH, "cyd": 2 * LENGTH}


def averaged(recipe: Recipe, weight: Mapping[str, float], divisor: float, rounds: int = 2) -> dict[str, Tensor]:
    """Federated averaging in numpy: theta <- theta - sum_k w_k delta_k / divisor."""
    theta = weights(untrained(recipe, torch.float64))
    per_round = {"ada": 3, "bob": 8, "cyd": 2}  # sequences of UNEQUAL
    for t in range(rounds):
        deltas: Updates = {node: local_sgd(recipe, theta, node, t * per_round[node]) for node in weight}
        theta = {
            name: value - torch.from_numpy(sum(np.float64(weight[n]) * deltas[n][name] for n in weight) / divisor)
            for name, value in theta.items()
        }
    return theta


def test_updates_weigh_as_many_tokens_as_were_trained(tmp_path: Path) -> None:
    recipe = tiny_recipe(UNEQUAL)
    federated = weights(Federation(tmp_path, recipe, dtype=torch.float64).run())
    assert largest_difference(federated, averaged(recipe, TOKENS, 13 * LENGTH)) < 1e-12
    uniform = averaged(recipe, dict.fromkeys(TOKENS, 1), 3)
    by_steps = averaged(recipe, {"ada": 3, "bob": 2, "cyd": 1}, 6)
    assert largest_difference(federated, uniform) > 1e-3
    assert largest_difference(federated, by_steps) > 1e-3


def test_uniform_weighting_is_the_plain_mean(tmp_path: Path) -> None:
    recipe = tiny_recipe(UNEQUAL, federation={"weighting": "uniform"})
    federated = weights(Federation(tmp_path, recipe, dtype=torch.float64).run())
    assert largest_difference(federated, averaged(recipe, dict.fromkeys(TOKENS, 1), 3)) < 1e-12
    assert largest_difference(federated, averaged(recipe, TOKENS, 13 * LENGTH)) > 1e-3


def test_only_nodes_that_answered_divide(tmp_path: Path) -> None:
    """bob was asked and is gone; neither his tokens nor his share of the mean remain."""
    recipe = tiny_recipe(UNEQUAL, federation={"rounds": 1, "quorum": 0.5})

    def network(arrivals: list[Arrival]) -> list[Delivery]:
        return [(0.0, Lost("bob", "gone") if a.node == "bob" else a) for a in arrivals]

    federated = weights(Federation(tmp_path, recipe, network, dtype=torch.float64).run())
    others = {node: tokens for node, tokens in TOKENS.items() if node != "bob"}
    assert largest_difference(federated, averaged(recipe, others, 5 * LENGTH, rounds=1)) < 1e-12
    assert largest_difference(federated, averaged(recipe, others, 13 * LENGTH, rounds=1)) > 1e-3  # asked nodes divide


def test_only_sampled_nodes_divide_and_every_owner_scores(tmp_path: Path) -> None:
    """K = 1 of P = 3: the round's step is that of the one node, not a third of it."""
    recipe = tiny_recipe(UNEQUAL, federation={"rounds": 1, "nodes_per_round": 1})
    federation = Federation(tmp_path, recipe, dtype=torch.float64)
    federated = weights(federation.run())
    ((node, _),) = federation.rounds()[0].nodes.items()
    assert largest_difference(federated, averaged(recipe, {node: 1}, 1, rounds=1)) < 1e-12
    assert largest_difference(federated, averaged(recipe, {node: 1}, 3, rounds=1)) > 1e-3
    assert [sorted(event.silos) for event in federation.evaluations()] == [["ada", "bob", "cyd"]] * 2
    tasks = [expect_task(decode_message(message)) for _, message in federation.fabric.sent]
    assert sorted(task.tau > 0 for task in tasks[:3]) == [False, False, True]


def training_reports(federation: Federation) -> dict[str, tuple[TrainingReport, dict[str, Tensor]]]:
    """What each node of a one-round federation handed in."""
    messages = [decode_message(data) for _, data in federation.fabric.received]
    return {
        expect_reply(message).node: (report, decode_tensors(message.body))
        for message in messages
        if (report := expect_reply(message).training) is not None
    }


def flat(tensors: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([tensors[name].double().flatten() for name in sorted(tensors)])


def test_norms_are_those_of_the_updates_and_of_the_steps_taken(tmp_path: Path) -> None:
    """Three norms, under an outer optimizer that makes each of them different."""
    recipe = tiny_recipe(UNEQUAL, federation={"rounds": 1, "outer": "nesterov", "outer_lr": 0.5, "outer_momentum": 0.9})
    federation = Federation(tmp_path, recipe)
    before = flat(weights(federation.aggregator.state()))
    after = flat(weights(federation.run()))
    (event,) = federation.rounds()
    handed_in = {node: flat(update) for node, (_, update) in training_reports(federation).items()}
    for node, update in handed_in.items():
        assert event.nodes[node].update_norm == pytest.approx(float(update.norm()), rel=1e-9)
    merged = sum(TOKENS[node] * update for node, update in handed_in.items()) / (13 * LENGTH)
    assert event.merged_norm == pytest.approx(float(merged.norm()), rel=1e-6)
    assert event.outer_norm == pytest.approx(float((before - after).norm()), rel=1e-5)
    assert event.outer_norm == pytest.approx(0.5 * 1.9 * event.merged_norm, rel=1e-5)  # Nesterov's first step
    for row, a in enumerate(sorted(handed_in)):
        for column, b in enumerate(sorted(handed_in)):
            cosine = float(torch.nn.functional.cosine_similarity(handed_in[a], handed_in[b], dim=0))
            assert event.cosine[row][column] == pytest.approx(cosine, abs=2e-6)


def test_the_record_is_what_the_nodes_reported(tmp_path: Path) -> None:
    federation = Federation(tmp_path, tiny_recipe(UNEQUAL, federation={"rounds": 1}))
    state = federation.run()
    (event,) = federation.rounds()
    reports = {node: report for node, (report, _) in training_reports(federation).items()}
    assert {node: report.tokens for node, report in reports.items()} == TOKENS
    assert event.round_tokens == event.tokens == state.progress.tokens == sum(TOKENS.values())
    losses = np.array([reports[node].loss_mean for node in sorted(TOKENS)])
    tokens = np.array([TOKENS[node] for node in sorted(TOKENS)])
    assert event.train_loss == pytest.approx(float((losses * tokens).sum() / tokens.sum()), rel=1e-12)
    assert event.train_loss != pytest.approx(float(losses.mean()), rel=1e-6)  # a mean of means
    assert list(event.phases_s) == ["assembly", "nodes", "merge", "outer", "commit of the round before"]
    assert event.phases_s["merge"] > 0
    shared = TrainingReport.model_fields.keys() & NodeRound.model_fields.keys()
    assert len(shared) >= 9
    for node, report in reports.items():
        assert {f: getattr(event.nodes[node], f) for f in shared} == {f: getattr(report, f) for f in shared}


def test_bytes_are_those_of_the_messages_in_both_directions(tmp_path: Path) -> None:
    """Of whole serialised messages; a reply that comes twice crossed twice, one that is refused crossed too."""

    def network(arrivals: list[Arrival]) -> list[Delivery]:
        return [(0.0, a) for a in arrivals] + [(0.0, arrivals[0]), (0.0, Arrival("cyd", b"noise"))]

    recipe = tiny_recipe(federation={"quorum": 0.5, "grace_s": 5.0})
    federation = Federation(tmp_path, recipe, network)
    progress = federation.run().progress
    sent = sum(len(message) for _, message in federation.fabric.sent)
    received = sum(len(message) for _, message in federation.fabric.received)
    assert (progress.link.down.encoded, progress.link.up.encoded) == (sent, received)
    assert progress.link.down.encoded > 8 * len(federation.aggregator.payload)  # 3 nodes x (2 rounds + final scores)
    first, second = federation.rounds()
    assert (first.bytes_up, first.bytes_down) == (first.round_bytes_up, first.round_bytes_down)
    assert second.bytes_up == first.round_bytes_up + second.round_bytes_up
    assert first.round_bytes_up == sum(node.bytes_up for node in first.nodes.values())
    messages = [message for node, message in federation.fabric.sent if node == "ada"]
    assert first.nodes["ada"].bytes_down == len(messages[0])


def test_bytes_go_on_after_a_resume(tmp_path: Path) -> None:
    whole = Federation(tmp_path / "whole", tiny_recipe(federation={"rounds": 2})).run().progress
    Federation(tmp_path / "cut", tiny_recipe(federation={"rounds": 1})).run()
    resumed = Federation(tmp_path / "cut", tiny_recipe(federation={"rounds": 2})).run().progress
    payload = len(untrained(tiny_recipe()).payload)
    # The shorter run scored its last model, which cost a broadcast more.
    assert resumed.link.down.encoded - whole.link.down.encoded == pytest.approx(3 * payload, rel=0.2)


def test_scores_are_pooled_over_tokens_and_belong_to_the_base(tmp_path: Path) -> None:
    """The record of round t says how good the model was that t rounds made, whoever trains on."""
    recipe = tiny_recipe(federation={"rounds": 2}, checkpoint={"keep_last": 3})
    federation = Federation(tmp_path, recipe)
    federation.run()
    for event in federation.evaluations():
        model = new_model(recipe)
        load_weights(model, weights(federation.store.load(None, event.round)))
        with torch.no_grad():
            windows = {n: torch.from_numpy(Text(n).heldout()[0].sequences) for n in federation.nodes}
            losses = {n: float(model.loss(w[:, :-1], w[:, 1:])) for n, w in windows.items()}
        assert {n: s.loss for n, s in event.silos.items()} == pytest.approx(losses, rel=1e-6)
        assert event.pooled.loss == pytest.approx(sum(losses.values()) / 3, rel=1e-6)
        assert event.pooled.tokens == 3 * 3 * LENGTH
    assert [event.round for event in federation.evaluations()] == [0, 1, 2]


def test_scores_stand_beside_what_their_model_had_cost(tmp_path: Path) -> None:
    federation = Federation(tmp_path, tiny_recipe(federation={"rounds": 3}))
    federation.run()
    rounds = federation.rounds()
    *before, last = federation.evaluations()[1:]
    for event in before:
        done = rounds[event.round - 1]
        assert (event.sequential_step, event.tokens) == (done.sequential_step, done.tokens)
        assert (event.bytes_up, event.bytes_down) == (done.bytes_up, done.bytes_down)
        assert event.seconds >= done.seconds
    # No round follows that would score the last model on the way: its scores cost a broadcast of their own.
    assert (last.tokens, last.sequential_step) == (rounds[-1].tokens, rounds[-1].sequential_step)
    assert last.seconds >= rounds[-1].seconds
    assert last.bytes_down > rounds[-1].bytes_down


def test_without_a_node_a_round_fails_and_says_so(tmp_path: Path) -> None:
    idle = [NodeInfo(name, 12, trains=False) for name in ("ada", "bob", "cyd")]
    with pytest.raises(RoundFailedError, match="round 0: no node is connected"):
        Federation(tmp_path, tiny_recipe(), infos=idle).run()


def test_scores_that_nobody_gives_end_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    federation = Federation(tmp_path, tiny_recipe(federation={"rounds": 1}))
    monkeypatch.setattr(federation.tracker, "note", notes.append)

    def network(arrivals: list[Arrival]) -> list[Delivery]:
        trained = any(expect_reply(decode_message(a.message)).training for a in arrivals)
        return [(0.0, a if trained else Lost(a.node, "asleep")) for a in arrivals]

    federation.fabric.network = network
    assert federation.run().progress.round == 1
    assert [event.round for event in federation.evaluations()] == [0]
    assert "the final score lacks ada, bob, cyd" in notes[0]
    assert "asleep" in notes[0]


def test_an_owner_that_cannot_score_the_final_model_costs_its_own_score_alone(tmp_path: Path) -> None:
    """All must answer in a round; but after the last one there is no round to fail."""
    asked: list[int] = []

    def network(arrivals: list[Arrival]) -> list[Delivery]:
        asked.append(len(arrivals))
        return [(0.0, Lost(a.node, "asleep")) if a.node == "ada" and len(asked) > 1 else (5.0, a) for a in arrivals]

    federation = Federation(tmp_path, tiny_recipe(federation={"rounds": 1, "quorum": 1.0}), network)
    federation.run()
    assert [(event.round, sorted(event.silos)) for event in federation.evaluations()] == [
        (0, ["ada", "bob", "cyd"]),
        (1, ["bob", "cyd"]),
    ]


def test_a_finished_run_has_nothing_left_to_do(tmp_path: Path) -> None:
    recipe = tiny_recipe()
    done = Federation(tmp_path, recipe).run()
    again = Federation(tmp_path, recipe)
    assert again.run().model_sha256 == done.model_sha256
    assert again.fabric.sent == []


def test_a_round_costs_memory_for_one_reply(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Law 4: when the next reply is taken in, the one before has been folded."""
    order: list[str] = []
    fold: Any = Aggregator.__init__.__globals__["Merge"].fold
    federation = Federation(tmp_path, tiny_recipe(federation={"rounds": 1}))

    def folding(merge: object, update: object, weight: int) -> None:
        order.append("fold")
        fold(merge, update, weight)

    monkeypatch.setattr("photon.aggregator.server.Merge.fold", folding)
    receive = federation.fabric.receive
    monkeypatch.setattr(federation.fabric, "receive", lambda timeout_s: order.append("receive") or receive(timeout_s))
    federation.run()
    assert order[:6] == ["receive", "fold"] * 3


def test_the_aggregator_needs_no_optimizer_of_torch() -> None:
    """It brings torch's compiler: 80 MB that stay, and three seconds of every start."""
    program = (
        "import sys; from photon.aggregator.server import Aggregator; from photon.aggregator.outer import *;"
        "from photon.config import FederationConfig;"
        "outer = OuterOptimizer([('w', torch.ones(2))], FederationConfig(outer='adam'));"
        "outer.step([('w', torch.ones(2))]); sys.exit('torch._dynamo' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], check=False, timeout=120).returncode == 0


def test_with_an_oversample_the_first_k_make_the_round_and_divide(tmp_path: Path) -> None:
    """Three are asked, K = 2: the slowest is abandoned, and neither its tokens nor its share remain."""
    options = {"rounds": 1, "nodes_per_round": 2, "oversample": 0.5}
    recipe = tiny_recipe(UNEQUAL, federation=options)
    late = {"ada": 1.0, "bob": 9.0, "cyd": 2.0}
    federation = Federation(
        tmp_path, recipe, lambda arrivals: [(late[a.node], a) for a in arrivals], dtype=torch.float64
    )
    federated = weights(federation.run())
    (event,) = federation.rounds()
    assert sorted(event.nodes) == ["ada", "cyd"]
    assert event.missing == {"bob": "not needed: 2 others had answered"}
    assert "bob" in federation.fabric.abandoned
    counted = {node: tokens for node, tokens in TOKENS.items() if node != "bob"}
    assert largest_difference(federated, averaged(recipe, counted, 5 * LENGTH, rounds=1)) < 1e-12
    asked = averaged(recipe, counted, 13 * LENGTH, rounds=1)  # the mutant: who was asked divides
    all_three = averaged(recipe, TOKENS, 13 * LENGTH, rounds=1)  # the mutant: the late reply is folded too
    assert largest_difference(federated, asked) > 1e-3
    assert largest_difference(federated, all_three) > 1e-3


def test_an_oversample_replaces_who_fails(tmp_path: Path) -> None:
    def network(arrivals: list[Arrival]) -> list[Delivery]:
        return [(0.0, Lost("ada", "gone") if a.node == "ada" else a) for a in arrivals]

    options = {"rounds": 1, "nodes_per_round": 2, "quorum": 1.0, "oversample": 0.5}
    federation = Federation(tmp_path, tiny_recipe(federation=options), network)
    federation.run()
    assert sorted(federation.rounds()[0].nodes) == ["bob", "cyd"]
