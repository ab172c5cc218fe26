"""What the fabric allows a node with its task, without a Flower: its thread finds none, and tries again."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from photon.fabric import errands
from photon.fabric.base import NodeInfo
from photon.fabric.flower import BlobPlane, FlowerFabric
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


def test_an_update_may_be_uploaded_as_long_as_its_node_tries(fabric: FlowerFabric, store: FolderStore) -> None:
    """With a long grace, or where late updates count, the Aggregator waits for it beyond the deadline."""
    task = Task(
        run="r", round=0, node="ada", nonce="n", base_sha256="a" * 64, form="held", evaluate=False,
        sequential_step=0, tau=1, nodes=1, deadline_s=DEADLINE_S,
    )  # fmt: skip
    fabric.send("ada", seal(task))
    training_ends = time.time() + DEADLINE_S
    assert store.ticket("ada").until >= training_ends + DEADLINE_S + errands._UPLOAD_SLACK_S
