"""Quorum, grace and deadline on a made-up clock: nothing is waited for without end, nothing counts twice."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import cast
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support import Delivery, InlineFabric, edited

from photon.aggregator import exchange as exchange_module
from photon.aggregator.downlink import Downlink, Told
from photon.aggregator.exchange import Exchange, Patience, RawBytes
from photon.events import NodeProgress
from photon.fabric.base import Arrival, FabricEvent, Lost, NodeInfo
from photon.link.ledger import Flow, Ledger
from photon.link.tensors import sha256_hex
from photon.link.update import Reply, Task, decode_message, encode_message, expect_task

NODES = ("ada", "bob", "cyd", "dan")
PATIENCE = Patience(quorum=0.5, grace_s=10.0, deadline_s=100.0)
RAW = RawBytes(whole=4000, difference=700, update=600)
WHOLE = Downlink.tell_whole(b"the whole base", sha256_hex(b"the whole base"))
DIFFERENCE = Told("difference", "1" * 64, "int4 | zstd", sha256_hex(b"less"), b"less", {"int4": 9, "zstd": 4})


def answer(data: bytes, **changes: object) -> bytes:
    """An ok reply to a serialised task; the Exchange looks no further than its header."""
    fields = expect_task(decode_message(data)).model_dump(include={"run", "round", "node", "nonce", "base_sha256"})
    return encode_message(Reply.model_validate({**fields, "status": "ok", **changes}), b"update")


def telling(task: Task, told: Told) -> Task:
    fields = {"form": told.form, "held_sha256": told.held_sha256, "codec": told.codec, "body_sha256": told.body_sha256}
    return task.model_copy(update=fields)


def retold(task: Task) -> Task:
    """The same task anew, with the whole base."""
    return telling(task, WHOLE).model_copy(update={"nonce": f"{task.nonce}-again"})


class Trial:
    """One exchange over a network that gives each node's reply the times in `at` (none: it never comes)."""

    def __init__(
        self,
        at: dict[str, Iterable[float]],
        patience: Patience = PATIENCE,
        change: Callable[[list[Arrival]], list[Delivery]] | None = None,
        evaluators: Iterable[str] = (),
        slots: int = len(NODES),
    ) -> None:
        self.fabric = InlineFabric(
            dict.fromkeys(NODES, answer),
            [NodeInfo(name, 1) for name in NODES],
            change or (lambda arrivals: [(s, a) for a in arrivals for s in at.get(a.node, ())]),
        )
        self.fabric.slots = slots
        self.ledger, self.progress = Ledger(), list[NodeProgress]()
        self.exchange = Exchange(
            self.fabric, self.ledger, patience, self.progress.append, lambda task: (retold(task), WHOLE), RAW
        )
        self.tasks = {name: self.task(name, 0 if name in evaluators else 5) for name in NODES}
        self.counted: list[str] = []

    def send(self, told: Told = WHOLE) -> None:
        self.exchange.send({name: (telling(task, told), told) for name, task in self.tasks.items()})

    def task(self, node: str, tau: int) -> Task:
        return Task(
            run="r", round=4, node=node, nonce=f"nonce-{node}", base_sha256="0" * 64,
            evaluate=tau == 0, sequential_step=20, tau=tau, nodes=2, deadline_s=100.0,
        )  # fmt: skip

    def run(self, refuse: Iterable[str] = (), told: Told = WHOLE) -> Trial:
        with mock.patch.object(exchange_module, "time", SimpleNamespace(monotonic=lambda: self.fabric.now)):
            self.send(told)
            for task, message in self.exchange.replies():
                assert message.header.node == task.node
                self.counted.append(task.node)
                if task.node in refuse:
                    self.exchange.refuse(task.node, "no good")
        return self


def test_all_answer_and_the_exchange_ends_with_the_last() -> None:
    trial = Trial({"ada": [3.0], "bob": [1.0], "cyd": [2.0], "dan": [4.0]}).run()
    assert trial.counted == ["bob", "cyd", "ada", "dan"]
    assert trial.fabric.now == 4.0
    assert trial.exchange.missing == {}
    assert trial.fabric.abandoned == []


def test_after_the_quorum_the_others_have_the_grace_time_and_no_more() -> None:
    """Half of four is two: the second reply, at 2 s, starts ten seconds of grace; later replies do not restart it."""
    trial = Trial({"ada": [1.0], "bob": [2.0], "cyd": [11.9], "dan": [12.1]}).run()
    assert trial.counted == ["ada", "bob", "cyd"]
    assert trial.fabric.now == pytest.approx(12.0)
    assert trial.exchange.missing == {"dan": "no answer before the deadline"}
    assert trial.fabric.abandoned == ["dan"]
    assert trial.exchange.quorum_is_met


def test_nothing_is_waited_for_beyond_the_deadline() -> None:
    silent = Trial({}).run()
    assert silent.fabric.now == pytest.approx(110.0)  # deadline and grace, so that the last second's reply can travel
    assert silent.counted == []
    assert set(silent.exchange.missing) == set(silent.fabric.abandoned) == set(NODES)
    assert not silent.exchange.quorum_is_met
    late = Trial({"ada": [1.0], "bob": [111.0]}, Patience(1.0, 10.0, 100.0)).run()
    assert (late.counted, late.fabric.now) == (["ada"], pytest.approx(110.0))


@pytest.mark.parametrize(("slots", "waves"), [(4, 1), (3, 2), (2, 2), (1, 4)])
def test_nodes_that_queue_for_a_device_have_the_time_of_all_before_them(slots: int, waves: int) -> None:
    assert Trial({}, slots=slots).run().fabric.now == pytest.approx(100.0 * waves + 10.0)


def test_the_quorum_ends_no_exchange_before_its_grace_even_if_the_deadline_is_near() -> None:
    trial = Trial({"ada": [1.0], "bob": [105.0], "cyd": [109.0]}).run()
    assert trial.counted == ["ada", "bob", "cyd"]
    assert trial.fabric.now == pytest.approx(110.0)  # and never later than without a quorum


def test_a_refused_reply_does_not_count_towards_the_quorum() -> None:
    trial = Trial({"ada": [1.0], "bob": [2.0], "cyd": [50.0]}).run(refuse=["ada"])
    assert trial.counted == ["ada", "bob", "cyd"]  # with ada, two would have been a quorum, and cyd too late
    assert trial.exchange.missing == {"ada": "refused: no good", "dan": "no answer before the deadline"}
    assert trial.exchange.quorum_is_met
    refused = Trial({"ada": [1.0], "bob": [2.0]}).run(refuse=["ada", "bob"])
    assert not refused.exchange.quorum_is_met


def test_the_quorum_is_of_those_asked_to_train() -> None:
    """Owners who only score the base neither help a quorum nor keep one from being met."""
    trial = Trial({"ada": [5.0], "cyd": [1.0], "dan": [2.0]}, Patience(1.0, 10.0, 100.0), evaluators=["cyd", "dan"])
    trial.run()
    assert trial.exchange.quorum == 2
    assert not trial.exchange.quorum_is_met
    scoring = Trial({"ada": [1.0]}, Patience(0.25, 0.0, 100.0), evaluators=NODES).run()
    assert scoring.exchange.quorum_is_met  # where nobody trains, all count


@pytest.mark.parametrize(("share", "quorum"), [(1.0, 4), (0.76, 4), (0.75, 3), (0.5, 2), (0.26, 2), (0.01, 1)])
def test_a_quorum_is_rounded_up(share: float, quorum: int) -> None:
    trial = Trial({}, Patience(share, 0.0, 1.0))
    trial.send()
    assert trial.exchange.quorum == quorum


def test_a_quorum_that_is_a_whole_number_is_not_rounded_up() -> None:
    names = [f"n{i}" for i in range(25)]
    trial = Trial({}, Patience(0.28, 0.0, 1.0))
    trial.fabric.handlers = dict.fromkeys(names, answer)
    trial.tasks = {name: trial.task(name, 5) for name in names}
    trial.send()
    assert trial.exchange.quorum == 7


def test_a_lost_node_is_not_waited_for() -> None:
    def change(arrivals: list[Arrival]) -> list[Delivery]:
        return [(1.0, Lost(a.node, "its worker died") if a.node == "ada" else a) for a in arrivals]

    trial = Trial({}, change=change).run()
    assert trial.fabric.now == 1.0
    assert trial.exchange.missing == {"ada": "its worker died"}


def test_what_was_given_up_stays_given_up() -> None:
    """An answer after the node was reported lost is on the ledger, and nowhere else."""

    def change(arrivals: list[Arrival]) -> list[Delivery]:
        ada = arrivals[0]
        return [
            (1.0, Lost("ada", "gone")),
            (2.0, ada),
            (2.5, Lost("ada", "gone again")),
            *((3.0, a) for a in arrivals[1:]),
        ]

    trial = Trial({}, change=change).run()
    assert trial.counted == ["bob", "cyd", "dan"]
    assert trial.exchange.missing == {"ada": "gone"}
    assert trial.ledger.of("ada").up.encoded == len(answer(trial.fabric.sent[0][1]))


def test_the_answer_to_an_earlier_task_does_not_stand_in_for_this_one() -> None:
    def change(arrivals: list[Arrival]) -> list[Delivery]:
        early = [Arrival(a.node, edited(a.message, nonce="old")) for a in arrivals]
        return [(1.0, a) for a in early] + [(2.0, a) for a in arrivals]

    trial = Trial({}, change=change).run()
    assert sorted(trial.counted) == list(NODES)
    assert trial.ledger.total.up.encoded == sum(len(message) for _, message in trial.fabric.received)
    assert len(trial.fabric.received) == 8


def test_who_speaks_for_another_is_refused_and_the_other_is_not() -> None:
    def change(arrivals: list[Arrival]) -> list[Delivery]:
        of = {a.node: a.message for a in arrivals}
        return [(1.0, Arrival("ada", of["bob"])), *((2.0, a) for a in arrivals if a.node != "ada")]

    trial = Trial({}, change=change).run()
    assert sorted(trial.counted) == ["bob", "cyd", "dan"]
    assert "sent by 'ada' in the name of 'bob'" in trial.exchange.missing["ada"]


def test_a_sender_that_was_not_asked_changes_nothing_but_the_ledger() -> None:
    trial = Trial({}, change=lambda arrivals: [(1.0, Arrival("eve", b"x" * 77)), *((2.0, a) for a in arrivals)]).run()
    assert sorted(trial.counted) == list(NODES)
    assert trial.exchange.missing == {}
    assert trial.ledger.of("eve").up.encoded == 77


def test_progress_is_passed_on_and_ends_for_every_node() -> None:
    report = NodeProgress(node="ada", round=4, state="training", step=2, steps=5)
    trial = Trial({}, change=lambda arrivals: [(0.5, report), *((1.0, a) for a in arrivals if a.node != "dan")]).run()
    assert trial.progress[0] == report
    assert {p.node: p.state for p in trial.progress} == {"ada": "done", "bob": "done", "cyd": "done", "dan": "failed"}


delivery = st.tuples(st.sampled_from([*NODES, "eve"]), st.floats(0, 130), st.sampled_from("okxlf"))


@settings(deadline=None)
@given(st.lists(delivery, max_size=14), st.floats(0.1, 1.0), st.floats(0, 20), st.integers(1, 4))
def test_any_network_gives_each_node_one_outcome_in_bounded_time(
    plan: list[tuple[str, float, str]], quorum: float, grace_s: float, slots: int
) -> None:
    """o, k: the reply; x: noise; l: lost; f: a failure."""

    def event(node: str, kind: str, replies: dict[str, bytes]) -> FabricEvent:
        reply = replies.get(node, b"?")
        match kind:
            case "x":
                return Arrival(node, reply[:20])
            case "l":
                return Lost(node, "lost")
            case "f" if node in replies:
                return Arrival(node, reply.replace(b'"status":"ok"', b'"status":"failed"'))
            case _:
                return Arrival(node, reply)

    def change(arrivals: list[Arrival]) -> list[Delivery]:
        replies = {a.node: a.message for a in arrivals}
        return [(at, event(node, kind, replies)) for node, at, kind in plan]

    trial = Trial({}, Patience(quorum, grace_s, 100.0), change, slots=slots).run()
    exchange = trial.exchange
    assert len(set(trial.counted)) == len(trial.counted)
    assert set(trial.counted) | set(exchange.missing) == set(NODES)
    assert not set(trial.counted) & set(exchange.missing)
    assert exchange.quorum_is_met == (len(trial.counted) >= exchange.quorum)
    assert trial.fabric.now <= 100.0 * -(-4 // slots) + grace_s + 1e-9
    first = {node: min((at, i) for i, (n, at, k) in enumerate(plan) if n == node) for node, _, _ in plan}
    assert all(plan[first[node][1]][2] in "ok" for node in trial.counted)  # what comes first is what counts
    assert trial.ledger.total.down.encoded == sum(len(message) for _, message in trial.fabric.sent)
    assert trial.ledger.total.up.encoded == sum(len(message) for _, message in trial.fabric.received)
    assert trial.ledger.round == trial.ledger.total


OVERSAMPLED = Patience(quorum=1.0, grace_s=10.0, deadline_s=100.0, nodes=2)


def test_with_k_usable_replies_the_exchange_ends_and_the_others_are_abandoned() -> None:
    trial = Trial({"ada": [3.0], "bob": [1.0], "cyd": [2.0], "dan": [2.5]}, OVERSAMPLED).run()
    assert trial.counted == ["bob", "cyd"]
    assert trial.fabric.now == 2.0
    assert trial.exchange.missing == dict.fromkeys(["ada", "dan"], "not needed: 2 others had answered")
    assert trial.exchange.refused == {}
    assert trial.fabric.abandoned == ["ada", "dan"]
    assert trial.exchange.quorum_is_met
    assert "failed" not in {progress.state for progress in trial.progress}


def test_the_quorum_is_a_share_of_k_and_not_of_the_oversample() -> None:
    half = Patience(quorum=0.5, grace_s=10.0, deadline_s=100.0, nodes=2)
    trial = Trial({"ada": [5.0]}, half).run()
    assert trial.exchange.quorum == 1
    assert trial.exchange.quorum_is_met
    assert trial.fabric.now == 15.0  # its grace: K are not in


def test_a_refused_reply_is_none_of_the_k() -> None:
    trial = Trial({"ada": [1.0], "bob": [2.0], "cyd": [3.0], "dan": [4.0]}, OVERSAMPLED).run(refuse=["ada"])
    assert trial.counted == ["ada", "bob", "cyd"]
    assert trial.exchange.missing.keys() == {"ada", "dan"}
    assert trial.exchange.refused == {"ada": "no good"}


def test_owners_who_only_score_have_the_grace_time_though_k_are_in() -> None:
    one = Patience(quorum=1.0, grace_s=10.0, deadline_s=100.0, nodes=1)
    trial = Trial({"ada": [9.0], "bob": [1.0], "cyd": [8.0], "dan": [12.0]}, one, evaluators=["cyd", "dan"]).run()
    assert trial.counted == ["bob", "cyd"]
    assert trial.fabric.now == 11.0
    assert set(trial.fabric.abandoned) == {"ada", "dan"}


def test_what_is_refused_is_told_from_what_is_missing() -> None:
    def change(arrivals: list[Arrival]) -> list[Delivery]:
        of = {a.node: a.message for a in arrivals}
        return [
            (1.0, Arrival("ada", b"noise")),
            (1.0, Arrival("bob", edited(of["bob"], status="failed", error="disk full"))),
            (1.0, Arrival("cyd", edited(of["cyd"], run="x"))),
            (1.0, Lost("dan", "gone")),
        ]

    trial = Trial({}, change=change).run()
    assert trial.exchange.refused.keys() == {"ada", "cyd"}
    assert trial.exchange.missing["bob"] == "the node reports: disk full"
    assert all(trial.exchange.missing[node].startswith("refused: ") for node in trial.exchange.refused)


def test_a_reason_of_megabytes_is_cut() -> None:
    trial = Trial({"ada": [1.0]})
    trial.send()
    trial.exchange.refuse("ada", "x" * 10**6)
    assert len(trial.exchange.missing["ada"]) == len(trial.exchange.refused["ada"]) == 2000


# --- a node that lacks what its task builds on -----------------------------------------------------------------------


def forgetful(data: bytes) -> bytes:
    """Of a node that holds no base: it wants the whole of it."""
    lacks = expect_task(decode_message(data)).form != "whole"
    return answer(data, status="lacks", error="a new disk") if lacks else answer(data)


def test_a_node_that_lacks_the_base_is_asked_once_more_with_all_of_it() -> None:
    trial = Trial({"ada": [3.0], "bob": [1.0], "cyd": [2.0], "dan": [4.0]})
    trial.fabric.handlers["ada"] = forgetful
    trial.run(told=DIFFERENCE)
    assert sorted(trial.counted) == list(NODES)
    assert trial.fabric.now == 6.0
    assert trial.exchange.missing == trial.exchange.refused == {}
    messages = [decode_message(message) for node, message in trial.fabric.sent if node == "ada"]
    first, second = (expect_task(message) for message in messages)
    assert (first.form, second.form) == ("difference", "whole")
    assert first.is_same_work(second)
    assert first.nonce != second.nonce
    assert [bytes(cast(memoryview, message.body)) for message in messages] == [b"less", b"the whole base"]
    assert len(trial.fabric.sent) == 5
    assert "gets the whole base" in {progress.note for progress in trial.progress if progress.node == "ada"}


def test_both_ways_of_telling_are_on_the_ledger_and_so_is_the_reply_between() -> None:
    trial = Trial({name: [1.0] for name in NODES})
    trial.fabric.handlers["ada"] = forgetful
    trial.run(told=DIFFERENCE)
    down, up = trial.ledger.of("ada").down, trial.ledger.of("ada").up
    sent = [len(message) for node, message in trial.fabric.sent if node == "ada"]
    received = [len(message) for node, message in trial.fabric.received if node == "ada"]
    assert (len(sent), len(received)) == (2, 2)
    assert down == Flow(
        raw=RAW.difference + RAW.whole,
        body=len(b"less") + len(b"the whole base"),
        encoded=sum(sent),
        sent=sum(sent),
        stages=DIFFERENCE.stage_bytes,
    )
    assert (up.encoded, up.raw, up.body) == (sum(received), 2 * RAW.update, 2 * len(b"update"))
    assert trial.ledger.of("bob").down.raw == RAW.difference


def test_who_lacks_what_was_sent_whole_has_failed_and_is_not_charged() -> None:
    """Else a node could keep an exchange going for ever."""
    trial = Trial({name: [1.0] for name in NODES})
    trial.fabric.handlers["ada"] = lambda data: answer(data, status="lacks", error="nowhere to put it")
    trial.run(told=DIFFERENCE)
    assert sorted(trial.counted) == ["bob", "cyd", "dan"]
    assert trial.exchange.missing == {"ada": "the node lacks the base that it was sent: nowhere to put it"}
    assert trial.exchange.refused == {}
    assert len([node for node, _ in trial.fabric.sent if node == "ada"]) == 2


def test_the_answer_to_the_first_telling_does_not_count_for_the_second() -> None:
    """Nor does saying twice that the base is lacking send it twice."""

    def change(arrivals: list[Arrival]) -> list[Delivery]:
        return [(1.0, a) for a in arrivals for _ in range(2 if a.node == "ada" else 1)]

    trial = Trial({}, change=change)
    trial.fabric.handlers["ada"] = forgetful
    trial.run(told=DIFFERENCE)
    assert sorted(trial.counted) == list(NODES)
    assert len([node for node, _ in trial.fabric.sent if node == "ada"]) == 2
