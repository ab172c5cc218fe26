"""Which tasks outlive their round, and what comes for them between two rounds."""

from __future__ import annotations

from collections.abc import Iterable
from types import SimpleNamespace

import pytest
from tests.aggregator.test_assemble import Notes
from tests.support import InlineFabric, tiny_recipe

from photon.aggregator import assemble as assemble_module
from photon.aggregator.assemble import RollCall, assemble
from photon.aggregator.late import Late
from photon.fabric.base import Arrival, FabricEvent, Lost, NodeInfo
from photon.link.ledger import Ledger
from photon.link.update import Task


def task(node: str, round_index: int, tau: int = 5) -> Task:
    return Task(
        run="r", round=round_index, node=node, nonce=f"nonce-{node}", base_sha256="0" * 64,
        evaluate=tau == 0, sequential_step=20, tau=tau, nodes=2, deadline_s=100.0,
    )  # fmt: skip


@pytest.mark.parametrize(("rounds", "age", "goes_on"), [(0, 0, False), (1, 0, True), (1, 1, False), (2, 1, True)])
def test_a_task_goes_on_while_its_reply_would_not_be_too_old_in_the_next_round(
    rounds: int, age: int, goes_on: bool
) -> None:
    late = Late()
    late.begin(7, rounds)
    assert late.age(task("ada", 7 - age)) == age
    assert late.goes_on(task("ada", 7 - age)) == goes_on
    assert not late.goes_on(task("ada", 7 - age, tau=0))


def test_without_patience_nothing_goes_on_whatever_the_round() -> None:
    assert not Late().goes_on(task("ada", 4))


def test_limits_hold_as_long_as_the_node_is_late() -> None:
    late = Late(tasks={"ada": task("ada", 1)}, limits={"ada": 3, "bob": 4})
    assert late.limits_with({"cyd": 5}) == {"ada": 3, "cyd": 5}
    late.tasks.clear()
    assert late.limits_with({"bob": 6}) == {"bob": 6}


def test_what_late_nodes_send_is_kept_once_and_in_order() -> None:
    late = Late(tasks={"ada": task("ada", 1), "bob": task("bob", 1)})
    first, second = Arrival("ada", b"1"), Lost("bob", "gone")
    assert [late.keep(event) for event in (first, Arrival("cyd", b"2"), second)] == [True, False, True]
    assert [late.kept(), late.kept(), late.kept()] == [first, second, None]


def test_that_a_task_was_lost_is_no_news_when_it_is_open_no_more() -> None:
    """Else the node's next task would be taken for lost."""
    late = Late(tasks={"ada": task("ada", 1)})
    late.keep(Lost("ada", "gone"))
    del late.tasks["ada"]
    assert late.kept() is None


class Waiting(InlineFabric):
    """Events come before the last node is there."""

    def __init__(self, events: Iterable[FabricEvent]) -> None:
        super().__init__({}, [NodeInfo("ada", 1), NodeInfo("bob", 1)])
        self.events = list(events)

    def receive(self, timeout_s: float) -> FabricEvent | None:
        if self.events:
            return self.events.pop(0)
        self.infos = [*self.infos, NodeInfo("cyd", 1)]
        return None


def test_while_a_round_is_assembled_late_replies_are_not_thrown_away(monkeypatch: pytest.MonkeyPatch) -> None:
    from_ada, from_bob, lost = Arrival("ada", b"late"), Arrival("bob", b"of the past"), Lost("ada", "gone")
    fabric, ledger, late = Waiting([from_bob, from_ada, lost]), Ledger(), Late(tasks={"ada": task("ada", 1)})
    monkeypatch.setattr(assemble_module, "time", SimpleNamespace(monotonic=lambda: fabric.now))
    nodes = assemble(fabric, ledger, Notes(), RollCall.of(tiny_recipe(), 2, {}, 2), late)
    assert [info.name for info in nodes] == ["ada", "bob", "cyd"]
    assert list(late.events) == [from_ada, lost]
    assert ledger.of("ada").up.encoded == 0  # counted when it is taken
    assert ledger.of("bob").up.encoded == len(b"of the past")
