"""The start of a round: who is absent is waited for, so long and no longer, and an error says who never came."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from tests.support import LENGTH, Federation, InlineFabric, edited, tiny_recipe

from photon.aggregator import assemble as assemble_module
from photon.aggregator.assemble import POOLED, RollCall, assemble
from photon.config import Recipe
from photon.errors import RoundFailedError
from photon.events import NodeProgress
from photon.fabric.base import Arrival, FabricEvent, Lost, NodeInfo
from photon.link.ledger import Ledger
from photon.link.update import decode_message, encode_message, expect_task
from photon.sites import POOLED as POOLED_SITE
from photon.track import Tracker

OWNERS = ("ada", "bob", "cyd", "dan")


class Gathering(InlineFabric):
    """Nodes that connect at the time in `at` (never, if they have none); `events` arrive while nobody works."""

    def __init__(self, at: Mapping[str, float], events: list[FabricEvent] | None = None) -> None:
        super().__init__({}, [NodeInfo(name, 1) for name in OWNERS])
        self.at, self.events = at, events or []

    def nodes(self) -> list[NodeInfo]:
        return [info for info in self.infos if self.now >= self.at.get(info.name, float("inf"))]

    def receive(self, timeout_s: float) -> FabricEvent | None:
        return self.events.pop(0) if self.events else super().receive(timeout_s)


class Notes(Tracker):
    """Keeps what people are shown."""

    def __init__(self) -> None:
        super().__init__([], [])
        self.notes: list[str] = []
        self.seen: list[NodeProgress] = []

    def note(self, text: str) -> None:
        self.notes.append(text)

    def progress(self, progress: NodeProgress) -> None:
        self.seen.append(progress)


def call(quorum: int = 2, suspended: Mapping[str, str] | None = None, absent: frozenset[str] = frozenset()) -> RollCall:
    out = dict(suspended or {})
    return RollCall(
        round=7,
        expected=frozenset(set(OWNERS) - out.keys()),
        absent=absent,
        suspended=out,
        quorum=quorum,
        assemble_s=120.0,
        deadline_s=1000.0,
    )


def gather(fabric: Gathering, call: RollCall, tracker: Notes | None = None, ledger: Ledger | None = None) -> list[str]:
    with mock.patch.object(assemble_module, "time", SimpleNamespace(monotonic=lambda: fabric.now)):
        return [info.name for info in assemble(fabric, ledger or Ledger(), tracker or Notes(), call)]


def test_with_everybody_there_nothing_is_waited_for() -> None:
    fabric, tracker = Gathering(dict.fromkeys(OWNERS, 0.0)), Notes()
    with mock.patch.object(fabric, "receive", side_effect=AssertionError("no event may be taken")):
        assert gather(fabric, call(), tracker) == list(OWNERS)
    assert tracker.notes == []


def test_a_quorum_waits_for_the_others_but_not_for_ever() -> None:
    late = Gathering({"ada": 0.0, "bob": 3.0, "cyd": 40.0, "dan": 90.0})
    assert gather(late, call()) == list(OWNERS)
    assert late.now == pytest.approx(90.0)
    fabric, tracker = Gathering({"ada": 0.0, "bob": 3.0, "cyd": 121.0}), Notes()
    assert gather(fabric, call(), tracker) == ["ada", "bob"]
    assert fabric.now == pytest.approx(120.0)
    assert tracker.notes == [
        "round 7: waiting for bob, cyd, dan to connect",
        "round 7: goes on without cyd, dan",
    ]


def test_below_the_quorum_it_waits_on_and_begins_with_it() -> None:
    fabric = Gathering({"ada": 0.0, "cyd": 700.0, "dan": 705.0})
    assert gather(fabric, call()) == ["ada", "cyd"]
    assert fabric.now == pytest.approx(700.0)


@pytest.mark.parametrize(
    ("at", "sentence"),
    [
        ({}, r"round 7: no node is connected; federation.quorum asks for 2.*Missing: ada, bob, cyd, dan\."),
        ({"bob": 5.0}, r"round 7: only bob connected; .*Missing: ada, cyd, dan\. Nothing was lost.*resume"),
    ],
)
def test_who_never_came_is_named(at: Mapping[str, float], sentence: str) -> None:
    fabric = Gathering(at)
    with pytest.raises(RoundFailedError, match=sentence):
        gather(fabric, call())
    assert fabric.now == pytest.approx(1120.0)


def test_who_was_waited_for_in_vain_is_not_waited_for_again() -> None:
    """A node that is away for weeks must not cost every round its patience; a new absence is waited for."""
    fabric = Gathering({"ada": 0.0, "bob": 0.0, "cyd": 0.0})
    assert gather(fabric, call(absent=frozenset({"dan"}))) == ["ada", "bob", "cyd"]
    assert fabric.now == 0.0
    assert gather(fabric, call()) == ["ada", "bob", "cyd"]
    assert fabric.now == 120.0  # it can fail: without the memory it waits
    fabric = Gathering({"ada": 0.0, "bob": 0.0})
    gather(fabric, call(absent=frozenset({"dan"})))
    assert fabric.now == 120.0  # cyd is newly missing
    fabric = Gathering({"ada": 0.0, "dan": 50.0})
    assert gather(fabric, call(absent=frozenset({"bob", "cyd", "dan"}))) == ["ada", "dan"]
    assert fabric.now == 50.0  # below the quorum everybody is hoped for, and with it nobody is


def test_suspended_nodes_are_neither_waited_for_nor_given_out() -> None:
    fabric = Gathering({"ada": 0.0, "bob": 0.0, "cyd": 0.0, "dan": 0.0})
    assert gather(fabric, call(suspended={"dan": "lied"})) == ["ada", "bob", "cyd"]
    assert fabric.now == 0.0
    fabric = Gathering({"ada": 0.0, "bob": 0.0, "cyd": 0.0})
    assert gather(fabric, call(suspended={"dan": "lied"})) == ["ada", "bob", "cyd"]
    assert fabric.now == 0.0


def test_a_quorum_that_suspensions_have_put_out_of_reach_is_not_waited_for() -> None:
    fabric = Gathering({"ada": 0.0, "bob": 0.0, "cyd": 0.0, "dan": 0.0})
    with pytest.raises(RoundFailedError, match=r"Suspended: cyd: lied; dan: lied too\..*readmit") as failure:
        gather(fabric, call(3, {"dan": "lied too", "cyd": "lied"}))
    assert "Missing" not in str(failure.value)
    assert fabric.now == 0.0


def test_what_arrives_meanwhile_is_counted_and_changes_nothing() -> None:
    progress = NodeProgress(node="ada", round=6, state="sending")
    events: list[FabricEvent] = [Arrival("bob", b"x" * 77), progress, Lost("cyd", "gone"), Arrival("eve", b"x" * 5)]
    fabric, tracker, ledger = Gathering({"ada": 0.0, "bob": 0.0}, events), Notes(), Ledger()
    assert gather(fabric, call(), tracker, ledger) == ["ada", "bob"]
    assert (ledger.of("bob").up.encoded, ledger.of("eve").up.encoded, ledger.total.up.encoded) == (77, 5, 82)
    assert tracker.seen == [progress]
    assert fabric.now == pytest.approx(120.0)


def test_a_node_that_only_scores_makes_no_quorum_but_is_asked() -> None:
    fabric = Gathering(dict.fromkeys(OWNERS, 0.0))
    fabric.infos = [NodeInfo(name, 1, trains=name in ("ada", "bob")) for name in OWNERS]
    assert gather(fabric, call(2)) == list(OWNERS)
    with pytest.raises(RoundFailedError, match="only ada, bob connected"):
        gather(fabric, call(3))


def test_expected_are_the_silos_or_the_pooled_trainer() -> None:
    assert POOLED == POOLED_SITE
    assert RollCall.of(tiny_recipe(), 0, {}, 1).expected == {"ada", "bob", "cyd"}
    assert RollCall.of(tiny_recipe(), 0, {"bob": "lied"}, 1).expected == {"ada", "cyd"}
    assert RollCall.of(tiny_recipe(federation={"outer": "none"}), 0, {}, 1).expected == {POOLED}


# --- in a federation ------------------------------------------------------------------------------------------------


def connecting(federation: Federation, at: Mapping[str, float]) -> None:
    """Nodes of a federation that connect at the time in `at`; others are there from the start."""
    infos = federation.fabric.infos
    federation.fabric.nodes = lambda: [  # type: ignore[method-assign]  # a network of its own for one test
        info for info in infos if federation.fabric.now >= at.get(info.name, 0.0)
    ]


def recipe(**federation: Any) -> Recipe:
    return tiny_recipe(federation={"rounds": 2, "quorum": 0.6, **federation})


def test_a_late_start_ends_in_the_same_model(tmp_path: Path) -> None:
    on_time, late = Federation(tmp_path / "a", recipe()), Federation(tmp_path / "b", recipe())
    connecting(late, {"ada": 5.0, "bob": 60.0, "cyd": 119.0})
    assert late.run().model_sha256 == on_time.run().model_sha256


def test_who_is_not_connected_is_not_asked(tmp_path: Path) -> None:
    federation = Federation(tmp_path, recipe(), lambda arrivals: [(2.0, arrival) for arrival in arrivals])
    connecting(federation, {"cyd": 121.0})  # while the first round, begun at 120, goes on; in time for the second
    federation.run()
    tasks = [(node, expect_task(decode_message(message)).round) for node, message in federation.fabric.sent]
    assert [round_index for node, round_index in tasks if node == "cyd"] == [1, 2]
    assert [round_index for node, round_index in tasks if node == "ada"] == [0, 1, 2]
    assert [sorted(event.nodes) for event in federation.rounds()] == [["ada", "bob"], ["ada", "bob", "cyd"]]
    assert sorted(federation.evaluations()[0].silos) == ["ada", "bob"]


def test_the_quorum_is_of_k_whoever_is_connected(tmp_path: Path) -> None:
    """0.6 of three is two; of the one node that is there it would be one, and one owner would be the federation."""
    federation = Federation(tmp_path, recipe())
    connecting(federation, {"bob": 1e9, "cyd": 1e9})
    with pytest.raises(RoundFailedError, match=r"only ada connected; federation.quorum asks for 2.*Missing: bob, cyd"):
        federation.run()
    assert federation.store.rounds() == [0]
    assert federation.fabric.sent == []
    assert federation.fabric.now == pytest.approx(120 + 6 * 3600)


def test_a_node_that_leaves_between_rounds_costs_no_committed_round(tmp_path: Path) -> None:
    whole = Federation(tmp_path / "whole", recipe(quorum=1.0)).run()
    leaving = Federation(tmp_path / "leaving", recipe(quorum=1.0))
    infos = leaving.fabric.infos
    leaving.fabric.nodes = lambda: infos[: 3 - len(leaving.rounds())]  # type: ignore[method-assign]  # as above
    with pytest.raises(RoundFailedError, match="round 1: only ada, bob connected"):
        leaving.run()
    assert leaving.store.rounds() == [0, 1]
    assert Federation(tmp_path / "leaving", recipe(quorum=1.0)).run().model_sha256 == whole.model_sha256


@pytest.mark.parametrize(("back_after_s", "scores"), [(60.0, ["ada", "bob", "cyd"]), (121.0, ["ada", "bob"])])
def test_the_final_score_waits_for_owners_as_a_round_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, back_after_s: float, scores: list[str]
) -> None:
    """Else the last score, which stands beside the others, would be of other text than they are."""
    federation, notes = Federation(tmp_path, recipe(rounds=1)), list[str]()
    monkeypatch.setattr(federation.tracker, "note", notes.append)
    infos, fabric = federation.fabric.infos, federation.fabric
    fabric.nodes = lambda: [  # type: ignore[method-assign]  # as above
        info for info in infos if info.name != "cyd" or not federation.rounds() or fabric.now >= back_after_s
    ]
    federation.run()
    assert [sorted(event.silos) for event in federation.evaluations()] == [["ada", "bob", "cyd"], scores]
    assert fabric.now == min(back_after_s, 120.0)
    assert notes[0] == "the final score: waiting for cyd to connect"
    assert ("the final score lacks cyd: {'cyd': 'not connected'}" in notes) == (scores == ["ada", "bob"])


def test_the_final_score_does_not_wait_again_for_who_was_waited_for_in_vain(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation, notes = Federation(tmp_path, recipe(rounds=1)), list[str]()
    monkeypatch.setattr(federation.tracker, "note", notes.append)
    connecting(federation, {"cyd": 1e9})
    federation.run()
    assert federation.fabric.now == 120.0
    assert notes == [
        "round 0: waiting for cyd to connect",
        "round 0: goes on without cyd",
        "the final score lacks cyd: {'cyd': 'not connected'}",
    ]


def test_without_anybody_connected_the_final_score_costs_no_more_than_the_patience_of_a_round(tmp_path: Path) -> None:
    federation = Federation(tmp_path, recipe(rounds=1))
    infos = federation.fabric.infos
    federation.fabric.nodes = lambda: [] if federation.rounds() else infos  # type: ignore[method-assign]  # as above
    assert federation.run().progress.round == 1
    assert federation.fabric.now == 120.0
    assert [event.round for event in federation.evaluations()] == [0]


def test_stray_bytes_are_on_the_ledger_of_the_run(tmp_path: Path) -> None:
    federation = Federation(tmp_path, recipe(rounds=1))
    connecting(federation, {"cyd": 10.0})
    stray = Arrival("ada", b"PHTN" + bytes(996))
    receive = federation.fabric.receive
    events = [stray]
    federation.fabric.receive = (  # type: ignore[method-assign]  # as above
        lambda timeout_s: events.pop() if events else receive(timeout_s)
    )
    progress = federation.run().progress
    assert progress.link.up.encoded == 1000 + sum(len(message) for _, message in federation.fabric.received)


def test_the_pooled_trainer_alone_makes_the_quorum_of_the_baseline(tmp_path: Path) -> None:
    federation = Federation(tmp_path, tiny_recipe(federation={"rounds": 1, "outer": "none"}))
    federation.fabric.infos[:] = [
        *(NodeInfo(name, 2 * LENGTH, trains=False) for name in ("ada", "bob", "cyd")),
        NodeInfo(POOLED, 2 * LENGTH, evaluates=False),
    ]
    federation.fabric.handlers = {
        **federation.fabric.handlers,
        POOLED: lambda message: as_ada(federation, message),
    }
    federation.run()
    assert sorted(federation.rounds()[0].nodes) == [POOLED]
    assert federation.fabric.now == 0.0


def as_ada(federation: Federation, message: bytes) -> bytes:
    """ada does the pooled trainer's work and answers in its name."""
    received = decode_message(message)
    renamed = encode_message(expect_task(received).model_copy(update={"node": "ada"}), received.body)
    return edited(federation.fabric.handlers["ada"](renamed), node=POOLED)
