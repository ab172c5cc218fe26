"""Refusals are counted, and kept over resumes; too many suspend a node; only an operator readmits it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
from tests.support import Delivery, Federation, Network, edited, tampering, tiny_recipe

from photon.aggregator.state import RoundStore
from photon.aggregator.trust import Charge, Trust
from photon.config import Recipe
from photon.errors import RoundFailedError
from photon.fabric.base import Arrival, Lost
from photon.link.update import decode_message, expect_reply, expect_task

LIE = tampering("ada", lambda message: edited(message, training={"steps": 99}))


def recipe(rounds: int, **federation: Any) -> Recipe:
    return tiny_recipe(federation={"rounds": rounds, "quorum": 0.5, "suspend_after": 2, **federation})


def asked(federation: Federation, node: str) -> list[int]:
    """Rounds of the tasks that a node was sent, scores alone included."""
    return [expect_task(decode_message(message)).round for name, message in federation.fabric.sent if name == node]


def run_noting(federation: Federation, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    notes: list[str] = []
    monkeypatch.setattr(federation.tracker, "note", notes.append)
    federation.aggregator.trust._note = notes.append  # taken when the Aggregator was made
    federation.run()
    return notes


def test_after_so_many_refusals_a_node_is_not_asked_for_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    federation = Federation(tmp_path, recipe(4), LIE)
    notes = run_noting(federation, monkeypatch)
    assert asked(federation, "ada") == [0, 1]  # neither to train nor, in rounds 2 to 4, for scores
    assert asked(federation, "bob") == [0, 1, 2, 3, 4]
    reason = "claims 99 steps of a task of 2"
    assert [event.missing for event in federation.rounds()] == [{"ada": f"refused: {reason}"}] * 2 + [{}] * 2
    assert [event.suspended for event in federation.rounds()] == [{}] + [{"ada": reason}] * 3
    assert [sorted(event.silos) for event in federation.evaluations()][-2:] == [["bob", "cyd"]] * 2
    assert notes == [
        f"round 0: the reply of ada was refused (1 of 2): {reason}",
        f"round 1: the reply of ada was refused (2 of 2): {reason}",
        f"ada is suspended after 2 refused replies; to readmit it: photon readmit ada {tmp_path}. "
        f"The last reason: {reason}",
    ]


def test_with_zero_nobody_is_suspended(tmp_path: Path) -> None:
    federation = Federation(tmp_path, recipe(4, suspend_after=0), LIE)
    state = federation.run()
    assert asked(federation, "ada") == [0, 1, 2, 3, 4]
    assert state.progress.charges["ada"].refusals == 4


def failing(node: str, kind: str) -> Network:
    """`node` answers too late, is lost, says that it failed, or answers an older task."""

    def delivery(arrival: Arrival) -> Delivery:
        if arrival.node != node:
            return 0.0, arrival
        match kind:
            case "late":
                return 1e9, arrival
            case "lost":
                return 0.0, Lost(node, "its line broke")
            case "failed":
                return 0.0, Arrival(node, edited(arrival.message, status="failed", error="disk full"))
            case _:
                return 0.0, Arrival(node, edited(arrival.message, nonce="older"))

    return lambda arrivals: [delivery(arrival) for arrival in arrivals]


@pytest.mark.parametrize("kind", ["late", "lost", "failed", "stale"])
def test_who_cannot_answer_is_not_charged(kind: str, tmp_path: Path) -> None:
    federation = Federation(tmp_path, recipe(3, suspend_after=1), failing("ada", kind))
    state = federation.run()
    assert all("ada" in event.missing for event in federation.rounds())
    assert state.progress.charges == {}
    assert asked(federation, "ada") == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "lie",
    [
        lambda message: b"noise",
        lambda message: message[:-1],
        lambda message: edited(message, run="other"),
        lambda message: edited(message, node="bob"),
        lambda message: edited(message, evaluation={"nats": -1.0}),
    ],
)
def test_every_check_that_fails_is_charged_to_the_sender(lie: Callable[[bytes], bytes], tmp_path: Path) -> None:
    state = Federation(tmp_path, recipe(2), tampering("ada", lie)).run()
    assert {name: charge.refusals for name, charge in state.progress.charges.items()} == {"ada": 2}


def test_a_wrong_score_alone_is_charged_too(tmp_path: Path) -> None:
    """Also that of the finished model, with which no round is trained any more."""

    def network(arrivals: list[Arrival]) -> list[Delivery]:
        lies = [edited(a.message, evaluation={"nats": -1.0}) if a.node == "ada" else a.message for a in arrivals]
        trained = expect_reply(decode_message(arrivals[0].message)).training is not None
        return honest(arrivals if trained else [Arrival(a.node, lie) for a, lie in zip(arrivals, lies, strict=True)])

    state = Federation(tmp_path, recipe(1), network).run()
    assert state.progress.charges["ada"] == Charge(1, "claims -1 nats for 18 tokens")
    assert RoundStore(tmp_path / "rounds", 2, 0).load(None).progress.charges == state.progress.charges


def honest(arrivals: Iterable[Arrival]) -> list[Delivery]:
    return [(0.0, arrival) for arrival in arrivals]


def test_counts_survive_a_resume(tmp_path: Path) -> None:
    Federation(tmp_path, recipe(1), LIE).run()
    resumed = Federation(tmp_path, recipe(4), LIE)
    assert resumed.aggregator.trust.charges == {"ada": Charge(1, "claims 99 steps of a task of 2")}
    resumed.run()
    assert asked(resumed, "ada") == [1]  # the second refusal, not the second since the resume
    again = Federation(tmp_path, recipe(6))
    again.run()
    assert asked(again, "ada") == []


def test_a_failed_round_leaves_the_counts_as_they_were_committed(tmp_path: Path) -> None:
    Federation(tmp_path, recipe(1), LIE).run()
    strict = Federation(tmp_path, recipe(2, quorum=1.0), LIE)
    with pytest.raises(RoundFailedError, match=r"round 1: . of 3 nodes counted"):
        strict.run()
    assert strict.store.load(None).progress.charges["ada"].refusals == 1


def test_an_operator_readmits_a_node_and_its_count_begins_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Federation(tmp_path, recipe(2), LIE).run()
    file = tmp_path / "operator" / "readmit-ada"
    file.parent.mkdir()
    file.touch()
    readmitted = Federation(tmp_path, recipe(5), LIE)
    notes = run_noting(readmitted, monkeypatch)
    assert asked(readmitted, "ada") == [2, 3]  # two more lies, and it is out again
    assert not file.exists()
    assert "ada is suspended after 2 refused replies" in notes[0]
    assert "the operator readmits ada; its refusals (2) are forgotten" in notes
    assert readmitted.store.load(None).progress.charges["ada"].refusals == 2


def test_a_readmission_is_heeded_while_the_run_goes_on(tmp_path: Path) -> None:
    file = tmp_path / "operator" / "readmit-ada"
    file.parent.mkdir()

    def network(arrivals: list[Arrival]) -> list[Delivery]:
        if len(federation.rounds()) == 3:
            file.touch()  # while round 3 is under way
        return LIE(arrivals) if len(federation.rounds()) < 2 else honest(arrivals)

    federation = Federation(tmp_path, recipe(6), network)
    federation.run()
    assert asked(federation, "ada") == [0, 1, 4, 5, 6]
    assert not file.exists()


def test_the_word_of_the_operator_survives_a_failed_round(tmp_path: Path) -> None:
    """The file goes when its round is committed, not when it is read."""
    Federation(tmp_path, recipe(2), LIE).run()
    file = tmp_path / "operator" / "readmit-ada"
    file.parent.mkdir()
    file.touch()
    with pytest.raises(RoundFailedError):
        Federation(tmp_path, recipe(3, quorum=1.0), failing("bob", "lost")).run()
    assert file.exists()
    resumed = Federation(tmp_path, recipe(3))
    assert asked(resumed, "ada") == []
    resumed.run()
    assert asked(resumed, "ada") == [2, 3]
    assert not file.exists()


def test_files_of_an_operator_that_mean_nothing_do_no_harm(tmp_path: Path) -> None:
    notes: list[str] = []
    (tmp_path / "readmit-nobody").touch()
    (tmp_path / "readmit-eve").mkdir()
    (tmp_path / "notes.txt").touch()
    trust = Trust({"eve": Charge(5, "lied")}, 3, tmp_path, notes.append)
    trust.readmit()
    trust.committed()
    assert trust.suspended == {}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "readmit-eve"]
    assert any("nothing is held against" in note and "'nobody'" in note for note in notes)
    assert any("cannot remove" in note and "readmit-eve" in note for note in notes)


def test_without_an_operator_there_is_no_readmission() -> None:
    notes: list[str] = []
    trust = Trust({"eve": Charge(3, "lied")}, 3, None, notes.append)
    trust.announce()
    trust.readmit()
    assert trust.suspended == {"eve": "lied"}
    assert notes == ["eve is suspended after 3 refused replies. The last reason: lied"]
