"""A node alone on its device goes on with the optimizer that lies there, and nobody can tell."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.node.test_node import NAN, task
from tests.support import Federation, tiny_recipe

from photon.config import Recipe
from photon.durable import Committed
from photon.link.update import decode_message
from photon.node.node import Node, TaskDroppedError
from photon.node.state import OPTIMIZER_FILE
from photon.node.trainer import TrainingError

happenings = st.tuples(
    st.sampled_from(["ada", "ada", "bob"]), st.sampled_from(["", "", "again", "dropped", "nan", "scored"])
)


def lived_through(
    folder: Path, recipe: Recipe, plan: list[tuple[str, str]], *, forgets: bool
) -> tuple[list[bytes], int]:
    """(All updates, how often an optimizer's file was read) of two nodes on one device, to whom `plan` happens.

    Where the trainer `forgets` what it holds, every state comes from the disk, as in a process that has just begun.
    """
    nodes, updates, reads = Federation(folder, recipe).nodes, [], 0
    rounds = dict.fromkeys(nodes, 0)
    read = Committed.read

    def counted(committed: Committed, name: str) -> bytes:
        nonlocal reads
        reads += name == OPTIMIZER_FILE
        return read(committed, name)

    def ask(node: Node, **changes: Any) -> bytes | None:
        if forgets:
            node.trainer.committed_sha256 = ""
        number = rounds[node.site.name]
        fields = {"node": node.site.name, "round": number, "sequential_step": 3 * number} | changes
        answer = decode_message(node.handle(task(**fields), lambda progress: None))
        return bytes(answer.body) if len(answer.body) else None

    with mock.patch.object(Committed, "read", counted), mock.patch.object(os, "fsync"):
        for name, what in plan:
            node = nodes[name]
            if what == "dropped":
                orders = iter(["go", "drop"])
                with mock.patch.object(node, "order", lambda orders=orders: next(orders)), suppress(TaskDroppedError):
                    ask(node)
            elif what == "nan":
                with suppress(TrainingError):
                    ask(node, body=NAN)
            elif what == "scored":
                ask(node, tau=0, evaluate=True)
            for _ in range(2 if what == "again" else 1):  # again: the Aggregator has lost the round
                updates.append(ask(node))
            rounds[name] += 1
    return updates, reads


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon"])
@pytest.mark.parametrize("choice", ["keep", "reset"])
@settings(max_examples=12, deadline=None)
@given(plan=st.lists(happenings, min_size=1, max_size=6))
def test_what_lies_in_the_trainer_goes_on_as_what_is_read_from_the_disk(
    tmp_path_factory: pytest.TempPathFactory, optimizer: str, choice: str, plan: list[tuple[str, str]]
) -> None:
    """To the byte, whoever else trained meanwhile and whatever was dropped, diverged or done again."""
    recipe = tiny_recipe(["ada", "bob"], node={"optimizer": optimizer, "optimizer_state": choice, "lr": 0.01})
    warm, _ = lived_through(tmp_path_factory.mktemp("warm"), recipe, plan, forgets=False)
    cold, _ = lived_through(tmp_path_factory.mktemp("cold"), recipe, plan, forgets=True)
    assert warm == cold


def test_an_optimizer_is_read_only_where_it_does_not_lie_in_the_trainer(tmp_path: Path) -> None:
    """Alone on its device a node reads its state once; and again after another node, or when its round was lost."""
    recipe = tiny_recipe(["ada", "bob"], node={"optimizer": "adamw", "lr": 0.01})
    for number, (plan, expected) in enumerate([
        ([("ada", "")] * 4, 1),
        ([("ada", ""), ("ada", "scored"), ("ada", "")], 1),
        ([("ada", ""), ("bob", ""), ("ada", "")], 3),
        ([("ada", ""), ("ada", "again"), ("ada", "")], 2),
        ([("ada", ""), ("ada", "dropped")], 2),
    ]):  # fmt: skip
        folder = tmp_path / str(number)
        assert lived_through(folder / "warm", recipe, plan, forgets=False)[1] == expected, plan
        tasks = sum(1 + (what in ("again", "dropped")) for _, what in plan)
        assert lived_through(folder / "cold", recipe, plan, forgets=True)[1] == tasks, plan
