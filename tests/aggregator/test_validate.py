"""A reply that is wrong in any way costs its node the round and harms nothing else.

The network changes what one node says; the round must end, to the last bit, as if that node had not answered.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support import (
    LENGTH,
    Delivery,
    Federation,
    Network,
    edited,
    tampering,
    tiny_recipe,
    weights,
    without_timings,
)
from torch import Tensor

from photon.aggregator import server
from photon.aggregator.updates import UpdateReader
from photon.aggregator.validate import Verified, verify_identity, verify_training
from photon.errors import ReplyRefusedError, RoundFailedError, WireError
from photon.fabric.base import Arrival, Lost
from photon.link.tensors import decode_tensors, sha256_hex
from photon.link.update import Message, Task, decode_message, encode_message, expect_reply, expect_task

RECIPE = tiny_recipe(federation={"rounds": 1, "quorum": 0.5})
NORM, EMBEDDING = "norm.weight", "embed_tokens.weight"
EXACT = UpdateReader.of(RECIPE.link)
Lie = Callable[[bytes], bytes]


def values(change: Callable[[dict[str, Tensor]], Mapping[str, Tensor]]) -> Lie:
    return lambda message: edited(message, change)


def replaced(name: str, change: Callable[[Tensor], Tensor]) -> Lie:
    return values(lambda update: update | {name: change(update[name])})


def one_value(value: float) -> Lie:
    """A single number in the middle of an update is exchanged."""
    return replaced(EMBEDDING, lambda tensor: tensor.index_put((torch.tensor(3), torch.tensor(4)), torch.tensor(value)))


def huge_strides(message: bytes) -> bytes:
    """A tensor without a value, whose sizes torch cannot multiply, under the name of one with values."""
    reply = expect_reply(decode_message(message))
    header = json.dumps({NORM: {"dtype": "F32", "shape": [2**40, 2**40, 0], "data_offsets": [0, 0]}}).encode()
    body = len(header).to_bytes(8, "little") + header
    return encode_message(reply.model_copy(update={"body_sha256": sha256_hex(body)}), body)


def twice(wire: Tensor) -> Tensor:
    """Of bfloat16 as it travels."""
    return (wire.view(torch.bfloat16) * 2).view(torch.uint8)


def report(**changes: object) -> Lie:
    return lambda message: edited(message, training=changes)


# What ada says instead of the truth, and what is said of it. Two steps of two sequences: 24 tokens are the truth.
LIES: dict[str, tuple[Lie, str]] = {
    "another run": (lambda m: edited(m, run="other"), "its run is not the one"),
    "another round": (lambda m: edited(m, round=7), "its round is not the one"),
    "another base": (lambda m: edited(m, base_sha256="0" * 64), "its base_sha256 is not the one"),
    "another node": (lambda m: edited(m, node="bob"), "sent by 'ada' in the name of 'bob'"),
    "another task": (lambda m: edited(m, nonce="0" * 16), "no answer before the deadline"),
    "failed": (lambda m: edited(m, status="failed", error="disk full"), "the node reports: disk full"),
    "no report": (lambda m: edited(m, training=None), "no training report"),
    "no scores": (lambda m: edited(m, evaluation=None), "no evaluation report"),
    "scores of nothing": (lambda m: edited(m, evaluation={"tokens": 0}), "no evaluation report"),
    "tokens of next to no text": (lambda m: edited(m, evaluation={"text_bytes": 5e-324}), "claims 4.94066e-324 bytes"),
    "an age to score": (lambda m: edited(m, evaluation={"seconds": 1.7e308}), "took 1.7e+308 seconds to score"),
    "scored before it began": (lambda m: edited(m, evaluation={"seconds": -1.0}), "took -1 seconds to score"),
    "no tokens": (report(tokens=0), "claims 0 tokens"),
    "too many tokens": (report(tokens=25), "claims 25 tokens in 2 steps"),
    "too many steps": (report(steps=3, tokens=36), "claims 3 steps of a task of 2"),
    "no steps": (report(steps=0), "claims 0 steps"),
    "more clipped steps than steps": (report(clipped_steps=3), "claims 3 clipped steps of 2"),
    "a loss that no sum survives": (report(loss_mean=1e308), "claims 1e+308 as its loss_mean"),
    "a loss below zero": (report(loss_first=-1e-9), "claims -1e-09 as its loss_first"),
    "time before it began": (report(seconds=-1.0), "claims -1 as its seconds"),
    "an age to write to disk": (report(save_s=1e10), "claims 1e+10 as its save_s"),
    "a learning rate from nowhere": (report(learning_rate=1e300), "as its learning_rate"),
    "unknown codec": (lambda m: edited(m, codec="zip"), "codec 'zip'"),
    "another codec": (lambda m: edited(m, codec="bf16"), "with codec 'bf16', the recipe says 'exact'"),
    "a codec's name of pages": (lambda m: edited(m, codec="x" * 2000), "malformed reply header: codec"),
    "not a number": (one_value(float("nan")), "not finite"),
    "infinite": (one_value(float("inf")), "not finite"),
    "minus infinite": (one_value(float("-inf")), "not finite"),
    "a million times": (values(lambda u: {name: tensor * 1e6 for name, tensor in u.items()}), "beyond 1024"),
    "one value too large": (one_value(-1024.1), "beyond 1024"),
    "shape": (replaced(NORM, lambda tensor: tensor[:-1]), "is torch.float32 (7,), expected torch.float32 (8,)"),
    "transposed": (
        replaced(EMBEDDING, lambda tensor: tensor.T),
        "is torch.float32 (8, 13), expected torch.float32 (13, 8)",
    ),
    "dtype": (replaced(NORM, lambda tensor: tensor.view(torch.int32)), "is torch.int32"),
    "a narrower dtype": (replaced(NORM, lambda tensor: tensor.half()), "is torch.float16"),
    "a wider dtype": (replaced(NORM, lambda tensor: tensor.double()), "takes 64 bytes; exact makes 32 at most"),
    "more than can be": (replaced(NORM, lambda tensor: tensor.repeat(9)), "takes 288 bytes; exact makes 32 at most"),
    "sizes that torch cannot multiply": (huge_strides, "more than can be addressed"),
    "a tensor is missing": (values(lambda u: {k: v for k, v in u.items() if k != NORM}), "lacks 1 tensors"),
    "a tensor too many": (values(lambda u: u | {"back.door": torch.zeros(1)}), "unknown tensor 'back.door'"),
    "no update": (values(lambda _: {}), "lacks"),
    "a task": (lambda m: m.replace(b'"kind":"reply"', b'"kind":"task"'), "malformed task header"),
    "cut in the header": (lambda m: m[:100], "the message has 100"),
    "cut in the update": (lambda m: m[:-1], "sha256 differs"),
    "a byte too many": (lambda m: m + b"\0", "sha256 differs"),
    "nothing": (lambda _: b"", "not a Photon message"),
    "noise": (lambda _: bytes(range(256)) * 9, "not a Photon message"),
}


def outcome(federation: Federation) -> tuple[str, object, set[str]]:
    """The model, and the record but for the reason why a node is missing, and what of it went up all the same."""
    digest = federation.run().model_sha256
    (event,) = federation.rounds()
    plain = without_timings(event)
    del plain["link"]["up"]
    for node in event.missing:
        del plain["round_link"][node]["up"]
    return digest, plain | {"missing": None}, set(event.missing)


def record(federation: Federation) -> list[dict[str, Any]]:
    """Of its rounds, all but what went up: what is said twice crosses twice."""
    rounds: list[dict[str, Any]] = without_timings(federation.rounds())
    for event in rounds:
        for traffic in (event["link"], *event["round_link"].values()):
            del traffic["up"]
    return rounds


def silent(node: str) -> Network:
    return lambda arrivals: [(0.0, Lost(a.node, "gone") if a.node == node else a) for a in arrivals]


@pytest.fixture(scope="module")
def without_ada(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, object, set[str]]:
    return outcome(Federation(tmp_path_factory.mktemp("without"), RECIPE, silent("ada")))


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_costs_the_liar_the_round_and_nothing_else(lie: str, without_ada: object, tmp_path: Path) -> None:
    tell, reason = LIES[lie]
    federation = Federation(tmp_path, RECIPE, tampering("ada", tell))
    assert outcome(federation) == without_ada
    assert reason in federation.rounds()[0].missing["ada"]


def test_a_lie_that_is_believed_shows(without_ada: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mutant: nothing is checked. Then what the test above compares differs, so it can fail."""
    monkeypatch.setattr(server, "verify_training", lambda *_: Verified(1.0, {}))
    tell, _ = LIES["a million times"]
    assert outcome(Federation(tmp_path, RECIPE, tampering("ada", tell))) != without_ada


def test_an_update_beyond_the_agreed_norm_is_refused_and_one_at_it_is_not(tmp_path: Path) -> None:
    """Nodes scale their updates down to `link.max_update_norm`; one that does not keeps its update."""
    recipe = tiny_recipe(federation={"rounds": 1, "quorum": 0.5}, link={"max_update_norm": 0.01, "up": "bf16"})
    honest = Federation(tmp_path / "honest", recipe)
    honest.run()
    assert all(0.0097 < node.update_norm <= 0.01 for node in honest.rounds()[0].nodes.values())
    free = Federation(tmp_path / "free", tiny_recipe(federation={"rounds": 1}))
    free.run()
    assert all(node.update_norm > 0.02 for node in free.rounds()[0].nodes.values())  # all were scaled
    doubled = tampering("ada", values(lambda update: {name: twice(wire) for name, wire in update.items()}))
    greedy = Federation(tmp_path / "greedy", recipe, doubled)
    assert outcome(greedy) == outcome(Federation(tmp_path / "without", recipe, silent("ada")))
    assert "link.max_update_norm is 0.01" in greedy.rounds()[0].missing["ada"]


def test_a_stolen_reply_counts_for_neither_side_but_its_owner(tmp_path: Path) -> None:
    """bob hands in ada's reply as his own: he is refused, she is not."""

    def network(arrivals: list[Arrival]) -> list[Delivery]:
        of = {a.node: a for a in arrivals}
        return [(0.0, Arrival("bob", of["ada"].message)), (0.0, of["ada"]), (0.0, of["cyd"])]

    stolen = Federation(tmp_path / "stolen", RECIPE, network)
    assert outcome(stolen) == outcome(Federation(tmp_path / "without", RECIPE, silent("bob")))
    assert "sent by 'bob' in the name of 'ada'" in stolen.rounds()[0].missing["bob"]


def test_a_node_that_fails_says_so_and_the_others_go_on(without_ada: object, tmp_path: Path) -> None:
    federation = Federation(tmp_path, RECIPE)
    (tmp_path / "nodes" / "ada").mkdir(parents=True)
    (tmp_path / "nodes" / "ada" / "state" / "000000").mkdir(parents=True)  # a state without content
    assert outcome(federation) == without_ada
    assert "the node reports: StateError" in federation.rounds()[0].missing["ada"]


def test_a_reply_said_many_times_counts_once(tmp_path: Path) -> None:
    recipe = tiny_recipe()
    once = Federation(tmp_path / "once", recipe)
    thrice = Federation(tmp_path / "thrice", recipe, lambda arrivals: [(0.0, a) for a in arrivals * 3])
    assert thrice.run().model_sha256 == once.run().model_sha256
    assert record(thrice) == record(once)


def test_a_replay_of_the_round_before_is_ignored(tmp_path: Path) -> None:
    """Also when it comes first: the node's true answer still counts."""
    old: list[Arrival] = []

    def network(arrivals: list[Arrival]) -> list[Delivery]:
        replayed = [(0.0, arrival) for arrival in old]
        old[:] = arrivals
        return [*replayed, *((1.0, arrival) for arrival in arrivals)]

    honest, replayed = Federation(tmp_path / "a", tiny_recipe()), Federation(tmp_path / "b", tiny_recipe(), network)
    assert replayed.run().model_sha256 == honest.run().model_sha256
    assert record(replayed) == record(honest)


def test_a_round_without_its_quorum_commits_nothing_and_can_be_done_again(tmp_path: Path) -> None:
    recipe = tiny_recipe(node={"optimizer": "adamw"}, federation={"rounds": 2, "quorum": 1.0})
    whole = Federation(tmp_path / "whole", recipe).run()

    def fail_in_round_1(arrivals: list[Arrival]) -> list[Delivery]:
        if expect_reply(decode_message(arrivals[0].message)).round == 0:
            return [(0.0, arrival) for arrival in arrivals]
        return [(0.0, Lost(a.node, "power cut") if a.node == "bob" else a) for a in arrivals]

    folder = tmp_path / "failing"
    failing = Federation(folder, recipe, fail_in_round_1)
    with pytest.raises(RoundFailedError, match=r"round 1: . of 3 nodes counted.*asks for 3.*bob: power cut.*resume"):
        failing.run()
    assert failing.store.rounds() == [0, 1]
    assert len(failing.rounds()) == 1
    assert Federation(folder, recipe).run().model_sha256 == whole.model_sha256


def test_absurd_scores_do_not_end_the_run(tmp_path: Path) -> None:
    federation = Federation(tmp_path, RECIPE, tampering("ada", lambda m: edited(m, evaluation={"nats": 1.7e308})))
    assert federation.run().progress.round == 1
    assert "claims 1.7e+308 nats" in federation.rounds()[0].missing["ada"]


def test_a_refused_reply_gives_no_scores_either(tmp_path: Path) -> None:
    tell, _ = LIES["not a number"]
    federation = Federation(tmp_path, RECIPE, tampering("ada", tell))
    federation.run()
    assert sorted(federation.evaluations()[0].silos) == ["bob", "cyd"]


# --- single checks ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def honest(tmp_path_factory: pytest.TempPathFactory) -> tuple[Task, bytes, dict[str, Tensor]]:
    """A task, what a real node answered, and the base."""
    federation = Federation(tmp_path_factory.mktemp("honest"), tiny_recipe(["ada"], federation={"rounds": 1}))
    base = weights(federation.aggregator.state())
    federation.run()
    (_, sent), (_, received) = federation.fabric.sent[0], federation.fabric.received[0]
    return expect_task(decode_message(sent)), received, base


def judge(data: bytes, task: Task, base: Mapping[str, Tensor]) -> tuple[Message, float]:
    message = decode_message(data)
    verify_identity("ada", expect_reply(message), task)
    return message, verify_training(message, task, 2 * LENGTH, base, EXACT).norm


def test_the_norm_is_that_of_the_whole_update(honest: tuple[Task, bytes, dict[str, Tensor]]) -> None:
    task, data, base = honest
    message, norm = judge(data, task, base)
    values = torch.cat([tensor.flatten().double() for tensor in decode_tensors(message.body).values()])
    assert norm == pytest.approx(float(values.norm()), rel=1e-12)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_truncation_is_refused(honest: tuple[Task, bytes, dict[str, Tensor]], data: st.DataObject) -> None:
    task, message, base = honest
    with pytest.raises((WireError, ReplyRefusedError)):
        judge(message[: data.draw(st.integers(0, len(message) - 1))], task, base)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_a_flipped_bit_is_refused_or_within_the_bounds_of_an_update(
    honest: tuple[Task, bytes, dict[str, Tensor]], data: st.DataObject
) -> None:
    task, message, base = honest
    flipped = bytearray(message)
    # Half of the flips in the header, which is a tenth of the message.
    place = data.draw(st.one_of(st.integers(0, 900), st.integers(0, len(message) - 1)))
    flipped[place] ^= 1 << data.draw(st.integers(0, 7))
    try:
        received, norm = judge(bytes(flipped), task, base)
    except (WireError, ReplyRefusedError):
        return
    reply = expect_reply(received)
    assert 0 < reply.training.tokens <= 24
    assert norm <= 1024 * sum(tensor.numel() for tensor in base.values()) ** 0.5
    assert {name: t.shape for name, t in decode_tensors(received.body).items()} == {n: t.shape for n, t in base.items()}


def test_any_flipped_bit_of_an_update_is_refused(honest: tuple[Task, bytes, dict[str, Tensor]]) -> None:
    task, message, base = honest
    flipped = bytearray(message)
    flipped[-4] ^= 1  # the last bit of the last float32
    with pytest.raises((WireError, ReplyRefusedError)):
        judge(bytes(flipped), task, base)
