"""Late updates against a plain loop: who trains from which model is written down by hand, in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from tests.support import (
    LENGTH,
    Delivery,
    Federation,
    Network,
    edited,
    largest_difference,
    local_sgd,
    tiny_recipe,
    untrained,
    weights,
    without_timings,
)
from torch import Tensor

from photon.aggregator.merge import Merge
from photon.config import Recipe
from photon.errors import ConfigError
from photon.fabric.base import Arrival, Lost
from photon.link.update import decode_message, expect_reply, expect_task
from photon.parts.method import Method
from photon.parts.stale import Stale

HALF = "stale(rounds=2, discount=0.5)"
GRACE_S = 10.0
SILOS = {"ada": {}, "bob": {"batch_size": 3}, "cyd": {"batch_size": 4}}
# Of a round, who counts, how many rounds ago it began, and its how-manieth task that is.
Plan = Sequence[dict[str, tuple[int, int]]]


def recipe(*parts: str, rounds: int = 5, quorum: float = 0.6, silos: Any = SILOS, **sections: Any) -> Recipe:
    federation = {
        "rounds": rounds, "parts": list(parts), "quorum": quorum, "grace_s": GRACE_S, **sections.pop("federation", {})
    }  # fmt: skip
    return tiny_recipe(silos, federation=federation, **sections)


def slow(name: str, seconds: float) -> Network:
    """Updates of one node take so long; its scores alone do not."""

    def network(arrivals: list[Arrival]) -> list[Delivery]:
        return [(seconds if a.node == name and trained(a.message) else 1.0, a) for a in arrivals]

    return network


def trained(message: bytes) -> bool:
    return expect_reply(decode_message(message)).training is not None


def by_hand(
    recipe: Recipe,
    plan: Plan,
    discount: Callable[[int], float],
    *,
    from_now: bool = False,
    undiscounted_sum: bool = False,
    uniform: bool = False,
) -> dict[str, Tensor]:
    """Plain averaging with weights `tokens * discount(age)`. `from_now` moves updates to the newest model (wrong), and
    `undiscounted_sum` divides by weights that know no age (wrong)."""
    models = [{name: tensor.double() for name, tensor in weights(untrained(recipe, torch.float64)).items()}]
    silos = {silo.name: silo for silo in recipe.silo}
    for index, counted in enumerate(plan):
        step = {name: torch.zeros_like(tensor) for name, tensor in models[0].items()}
        total = 0.0
        for node, (age, nth) in counted.items():
            size, tau, base = recipe.batch_size_of(silos[node]), recipe.federation.tau, models[index - age]
            delta = local_sgd(recipe, base, node, nth * tau * size)
            tokens = 1 if uniform else tau * size * LENGTH
            weight = tokens * discount(age)
            total += tokens if undiscounted_sum else weight
            for name in step:
                moved = models[index][name] - base[name] if from_now else 0.0
                step[name] += weight * (torch.from_numpy(delta[name]) + moved)
        models.append({name: tensor - step[name] / total for name, tensor in models[index].items()})
    return models[-1]


def one_round_late(rounds: int) -> Plan:
    """cyd answers the task of every other round in the round after."""
    plan: list[dict[str, tuple[int, int]]] = []
    for index in range(rounds):
        counted = {"ada": (0, index), "bob": (0, index)}
        if index % 2:
            counted["cyd"] = (1, index // 2)
        plan.append(counted)
    return plan


# Of round 0 it has 1 s for the quorum and 10 s of grace; in round 1, which ends after 1 s, its update is there.
ONE_LATE = slow("cyd", 11.5)


def test_a_straggler_counts_each_time_with_its_tokens_and_its_discount(tmp_path: Path) -> None:
    asked = recipe(HALF, rounds=6)
    federation = Federation(tmp_path, asked, ONE_LATE, dtype=torch.float64)
    ours = weights(federation.run())
    plan = one_round_late(6)
    assert largest_difference(ours, by_hand(asked, plan, lambda age: 0.5**age)) < 1e-12
    # The mutants: no discount, moved to the newest model, divided by the whole weights, tokens that do not count.
    assert largest_difference(ours, by_hand(asked, plan, lambda age: 1.0)) > 1e-5
    assert largest_difference(ours, by_hand(asked, plan, lambda age: 0.5**age, from_now=True)) > 1e-5
    assert largest_difference(ours, by_hand(asked, plan, lambda age: 0.5**age, undiscounted_sum=True)) > 1e-5
    assert largest_difference(ours, by_hand(asked, plan, lambda age: 0.5**age, uniform=True)) > 1e-5
    rounds = federation.rounds()
    assert [{name: node.age for name, node in event.nodes.items()} for event in rounds] == [
        {name: age for name, (age, _) in counted.items()} for counted in plan
    ]
    assert [event.missing for event in rounds] == [
        {} if index % 2 else {"cyd": "goes on training: its update may count in a later round"} for index in range(5)
    ] + [{}]
    assert federation.fabric.abandoned == []


def test_its_place_in_the_text_has_no_gap_and_nothing_counts_twice(tmp_path: Path) -> None:
    federation = Federation(tmp_path, recipe(HALF, rounds=6), ONE_LATE)
    state = federation.run()
    rounds = federation.rounds()
    counted = {name: sum(event.nodes[name].tokens for event in rounds if name in event.nodes) for name in SILOS}
    for name, site in federation.sites.items():
        kept = site.store.load("run-of-a-test", name, 6)
        assert kept.position * LENGTH == kept.tokens == counted[name]
    assert state.progress.tokens == sum(counted.values())
    assert counted["cyd"] == 3 * 2 * 4 * LENGTH
    assert rounds[-1].tokens == state.progress.tokens
    asked = [expect_task(decode_message(message)) for node, message in federation.fabric.sent if node == "cyd"]
    assert [task.round for task in asked if task.tau] == [0, 2, 4]


@pytest.mark.parametrize("quorum", [1.0, 0.6])
def test_where_nobody_is_late_it_changes_nothing(tmp_path: Path, quorum: float) -> None:
    plain, with_it = (
        Federation(tmp_path / name, recipe(*parts, rounds=3, quorum=quorum, federation={"oversample": 0.1}))
        for name, parts in (("plain", ()), ("stale", (HALF,)))
    )
    assert largest_difference(weights(plain.run()), weights(with_it.run())) == 0
    assert without_timings(plain.events()) == without_timings(with_it.events())


def test_with_uniform_weights_it_is_the_discount_alone(tmp_path: Path) -> None:
    asked = recipe("stale(rounds=1, discount=0.3)", rounds=4, federation={"weighting": "uniform"})
    ours = weights(Federation(tmp_path, asked, ONE_LATE, dtype=torch.float64).run())
    plan = one_round_late(4)
    by_age = by_hand(asked, plan, lambda age: 0.3**age, uniform=True)
    assert largest_difference(ours, by_age) < 1e-6  # weights are whole 2^-20ths
    assert largest_difference(ours, by_hand(asked, plan, lambda age: 1.0, uniform=True)) > 1e-5


def test_who_is_too_old_is_abandoned_and_asked_again_uncharged(tmp_path: Path) -> None:
    """cyd never answers its first task; with two rounds of patience it is asked again in the fourth round."""

    def network(arrivals: list[Arrival]) -> list[Delivery]:
        tasks = [(expect_reply(decode_message(a.message)).round, a) for a in arrivals]
        return [(1e6 if a.node == "cyd" and index == 0 else 1.0, a) for index, a in tasks]

    federation = Federation(tmp_path, recipe(HALF, rounds=5), network)
    state = federation.run()
    rounds = federation.rounds()
    assert federation.fabric.abandoned == ["cyd"]
    assert [event.missing.get("cyd") for event in rounds] == [
        "goes on training: its update may count in a later round", None, "too old: its task is of round 0", None, None
    ]  # fmt: skip
    assert [sorted(event.nodes) for event in rounds[:3]] == [["ada", "bob"]] * 3
    assert [event.nodes["cyd"].age for event in rounds[3:]] == [0, 0]
    assert state.progress.charges == {}


def test_the_weight_is_whole_exact_and_never_nothing() -> None:
    part = Stale(rounds=100, discount=0.1)
    assert [part.late_weight(weight, age) for weight, age in ((1000, 0), (1000, 2), (1000, 3), (16, 1), (7, 90))] == [
        1000, 10, 1, 2, 1
    ]  # fmt: skip
    assert Stale(discount=1.0).late_weight(12345, 2) == 12345
    assert Stale(discount=0.7).late_weight(10**17, 2) == 49 * 10**15  # no float between


def test_the_merge_has_room_for_late_weights(tmp_path: Path) -> None:
    """Undiscounted and all at once, as many tokens as can be: what is folded never exceeds what was announced."""
    asked = recipe("stale(rounds=1, discount=1.0)", rounds=4)
    sums: list[tuple[int, int]] = []
    result = Merge.result

    def seen(merge: Merge) -> object:
        sums.append((merge.weight, merge._max_weight))
        return result(merge)

    with mock.patch.object(Merge, "result", seen):
        Federation(tmp_path, asked, ONE_LATE).run()
    tokens = [2 * size * LENGTH for size in (2, 3, 4)]
    assert sums == [(sum(tokens[:2]), sum(tokens)), (sum(tokens), sum(tokens))] * 2


# --- liars, doubles, losses -------------------------------------------------------------------------------------------


def late_and(change: Callable[[Arrival], list[Delivery]]) -> Network:
    """cyd's updates are late, and then what `change` says."""

    def network(arrivals: list[Arrival]) -> list[Delivery]:
        others: list[Delivery] = [(1.0, a) for a in arrivals if a.node != "cyd" or not trained(a.message)]
        return others + [d for a in arrivals if a.node == "cyd" and trained(a.message) for d in change(a)]

    return network


@pytest.mark.parametrize(
    ("lie", "reason"),
    [
        ({"base_sha256": "f" * 64}, "its base_sha256 is not the one"),
        ({"round": 1}, "its round is not the one"),
        ({"run": "another"}, "its run is not the one"),
        ({"training": {"tokens": 10**6}}, "claims 1000000 tokens"),
        ({"training": {"steps": 3}}, "claims 3 steps of a task of 2"),
        ({"body_sha256": "0" * 64}, "sha256 differs"),
        ({"tensors": lambda tensors: {name: value + 500 for name, value in tensors.items()}}, "has norm"),
    ],
)
def test_who_lies_late_is_refused_and_charged(tmp_path: Path, lie: dict[str, Any], reason: str) -> None:
    network = late_and(lambda a: [(11.5, Arrival("cyd", edited(a.message, **lie)))])
    federation = Federation(tmp_path / "lied", recipe(HALF, rounds=2), network)
    state = federation.run()
    assert reason in federation.rounds()[1].missing["cyd"]
    assert state.progress.charges["cyd"].refusals == 1
    never = Federation(tmp_path / "never", recipe(HALF, rounds=2), late_and(lambda a: []))
    assert largest_difference(weights(state), weights(never.run())) == 0


def test_a_reply_counts_once_however_often_it_comes(tmp_path: Path) -> None:
    once = Federation(tmp_path / "once", recipe(HALF, rounds=6), ONE_LATE)
    often = Federation(
        tmp_path / "often",
        recipe(HALF, rounds=6),
        late_and(lambda a: [(s, a) for s in (11.5, 11.5, 11.6, 12.5, 13.0)]),
    )
    assert largest_difference(weights(once.run()), weights(often.run())) == 0
    assert once.aggregator.progress.charges == often.aggregator.progress.charges == {}
    assert once.aggregator.progress.tokens == often.aggregator.progress.tokens
    assert len(often.fabric.received) > len(once.fabric.received)


def test_a_late_node_that_is_lost_fails_or_lacks_its_base_is_free_again(tmp_path: Path) -> None:
    events: dict[str, Callable[[Arrival], list[Delivery]]] = {
        "gone": lambda a: [(11.5, Lost("cyd", "gone"))],
        "disk full": lambda a: [(11.5, Arrival("cyd", edited(a.message, status="failed", error="disk full")))],
        "lacks the base": lambda a: [(11.5, Arrival("cyd", edited(a.message, status="lacks", error="new disk")))],
    }
    for reason, change in events.items():
        federation = Federation(tmp_path / reason, recipe(HALF, rounds=3), late_and(change))
        state = federation.run()
        assert reason in federation.rounds()[1].missing["cyd"]
        assert state.progress.charges == {}
        tasks = [expect_task(decode_message(m)) for node, m in federation.fabric.sent if node == "cyd"]
        assert [task.round for task in tasks if task.tau] == [0, 2]


def test_scores_of_an_older_model_are_not_pooled(tmp_path: Path) -> None:
    federation = Federation(tmp_path, recipe(HALF, rounds=2), ONE_LATE)
    federation.run()
    assert [sorted(event.silos) for event in federation.evaluations()] == [
        ["ada", "bob"], ["ada", "bob"], ["ada", "bob", "cyd"]
    ]  # fmt: skip


@pytest.mark.parametrize("share_disk", [True, False])
def test_with_a_lossy_way_down_a_late_node_is_told_the_whole_base_next(tmp_path: Path, share_disk: bool) -> None:
    asked = recipe(HALF, rounds=6, link={"down": ["int8"], "of": "difference"})
    federation = Federation(tmp_path, asked, ONE_LATE, share_disk=share_disk)
    federation.run()
    tasks = [(node, expect_task(decode_message(message))) for node, message in federation.fabric.sent]
    forms = {name: [task.form for node, task in tasks if node == name and task.tau] for name in SILOS}
    assert forms == {
        "ada": ["held"] + ["difference"] * 5,
        "bob": ["held"] + ["difference"] * 5,
        "cyd": ["held", "whole", "whole"],
    }
    assert [sorted(event.nodes) for event in federation.rounds()] == [["ada", "bob"], ["ada", "bob", "cyd"]] * 3


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_what_cannot_be_is_refused() -> None:
    for parameters in ({"rounds": 0}, {"rounds": 101}, {"discount": 0.0}, {"discount": 1.1}, {"discount": -0.5}):
        with pytest.raises(ValueError, match="stale"):
            Stale(**parameters)
    for message, asked in (
        ("of = difference", recipe(HALF, link={"of": "weights"})),
        ("quorum below 1", recipe(HALF, quorum=1.0)),
        ("stale goes with no part", recipe(HALF, "share", node={"optimizer": "adamw"})),
        ("stale goes with no part", recipe(HALF, "median")),
        ("cannot go together", recipe(HALF, HALF)),
    ):
        with pytest.raises(ConfigError, match=message):
            Method.of(asked)
