"""An LLM Node answers bytes with bytes: the right update for the right task, from its own state, or a refusal."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tests.support import CPU, LENGTH, RUN, VOCAB, Federation, Text, edited, largest_difference, new_model, tiny_recipe
from torch import Tensor

from photon.config import Recipe
from photon.errors import StateError, WireError
from photon.events import NodeProgress
from photon.link.codecs import CODECS
from photon.link.tensors import decode_tensors, encode_tensors, sha256_hex
from photon.link.update import Reply, Task, decode_message, encode_message, expect_reply
from photon.model.build import named_weights
from photon.node import node as node_module
from photon.node.node import HeldOut, Node, failure_reply, score
from photon.node.state import NodeStore
from photon.node.trainer import Trainer, TrainingError

BASE = encode_tensors(named_weights(new_model(tiny_recipe())))


def task(body: bytes = BASE, **changes: Any) -> bytes:
    fields = {
        "run": RUN, "round": 0, "node": "ada", "nonce": "n", "base_sha256": sha256_hex(body),
        "evaluate": False, "sequential_step": 0, "tau": 3, "deadline_s": 1e6,
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
    assert once.model_dump(exclude={"training": {"seconds"}}) == again.model_dump(exclude={"training": {"seconds"}})
    assert node.site.store.load(RUN, "ada", 1).position == 6
    later = encode_tensors(handed_in(node, task(round=1, sequential_step=3))[1])
    assert later != encode_tensors(first)  # it can fail: the next round does train on
    assert node.site.store.load(RUN, "ada", 2).position == 12


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


@pytest.mark.parametrize("name", CODECS)
def test_the_codec_that_is_named_is_the_one_that_is_used(name: str, tmp_path: Path) -> None:
    _, exact, _ = handed_in(one_node(tmp_path / "exact"), task())
    reply, update, _ = handed_in(one_node(tmp_path / name, link={"up": name}), task())
    assert reply.codec == name
    assert encode_tensors(update) == encode_tensors({k: CODECS[name].encode(v) for k, v in exact.items()})


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


@pytest.mark.parametrize("batch_size", [1, 2, 64])
def test_sources_are_summed_with_their_own_bytes_and_unigrams(batch_size: int) -> None:
    """Two sources of different size: sums over tokens, so that no source weighs more than it is long."""
    trainer = Trainer(new_model(tiny_recipe()), tiny_recipe().node, CPU, 1)
    small = HeldOut(Text("s").batch(0, 2), bytes_per_token=2.0, unigram_loss=1.0)
    large = HeldOut(Text("l").batch(0, 5), bytes_per_token=4.0, unigram_loss=3.0)
    whole = np.concatenate([small.sequences, large.sequences])
    report = score(trainer, [small, large], batch_size)
    assert report.tokens == 7 * LENGTH
    assert report.text_bytes == 2 * LENGTH * 2.0 + 5 * LENGTH * 4.0
    assert report.unigram_nats == 2 * LENGTH * 1.0 + 5 * LENGTH * 3.0
    assert report.nats == pytest.approx(trainer.evaluate(whole, 7)[0], rel=1e-6)


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
    for message in (task(base_sha256="0" * 64), bytes(damaged), task()[:-4]):
        with pytest.raises(WireError, match="round 0: the base received is not the one the task names"):
            node.handle(message, lambda progress: None)


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
    infinite = encode_tensors({name: tensor * float("nan") for name, tensor in decode_tensors(BASE).items()})
    with pytest.raises(TrainingError, match="diverged"):
        node.handle(task(infinite, round=1), lambda progress: None)
    assert node.site.store.load(RUN, "ada", 2).position == 6
    _, update, _ = handed_in(node, task(round=1, sequential_step=3))
    fresh = one_node(tmp_path / "fresh")
    handed_in(fresh, task())
    assert encode_tensors(update) == encode_tensors(handed_in(fresh, task(round=1, sequential_step=3))[1])


def test_nothing_is_handed_in_that_was_not_committed(tmp_path: Path) -> None:
    """An Aggregator that counts an update must find the node ready for the next round."""

    class FullDisk(NodeStore):
        def commit(self, state: object, ready_for: int) -> None:
            if ready_for:
                raise OSError("no space left")
            super().commit(state, ready_for)

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
