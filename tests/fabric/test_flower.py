"""What the fabric allows a node with its task, without a Flower: its thread finds none, and tries again."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

from photon.fabric import errands
from photon.fabric.base import NodeInfo
from photon.fabric.control import read_ask, read_coming
from photon.fabric.flower import BlobPlane, FlowerFabric
from photon.fabric.flower_run import FlowerRun
from photon.fabric.flwr_internals import Content, FlowerDownError
from photon.link.store import BlobError, FolderStore
from photon.link.tensors import sha256_hex
from photon.link.update import Sealed, Task, seal

DEADLINE_S = 900.0


@pytest.fixture
def store(tmp_path: Path) -> FolderStore:
    return FolderStore(tmp_path / "blobs")


@pytest.fixture
def fabric(store: FolderStore) -> Iterator[FlowerFabric]:
    plane = BlobPlane(store, payload_bytes=1000)
    one = FlowerFabric("r", "a" * 64, "127.0.0.1:1", b"s" * 32, [NodeInfo("ada", tokens_per_step=1)], plane)
    yield one
    one.close()


class Run:
    """A run of Flower in which `deaf` cannot be sent a message."""

    def __init__(self, deaf: int) -> None:
        self.deaf, self.asked = deaf, list[int]()

    def push(self, node_id: int, content: Content, ttl_s: float) -> str:
        self.asked.append(node_id)
        if node_id == self.deaf:
            raise FlowerDownError("it takes none", status=404)
        return f"q{node_id}"


def test_a_node_that_takes_no_question_costs_the_others_none_and_is_not_asked_without_a_pause(
    store: FolderStore,
) -> None:
    infos = [NodeInfo("ada", tokens_per_step=1), NodeInfo("bob", tokens_per_step=1)]
    fabric = FlowerFabric("r", "a" * 64, "127.0.0.1:1", b"s" * 32, infos, BlobPlane(store, payload_bytes=1000))
    fabric.close()
    for number, peer in enumerate(fabric._peers.values(), start=1):
        peer.node_id, peer.is_online = number, True
    run = Run(deaf=1)
    for _ in range(3):
        fabric._ask_all(cast(FlowerRun, run))
    assert run.asked == [1, 2]
    assert fabric._peers["bob"].question == "q2"


def test_an_update_may_be_uploaded_as_long_as_its_node_tries(fabric: FlowerFabric, store: FolderStore) -> None:
    """With a long grace, or where late updates count, the Aggregator waits for it beyond the deadline."""
    task = Task(
        run="r", round=0, node="ada", nonce="n", base_sha256="a" * 64, form="held", evaluate=False,
        sequential_step=0, tau=1, nodes=1, deadline_s=DEADLINE_S,
    )  # fmt: skip
    fabric.send("ada", seal(task))
    training_ends = time.time() + DEADLINE_S
    assert store.ticket("ada").until >= training_ends + DEADLINE_S + errands._UPLOAD_SLACK_S


def base_task(number: int, body: bytes) -> Sealed:
    name = sha256_hex(body)
    return seal(
        Task(
            run="r", round=number, node="ada", nonce=f"n{number}", base_sha256=name, body_sha256=name, evaluate=False,
            sequential_step=number, tau=1, nodes=1, deadline_s=DEADLINE_S,
        ),
        body,
    )  # fmt: skip


def test_what_comes_next_is_published_and_stays_when_it_is_asked_for(fabric: FlowerFabric, store: FolderStore) -> None:
    """With the first task of a round the bases of others go: not that which the nodes have begun to download."""
    bodies = [b"base 0", b"base 1", b"base 2"]
    names = [sha256_hex(body) for body in bodies]
    fabric.send("ada", base_task(0, bodies[0]))
    fabric.foretell("ada", base_task(1, bodies[1]))
    assert store.published() == set(names[:2])
    fabric.send("ada", base_task(1, bodies[1]))
    fabric.foretell("ada", base_task(2, bodies[2]))
    assert store.published() == set(names[1:])


class Heard:
    """A run of Flower that keeps what is asked."""

    def __init__(self) -> None:
        self.questions: list[Content] = []

    def push(self, node_id: int, content: Content, ttl_s: float) -> str:
        self.questions.append(content)
        return f"q{len(self.questions)}"


def test_a_question_tells_what_comes_next_for_as_long_as_its_task_is_open(
    fabric: FlowerFabric, store: FolderStore
) -> None:
    fabric.close()
    fabric._closing.clear()
    peer, heard = fabric._peers["ada"], Heard()
    peer.node_id, peer.is_online = 1, True

    def asked() -> tuple[bytes, bytes, int]:
        peer.forget_question()
        fabric._ask_all(cast(FlowerRun, heard))
        content = heard.questions[-1]
        ask, head = read_ask(content)
        return head, read_coming(content), ask.coming_bytes

    task, follows = base_task(0, b"base"), base_task(1, b"another")
    fabric.foretell("ada", follows)  # nothing is open that it could follow
    assert asked() == (b"", b"", 0)
    fabric.send("ada", task)
    assert asked() == (task.head, b"", 0)
    fabric.foretell("ada", follows)
    assert asked() == (task.head, follows.head, 7)
    fabric.send("ada", follows)
    assert asked() == (follows.head, b"", 0)
    fabric.foretell("ada", base_task(2, b""))
    fabric.abandon("ada")
    assert asked() == (b"", b"", 0)


def test_a_store_that_does_not_take_the_next_base_costs_no_round(
    fabric: FlowerFabric, store: FolderStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    fabric.send("ada", base_task(0, b"base"))

    def full(sha256: str, body: object) -> None:
        raise BlobError("no space")

    monkeypatch.setattr(store, "publish", full)
    fabric.foretell("ada", base_task(1, b"another"))
    assert fabric._peers["ada"].coming is None
