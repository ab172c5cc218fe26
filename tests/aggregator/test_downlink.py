"""Every node is told the base in the fewest bytes that it can build it from, and builds the very same bits."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.crashes import steps_that_do_not_survive
from tests.support import Federation, tiny_recipe, weights, without_timings
from torch import Tensor

from photon.aggregator.downlink import Downlink, Told
from photon.config import LinkConfig
from photon.errors import RoundFailedError
from photon.fabric.base import Arrival, Lost
from photon.link.codec.notation import parse_pipeline
from photon.link.tensors import decode_tensors, encode_tensors, sha256_hex, streamed_chunks
from photon.link.update import Task, decode_message, expect_reply, expect_task
from photon.node.base import Bases, LacksBaseError

NODES = ("ada", "bob", "cyd")
LOSSY = {"up": ["int8"], "down": ["int4(block=32)", "zstd"]}
Model = dict[str, Tensor]


def model(seed: int) -> Model:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in (("w", (8, 20)), ("b", (20,)))}


def link(**options: Any) -> LinkConfig:
    return LinkConfig.model_validate(options)


class Sender:
    """The Aggregator's end alone: `move` is a round in which the model becomes another."""

    def __init__(self, config: LinkConfig, is_partial: bool = False) -> None:
        self.weights, self.downlink = model(0), Downlink(config, is_partial=is_partial)
        self.base, self.rounds = encode_tensors(self.weights), 0

    @property
    def sha256(self) -> str:
        return sha256_hex(self.base)

    def move(self, seed: int, *moved: str) -> None:
        self.rounds += 1
        for name, tensor in model(seed).items():
            if not moved or name in moved:
                self.weights[name].add_(tensor, alpha=0.1)
        tensors = self.downlink.advance(self.weights, self.base, self.sha256, f"{self.rounds}", moved or None)
        self.base = b"".join(streamed_chunks(self.weights, tensors))

    def tell(self, node: str) -> Told:
        return self.downlink.tell(node, self.base, self.sha256, self.rounds == 0)

    def task(self, told: Told) -> Task:
        return Task(
            run="r", round=self.rounds, node="ada", nonce="n", base_sha256=self.sha256, evaluate=False,
            sequential_step=0, tau=1, nodes=2, deadline_s=1.0, form=told.form, held_sha256=told.held_sha256,
            codec=told.codec, body_sha256=told.body_sha256,
        )  # fmt: skip


# --- in which form ---------------------------------------------------------------------------------------------------

answers = st.lists(st.tuples(st.sets(st.sampled_from(NODES)), st.sets(st.sampled_from(NODES))), max_size=6)


@settings(max_examples=60, deadline=None)
@given(answers)
def test_who_was_there_the_round_before_gets_the_difference_and_who_was_not_the_whole(
    tmp_path_factory: pytest.TempPathFactory, history: list[tuple[set[str], set[str]]]
) -> None:
    """A history of (who takes part, whose disk is lost after that), against a model of who holds what."""
    sender, folder = Sender(link(**LOSSY)), tmp_path_factory.mktemp("bases")
    nodes = {name: Bases.of_run(folder / name, link(**LOSSY), model(0)) for name in NODES}
    holds: dict[str, int] = {}  # as the Aggregator knows it: the round whose base a node answered from
    has = {node: {0} for node in NODES}  # rounds whose base really lies on the node's disk
    for number, (present, lost) in enumerate(history):
        for node in sorted(present):
            told = sender.tell(node)
            expected = "held" if number == 0 else "difference" if holds.get(node) == number - 1 else "whole"
            assert told.form == expected
            lacks = (expected == "held" and 0 not in has[node]) or (
                expected == "difference" and number - 1 not in has[node]
            )
            try:
                got = nodes[node].receive(sender.task(told), told.body)
                assert not lacks
            except LacksBaseError:
                assert lacks
                told = sender.downlink.tell_whole(sender.base, sender.sha256)
                got = nodes[node].receive(sender.task(told), told.body)
            assert encode_tensors(got) == sender.base
            sender.downlink.heard(node, sender.sha256)
            assert sender.tell(node).form == "held"  # for the scores at the end, say
            holds[node], has[node] = number, {number} | ({number - 1} if expected == "difference" else set())
        for node in sorted(lost):
            shutil.rmtree(folder / node, ignore_errors=True)
            has[node] = set()
        sender.move(number + 1)


@pytest.mark.parametrize("options", [{}, {"down": ["zstd"]}, {"down": ["svd(energy=0.7)"], "of": "weights"}], ids=str)
def test_whole_models_are_told_whole_to_everybody(options: dict[str, Any], tmp_path: Path) -> None:
    """Exact they go as they are; else the untrained one does, and every later one as the codec writes it."""
    sender, receiver = Sender(link(**options)), Bases.of_run(tmp_path / "bases", link(**options), model(0))
    name = parse_pipeline(options.get("down", [])).name
    for number in range(3):
        told = sender.tell("ada")
        assert (told.form, told.codec) == ("whole", name if number else "exact")
        assert encode_tensors(receiver.receive(sender.task(told), told.body)) == sender.base
        assert (len(told.body) < len(sender.base)) == (number > 0 and name != "exact")
        sender.downlink.heard("ada", sender.sha256)
        assert sender.downlink.holders == {}
        if not sender.downlink.is_exact:
            sender.move(number + 1)
    assert not (tmp_path / "bases").exists()


# --- what is left out ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("of", ["difference", "weights"])
@pytest.mark.parametrize("decay", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("exact", [(), ("b",)])
def test_the_share_of_what_was_left_out_stays_in_the_exact_model(of: str, decay: float, exact: tuple[str]) -> None:
    """weights = base + decay * (weights before - base); and all of it can be committed and restored."""
    config = link(down=["int4(block=32)"], of=of, down_feedback=decay, exact_tensors=list(exact))
    sender = Sender(config)
    for seed in range(1, 8):
        intended = {name: sender.weights[name] + 0.1 * tensor for name, tensor in model(seed).items()}
        sender.move(seed)
        base = decode_tensors(sender.base)
        left = {name: intended[name] - base[name] for name in base}
        assert all((float(tensor.abs().max()) > 1e-4) == (name not in exact) for name, tensor in left.items())
        for name in base:
            assert torch.allclose(sender.weights[name], base[name] + decay * left[name], atol=1e-6)
            assert not torch.allclose(sender.weights[name], base[name] + (1 - decay) * left[name], atol=1e-4) or (
                decay == 0.5 or name in exact
            )
        state = sender.downlink.export_state(sender.weights)
        assert encode_tensors(dict(Downlink.exact_weights(state, sender.base))) == encode_tensors(sender.weights)
        assert bool(state) == (decay > 0)  # what is the base itself is not written twice


def test_with_feedback_the_base_follows_a_model_that_stands_still() -> None:
    """The mutants: with a share forgotten, or all of it, the base stays away from it for good."""

    def distance(decay: float) -> float:
        sender = Sender(link(down=["int4(block=32)"], down_feedback=decay))
        goal = {name: 1.1 * tensor for name, tensor in model(5).items()}
        for number in range(1, 13):
            step = {name: 0.1 * (goal[name] - model(0)[name]) for name in goal} if number <= 10 else {}
            for name, tensor in step.items():
                sender.weights[name].add_(tensor)
            tensors = sender.downlink.advance(sender.weights, sender.base, sender.sha256, f"{number}")
            sender.base = b"".join(streamed_chunks(sender.weights, tensors))
        return max(float((decode_tensors(sender.base)[name] - goal[name]).abs().max()) for name in goal)

    assert distance(1.0) < 0.005
    assert distance(0.5) > 0.01
    assert distance(0.0) > 0.01


# --- in a federation -------------------------------------------------------------------------------------------------


def tasks_of(federation: Federation) -> list[Task]:
    return [expect_task(decode_message(message)) for _, message in federation.fabric.sent]


@pytest.mark.parametrize("decay", [1.0, 0.5, 0.0])
def test_both_ends_hold_the_same_bits_after_twenty_lossy_rounds(decay: float, tmp_path: Path) -> None:
    recipe = tiny_recipe(
        ["ada", "bob"],
        link={**LOSSY, "down_feedback": decay},
        federation={"rounds": 20, "tau": 1, "outer": "nesterov", "outer_lr": 0.7},
        checkpoint={"keep_last": 30},
    )
    held: list[tuple[str, str, str]] = []

    def network(arrivals: list[Arrival]) -> list[tuple[float, Any]]:
        """After each round: what its tasks named, and which of its files a node has under that name."""
        for arrival in arrivals:
            reply = expect_reply(decode_message(arrival.message))
            file = federation.bases[arrival.node] / f"{reply.base_sha256}.safetensors"
            held.append((arrival.node, reply.base_sha256, sha256_hex(file.read_bytes())))
        return [(0.0, arrival) for arrival in arrivals]

    federation = Federation(tmp_path, recipe, network, share_disk=False)
    final = federation.run().model_sha256
    committed = [federation.store.load(None, number).model_sha256 for number in range(21)]
    assert committed[-1] == final
    assert len(set(committed)) == 21
    assert held == [(node, digest, digest) for digest in committed for node in ("ada", "bob")]
    tasks = tasks_of(federation)
    assert [task.base_sha256 for task in tasks[::2]] == committed
    assert [task.form for task in tasks] == ["held"] * 2 + ["difference"] * 40
    assert [task.held_sha256 for task in tasks[2::2]] == committed[:-1]
    exact = federation.aggregator.outer.weights()  # it can fail: the exact model is another
    assert (encode_tensors(exact) == encode_tensors(weights(federation.store.load(None, 20)))) == (decay == 0.0)


def test_who_sat_out_a_round_gets_the_whole_model_and_differences_after_that(tmp_path: Path) -> None:
    recipe = tiny_recipe(NODES, link=LOSSY, federation={"rounds": 5, "quorum": 0.6})
    federation = Federation(tmp_path, recipe, share_disk=False)
    infos = federation.fabric.infos
    federation.fabric.nodes = lambda: [  # type: ignore[method-assign]  # a network of its own for one test
        info for info in infos if not (info.name == "bob" and len(federation.rounds()) == 2)
    ]
    federation.run()
    forms = {(task.node, task.round): task.form for task in tasks_of(federation)}
    differences = {(node, number): "difference" for node in NODES for number in range(1, 6)}
    differences |= {(node, 0): "held" for node in NODES} | {("bob", 3): "whole"}
    assert forms == {place: form for place, form in differences.items() if place != ("bob", 2)}
    assert not any(event.missing for event in federation.rounds())


def gone(file: Path) -> None:
    file.unlink()


def rotten(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-3] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("damage", [gone, rotten])
@pytest.mark.parametrize("victims", [("bob",), NODES])
def test_a_node_whose_base_is_lost_gets_it_whole_and_counts(
    damage: Callable[[Path], None], victims: tuple[str, ...], tmp_path: Path
) -> None:
    recipe = tiny_recipe(NODES, link=LOSSY, federation={"rounds": 4, "quorum": 1.0})
    undisturbed = Federation(tmp_path / "undisturbed", recipe, share_disk=False)
    expected = undisturbed.run().model_sha256

    def network(arrivals: list[Arrival]) -> list[tuple[float, Any]]:
        if expect_reply(decode_message(arrivals[0].message)).round == 1 and not federation.rounds()[1:]:
            for victim in victims:
                for file in federation.bases[victim].iterdir():
                    damage(file)
        return [(0.0, arrival) for arrival in arrivals]

    federation = Federation(tmp_path / "disturbed", recipe, network, share_disk=False)
    assert federation.run().model_sha256 == expected
    told = [(task.round, task.form) for task in tasks_of(federation) if task.node == victims[-1]]
    assert told == [
        (0, "held"),
        (1, "difference"),
        (2, "difference"),
        (2, "whole"),
        (3, "difference"),
        (4, "difference"),
    ]
    said = [
        expect_reply(decode_message(message)).status for node, message in federation.fabric.received if node == "bob"
    ]
    assert said == ["ok", "ok", "lacks", "ok", "ok", "ok"]
    assert all(sorted(event.nodes) == sorted(NODES) and not event.missing for event in federation.rounds())
    assert federation.aggregator.progress.charges == {}
    extra = federation.rounds()[-1].link.down.encoded - undisturbed.rounds()[-1].link.down.encoded
    assert extra > len(victims) * len(federation.aggregator.payload)  # and all of it is on the ledger


def test_who_lacks_every_base_is_no_endless_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = tiny_recipe(NODES, link=LOSSY, federation={"rounds": 1, "quorum": 0.6})
    federation = Federation(tmp_path, recipe, share_disk=False)

    def receive(task: Task, body: object) -> Mapping[str, Tensor]:
        raise LacksBaseError("no room")

    monkeypatch.setattr(federation.nodes["bob"].bases, "receive", receive)
    federation.run()
    (event,) = federation.rounds()
    assert event.missing == {"bob": "the node lacks the base that it was sent: no room"}
    assert [task.form for task in tasks_of(federation) if task.node == "bob"] == ["held", "whole", "whole"]
    assert federation.aggregator.progress.charges == {}


# --- nothing moves when nothing should -------------------------------------------------------------------------------

CHAINS = [
    [], ["zstd"], ["lz4"], ["bf16"], ["fp16"], ["int8"], ["int4"], ["int2"], ["int4(rounding=stochastic)"], ["sign"],
    ["topk(density=0.1)", "int4"], ["topk(scope=global)"], ["topk(scope=tensor)", "zstd"], ["lowrank(rank=1)"],
    ["svd(energy=0.6)"], ["lowrank(rank=1)", "int8", "zstd"],
]  # fmt: skip


def models_of(folder: Path, options: Mapping[str, Any], rate: float) -> list[str]:
    """The model's hash after each of four rounds, the untrained one first."""
    recipe = tiny_recipe(
        ["ada", "bob"],
        node={"optimizer": "adamw", "lr": rate, "weight_decay": 0.1},
        link=options,
        federation={"rounds": 4, "tau": 1},
        checkpoint={"keep_last": 9},
    )
    federation = Federation(folder, recipe)
    federation.run()
    return [federation.store.load(None, number).model_sha256 for number in range(5)]


@pytest.mark.parametrize("chain", CHAINS, ids=" ".join)
def test_no_codec_moves_a_model_that_no_node_moves(chain: list[str], tmp_path: Path) -> None:
    options = {"up": chain, "down": chain}
    assert len(set(models_of(tmp_path / "still", options, 0.0))) == 1
    assert len(set(models_of(tmp_path / "moving", options, 1e-3))) == 5  # it can fail


@pytest.mark.parametrize("feedback", [0.0, 1.0])
@pytest.mark.parametrize(("up", "down"), [("zstd", "zstd"), ("bf16", "bf16"), ("zstd", "int4")])
def test_weights_are_cut_once_and_then_stand_still(up: str, down: str, feedback: float, tmp_path: Path) -> None:
    """The first time that a model of lossy weights is sent it is another model; that one stays."""
    options = {"up": [up], "down": [down], "of": "weights", "up_feedback": 0.0, "down_feedback": feedback}
    models = models_of(tmp_path / "still", options, 0.0)
    assert len(set(models[1:])) == 1
    assert (models[0] == models[1]) == (down == "zstd")
    assert len(set(models_of(tmp_path / "moving", options, 1e-3))) == 5


def test_weights_whose_codec_cuts_again_stand_still_with_feedback(tmp_path: Path) -> None:
    """What was left out is no pseudo-gradient: nodes are measured from the base that they had, not the exact model."""
    options = {"up": ["zstd"], "down": ["svd(energy=0.6)"], "of": "weights"}
    assert len(set(models_of(tmp_path / "still", options, 0.0)[1:])) == 1
    cut_again = models_of(tmp_path / "cut", {**options, "down_feedback": 0.0}, 0.0)
    assert len(set(cut_again)) == 5  # it can fail


# --- a resume --------------------------------------------------------------------------------------------------------


def test_a_resumed_run_counts_and_tells_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    """Also what each stage of a message left that was written before the stop."""
    recipe = tiny_recipe(NODES, link=LOSSY, federation={"rounds": 3, "quorum": 1.0})
    whole = Federation(tmp_path / "whole", recipe)
    expected = whole.run().model_sha256

    def failing(arrivals: list[Arrival]) -> list[tuple[float, Any]]:
        number = expect_reply(decode_message(arrivals[0].message)).round
        return [(0.0, Lost(arrival.node, "power cut") if number == 2 else arrival) for arrival in arrivals]

    with pytest.raises(RoundFailedError):
        Federation(tmp_path / "stopped", recipe, failing).run()
    resumed = Federation(tmp_path / "stopped", recipe)
    assert resumed.run().model_sha256 == expected
    assert without_timings(resumed.rounds()) == without_timings(whole.rounds())
    assert [task.form for task in tasks_of(resumed)] == ["difference"] * 6
    stages = resumed.rounds()[-1].link.down.stages
    assert stages.keys() == {"int4(block=32)", "zstd"}


CODECS = [{}, {"down": ["zstd"]}, {"down": ["int4"]}, {"down": ["int8"]}, {"down": ["int4"], "of": "weights"}]


@pytest.mark.parametrize("before", CODECS, ids=str)
@pytest.mark.parametrize("after", CODECS, ids=str)
def test_a_run_goes_on_with_another_downlink(before: dict[str, Any], after: dict[str, Any], tmp_path: Path) -> None:
    """A message that was written in another way is not sent; the whole model is, once."""
    Federation(tmp_path, tiny_recipe(["ada", "bob"], link=before, federation={"rounds": 2})).run()
    federation = Federation(tmp_path, tiny_recipe(["ada", "bob"], link=after, federation={"rounds": 4}))
    federation.run()
    assert len(federation.rounds()) == 4
    assert not any(event.missing for event in federation.rounds())
    first, later = tasks_of(federation)[:2], tasks_of(federation)[2:]
    if before != after:
        assert {(task.form, task.codec) for task in first} == {("whole", "exact")}
        assert all(len(message) > 2000 for _, message in federation.fabric.sent[:2])
    codec = parse_pipeline(after.get("down", [])).name
    form = "difference" if codec.startswith("int") and "of" not in after else "whole"
    assert {(task.form, task.codec) for task in later} == {(form, codec)}


# --- a crash ---------------------------------------------------------------------------------------------------------

CRASHING = {"up": ["topk(density=0.2)", "int4(block=32, rounding=stochastic)"], "down": ["int4(block=32)", "zstd"]}
STAGED = {"up": ["lowrank(rank=1)", "int8"], "down": ["lowrank(rank=1)", "int8"], "down_feedback": 0.5}


@pytest.mark.parametrize("options", [CRASHING, STAGED], ids=["topk", "lowrank"])
def test_a_crash_at_any_commit_leaves_no_trace_in_a_lossy_run(options: dict[str, Any], tmp_path: Path) -> None:
    """Same bits, same record, and nodes that hold a base get differences to it after the crash as before."""
    told: list[list[str]] = []

    def look(again: Federation) -> None:
        told.append([task.form for task in tasks_of(again)])

    assert list(steps_that_do_not_survive(tmp_path, look, link=options)) == []
    assert {form for forms in told for form in forms} == {"difference"}
    assert len(told) >= 30
