"""What nodes are told of the next round is what it asks, to the byte; and who begins it early changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from tests.support import Federation, tiny_recipe, without_timings

from photon.aggregator import server
from photon.aggregator.outer import OuterOptimizer
from photon.config import Recipe
from photon.errors import RoundFailedError, StateError
from photon.fabric.base import Arrival, Lost
from photon.link.body import FileBody
from photon.link.update import Task, decode_message, encode_message, expect_reply, expect_task
from photon.node.replies import ReplyStore
from photon.node.state import NodeStore

NODES = ("ada", "bob", "cyd")
LINKS: list[dict[str, Any]] = [
    {},
    {"up": ["zstd"], "down": ["zstd"]},
    {"up": ["int4(block=32)"], "down": ["int4(block=32)", "zstd"]},
    {"up": ["int8"], "down": ["lowrank(rank=1)", "int8"], "down_feedback": 0.5, "up_feedback": 0.5},
    {"up": ["topk(scope=global)"], "down": ["topk(density=0.2)", "int4(rounding=stochastic)"], "down_feedback": 0.0},
]


METHODS = ["eager", "fragments(count=2, delay=1)"]


def recipe(*parts: str, **more: Any) -> Recipe:
    federation = {"rounds": 5, "parts": list(parts or ["eager"]), "outer": "nesterov", "outer_lr": 0.7}
    federation |= more.pop("federation", {})
    return tiny_recipe(NODES, federation=federation, **more)


def told(folder: Path, asked: Recipe) -> Federation:
    """A finished run whose fabric is one on which it pays to tell what comes."""
    federation = Federation(folder, asked, share_disk=False)
    federation.fabric.foretells = True
    federation.run()
    return federation


def tasks(messages: list[tuple[str, bytes]]) -> dict[tuple[str, int], tuple[Task, bytes]]:
    """By node and round the tasks that train, and their bodies."""
    read = [decode_message(message) for _, message in messages]
    found = [(expect_task(message), bytes(message.body)) for message in read]
    return {(task.node, task.round): (task, body) for task, body in found if task.tau}


@pytest.mark.parametrize("part", METHODS)
@pytest.mark.parametrize("link", LINKS, ids=str)
def test_what_is_told_early_is_what_is_asked_then(tmp_path: Path, link: dict[str, Any], part: str) -> None:
    """Base, form, codec and body: a node that has the base of this round needs no more than it was told."""
    federation = told(tmp_path / "told", recipe(part, link=link))
    early, asked = tasks(federation.fabric.foretold), tasks(federation.fabric.sent)
    assert early.keys() == {(node, number) for node in NODES for number in range(1, 5)}
    for key, (task, body) in early.items():
        then, then_body = asked[key]
        assert task.is_same_work(then)
        assert then.model_copy(update={"nonce": task.nonce}) == task
        assert body == then_body
    untold = Federation(tmp_path / "untold", recipe(part, link=link), share_disk=False)
    assert untold.run().model_sha256 == federation.aggregator.state().model_sha256
    assert untold.fabric.foretold == []


def test_a_disk_without_room_for_what_comes_next_ends_no_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may well take the model that the round ends in, which is all that is needed."""
    usual = told(tmp_path / "usual", recipe())
    federation = Federation(tmp_path / "full", recipe(), share_disk=False)
    federation.fabric.foretells, notes = True, list[str]()

    def full(chunks: object) -> tuple[FileBody, str]:
        raise StateError("rounds cannot be written: No space left on device")

    monkeypatch.setattr(federation.store, "forecast", full)
    monkeypatch.setattr(federation.tracker, "note", notes.append)
    assert federation.run().model_sha256 == usual.aggregator.state().model_sha256
    assert federation.fabric.foretold == []
    assert notes == ["what comes next is not told: rounds cannot be written: No space left on device"] * 4


def test_a_schedule_of_tau_is_foreseen(tmp_path: Path) -> None:
    federation = told(tmp_path, recipe("eager", "tau_ramp(first=1)", federation={"tau": 4}))
    early, then = tasks(federation.fabric.foretold), tasks(federation.fabric.sent)
    assert early.keys() == {(node, number) for node, number in then if number > 0}
    assert len({task.tau for task, _ in early.values()}) > 2
    assert all(task.is_same_work(then[key][0]) for key, (task, _) in early.items())


def test_who_drops_out_of_this_round_may_be_drawn_for_the_next(tmp_path: Path) -> None:
    """The next draw is among all who are there, not among those that are left of this one."""
    asked = recipe(federation={"nodes_per_round": 1, "rounds": 16, "dropout": 0.4, "oversample": 1.0})
    federation = told(tmp_path, asked)
    early, then = tasks(federation.fabric.foretold), tasks(federation.fabric.sent)
    assert early.keys() == {(name, number) for name, number in then if (name, number - 1) in then}
    assert len(early) > 4


def test_owners_of_their_own_pace_and_who_is_drawn_twice_are_foreseen(tmp_path: Path) -> None:
    """Who is not drawn in the next round is told nothing; nor is who was not drawn in this one."""
    asked = recipe(federation={"tau": 4, "nodes_per_round": 2, "rounds": 8})
    asked = asked.model_copy(update={"silo": [asked.silo[0].model_copy(update={"tau": 3}), *asked.silo[1:]]})
    federation = told(tmp_path, asked)
    early, then = tasks(federation.fabric.foretold), tasks(federation.fabric.sent)
    assert early.keys() == {(name, number) for name, number in then if (name, number - 1) in then}
    assert all(task.is_same_work(then[key][0]) for key, (task, _) in early.items())
    assert {task.tau for task, _ in early.values()} == {3, 4}


@pytest.mark.parametrize(
    "changes",
    [
        {"parts": []},
        {"parts": ["fragments(count=2)"]},
        {"parts": ["fragments(count=2, delay=1)", "share(first=0)"]},
        {"parts": ["eager", "tau_by_agreement"]},
        {"parts": ["eager"], "balance": "time"},
    ],
    ids=str,
)
def test_what_hangs_on_the_round_at_hand_is_not_told(tmp_path: Path, changes: dict[str, Any]) -> None:
    asked = recipe(federation=changes, node={"optimizer": "adamw", "optimizer_state": "keep"})
    assert told(tmp_path, asked).fabric.foretold == []


def test_a_step_that_is_not_held_back_is_no_base_to_begin_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: the weights as they are now, which lack what was held."""
    monkeypatch.setattr(OuterOptimizer, "foreseen", lambda self, name: self.weights()[name].clone())
    federation = told(tmp_path, recipe())
    early, then = tasks(federation.fabric.foretold), tasks(federation.fabric.sent)
    assert [key[1] for key, (task, _) in early.items() if task.is_same_work(then[key][0])] == [1, 1, 1]


class Hasty:
    """A node as a site's trainer works: what it was told early it does at once, and hands in when it is asked."""

    def __init__(self, federation: Federation, name: str) -> None:
        self.fabric, self.node = federation.fabric, federation.nodes[name]
        self.name, self.done_early = name, dict[int, bytes]()
        folder, keep = federation.folder / "nodes" / name, federation.recipe.checkpoint
        self.node.site = replace(
            self.node.site,
            store=NodeStore(folder / "state", keep.keep_last + 1, keep.keep_every),
            replies=ReplyStore(folder / "replies", "a" * 64, keep=2),
        )
        self.answer, self.begun = federation.fabric.handlers[name], list[int]()

    def __call__(self, message: bytes) -> bytes:
        task = expect_task(decode_message(message))
        reply = self.done_early.pop(task.round, None) or self.answer(message)
        coming = tasks([told for told in self.fabric.foretold if told[0] == self.name]).get((self.name, task.round + 1))
        if coming is not None and task.tau:
            self.begun.append(task.round + 1)
            self.done_early[task.round + 1] = self.answer(encode_message(*coming))
        read = decode_message(reply)
        return encode_message(expect_reply(read).model_copy(update={"nonce": task.nonce}), bytes(read.body))


def hasty(folder: Path, asked: Recipe, network: Callable[[list[Arrival]], list[Any]] | None = None) -> Federation:
    made = (
        Federation(folder, asked, share_disk=False, share_trainer=False)
        if network is None
        else Federation(folder, asked, network, share_disk=False, share_trainer=False)
    )
    made.fabric.foretells = True
    made.fabric.handlers = {name: Hasty(made, name) for name in NODES}
    return made


@pytest.mark.parametrize("part", METHODS)
@pytest.mark.parametrize("link", LINKS, ids=str)
def test_who_begins_early_ends_with_the_same_model(tmp_path: Path, link: dict[str, Any], part: str) -> None:
    early, late = (
        hasty(tmp_path / "early", recipe(part, link=link)),
        Federation(tmp_path / "late", recipe(part, link=link)),
    )
    assert early.run().model_sha256 == late.run().model_sha256
    assert without_timings(early.rounds()) == without_timings(late.rounds())
    begun = [node.begun for node in early.fabric.handlers.values() if isinstance(node, Hasty)]
    assert begun == [[1, 2, 3, 4]] * 3


@pytest.mark.parametrize("part", METHODS)
@pytest.mark.parametrize("keep_last", [1, 3])
@pytest.mark.parametrize("link", [LINKS[0], LINKS[2]], ids=str)
def test_a_round_that_fails_is_handed_in_again_by_who_is_a_round_ahead(
    tmp_path: Path, link: dict[str, Any], keep_last: int, part: str
) -> None:
    """Its update is kept beside that of the round after, and the state to train it again as well."""

    def failing(arrivals: list[Arrival]) -> list[Any]:
        number = expect_reply(decode_message(arrivals[0].message)).round
        return [(0.0, Lost(arrival.node, "power cut") if number == 2 else arrival) for arrival in arrivals]

    asked = recipe(part, link=link, checkpoint={"keep_last": keep_last})
    expected = Federation(tmp_path / "whole", asked, share_disk=False).run().model_sha256
    with pytest.raises(RoundFailedError):
        hasty(tmp_path / "parts", asked, failing).run()
    states = NodeStore(tmp_path / "parts" / "nodes" / "ada" / "state", 1, 0)
    assert states.position_of(4) is not None  # two rounds are trained that no round of the run has counted
    trained: list[int] = []
    resumed = hasty(tmp_path / "parts", asked)
    for node in resumed.nodes.values():
        train = node.trainer.train

        def counting(*arguments: Any, train: Any = train) -> Any:
            trained.append(arguments[4])
            return train(*arguments)

        node.trainer.train = counting  # type: ignore[method-assign]
    assert resumed.run().model_sha256 == expected
    assert sorted(set(trained)) == [8]  # rounds 2 and 3 were handed in again, 4 was not done yet


def test_a_lost_reply_does_not_lose_the_state_to_do_it_again(tmp_path: Path) -> None:
    """With another recipe's hash no kept reply counts: both rounds are trained anew, from the states before them."""

    def failing(arrivals: list[Arrival]) -> list[Any]:
        number = expect_reply(decode_message(arrivals[0].message)).round
        return [(0.0, Lost(arrival.node, "power cut") if number == 2 else arrival) for arrival in arrivals]

    asked = recipe(checkpoint={"keep_last": 1})
    expected = Federation(tmp_path / "whole", asked, share_disk=False).run().model_sha256
    with pytest.raises(RoundFailedError):
        hasty(tmp_path / "parts", asked, failing).run()
    resumed = hasty(tmp_path / "parts", asked)
    for name, node in resumed.nodes.items():
        replies = ReplyStore(tmp_path / "parts" / "nodes" / name / "replies", "b" * 64, keep=2)
        node.site = replace(node.site, replies=replies)
    assert resumed.run().model_sha256 == expected


def test_where_nobody_waits_for_a_network_nothing_is_foreseen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*arguments: Any) -> Any:
        raise AssertionError("it costs an outer step and a model on the disk")

    monkeypatch.setattr(server, "foresee", never)
    Federation(tmp_path, recipe()).run()
