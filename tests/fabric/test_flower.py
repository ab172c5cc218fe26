"""What the fabric allows a node with its task, without a Flower: its thread finds none, and tries again."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import pytest

from photon.fabric import errands
from photon.fabric.base import NodeInfo
from photon.fabric.flower import BlobPlane, FlowerFabric
from photon.fabric.flower_run import FlowerRun
from photon.fabric.flwr_internals import Content, FlowerDownError
from photon.link.store import FolderStore
from photon.link.update import Task, seal

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
