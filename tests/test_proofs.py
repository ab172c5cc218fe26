"""What a federated run is equal to, proved through the real Aggregator and LLM Nodes; and the wrong ones it is not.

Every defect of the released code of arXiv 2411.02908 that has a counterpart here, and the test that keeps it out
(the beginning of its name; in this file, or in another folder of `tests`):

| there | here |
|---|---|
| FedAdam and FedYogi move away from the clients | aggregator/test_outer: every_optimizer_moves_towards |
| FedMom multiplies weights by 1 + momentum in round 1 | aggregator/test_outer: first_momentum_step |
| FedAvg ignores the configured learning rate | aggregator/test_outer: fedavg_uses_the_configured |
| a restore loses the second momentum | aggregator/test_outer: state_committed_and_restored |
| norms are logged after momentum changed the update | aggregator/test_server: norms_are_those_of_the_updates |
| averaged weights are scaled, not the pseudo-gradient | a_round_in_which_no_node_moves |
| optimizer state leaks from one client to the next | virtual_nodes_on_one_trainer |
| `reset_optimizer` is not honoured | optimizer_state_is_kept_or_reset |
| evaluation drops the optimizer | evaluating_changes_nothing |
| a client's exception returns as success, 0 samples | aggregator/test_validate: a_node_that_fails |
| failures allowed: none, or without limit | aggregator/test_validate: a_round_without_its_quorum |
| last round's upload passes for this round's | aggregator/test_validate: a_replay_of_the_round_before |
| no timeout; no nodes are waited for without end | aggregator/test_exchange: nothing_is_waited_for |
| a node that missed a broadcast trains stale weights | node/test_node: a_base_that_is_not_the_one_named |
| any node may be handed any client's stream | node/test_node: a_task_for_another_node_or_run |
| the place in the data is not restored | a_crash_at_any_step |
| bytes sent and received are nowhere counted | aggregator/test_server: bytes_are_those_of_the_messages |
| pickle and `eval` of what came over the network | link/test_tensors: attacks_are_refused |
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from tests.crashes import steps_that_do_not_survive
from tests.support import (
    CPU,
    Federation,
    Text,
    largest_difference,
    new_model,
    tiny_recipe,
    weights,
    without_timings,
)
from torch import Tensor

from photon import durable
from photon.aggregator import server
from photon.aggregator.merge import Merge
from photon.aggregator.outer import OuterOptimizer
from photon.config import Recipe
from photon.link.update import decode_message, expect_reply
from photon.model.build import named_weights
from photon.node import node as node_module
from photon.node.optimizers import build_optimizer
from photon.node.schedule import learning_rate_scale
from photon.node.state import NodeState, NodeStore

LOAD = NodeStore.load
ADAMW = {"optimizer": "adamw", "lr": 0.01, "weight_decay": 0.1}


# --- large-batch SGD -------------------------------------------------------------------------------------------------


def large_batch_sgd(
    recipe: Recipe, nodes: Iterable[str], scale: float = 1.0, restart_data: bool = False
) -> dict[str, Tensor]:
    """A plain loop: each step is one gradient of the mean loss over the batches of all nodes, in float64."""
    model = new_model(recipe, torch.float64)
    for step in range(recipe.federation.rounds):
        position = 0 if restart_data else step * recipe.node.batch_size
        batch = torch.cat([torch.from_numpy(Text(node).batch(position, recipe.node.batch_size)) for node in nodes])
        model.zero_grad()
        model.loss(batch[:, :-1], batch[:, 1:]).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(recipe.node.lr * scale * parameter.grad)
    return named_weights(model)


def test_one_local_step_of_sgd_is_large_batch_sgd(tmp_path: Path) -> None:
    """Law 7: tau = 1, SGD, equal tokens, every node: four rounds are four steps of one big batch, to 1e-12."""
    recipe = tiny_recipe(federation={"rounds": 4, "tau": 1})
    federated = weights(Federation(tmp_path, recipe, dtype=torch.float64).run())
    names = [silo.name for silo in recipe.silo]
    assert largest_difference(federated, large_batch_sgd(recipe, names)) < 1e-12
    mutants = [
        large_batch_sgd(recipe, names, scale=3.0),  # the sum of the updates instead of their mean
        large_batch_sgd(recipe, names[:2]),  # a node is forgotten
        large_batch_sgd(recipe, names, restart_data=True),  # each round begins at the start of the data
    ]
    assert all(largest_difference(federated, mutant) > 1e-4 for mutant in mutants)


# --- the schedule ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", ["cosine", "wsd"])
def test_the_learning_rate_is_never_restarted(schedule: str, tmp_path: Path) -> None:
    """What every node reports at its last step of round t is the schedule at t tau + tau_k - 1."""
    recipe = tiny_recipe(
        {"ada": {}, "bob": {"tau": 3}},
        node={"schedule": schedule, "warmup_steps": 3},
        federation={"rounds": 4, "tau": 2},
    )
    federation = Federation(tmp_path, recipe)
    federation.run()
    reported, restarted = {}, {}
    expected = {}
    for sender, message in federation.fabric.received:
        reply = expect_reply(decode_message(message))
        if reply.training is None:
            continue
        place = (sender, reply.round)
        last = (3 if sender == "bob" else 2) - 1
        reported[place] = reply.training.learning_rate
        expected[place] = recipe.node.lr * learning_rate_scale(2 * reply.round + last, recipe.node, 8)
        restarted[place] = recipe.node.lr * learning_rate_scale(last, recipe.node, 8)  # the mutant
    assert len(expected) == 8
    assert reported == pytest.approx(expected, rel=1e-12)
    assert reported != pytest.approx(restarted, rel=1e-3)
    by_round = [max(reported["ada", t], reported["bob", t]) for t in range(4)]
    assert [event.learning_rate for event in federation.rounds()] == pytest.approx(by_round, rel=1e-12)


# --- virtual nodes ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [ADAMW, {"optimizer": "muon"}, {"optimizer": "sgd", "momentum": 0.9}])
def test_virtual_nodes_on_one_trainer_train_as_if_alone(
    optimizer: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tiny_recipe(node=optimizer, federation={"rounds": 3})
    alone = Federation(tmp_path / "alone", recipe, share_trainer=False).run()
    shared = Federation(tmp_path / "shared", recipe).run()
    assert shared.model_sha256 == alone.model_sha256
    monkeypatch.setattr(node_module, "import_state", lambda *_: None)  # the mutant: state stays in the trainer
    leaking = Federation(tmp_path / "leaking", recipe).run()
    assert leaking.model_sha256 != alone.model_sha256


@pytest.mark.parametrize(
    "parts",
    [["share"], ["share(first=3, second=2)"], ["share(first=0, factored=true)"], ["fragments(count=2, delay=1)"],
     ["eager"], ["fedprox(mu=0.1)"], ["slow_momentum(beta=0.97)", "share"]],
    ids=str,
)  # fmt: skip
def test_so_they_do_under_every_method_that_keeps_something_at_its_nodes(parts: list[str], tmp_path: Path) -> None:
    """Alone, a node's optimizer goes on as it lies in its trainer, unless the method has something else begin."""
    recipe = tiny_recipe(node=ADAMW, federation={"rounds": 5, "parts": parts, "outer": "nesterov", "outer_lr": 0.7})
    alone = Federation(tmp_path / "alone", recipe, share_trainer=False).run()
    shared = Federation(tmp_path / "shared", recipe).run()
    assert shared.model_sha256 == alone.model_sha256


def plain_adamw(recipe: Recipe, reset: bool) -> dict[str, Tensor]:
    """One node's steps written out, with a new optimizer each round if `reset`."""
    model = new_model(recipe, torch.float64)
    optimizer = build_optimizer(model, recipe.node, CPU)
    size, tau = recipe.node.batch_size, recipe.federation.tau
    for step in range(recipe.federation.rounds * tau):
        if reset and step % tau == 0:
            optimizer = build_optimizer(model, recipe.node, CPU)
        batch = torch.from_numpy(Text("ada").batch(step * size, size))
        optimizer.zero_grad()
        model.loss(batch[:, :-1], batch[:, 1:]).backward()
        optimizer.step()
    return named_weights(model)


@pytest.mark.parametrize("choice", ["keep", "reset"])
def test_optimizer_state_is_kept_or_reset_as_asked(choice: str, tmp_path: Path) -> None:
    recipe = tiny_recipe(["ada"], node={**ADAMW, "optimizer_state": choice}, federation={"rounds": 3})
    federated = weights(Federation(tmp_path, recipe, dtype=torch.float64).run())
    assert largest_difference(federated, plain_adamw(recipe, choice == "reset")) < 1e-9
    assert largest_difference(federated, plain_adamw(recipe, choice != "reset")) > 1e-4  # the other one


def test_evaluating_changes_nothing_but_the_record(tmp_path: Path) -> None:
    often = tiny_recipe(node=ADAMW, federation={"rounds": 3}, evaluation={"every": 1})
    seldom = tiny_recipe(node=ADAMW, federation={"rounds": 3}, evaluation={"every": 3})
    runs = [Federation(tmp_path / name, recipe) for name, recipe in (("often", often), ("seldom", seldom))]
    assert runs[0].run().model_sha256 == runs[1].run().model_sha256
    assert [event.round for event in runs[0].evaluations()] == [0, 1, 2, 3]
    assert [event.round for event in runs[1].evaluations()] == [0, 3]


# --- nothing moves when nothing should -------------------------------------------------------------------------------

STILL = [(outer, "adamw") for outer in ("fedavg", "momentum", "nesterov", "adam", "yogi", "none")]


@pytest.mark.parametrize(("outer", "optimizer"), [*STILL, ("nesterov", "muon"), ("adam", "sgd")])
def test_a_round_in_which_no_node_moves_changes_no_bit(outer: str, optimizer: str, tmp_path: Path) -> None:
    """A local learning rate of zero, with weight decay and momentum switched on."""

    def after_a_round(rate: float) -> tuple[str, str]:
        recipe = tiny_recipe(
            node={"optimizer": optimizer, "lr": rate, "muon_lr": rate, "weight_decay": 0.1, "momentum": 0.9},
            federation={"rounds": 1, "outer": outer, "outer_lr": 0.7},
        )
        federation = Federation(tmp_path / f"{rate}", recipe)
        before = federation.aggregator.model_sha256
        return before, federation.run().model_sha256

    before, after = after_a_round(0.0)
    assert after == before
    before, after = after_a_round(1e-6)  # it can fail: a rate of a millionth shows
    assert after != before


# --- the order of arrival --------------------------------------------------------------------------------------------


class RunningSum(Merge):
    """The mutant: sums of float32 in the order of arrival, as one would write it first."""

    def fold(self, update: Iterable[tuple[str, Tensor]], weight: int) -> None:
        sums = self.__dict__.setdefault("plain", {})
        for name, delta in update:
            sums[name] = sums.get(name, 0) + weight * delta
        self.weight += weight

    def result(self) -> Iterator[tuple[str, Tensor]]:
        return ((name, total / self.weight) for name, total in self.__dict__["plain"].items())


def in_every_order(folder: Path) -> Iterator[tuple[str, object]]:
    """Final hash and record of a round of nodes that differ, for every order in which they answer."""
    recipe = tiny_recipe({"ada": {"tau": 3}, "bob": {"batch_size": 3}, "cyd": {}}, federation={"rounds": 1})
    for order in itertools.permutations(range(3)):
        federation = Federation(
            folder / "".join(map(str, order)), recipe, lambda arrivals, order=order: [(0.0, arrivals[i]) for i in order]
        )
        yield federation.run().model_sha256, without_timings(federation.events())


def test_the_order_of_arrival_does_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    results = list(in_every_order(tmp_path / "ours"))
    assert len(results) == 6
    assert all(result == results[0] for result in results)
    monkeypatch.setattr(server, "Merge", RunningSum)
    assert len({digest for digest, _ in in_every_order(tmp_path / "mutant")}) > 1


# --- a round is a transaction ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("outer", ["nesterov", "adam"])
def test_a_run_in_pieces_ends_as_one_in_a_piece(outer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every round by an Aggregator and by nodes that know nothing but what is on the disk."""

    def in_pieces(folder: Path) -> str:
        for rounds in (1, 2, 3):
            digest = Federation(folder, recipe_of(rounds)).run().model_sha256
        return digest

    def recipe_of(rounds: int) -> Recipe:
        node = {**ADAMW, "schedule": "cosine", "total_steps": 6}
        return tiny_recipe(node=node, federation={"rounds": rounds, "outer": outer, "outer_lr": 0.01})

    whole = Federation(tmp_path / "whole", recipe_of(3)).run().model_sha256
    assert in_pieces(tmp_path / "pieces") == whole
    monkeypatch.setattr(OuterOptimizer, "import_state", lambda *_: None)  # the mutant: the outer state is forgotten
    assert in_pieces(tmp_path / "mutant") != whole


def test_a_crash_at_any_step_of_a_round_changes_nothing(tmp_path: Path) -> None:
    assert list(steps_that_do_not_survive(tmp_path, node=ADAMW)) == []


def newest_state(store: NodeStore, run: str, node: str, round_index: int, held: str = "") -> NodeState:
    """A mutant: a node goes on from its newest state, whatever round is asked for."""
    numbers = store._states.numbers()
    return LOAD(store, run, node, numbers[-1] if numbers else round_index, held)


def write_in_place(
    states: durable.NumberedStates,
    number: int,
    files: Mapping[str, Iterable[bytes] | durable.Draft],
    fields: Mapping[str, Any],
) -> dict[str, str]:
    """A mutant: the folder has its final name while it is written."""
    folder = states.folder(number)
    folder.mkdir(parents=True, exist_ok=True)
    whole = {
        name: chunks.path.read_bytes() if isinstance(chunks, durable.Draft) else b"".join(chunks)
        for name, chunks in files.items()
    }
    entries = {
        name: durable._FileEntry(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        for name, data in whole.items()
    }
    manifest = durable._Manifest(number=number, fields=dict(fields), files=entries, sha256="")
    manifest = manifest.model_copy(update={"sha256": manifest.own_sha256()})
    for name, data in {**whole, durable.STATE_FILE: manifest.model_dump_json().encode()}.items():
        durable._write_synced(folder / name, [data])
    return {name: entry.sha256 for name, entry in entries.items()}


@pytest.mark.parametrize(
    ("place", "name", "mutant"),
    [(NodeStore, "load", newest_state), (durable.NumberedStates, "commit", write_in_place)],
)
def test_a_crash_shows_where_states_are_not_kept_so(
    place: type, name: str, mutant: Callable[..., Any], tmp_path: Path
) -> None:
    with mock.patch.object(place, name, mutant):
        assert next(steps_that_do_not_survive(tmp_path, node=ADAMW), None) is not None
