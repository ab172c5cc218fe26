"""Slower nodes take fewer steps, and all finish together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.support import Delivery, Federation, edited, tiny_recipe

from photon.aggregator.balance import local_steps, measured
from photon.fabric.base import Arrival
from photon.link.update import TrainingReport, decode_message, expect_reply, expect_task

Balance = Callable[[list[str], int, Mapping[str, float]], dict[str, int]]
SPEEDS = {"ada": 0.5, "bob": 1.0, "cyd": 4.0}


def unbalanced(nodes: list[str], tau: int, speeds: Mapping[str, float]) -> dict[str, int]:
    """A mutant: tau for everybody."""
    return dict.fromkeys(nodes, tau)


def upside_down(nodes: list[str], tau: int, speeds: Mapping[str, float]) -> dict[str, int]:
    """A mutant: the ratio is the wrong way round."""
    slowest = max(speeds[name] for name in nodes)
    return {name: max(1, round(tau * speeds[name] / slowest)) for name in nodes}


def finish_together(balance: Balance, tau: int, speeds: dict[str, float]) -> bool:
    """Within half a step of each node, or with the one step that is the least."""
    steps = balance(list(speeds), tau, speeds)
    end_s = tau * min(speeds.values())
    return all(
        abs(steps[name] * own - end_s) <= own / 2 * (1 + 1e-9) or (steps[name] == 1 and own >= end_s)
        for name, own in speeds.items()
    )


@given(
    st.dictionaries(st.text("abcdef", min_size=1), st.floats(1e-3, 1e3), min_size=1, max_size=8), st.integers(1, 500)
)
def test_all_finish_together(speeds: dict[str, float], tau: int) -> None:
    assert finish_together(local_steps, tau, speeds)
    steps = local_steps(speeds, tau, speeds)
    assert max(steps.values()) == tau  # the fastest is not slowed down
    assert min(steps.values()) >= 1


def test_mutants_do_not_finish_together() -> None:
    assert finish_together(local_steps, 32, SPEEDS)
    assert not finish_together(unbalanced, 32, SPEEDS)
    assert not finish_together(upside_down, 32, SPEEDS)


def test_steps_of_known_speeds() -> None:
    assert local_steps(SPEEDS, 32, SPEEDS) == {"ada": 32, "bob": 16, "cyd": 4}
    assert local_steps(["bob", "cyd"], 32, SPEEDS) == {"bob": 32, "cyd": 8}  # of those who take part
    assert local_steps(["ada", "cyd"], 2, SPEEDS) == {"ada": 2, "cyd": 1}


def test_who_was_never_measured_takes_tau() -> None:
    assert local_steps(["ada", "bob", "eve"], 32, SPEEDS) == {"ada": 32, "bob": 16, "eve": 32}
    assert local_steps(["dan", "eve"], 32, SPEEDS) == {"dan": 32, "eve": 32}
    assert local_steps([], 32, SPEEDS) == {}


def report(seconds: float, steps: int) -> TrainingReport:
    return TrainingReport(
        tokens=1, steps=steps, loss_first=1.0, loss_last=1.0, loss_mean=1.0, gradient_norm_mean=1.0,
        clipped_steps=0, learning_rate=0.1, seconds=seconds, epoch=0.0,
    )  # fmt: skip


def test_speed_is_an_exponential_mean_of_seconds_per_step() -> None:
    speeds = measured({}, {"ada": report(8.0, 4)})
    assert speeds == {"ada": 2.0}
    speeds = measured(speeds, {"ada": report(40.0, 10), "bob": report(3.0, 1)})
    assert speeds == pytest.approx({"ada": 0.7 * 2 + 0.3 * 4, "bob": 3.0})
    for _ in range(60):
        speeds = measured(speeds, {"ada": report(5.0, 1)})
    assert speeds["ada"] == pytest.approx(5.0)


def test_a_time_that_is_none_is_not_believed() -> None:
    assert measured({"ada": 2.0}, {"ada": report(0.0, 4), "bob": report(-1.0, 4)}) == {"ada": 2.0}


def timed(arrivals: list[Arrival]) -> list[Delivery]:
    """Every node reports the time that its speed makes of its steps."""

    def change(arrival: Arrival) -> Arrival:
        training = expect_reply(decode_message(arrival.message)).training
        if training is None:
            return arrival
        return Arrival(
            arrival.node, edited(arrival.message, training={"seconds": SPEEDS[arrival.node] * training.steps})
        )

    return [(0.0, change(arrival)) for arrival in arrivals]


def taus(federation: Federation) -> list[dict[str, int]]:
    """Of each round, the steps that were asked for."""
    rounds: dict[int, dict[str, int]] = {}
    for node, message in federation.fabric.sent:
        task = expect_task(decode_message(message))
        if task.tau:
            rounds.setdefault(task.round, {})[node] = task.tau
    return [rounds[index] for index in sorted(rounds)]


def test_a_federation_measures_first_and_then_balances(tmp_path: Path) -> None:
    recipe = tiny_recipe(federation={"rounds": 3, "tau": 8, "balance": "time"})
    federation = Federation(tmp_path, recipe, timed)
    federation.run()
    balanced = {"ada": 8, "bob": 4, "cyd": 1}
    assert taus(federation) == [dict.fromkeys(SPEEDS, 8), balanced, balanced]
    for event in federation.rounds()[1:]:
        assert [event.nodes[name].seconds for name in ("ada", "bob", "cyd")] == [4.0, 4.0, 4.0]
        tokens = {name: node.tokens for name, node in event.nodes.items()}
        assert tokens["ada"] == 2 * tokens["bob"] == 8 * tokens["cyd"]  # and so they weigh
    assert federation.store.load(None).progress.sequential_step == 24


def test_a_resumed_run_knows_the_speeds(tmp_path: Path) -> None:
    def recipe(rounds: int) -> object:
        return tiny_recipe(federation={"rounds": rounds, "tau": 8, "balance": "time"})

    Federation(tmp_path, recipe(1), timed).run()
    resumed = Federation(tmp_path, recipe(2), timed)
    resumed.run()
    assert taus(resumed) == [{"ada": 8, "bob": 4, "cyd": 1}]


def test_a_silos_own_tau_wins_and_sets_no_pace(tmp_path: Path) -> None:
    silos = {"ada": {"tau": 3}, "bob": {}, "cyd": {}}
    federation = Federation(tmp_path, tiny_recipe(silos, federation={"rounds": 2, "tau": 8, "balance": "time"}), timed)
    federation.run()
    assert taus(federation)[1] == {"ada": 3, "bob": 8, "cyd": 2}


def test_unless_asked_for_nothing_is_balanced(tmp_path: Path) -> None:
    federation = Federation(tmp_path, tiny_recipe(federation={"rounds": 2, "tau": 8}), timed)
    federation.run()
    assert taus(federation) == [dict.fromkeys(SPEEDS, 8)] * 2
