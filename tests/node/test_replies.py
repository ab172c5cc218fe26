"""The same work asked for again costs a node nothing and gives the same bytes; any other work is done anew."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.support import RUN, Federation, new_model, tiny_recipe, without_timings

from photon.durable import STATE_FILE
from photon.link.body import FileBody
from photon.link.tensors import encode_tensors, sha256_hex, tensor_chunks
from photon.link.update import EvaluationReport, Reply, Task, TrainingReport, decode_message, encode_message
from photon.model.build import named_weights
from photon.node.node import Node
from photon.node.replies import UPDATE_FILE, ReplyStore, StoredReply

BASE = encode_tensors(named_weights(new_model(tiny_recipe())))
OTHER_BASE = encode_tensors(named_weights(new_model(tiny_recipe(seed=6))))
TRAINING = TrainingReport(
    tokens=36, steps=3, loss_first=2.5, loss_last=2.25, loss_mean=2.4, gradient_norm_mean=0.5, clipped_steps=1,
    learning_rate=0.3, seconds=1.5, epoch=0.06,
)  # fmt: skip
EVALUATION = EvaluationReport(nats=7.5, tokens=18, text_bytes=63.0, unigram_nats=45.0, seconds=0.1)
UPDATE = {"w": torch.arange(6, dtype=torch.float32)}


def task(body: bytes = BASE, **changes: Any) -> Task:
    fields = {
        "run": RUN, "round": 0, "node": "ada", "nonce": "n",
        "base_sha256": sha256_hex(body), "body_sha256": sha256_hex(body),
        "evaluate": False, "sequential_step": 0, "tau": 3, "nodes": 2, "deadline_s": 1e6,
    }  # fmt: skip
    return Task.model_validate(fields | changes)


RECIPE = "5" * 64


# --- the store -------------------------------------------------------------------------------------------------------


def commit(store: ReplyStore, one: Task, evaluation: EvaluationReport | None = None) -> StoredReply:
    return store.commit(one, TRAINING, evaluation, "exact", 6, tensor_chunks(UPDATE))


@pytest.mark.parametrize("evaluation", [None, EVALUATION])
def test_what_was_committed_is_found_by_the_next_process(evaluation: EvaluationReport | None, tmp_path: Path) -> None:
    kept = commit(ReplyStore(tmp_path, RECIPE), task(), evaluation)
    found = ReplyStore(tmp_path, RECIPE).find(task(), "exact")
    assert found == kept
    assert found is not None
    assert (found.training, found.evaluation, found.codec, found.position_after) == (TRAINING, evaluation, "exact", 6)
    assert bytes(found.body.read(0, len(found.body))) == encode_tensors(UPDATE)
    assert found.body_sha256 == sha256_hex(encode_tensors(UPDATE))


def test_before_anything_is_committed_nothing_is_found(tmp_path: Path) -> None:
    assert ReplyStore(tmp_path / "nowhere", RECIPE).find(task(), "exact") is None
    assert not (tmp_path / "nowhere").exists()


CHANGES: dict[str, dict[str, Any]] = {
    "another run": {"run": "r2"},
    "another node": {"node": "bob"},
    "another round": {"round": 1},
    "another base": {"base_sha256": sha256_hex(OTHER_BASE)},
    "another place in the schedule": {"sequential_step": 3},
    "more steps": {"tau": 4},
    "scores as well": {"evaluate": True},
    "other nodes beside it": {"nodes": 3},
}


@pytest.mark.parametrize("what", CHANGES)
def test_other_work_is_not_found(what: str, tmp_path: Path) -> None:
    store = ReplyStore(tmp_path, RECIPE)
    commit(store, task())
    assert store.find(task(**CHANGES[what]), "exact") is None
    assert store.find(task(), "exact") is not None


def test_what_another_recipe_led_to_is_not_found(tmp_path: Path) -> None:
    """A round failed, its operator lowered the learning rate: nobody wants the update of the old one."""
    commit(ReplyStore(tmp_path, RECIPE), task())
    assert ReplyStore(tmp_path, "6" * 64).find(task(), "exact") is None
    assert ReplyStore(tmp_path, RECIPE).find(task(), "exact") is not None


TOLD_OTHERWISE = {"form": "difference", "held_sha256": "1" * 64, "codec": "int4", "body_sha256": "2" * 64}


@pytest.mark.parametrize("change", [{"nonce": "another"}, {"deadline_s": 5.0}, TOLD_OTHERWISE])
def test_the_same_work_under_another_nonce_or_deadline_or_told_otherwise_is_found(
    change: dict[str, Any], tmp_path: Path
) -> None:
    store = ReplyStore(tmp_path, RECIPE)
    commit(store, task())
    assert store.find(task(**change), "exact") is not None


def test_one_reply_is_kept_that_of_the_newest_work(tmp_path: Path) -> None:
    store = ReplyStore(tmp_path, RECIPE)
    for number in range(4):
        commit(store, task(round=number))
    assert [path.name for path in tmp_path.iterdir()] == ["000003"]
    commit(store, task(round=1))  # the Aggregator went back
    assert store.find(task(round=3), "exact") is None
    assert store.find(task(round=1), "exact") is not None
    commit(store, task(round=1, tau=2))  # the same round, other work
    assert store.find(task(round=1), "exact") is None
    assert store.find(task(round=1, tau=2), "exact") is not None


def flipped(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def cut_short(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGE: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "a flipped bit": (UPDATE_FILE, flipped),
    "an update cut short": (UPDATE_FILE, cut_short),
    "no update": (UPDATE_FILE, Path.unlink),
    "a manifest cut short": (STATE_FILE, cut_short),
    "an empty manifest": (STATE_FILE, lambda path: path.write_bytes(b"")),
    "a manifest that says other things": (
        STATE_FILE,
        lambda path: path.write_text(path.read_text().replace('"steps": 3', '"steps": 4')),
    ),
    "no manifest": (STATE_FILE, Path.unlink),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_reply_is_none(what: str, tmp_path: Path) -> None:
    store = ReplyStore(tmp_path, RECIPE)
    commit(store, task())
    name, damage = DAMAGE[what]
    damage(tmp_path / "000000" / name)
    assert store.find(task(), "exact") is None
    assert commit(store, task()) == store.find(task(), "exact")  # and is made again in its place


@settings(deadline=None, max_examples=40)
@given(
    st.lists(
        st.fixed_dictionaries(
            {"round": st.integers(0, 2), "tau": st.integers(1, 2), "sequential_step": st.integers(0, 1)}
        ),
        max_size=5,
    )
)
def test_only_the_last_work_is_ever_found(
    tmp_path_factory: pytest.TempPathFactory, works: list[dict[str, int]]
) -> None:
    store = ReplyStore(tmp_path_factory.mktemp("replies"), RECIPE)
    for work in works:
        commit(store, task(**work))
        for other in works:
            assert (store.find(task(**other), "exact") is not None) == (other == work)


# --- a node that keeps replies ---------------------------------------------------------------------------------------


class Counted:
    """A node with its own disk, and how often it has really trained. `again` is the same node as a new process."""

    def __init__(self, folder: Path, replies: type[ReplyStore] = ReplyStore, **sections: Any) -> None:
        self.folder, self.replies, self.sections = folder, replies, sections
        self.trainings = 0
        self.node = self._node()

    def again(self) -> None:
        self.node = self._node()

    def _node(self) -> Node:
        node = Federation(self.folder, tiny_recipe(["ada"], **self.sections)).nodes["ada"]
        node.site = replace(node.site, replies=self.replies(self.folder / "replies", RECIPE))
        train = node.trainer.train

        def counted(*arguments: Any) -> Any:
            self.trainings += 1
            return train(*arguments)

        node.trainer.train = counted  # type: ignore[method-assign, assignment]  # counted
        return node

    def ask(self, body: bytes = BASE, **changes: Any) -> tuple[Reply, bytes]:
        answer = self.node.handle(encode_message(task(body, **changes), body), lambda progress: None)
        message = decode_message(answer)
        assert isinstance(message.header, Reply)
        assert message.header.status == "ok"
        rest = message.body
        data = bytes(rest.read(0, len(rest)) if isinstance(rest, FileBody) else rest)
        assert sha256_hex(data) == message.header.body_sha256
        return message.header, data

    def position(self, ready_for: int) -> int:
        return self.node.site.store.load(RUN, "ada", ready_for).position


def test_the_same_work_is_handed_in_untrained_under_its_new_nonce(tmp_path: Path) -> None:
    one = Counted(tmp_path, node={"optimizer": "adamw"})
    first, body = one.ask(evaluate=True)
    one.again()  # after a kill, say
    second, again = one.ask(evaluate=True, nonce="m", deadline_s=3.0)
    assert one.trainings == 1
    assert again == body
    assert (first.nonce, second.nonce) == ("n", "m")
    but = {"nonce": True, "training": {"save_s"}}  # how long it took to save is not known before it is saved
    assert first.model_dump(exclude=but) == second.model_dump(exclude=but)
    assert second.evaluation is not None
    assert one.position(1) == 6


def test_a_reply_is_what_training_would_give(tmp_path: Path) -> None:
    """It is only a saving: a node that keeps no replies hands in the same."""
    keeps = Counted(tmp_path / "keeps", node={"optimizer": "adamw"})
    forgets = Counted(tmp_path / "forgets", node={"optimizer": "adamw"})
    forgets.node.site = replace(forgets.node.site, replies=None)
    for number in (0, 0, 1, 1, 2):
        ours, theirs = (one.ask(round=number, sequential_step=3 * number)[1] for one in (keeps, forgets))
        assert ours == theirs
    assert (keeps.trainings, forgets.trainings) == (3, 5)
    assert keeps.position(3) == forgets.position(3) == 18


def test_the_update_is_told_once_it_is_durable_and_before_the_state_is(tmp_path: Path) -> None:
    one = Counted(tmp_path, node={"optimizer": "adamw"})
    told: list[tuple[bytes, str, int]] = []

    def on_update(body: FileBody, sha256: str) -> None:
        told.append((bytes(body.read(0, len(body))), sha256, one.position(1)))

    answer = one.node.handle(encode_message(task(), BASE), lambda progress: None, on_update)
    reply = decode_message(answer).header
    assert isinstance(reply, Reply)
    [(data, sha256, position)] = told
    assert sha256 == sha256_hex(data) == reply.body_sha256
    assert position == 0  # of the state that the node began from: the new one is not there yet
    assert one.position(1) == 6


@pytest.mark.parametrize(
    ("body", "changes"),
    [(OTHER_BASE, {}), (BASE, {"tau": 2}), (BASE, {"sequential_step": 3}), (BASE, {"evaluate": True})],
    ids=["base", "tau", "step", "scores"],
)
def test_other_work_of_the_same_round_is_trained(body: bytes, changes: dict[str, Any], tmp_path: Path) -> None:
    """What it hands in is what a node would that was asked for nothing before."""
    schedule = {"node": {"schedule": "cosine"}}  # so that the place in it matters
    one, fresh = Counted(tmp_path / "one", **schedule), Counted(tmp_path / "fresh", **schedule)
    before = one.ask()[1]
    reply, update = one.ask(body, **changes)
    expected, expected_update = fresh.ask(body, **changes)
    assert one.trainings == 2
    assert update == expected_update
    assert (update == before) == ("evaluate" in changes)  # it can fail; scores alone do not change an update
    assert (reply.evaluation is not None) == ("evaluate" in changes)
    assert without_timings(reply) == without_timings(expected)
    assert one.position(1) == fresh.position(1)


class ByRoundAlone(ReplyStore):
    """Mutant: one round, one reply, whatever it was that was asked for."""

    def find(self, task: Task, codec: str) -> StoredReply | None:
        if task.round not in self._states.numbers():
            return None
        work = self._states.load(task.round).fields["work"]
        return super().find(task.model_copy(update=work), codec)


def test_a_store_keyed_by_round_alone_would_hand_in_another_models_update(tmp_path: Path) -> None:
    right, mutant = Counted(tmp_path / "right"), Counted(tmp_path / "mutant", ByRoundAlone)
    stale = mutant.ask()[1]
    assert right.ask()[1] == stale
    assert mutant.ask(OTHER_BASE)[1] == stale
    assert right.ask(OTHER_BASE)[1] != stale
    assert (right.trainings, mutant.trainings) == (2, 1)


@pytest.mark.parametrize("what", DAMAGE)
def test_a_node_whose_reply_is_damaged_trains_anew(what: str, tmp_path: Path) -> None:
    one = Counted(tmp_path)
    body = one.ask()[1]
    name, damage = DAMAGE[what]
    damage(tmp_path / "replies" / "000000" / name)
    one.again()
    assert one.ask(nonce="m")[1] == body
    assert one.trainings == 2
    assert one.position(1) == 6
    assert one.ask(nonce="o")[1] == body
    assert one.trainings == 2


def test_a_node_whose_state_was_not_committed_trains_anew(tmp_path: Path) -> None:
    """It died between the two commits: handing the reply in would leave it with no state for the next round."""
    one = Counted(tmp_path)
    body = one.ask()[1]
    shutil.rmtree(tmp_path / "nodes" / "ada" / "state" / "000001")
    one.again()
    assert one.ask(nonce="m")[1] == body
    assert one.trainings == 2
    assert one.position(1) == 6


def test_a_state_from_other_work_does_not_vouch_for_a_reply(tmp_path: Path) -> None:
    """The state after this round stands elsewhere in the data: it came of another task than the reply did."""
    one = Counted(tmp_path)
    body = one.ask(tau=2)[1]
    saved = shutil.copytree(tmp_path / "replies", tmp_path / "saved")
    one.ask(tau=3)
    shutil.rmtree(tmp_path / "replies")
    saved.rename(tmp_path / "replies")
    one.again()
    assert one.ask(tau=2)[1] == body
    assert one.trainings == 3
    assert one.position(1) == 4


def test_a_node_whose_state_is_damaged_trains_anew(tmp_path: Path) -> None:
    one = Counted(tmp_path)
    body = one.ask()[1]
    cut_short(tmp_path / "nodes" / "ada" / "state" / "000001" / STATE_FILE)
    assert one.ask(nonce="m")[1] == body
    assert one.trainings == 2


def test_an_update_in_a_codec_that_the_recipe_no_longer_names_is_not_handed_in(tmp_path: Path) -> None:
    one = Counted(tmp_path)
    one.ask()
    one.sections = {"link": {"up": "bf16"}}  # the operator changed the recipe, and resumed
    one.again()
    fresh = Counted(tmp_path / "fresh", link={"up": "bf16"})
    assert one.ask(nonce="m")[1] == fresh.ask()[1]
