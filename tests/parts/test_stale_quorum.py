"""Late updates, the quorum, and a crash: who may end a round, and what is left of who was late."""

from __future__ import annotations

from pathlib import Path
from unittest import mock

import pytest
from tests.parts.test_stale import GRACE_S, HALF, ONE_LATE, recipe, slow, trained
from tests.support import Delivery, Federation, Network, largest_difference, on_time, weights, without_timings

from photon.aggregator.exchange import Exchange
from photon.aggregator.server import Aggregator
from photon.errors import RoundFailedError
from photon.fabric.base import Arrival
from photon.link.update import decode_message, expect_reply


def at(times: dict[tuple[str, int], float]) -> Network:
    """Seconds that an update takes by (node, round); 1 where it is not said. inf: it is lost on the way."""

    def network(arrivals: list[Arrival]) -> list[Delivery]:
        found: list[Delivery] = []
        for a in arrivals:
            reply = expect_reply(decode_message(a.message))
            seconds = times.get((a.node, reply.round), 1.0) if reply.training else 1.0
            if seconds != float("inf"):
                found.append((seconds, a))
        return found

    return network


FOUR = ("ada", "bob", "cyd", "dan")


def test_late_updates_help_the_quorum(tmp_path: Path) -> None:
    """ada fails in round 1 and cyd, late from round 0, stands in; without it the run would stop."""
    times = {("cyd", 0): 20.0, ("dan", 0): 1e6, ("ada", 1): float("inf")}
    federation = Federation(tmp_path / "stale", recipe(HALF, rounds=2, quorum=0.5, silos=FOUR), at(times))
    federation.run()
    assert {name: node.age for name, node in federation.rounds()[1].nodes.items()} == {"bob": 0, "cyd": 1}
    times[("cyd", 0)] = 1e6
    with pytest.raises(RoundFailedError, match=r"1 of 2 nodes counted, federation\.quorum asks for 2"):
        Federation(tmp_path / "none", recipe(HALF, rounds=2, quorum=0.5, silos=FOUR), at(times)).run()


def test_grace_begins_with_a_fresh_update_if_one_may_come(tmp_path: Path) -> None:
    """Two late updates alone would be a quorum: at 50 s, ada's is waited for, and bob's for its grace of 10 s."""
    times = {("cyd", 0): 12.0, ("dan", 0): 12.0, ("ada", 1): 50.0, ("bob", 1): 61.0}
    federation = Federation(tmp_path, recipe(HALF, rounds=2, quorum=0.5, silos=FOUR), at(times))
    federation.run()
    last = federation.rounds()[1]
    assert {name: node.age for name, node in last.nodes.items()} == {"ada": 0, "cyd": 1, "dan": 1}
    assert last.missing == {"bob": "no answer before the deadline"}  # the last round: nobody goes on
    assert federation.fabric.abandoned == ["bob"]
    # The mutant, whose grace begins with any quorum: a round of late updates alone, at full weight.
    with mock.patch.object(Exchange, "_may_end", Exchange.quorum_is_met):
        mutant = Federation(tmp_path / "mutant", recipe(HALF, rounds=2, quorum=0.5, silos=FOUR), at(times))
        mutant.run()
    assert {node.age for node in mutant.rounds()[1].nodes.values()} == {1}


def test_nobody_waits_for_the_late_once_the_quorum_is_there(tmp_path: Path) -> None:
    federation = Federation(tmp_path, recipe(HALF, rounds=3), slow("cyd", 1e5))
    federation.run()
    assert federation.fabric.now == pytest.approx(1 + GRACE_S + 1 + 1 + 1, abs=1e-9)  # at last, scores alone


def test_spares_go_on_too_and_k_are_fresh(tmp_path: Path) -> None:
    asked = recipe(HALF, rounds=3, quorum=1.0, silos=FOUR, federation={"nodes_per_round": 2, "oversample": 1.0})
    federation = Federation(tmp_path, asked, at({("dan", 0): 1.5, ("cyd", 0): 1.5}))
    federation.run()
    ages = [{name: node.age for name, node in event.nodes.items()} for event in federation.rounds()]
    assert ages[:2] == [{"ada": 0, "bob": 0}, {"ada": 0, "bob": 0, "cyd": 1, "dan": 1}]
    assert list(ages[2].values()) == [0, 0]
    assert len(federation.fabric.abandoned) == 2  # those of the last round
    assert set(federation.rounds()[0].missing) == {"cyd", "dan"}


# --- a crash ----------------------------------------------------------------------------------------------------------


def test_after_a_crash_a_late_reply_answers_nothing_and_its_node_goes_on(tmp_path: Path) -> None:
    late: list[Arrival] = []

    def network(arrivals: list[Arrival]) -> list[Delivery]:
        late.extend(a for a in arrivals if a.node == "cyd" and trained(a.message))
        return [(1.0, a) for a in arrivals if a.node != "cyd" or not trained(a.message)]

    before = Federation(tmp_path, recipe(HALF, rounds=4), network)
    commit = Aggregator._commit

    def crash(aggregator: Aggregator) -> None:
        commit(aggregator)
        if aggregator.progress.round == 2:
            raise KeyboardInterrupt

    with mock.patch.object(Aggregator, "_commit", crash), pytest.raises(KeyboardInterrupt):
        before.run()
    assert before.aggregator.late.tasks.keys() == {"cyd"}

    def answers_both(arrivals: list[Arrival]) -> list[Delivery]:
        """What was late comes first, then everybody's answer."""
        return [(0.5, a) for a in late] + on_time_after(arrivals)

    def on_time_after(arrivals: list[Arrival]) -> list[Delivery]:
        return [(1.0, a) for _, a in on_time(arrivals)]

    after = Federation(tmp_path, recipe(HALF, rounds=4), answers_both)
    state = after.run()
    assert [sorted(event.nodes) for event in after.rounds()] == [["ada", "bob"]] * 2 + [["ada", "bob", "cyd"]] * 2
    assert [event.nodes["cyd"].age for event in after.rounds()[2:]] == [0, 0]
    assert state.progress.charges == {}
    kept = after.sites["cyd"].store.load("run-of-a-test", "cyd", 4)
    assert kept.position == 3 * 2 * 4  # the work that was dropped is not trained again, the rest has no gap
    quiet = Federation(tmp_path / "again", recipe(HALF, rounds=4), network)
    with mock.patch.object(Aggregator, "_commit", crash), pytest.raises(KeyboardInterrupt):
        quiet.run()
    again = Federation(tmp_path / "again", recipe(HALF, rounds=4), on_time_after)
    assert largest_difference(weights(again.run()), weights(state)) == 0


def test_a_resume_with_nobody_late_is_bit_identical(tmp_path: Path) -> None:
    """After two rounds cyd's update is in and the next task not given yet."""
    whole = Federation(tmp_path / "whole", recipe(HALF, rounds=6), ONE_LATE)
    Federation(tmp_path / "halves", recipe(HALF, rounds=6), ONE_LATE)
    commit = Aggregator._commit

    def crash(aggregator: Aggregator) -> None:
        commit(aggregator)
        if aggregator.progress.round == 2:
            raise KeyboardInterrupt

    first = Federation(tmp_path / "halves", recipe(HALF, rounds=6), ONE_LATE)
    with mock.patch.object(Aggregator, "_commit", crash), pytest.raises(KeyboardInterrupt):
        first.run()
    second = Federation(tmp_path / "halves", recipe(HALF, rounds=6), ONE_LATE)
    assert largest_difference(weights(second.run()), weights(whole.run())) == 0
    assert without_timings(second.events()) == without_timings(whole.events())
