"""Eager updates against the paper's algorithm in float64: each worker has an outer optimizer of its own, from torch."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from tests.crashes import steps_that_do_not_survive
from tests.support import Federation, largest_difference, local_sgd, tiny_recipe, untrained, weights, without_timings
from torch import Tensor

from photon.config import Recipe
from photon.errors import ConfigError, RoundFailedError
from photon.fabric.base import Lost
from photon.link.update import decode_message, expect_reply
from photon.model.build import named_weights
from photon.node.trainer import LocalRun, Trainer
from photon.parts.method import Method

Model = dict[str, Tensor]
NODES = ("ada", "bob", "cyd")
LR, MOMENTUM = 0.7, 0.9
OUTERS: dict[str, dict[str, Any]] = {
    "fedavg": {"lr": LR},
    "momentum": {"lr": LR, "momentum": MOMENTUM},
    "nesterov": {"lr": LR, "momentum": MOMENTUM, "nesterov": True},
}  # of torch.optim.SGD
MUTANTS = ("share of the whole", "not taken back", "from the base", "no velocity")


def recipe(*parts: str, silos: Sequence[str] = NODES, outer: str = "nesterov", rounds: int = 5, **more: Any) -> Recipe:
    federation = {
        "rounds": rounds, "parts": list(parts), "outer": outer, "outer_lr": LR, "outer_momentum": MOMENTUM,
        **more.pop("federation", {}),
    }  # fmt: skip
    return tiny_recipe(silos, federation=federation, checkpoint={"keep_last": 20}, **more)


@dataclass
class Seen:
    """What nodes began from and ended with, by node and round."""

    starts: dict[tuple[str, int], Model] = field(default_factory=dict)
    ends: dict[tuple[str, int], Model] = field(default_factory=dict)

    def merged(self, round_index: int) -> Model:
        """The mean of what the nodes of a round moved by."""
        nodes = [node for node, index in self.starts if index == round_index]
        moved = [differences(self.starts[n, round_index], self.ends[n, round_index]) for n in nodes]
        return {name: torch.stack([update[name] for update in moved]).mean(0) for name in moved[0]}


def differences(one: Model, other: Model) -> Model:
    return {name: one[name] - other[name] for name in one}


@contextmanager
def watched() -> Iterator[Seen]:
    """Everything that nodes train meanwhile."""
    seen, train = Seen(), Trainer.train

    def watching(self: Trainer, stream: Any, position: int, size: int, tau: int, step: int, on_step: Any) -> LocalRun:
        place = (stream.seed.to_bytes(3).decode(), step // tau)
        seen.starts[place] = copied(named_weights(self.model))
        run = train(self, stream, position, size, tau, step, on_step)
        seen.ends[place] = copied(named_weights(self.model))
        return run

    with mock.patch.object(Trainer, "train", watching):
        yield seen


def copied(model: Model) -> Model:
    return {name: tensor.clone() for name, tensor in model.items()}


def run(folder: Path, asked: Recipe) -> tuple[Model, Seen]:
    with watched() as seen:
        return weights(Federation(folder, asked, dtype=torch.float64).run()), seen


class Sgd:
    """A model and torch's optimizer of it."""

    def __init__(self, asked: Recipe) -> None:
        self.model = {name: torch.nn.Parameter(t) for name, t in weights(untrained(asked, torch.float64)).items()}
        self._optimizer = torch.optim.SGD(self.model.values(), **OUTERS[asked.federation.outer])

    def step(self, gradient: Model) -> None:
        for name, parameter in self.model.items():
            parameter.grad = gradient[name]
        self._optimizer.step()

    def weights(self) -> Model:
        return {name: parameter.detach().clone() for name, parameter in self.model.items()}


def all_applied(asked: Recipe, merged: Sequence[Model]) -> Model:
    """The untrained model after an outer step along each of these."""
    outer = Sgd(asked)
    for gradient in merged:
        outer.step(gradient)
    return outer.weights()


def of_the_paper(asked: Recipe, eager: bool = True, mutant: str = "") -> tuple[Model, Seen]:
    """Every worker's starts, and the model with all merges applied. Without `eager` outer gradients are only late."""
    nodes, tau = [silo.name for silo in asked.silo], asked.federation.tau
    workers = {node: Sgd(asked) for node in nodes}
    zero = {name: torch.zeros_like(tensor) for name, tensor in workers[nodes[0]].model.items()}
    own, merged, seen = [dict.fromkeys(nodes, zero)], [zero], Seen()  # those of the round before the first are zero
    share = 1 if mutant == "share of the whole" else len(nodes)
    for index in range(asked.federation.rounds):
        base = all_applied(asked, merged[1:-1])
        updates: dict[str, Model] = {}
        for node, worker in workers.items():
            start = seen.starts[node, index] = worker.weights()
            if mutant == "no velocity" and index:
                step = LR * (1 + MOMENTUM) / len(nodes)
                start = seen.starts[node, index] = {name: base[name] - step * own[-1][node][name] for name in base}
            moved = local_sgd(asked, start, node, index * tau * asked.node.batch_size)
            updates[node] = {name: torch.from_numpy(delta) for name, delta in moved.items()}
            if mutant == "from the base":
                updates[node] = {name: delta + base[name] - start[name] for name, delta in updates[node].items()}
        own.append(updates)
        merged.append({name: torch.stack([updates[node][name] for node in nodes]).mean(0) for name in zero})
        before = dict.fromkeys(nodes, zero) if mutant == "not taken back" else own[-2]
        for node, worker in workers.items():
            ahead = {name: (own[-1][node][name] - before[node][name]) / share for name in zero}
            worker.step({name: merged[-2][name] + (ahead[name] if eager else 0.0) for name in zero})
    return all_applied(asked, merged[1:]), seen


# --- the arithmetic --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outer", OUTERS)
@pytest.mark.parametrize("part", ["eager", "eager(own=false)"])
def test_it_is_the_papers_algorithm_at_every_node_in_every_round(tmp_path: Path, part: str, outer: str) -> None:
    asked = recipe(part, outer=outer)
    (ours, seen), (theirs, expected) = run(tmp_path, asked), of_the_paper(asked, part == "eager")
    assert len(seen.starts) == 15
    assert seen.starts.keys() == expected.starts.keys()
    assert max(largest_difference(seen.starts[place], expected.starts[place]) for place in seen.starts) < 1e-12
    assert largest_difference(ours, theirs) < 1e-12
    assert largest_difference(ours, of_the_paper(asked, part != "eager")[0]) > 1e-6
    for mutant in MUTANTS if part == "eager" else ():
        if mutant != "no velocity" or outer == "nesterov":
            assert largest_difference(ours, of_the_paper(asked, mutant=mutant)[0]) > 1e-6, mutant


def test_the_last_round_takes_what_was_held_and_then_its_own(tmp_path: Path) -> None:
    asked = recipe("eager")
    ours, seen = run(tmp_path, asked)
    merged = [seen.merged(index) for index in range(5)]
    assert largest_difference(ours, all_applied(asked, merged)) < 1e-12
    for lost in (merged[:-1], merged[:-2], [*merged[:-2], merged[-1]]):  # the mutants: one of the two, or both
        assert largest_difference(ours, all_applied(asked, lost)) > 1e-6


def test_the_model_lacks_the_newest_round_until_the_last(tmp_path: Path) -> None:
    asked = recipe("eager")
    with watched() as seen:
        federation = Federation(tmp_path, asked, dtype=torch.float64)
        federation.run()
    merged = [seen.merged(index) for index in range(5)]
    for number in range(5):
        committed = weights(federation.store.load(None, number))
        assert largest_difference(committed, all_applied(asked, merged[: max(0, number - 1)])) < 1e-12
    events = federation.rounds()
    assert [event.outer_norm > 0 for event in events] == [False, True, True, True, True]
    norms = [sum(float(t.square().sum()) for t in update.values()) ** 0.5 for update in merged]
    assert [event.merged_norm for event in events] == pytest.approx(norms)


@pytest.mark.parametrize("outer", OUTERS)
def test_of_one_node_it_is_the_method_without_it(tmp_path: Path, outer: str) -> None:
    """All of the merge is its own share: it waits for nothing."""
    eager, plain, late = (
        weights(
            Federation(tmp_path / str(index), recipe(*parts, silos=["ada"], outer=outer), dtype=torch.float64).run()
        )
        for index, parts in enumerate((["eager"], [], ["eager(own=false)"]))
    )
    assert largest_difference(eager, plain) < 1e-12
    assert largest_difference(late, plain) > 1e-6


@pytest.mark.parametrize("outer", OUTERS)
@pytest.mark.parametrize("link", [{}, {"max_update_norm": 0.05}], ids=["whole", "scaled down"])
def test_what_one_node_takes_ahead_is_what_comes_later(tmp_path: Path, outer: str, link: dict[str, Any]) -> None:
    """Also where rate and momentum change from round to round, and where updates are scaled down."""
    schedules = ["outer_lr_schedule(last=0.3)", "outer_momentum_schedule(first=0.9, last=0.2)"]
    asked = recipe("eager", *schedules[: 1 if outer == "fedavg" else 2], silos=["ada"], outer=outer, link=link)
    with watched() as seen:
        federation = Federation(tmp_path, asked, dtype=torch.float64)
        federation.run()
    norms = [event.merged_norm for event in federation.rounds()]
    assert (max(norms) < 0.0501) == bool(link)
    for index in range(1, 4):  # the last round takes more than that
        after = weights(federation.store.load(None, index + 1))
        assert largest_difference(seen.starts["ada", index], after) < 1e-12
        assert largest_difference(seen.starts["ada", index], weights(federation.store.load(None, index))) > 1e-3


def test_a_proximal_term_pulls_to_where_the_round_began(tmp_path: Path) -> None:
    eager, plain = (
        run(tmp_path / str(index), recipe(*parts, "fedprox(mu=0.5)", silos=["ada"]))[0]
        for index, parts in enumerate((["eager"], []))
    )
    assert largest_difference(eager, plain) < 1e-12


# --- who was not there, and runs that stop ---------------------------------------------------------------------------


def test_who_missed_a_round_begins_from_the_base_with_no_velocity(tmp_path: Path) -> None:
    asked = recipe("eager", federation={"quorum": 0.6})
    with watched() as seen:
        federation = Federation(tmp_path, asked, dtype=torch.float64)
        infos = federation.fabric.infos
        federation.fabric.nodes = lambda: [  # type: ignore[method-assign]  # a network of its own for one test
            info for info in infos if not (info.name == "bob" and len(federation.rounds()) == 2)
        ]
        federation.run()
    assert ("bob", 2) not in seen.starts
    models = [weights(federation.store.load(None, number)) for number in range(6)]
    assert largest_difference(seen.starts["bob", 3], models[3]) == 0
    assert largest_difference(seen.starts["ada", 3], models[3]) > 1e-6
    moved = differences(seen.starts["bob", 3], seen.ends["bob", 3])
    step = {name: models[4][name] - LR * (1 + MOMENTUM) / 3 * moved[name] for name in moved}
    assert largest_difference(seen.starts["bob", 4], step) < 1e-12


@pytest.mark.parametrize("stop", [1, 2, 4])
@pytest.mark.parametrize("outer", ["fedavg", "nesterov"])
def test_it_goes_on_after_a_stop_as_if_there_had_been_none(tmp_path: Path, outer: str, stop: int) -> None:
    asked = recipe("eager", outer=outer)
    whole = Federation(tmp_path / "whole", asked).run()
    rounds_of(tmp_path / "parts", asked, stop)
    assert Federation(tmp_path / "parts", asked).run().model_sha256 == whole.model_sha256


def rounds_of(folder: Path, asked: Recipe, count: int, **options: Any) -> None:
    """The first rounds of a run, and then it stops."""
    begun = Federation(folder, asked, **options)
    begun.aggregator._commit()
    for _ in range(count):
        begun.aggregator._round()
        begun.aggregator._commit()


LINKS: list[dict[str, Any]] = [
    {"up": ["zstd"], "down": ["zstd"]},
    {"up": ["int4(block=32)"], "down": ["int4(block=32)", "zstd"]},
    {"up": ["lowrank(rank=1)", "int8"], "down": ["lowrank(rank=1)", "int8"], "down_feedback": 0.5, "up_feedback": 0.5},
    {"up": ["topk(scope=global)"], "down": ["topk(density=0.2)", "int4(rounding=stochastic)"], "down_feedback": 0.0},
]


@pytest.mark.parametrize("link", LINKS, ids=str)
def test_a_failed_round_is_done_again_whatever_the_link(tmp_path: Path, link: dict[str, Any]) -> None:
    """The base of the second round is that of the first, whatever tells it."""

    def failing(arrivals: list[Any]) -> list[tuple[float, Any]]:
        number = expect_reply(decode_message(arrivals[0].message)).round
        return [(0.0, Lost(arrival.node, "power cut") if number == 3 else arrival) for arrival in arrivals]

    asked = recipe("eager", link=link)
    whole = Federation(tmp_path / "whole", asked, share_disk=False)
    expected = whole.run().model_sha256
    with pytest.raises(RoundFailedError):
        Federation(tmp_path / "parts", asked, failing, share_disk=False).run()
    resumed = Federation(tmp_path / "parts", asked, share_disk=False)
    assert resumed.run().model_sha256 == expected
    assert without_timings(resumed.rounds()) == without_timings(whole.rounds())
    assert not any(event.missing for event in resumed.rounds())


def test_a_crash_at_any_step_leaves_no_trace(tmp_path: Path) -> None:
    assert list(steps_that_do_not_survive(tmp_path, begin=2, federation={"parts": ["eager"]})) == []


@pytest.mark.parametrize("parts", list(itertools.permutations(["eager", "eager(own=false)", ""], 2)), ids=str)
def test_a_run_that_gets_or_loses_the_part_loses_no_update(tmp_path: Path, parts: tuple[str, str]) -> None:
    """What is held is applied with the next step; a node that remembers nothing begins from the base."""
    before, after = (recipe(*filter(None, [part])) for part in parts)
    with watched() as seen:
        rounds_of(tmp_path, before, 2, dtype=torch.float64)
        federation = Federation(tmp_path, after, dtype=torch.float64)
        ours = weights(federation.run())
    merged = [seen.merged(index) for index in range(5)]
    assert largest_difference(ours, all_applied(after, merged)) < 1e-12
    base = weights(federation.store.load(None, 2))
    assert largest_difference(seen.starts["ada", 2], base) == 0
    then, held = weights(federation.store.load(None, 3)), bool(parts[1])
    assert largest_difference(then, all_applied(after, merged[: 3 - held])) < 1e-12


def test_a_run_that_is_made_longer_takes_nothing_ahead_of_what_was_applied(tmp_path: Path) -> None:
    with watched() as seen:
        short = Federation(tmp_path, recipe("eager", rounds=3), dtype=torch.float64).run()
        assert not [key for key in short.outer if key.endswith("/held")]
        ours = weights(Federation(tmp_path, recipe("eager", rounds=6), dtype=torch.float64).run())
    assert all(largest_difference(seen.starts[node, 3], weights(short)) == 0 for node in NODES)
    assert largest_difference(ours, all_applied(recipe(), [seen.merged(index) for index in range(6)])) < 1e-12


def test_a_lossy_codec_changes_what_is_merged_and_not_what_is_taken_ahead(tmp_path: Path) -> None:
    asked = recipe("eager", silos=["ada"], rounds=2, link={"up": ["int2(block=32)"]})
    with watched() as seen:
        federation = Federation(tmp_path, asked)
        federation.run()
    start, moved = seen.starts["ada", 1], differences(seen.starts["ada", 0], seen.ends["ada", 0])
    base = weights(federation.store.load(None, 1))
    exact = {name: base[name] - LR * (1 + MOMENTUM) * moved[name] for name in moved}
    assert largest_difference(start, exact) < 1e-6


# --- refusals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("outer", ["adam", "yogi", "none"])
def test_an_outer_optimizer_that_is_not_linear_is_refused(outer: str) -> None:
    with pytest.raises(ConfigError, match=f"fedavg, momentum or nesterov, not {outer}"):
        Method.of(recipe("eager", outer=outer))


def test_local_weights_are_refused() -> None:
    """The Aggregator would take updates from the base, not from where nodes began."""
    with pytest.raises(ConfigError, match="sends all weights each time"):
        Method.of(recipe("eager", link={"of": "weights", "up": ["svd"], "down": ["svd"]}))


@pytest.mark.parametrize("own", ["eager", "eager(own=false)"])
@pytest.mark.parametrize("other", ["share", "fragments(count=2)", "stale", "momentum_warmup", "median"])
def test_what_does_not_go_together_is_refused(own: str, other: str) -> None:
    sections: dict[str, Any] = {"node": {"optimizer": "adamw"}, "federation": {"quorum": 0.6}}
    Method.of(recipe(other, **{key: dict(value) for key, value in sections.items()}))
    with pytest.raises(ConfigError, match="eager goes with no part"):
        Method.of(recipe(own, other, **sections))


def test_a_node_must_be_able_to_tell_the_last_round() -> None:
    """By its own steps it cannot, where it takes fewer than others and tau is the Aggregator's to find."""
    for balance in ("none", "time"):
        Method.of(recipe("eager", federation={"balance": balance}))
    Method.of(recipe("eager", "tau_by_agreement"))
    for part in ("tau_by_agreement", "tau_by_agreement(most=2)"):  # which may only shrink
        with pytest.raises(ConfigError, match=r"tau_by_agreement and federation\.balance = time"):
            Method.of(recipe("eager", part, federation={"balance": "time"}))


def test_it_is_given_once() -> None:
    with pytest.raises(ConfigError, match="Eager and Eager cannot go together"):
        Method.of(recipe("eager", "eager(own=false)"))
