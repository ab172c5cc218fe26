"""An LLM Node answers bytes with bytes: the right update for the right task, from its own state, or a refusal."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tests.support import (
    LENGTH,
    RUN,
    VOCAB,
    Federation,
    Text,
    edited,
    largest_difference,
    new_model,
    tiny_recipe,
    without_timings,
)
from torch import Tensor

from photon import stopwatch
from photon.config import Recipe
from photon.errors import StateError, WireError
from photon.events import NodeProgress
from photon.link.codec.feedback import tensor_seed
from photon.link.codec.notation import parse_pipeline
from photon.link.tensors import decode_tensors, encode_tensors, sha256_hex
from photon.link.update import Reply, Task, decode_message, encode_message, expect_reply
from photon.model.build import named_weights
from photon.node import node as node_module
from photon.node.node import Node, failure_reply
from photon.node.state import NodeState, NodeStore
from photon.node.trainer import TrainingError

SEED = tiny_recipe().seed
BASE = encode_tensors(named_weights(new_model(tiny_recipe())))
NAN = encode_tensors({name: tensor * float("nan") for name, tensor in decode_tensors(BASE).items()})


def task(body: bytes = BASE, **changes: Any) -> bytes:
    fields = {
        "run": RUN, "round": 0, "node": "ada", "nonce": "n",
        "base_sha256": sha256_hex(body), "body_sha256": sha256_hex(body),
        "evaluate": False, "sequential_step": 0, "tau": 3, "nodes": 2, "deadline_s": 1e6,
    }  # fmt: skip
    return encode_message(Task.model_validate(fields | changes), body)


def one_node(folder: Path, **sections: Any) -> Node:
    return Federation(folder, tiny_recipe(["ada"], **sections)).nodes["ada"]


def handed_in(node: Node, message: bytes) -> tuple[Reply, dict[str, Tensor], list[NodeProgress]]:
    progress: list[NodeProgress] = []
    answer = decode_message(node.handle(message, progress.append))
    return expect_reply(answer), decode_tensors(answer.body) if len(answer.body) else {}, progress


def trained_by_hand(recipe: Recipe, steps: int = 3) -> dict[str, Tensor]:
    model = new_model(recipe)
    for step in range(steps):
        batch = torch.from_numpy(Text("ada").batch(2 * step, 2))
        model.zero_grad()
        model.loss(batch[:, :-1], batch[:, 1:]).backward()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.sub_(recipe.node.lr * parameter.grad)
    return named_weights(model)


# --- what it hands in ------------------------------------------------------------------------------------------------


def test_the_update_is_the_base_minus_what_was_trained(tmp_path: Path) -> None:
    node, base = one_node(tmp_path), decode_tensors(BASE)
    reply, update, _ = handed_in(node, task())
    local = trained_by_hand(tiny_recipe())
    assert largest_difference(update, {name: base[name] - local[name] for name in base}) < 1e-6
    assert largest_difference(update, {name: local[name] - base[name] for name in base}) > 1e-2  # the other sign
    assert (reply.status, reply.round, reply.node, reply.nonce) == ("ok", 0, "ada", "n")
    assert reply.training is not None
    assert (reply.training.steps, reply.training.tokens) == (3, 3 * 2 * LENGTH)
    assert reply.training.epoch == 6 / 100
    assert reply.evaluation is None


def test_a_task_done_twice_gives_the_same_bytes_and_counts_once(tmp_path: Path) -> None:
    """The Aggregator asks again after a crash; the second time must not train on from the first."""
    node = one_node(tmp_path, node={"optimizer": "adamw"})
    once, first, _ = handed_in(node, task())
    again, second, _ = handed_in(node, task())
    assert encode_tensors(first) == encode_tensors(second)
    assert without_timings(once) == without_timings(again)
    assert node.site.store.load(RUN, "ada", 1).position == 6
    later = encode_tensors(handed_in(node, task(round=1, sequential_step=3))[1])
    assert later != encode_tensors(first)  # it can fail: the next round does train on
    assert node.site.store.load(RUN, "ada", 2).position == 12


def test_what_a_model_draws_in_training_is_drawn_again(tmp_path: Path) -> None:
    """As the routers of some experts do: `router_jitter_noise` of a Mixtral."""
    nodes = Federation(tmp_path, tiny_recipe(["ada", "bob"])).nodes
    trainer = nodes["ada"].trainer
    plain, drawn = trainer._loss, list[float]()

    def noisy(inputs: Tensor, targets: Tensor) -> Tensor:
        drawn.append(float(torch.rand(())))
        return plain(inputs, targets) * (1 + drawn[-1])

    trainer._loss = noisy
    first, again = (encode_tensors(handed_in(nodes["ada"], task())[1]) for _ in range(2))
    assert first == again
    assert drawn[:3] == drawn[3:]
    handed_in(nodes["ada"], task(round=1, sequential_step=3))
    handed_in(nodes["bob"], task(node="bob"))
    assert len(set(drawn)) == 9  # other numbers in other rounds, and for other nodes of the same device


@pytest.mark.parametrize(("choice", "kept"), [("keep", True), ("reset", False)])
def test_an_optimizer_that_is_reset_takes_no_room_on_the_disk(choice: str, kept: bool, tmp_path: Path) -> None:
    node = one_node(tmp_path, node={"optimizer": "adamw", "optimizer_state": choice})
    handed_in(node, task())
    assert bool(node.site.store.load(RUN, "ada", 1).optimizer) == kept


def test_a_node_that_is_late_hands_in_what_it_has(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its deadline passes during the second of three steps; the place in the data follows the steps really made."""
    node = one_node(tmp_path)
    clock: Iterator[float] = iter([0.0, 4.0, 11.0])  # received, after step 1, after step 2
    monkeypatch.setattr(node_module, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    reply, update, _ = handed_in(node, task(deadline_s=10.0))
    assert reply.training is not None
    assert (reply.training.steps, reply.training.tokens) == (2, 2 * 2 * LENGTH)
    assert node.site.store.load(RUN, "ada", 1).position == 4
    local, base = trained_by_hand(tiny_recipe(), steps=2), decode_tensors(BASE)
    assert largest_difference(update, {name: base[name] - local[name] for name in base}) < 1e-6


def test_it_says_where_its_time_went(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that ticks once whenever it is looked at: after the base, the state, training, encoding, the disk."""
    clock = itertools.count()
    monkeypatch.setattr(stopwatch, "time", SimpleNamespace(monotonic=lambda: float(next(clock))))
    reply, _, _ = handed_in(one_node(tmp_path), task())
    assert reply.training is not None
    assert (reply.training.receive_s, reply.training.encode_s, reply.training.save_s) == (2.0, 1.0, 1.0)


def norm(tensors: Mapping[str, Tensor]) -> float:
    return float(torch.cat([tensor.double().flatten() for tensor in tensors.values()]).norm())


def test_an_update_is_scaled_down_to_its_largest_norm(tmp_path: Path) -> None:
    _, whole, _ = handed_in(one_node(tmp_path / "whole"), task())
    limit = norm(whole) / 3
    _, clipped, _ = handed_in(one_node(tmp_path / "clipped", link={"max_update_norm": limit}), task())
    assert norm(clipped) == pytest.approx(limit, rel=1e-6)
    assert largest_difference(clipped, {name: tensor / 3 for name, tensor in whole.items()}) < 1e-7
    _, kept, _ = handed_in(one_node(tmp_path / "kept", link={"max_update_norm": 2 * norm(whole)}), task())
    assert encode_tensors(kept) == encode_tensors(whole)


CHAINS = [[], ["zstd"], ["bf16"], ["int4(block=32, rounding=stochastic)", "zstd"], ["topk(scope=global)", "sign"]]


@pytest.mark.parametrize("up", CHAINS, ids="-".join)
def test_the_codec_that_is_named_is_the_one_that_is_used(up: list[str], tmp_path: Path) -> None:
    """With random choices that belong to seed, node, round and tensor."""
    _, exact, _ = handed_in(one_node(tmp_path / "exact"), task())
    reply, update, _ = handed_in(one_node(tmp_path / "coded", link={"up": up}), task())
    codec = parse_pipeline(up)
    assert reply.codec == codec.name

    def encoded(seed: str) -> bytes:
        survey = codec.survey(lambda: iter(exact.items()))
        wires = {k: codec.encode(value, tensor_seed(seed, k), survey, {}).wire for k, value in exact.items()}
        return encode_tensors(wires)

    assert encode_tensors(update) == encoded(f"{SEED}/ada/0")
    if "stochastic" in codec.name:
        assert encode_tensors(update) != encoded(f"{SEED}/bob/0")


def test_weights_are_handed_in_as_they_are_where_the_recipe_says_so(tmp_path: Path) -> None:
    link = {"of": "weights", "up": ["bf16"], "up_feedback": 0.0}
    _, wire, _ = handed_in(one_node(tmp_path, link=link), task())
    local = trained_by_hand(tiny_recipe())
    codec = parse_pipeline(["bf16"])
    decoded = {name: codec.decode(wire[name], tuple(local[name].shape), torch.float32).tensor for name in local}
    assert largest_difference(decoded, local) < 2**-7  # weights of up to 2, rounded to 8 bits
    base = decode_tensors(BASE)
    assert largest_difference(decoded, {name: base[name] - local[name] for name in base}) > 0.1  # the mutant


def test_what_the_codec_left_out_is_committed_with_the_state_and_sent_in_the_next_round(tmp_path: Path) -> None:
    """Round 1 sends the codec's image of update + residual; a task done again begins with the residual of then."""
    node = one_node(tmp_path / "lossy", link={"up": ["int4(block=32, rounding=stochastic)"]})
    plain = one_node(tmp_path / "exact")
    codec = parse_pipeline(["int4(block=32, rounding=stochastic)"])

    def decoded(wire: Mapping[str, Tensor]) -> dict[str, Tensor]:
        shapes = {name: tuple(tensor.shape) for name, tensor in decode_tensors(BASE).items()}
        return {name: codec.decode(wire[name], shape, torch.float32).tensor for name, shape in shapes.items()}

    residual = {name: torch.zeros_like(tensor) for name, tensor in decode_tensors(BASE).items()}
    for number in (0, 1, 2):
        asked = task(round=number, sequential_step=3 * number)
        wire, update = handed_in(node, asked)[1], handed_in(plain, asked)[1]
        given = {name: update[name] + residual[name] for name in update}
        seed = f"{SEED}/ada/{number}"
        again = {n: codec.encode(t, tensor_seed(seed, n), None, {}).wire for n, t in given.items()}
        assert encode_tensors(wire) == encode_tensors(again)
        if number:
            forgotten = {n: codec.encode(t, tensor_seed(seed, n), None, {}).wire for n, t in update.items()}
            assert encode_tensors(wire) != encode_tensors(forgotten)  # the mutant
        residual = {name: given[name] - tensor for name, tensor in decoded(wire).items()}
        kept = node.site.store.load(RUN, "ada", number + 1).link
        assert largest_difference({f"residual/{n}": t for n, t in residual.items()}, kept) == 0.0
        assert encode_tensors(handed_in(node, asked)[1]) == encode_tensors(wire)


def test_updates_are_made_longer_where_nothing_comes_back(tmp_path: Path) -> None:
    _, exact, _ = handed_in(one_node(tmp_path / "exact"), task())
    along = {}
    for feedback in ("rescale", 0.0):  # the mutant: dropped, and not made up for
        node = one_node(tmp_path / str(feedback), link={"up": ["sign"], "up_feedback": feedback})
        _, wire, _ = handed_in(node, task())
        codec = parse_pipeline(["sign"])
        found = {n: codec.decode(wire[n], tuple(t.shape), torch.float32).tensor for n, t in exact.items()}
        along[feedback] = [float((found[n] * t).sum() / t.square().sum()) for n, t in exact.items()]
        assert node.site.store.load(RUN, "ada", 1).link == {}
    assert along["rescale"] == pytest.approx([1.0] * len(exact), abs=0.01)
    assert max(along[0.0]) < 0.9


@pytest.mark.parametrize(("up", "feedback"), [([], 1.0), (["zstd"], 1.0), (["int4"], 0.0)])
def test_where_nothing_is_left_out_or_wanted_again_nothing_is_kept(
    up: list[str], feedback: float, tmp_path: Path
) -> None:
    node = one_node(tmp_path, link={"up": up, "up_feedback": feedback})
    handed_in(node, task())
    assert node.site.store.load(RUN, "ada", 1).link == {}


# --- what it scores --------------------------------------------------------------------------------------------------


def test_scoring_alone_leaves_no_trace(tmp_path: Path) -> None:
    node = one_node(tmp_path)
    reply, update, progress = handed_in(node, task(tau=0, evaluate=True))
    assert (update, reply.training) == ({}, None)
    assert [p.state for p in progress] == ["evaluating"]
    assert not (tmp_path / "nodes").exists()
    model, windows = new_model(tiny_recipe()), torch.from_numpy(Text("ada").heldout()[0].sequences)
    with torch.no_grad():
        loss = float(model.loss(windows[:, :-1], windows[:, 1:]))
    assert reply.evaluation is not None
    assert reply.evaluation.nats == pytest.approx(loss * 3 * LENGTH, rel=1e-6)
    assert reply.evaluation.tokens == 3 * LENGTH


def test_the_base_is_scored_not_what_is_trained_from_it(tmp_path: Path) -> None:
    scored, _, progress = handed_in(one_node(tmp_path / "both"), task(evaluate=True))
    alone, _, _ = handed_in(one_node(tmp_path / "alone"), task(tau=0, evaluate=True))
    assert scored.evaluation is not None
    assert alone.evaluation is not None
    assert scored.evaluation.nats == alone.evaluation.nats
    assert [p.state for p in progress] == ["evaluating", "training", "training", "training", "sending"]
    assert [(p.step, p.steps) for p in progress[1:]] == [(1, 3), (2, 3), (3, 3), (3, 3)]


# --- what it refuses -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [{"node": "bob"}, {"run": "another"}])
def test_a_task_for_another_node_or_run_is_refused(change: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(WireError, match="reached 'ada' of"):
        one_node(tmp_path).handle(task(**change), lambda progress: None)
    assert not (tmp_path / "nodes").exists()


def test_a_base_that_is_not_the_one_named_is_refused(tmp_path: Path) -> None:
    node = one_node(tmp_path)
    damaged = bytearray(task())
    damaged[-1] ^= 1
    for message in (task(body_sha256="0" * 64), bytes(damaged), task()[:-4]):
        with pytest.raises(WireError, match="round 0: the base received is not the one the task names"):
            node.handle(message, lambda progress: None)
    with pytest.raises(WireError, match="round 0: the whole base is announced under two hashes"):
        node.handle(task(base_sha256="0" * 64), lambda progress: None)


def test_a_node_that_lacks_a_base_says_so_and_has_done_nothing(tmp_path: Path) -> None:
    node = one_node(tmp_path, link={"down": ["int8"]})
    reply, update, progress = handed_in(node, task(b"", base_sha256="1" * 64, form="held", round=3, evaluate=True))
    assert (reply.status, reply.error) == ("lacks", f"this node does not hold the base {'1' * 64}")
    assert (reply.run, reply.round, reply.node, reply.nonce, reply.base_sha256) == (RUN, 3, "ada", "n", "1" * 64)
    assert (reply.training, reply.evaluation, update, progress) == (None, None, {}, [])
    assert not (tmp_path / "nodes").exists()


def test_a_base_of_another_model_is_refused(tmp_path: Path) -> None:
    other = encode_tensors({"embed_tokens.weight": torch.zeros(VOCAB, 8)})
    with pytest.raises(StateError, match="not this model's"):
        one_node(tmp_path).handle(task(other), lambda progress: None)


def test_a_reply_or_noise_is_no_task(tmp_path: Path) -> None:
    node = one_node(tmp_path)
    with pytest.raises(WireError, match="not a task"):
        node.handle(node.handle(task(), lambda progress: None), lambda progress: None)
    with pytest.raises(WireError):
        node.handle(b"noise", lambda progress: None)


def test_training_that_diverges_leaves_the_state_of_before(tmp_path: Path) -> None:
    node = one_node(tmp_path)
    handed_in(node, task())
    with pytest.raises(TrainingError, match="diverged"):
        node.handle(task(NAN, round=1), lambda progress: None)
    assert node.site.store.load(RUN, "ada", 2).position == 6
    _, update, _ = handed_in(node, task(round=1, sequential_step=3))
    fresh = one_node(tmp_path / "fresh")
    handed_in(fresh, task())
    assert encode_tensors(update) == encode_tensors(handed_in(fresh, task(round=1, sequential_step=3))[1])


def test_nothing_is_handed_in_that_was_not_committed(tmp_path: Path) -> None:
    """An Aggregator that counts an update must find the node ready for the next round."""

    class FullDisk(NodeStore):
        def commit(self, state: NodeState, ready_for: int) -> str:
            if ready_for:
                raise OSError("no space left")
            return super().commit(state, ready_for)

    node = one_node(tmp_path)
    node.site = replace(node.site, store=FullDisk(tmp_path / "state", 2, 0))
    with pytest.raises(OSError, match="no space left"):
        node.handle(task(), lambda progress: None)


def test_a_failure_names_the_task_and_the_reason() -> None:
    reply = expect_reply(decode_message(failure_reply(task(round=4), "ada", "disk full")))
    assert (reply.status, reply.error) == ("failed", "disk full")
    assert (reply.run, reply.round, reply.node, reply.nonce) == (RUN, 4, "ada", "n")
    assert (reply.training, reply.evaluation) == (None, None)
    long = expect_reply(decode_message(failure_reply(task(), "ada", "x" * 5000)))
    assert len(long.error) == 2000
    with pytest.raises(WireError):
        failure_reply(b"noise", "ada", "?")
    with pytest.raises(WireError, match="not a task"):
        failure_reply(edited(failure_reply(task(), "ada", "?"), error=""), "ada", "?")
