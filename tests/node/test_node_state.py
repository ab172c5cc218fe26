"""A node's states: whatever round the Aggregator can go back to, the node still has the state it had then."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from photon.durable import STATE_FILE, NumberedStates, kept_numbers
from photon.errors import StateError
from photon.link.tensors import encode_tensors, tensor_chunks
from photon.node.state import LINK_FILE, OPTIMIZER_FILE, NodeState, NodeStore

StoreType = Callable[[Path, int, int], NodeStore]


def state(position: int) -> NodeState:
    optimizer = {"w/exp_avg": torch.tensor([float(position)]), "w/step": torch.tensor(float(position))}
    link = {"residual/w": torch.tensor([0.5, -0.0, float(position)]), "memory/w/0/basis": torch.eye(2) * position}
    return NodeState("r", "ada", position, 6 * position, position, optimizer, link)


def same(a: NodeState, b: NodeState) -> bool:
    optimizer, link = (
        encode_tensors(ours) == encode_tensors(theirs)
        for ours, theirs in ((a.optimizer, b.optimizer), (a.link, b.link))
    )
    return (
        optimizer
        and link
        and (a.run, a.node, a.position, a.tokens, a.steps) == (b.run, b.node, b.position, b.tokens, b.steps)
    )


def test_what_was_committed_is_restored(tmp_path: Path) -> None:
    store = NodeStore(tmp_path, 2, 0)
    assert same(store.load("r", "ada", 0), NodeState("r", "ada"))
    store.commit(state(4), 1)
    assert same(store.load("r", "ada", 1), state(4))
    assert same(store.load("r", "ada", 9), state(4))  # it sat out rounds 1 to 8
    assert same(store.load("r", "ada", 0), NodeState("r", "ada"))  # round 0 again
    assert same(NodeStore(tmp_path, 2, 0).load("r", "ada", 1), state(4))  # by another process


def test_a_state_from_before_codecs_kept_anything_is_read(tmp_path: Path) -> None:
    fields = {"run": "r", "node": "ada", "position": 4, "tokens": 24, "steps": 4}
    NumberedStates(tmp_path).commit(1, {OPTIMIZER_FILE: tensor_chunks(state(4).optimizer)}, fields)
    assert same(NodeStore(tmp_path, 2, 0).load("r", "ada", 1), replace(state(4), link={}))


def test_a_node_that_joins_late_begins_fresh_and_can_do_so_again(tmp_path: Path) -> None:
    store = NodeStore(tmp_path, 1, 0)
    assert store.load("r", "ada", 7).position == 0
    store.commit(state(4), 8)
    assert store.load("r", "ada", 7).position == 0  # the Aggregator lost round 7 and asks again


# --- retention -------------------------------------------------------------------------------------------------------
# What happens in a round: (the node takes part, the Aggregator crashes after that and does the round again, then the
# user goes back to the n-th of the rounds that the Aggregator still has; None = goes on).
Happening = tuple[bool, bool, int | None]


def lost_states(
    folder: Path, store_type: StoreType, plan: list[Happening], keep_last: int, keep_every: int
) -> list[str]:
    """Run `plan`; after each step say for which kept round the node no longer has the state it had then."""
    store = store_type(folder, keep_last, keep_every)
    filed = {0: 0}  # what the node ever had: round it was ready for -> position
    kept: list[int] = [0]  # rounds that the Aggregator holds
    lost, position = [], 0

    def check(when: str) -> None:
        for round_index in kept:
            expected = filed[max(ready for ready in filed if ready <= round_index)]
            try:
                found = store.load("r", "ada", round_index).position
            except StateError as error:
                lost.append(f"{when}: round {round_index}: {error}")
            else:
                if found != expected:
                    lost.append(f"{when}: round {round_index}: {found}, not {expected}")

    for takes_part, crashes, back_to in plan:
        current = kept[-1]
        for attempt in range(1 + crashes):
            if takes_part:
                before = store.load("r", "ada", current).position
                position = before + 1 + attempt  # a repeat on a machine with another deadline may get further
                store.commit(state(position), current + 1)
                filed[current + 1] = position
            check(f"in round {current}")
        kept = sorted(kept_numbers([*kept, current + 1], keep_last, keep_every))
        check(f"after round {current}")
        if back_to is not None:
            target = kept[back_to % len(kept)]
            kept = [round_index for round_index in kept if round_index <= target]
            filed = {ready: place for ready, place in filed.items() if ready <= target}
            store.set_aside(target)
            check(f"back at round {target}")
    return lost


happenings = st.tuples(st.booleans(), st.booleans(), st.none() | st.none() | st.none() | st.integers(0, 5))


@settings(max_examples=60, deadline=None)
@given(st.lists(happenings, max_size=14), st.integers(1, 4), st.integers(0, 4))
def test_every_round_the_aggregator_keeps_has_the_states_it_needs(
    tmp_path_factory: pytest.TempPathFactory, plan: list[Happening], keep_last: int, keep_every: int
) -> None:
    with mock.patch.object(os, "fsync"):
        assert lost_states(tmp_path_factory.mktemp("node"), NodeStore, plan, keep_last, keep_every) == []


class NewestOnly(NodeStore):
    """A mutant: the Aggregator's rule applied to the node's own states."""

    def commit(self, state: NodeState, ready_for: int) -> None:
        with mock.patch.object(NumberedStates, "prune"):
            super().commit(state, ready_for)
        self._states.prune(kept_numbers(self._states.numbers(), self._keep_last, self._keep_every))


class NothingBefore(NodeStore):
    """A mutant: states of kept rounds stay, but not the older one that a kept round goes back to."""

    def commit(self, state: NodeState, ready_for: int) -> None:
        with mock.patch.object(NumberedStates, "prune"):
            super().commit(state, ready_for)
        self._states.prune(kept_numbers(range(ready_for), self._keep_last, self._keep_every) | {ready_for})


@pytest.mark.parametrize(
    ("mutant", "plan"),
    [(NewestOnly, [(True, False, None)] * 3), (NothingBefore, [(True, False, None), (False, False, None)] * 3)],
)
def test_a_store_that_keeps_too_little_is_found_out(mutant: StoreType, plan: list[Happening], tmp_path: Path) -> None:
    assert lost_states(tmp_path / "ours", NodeStore, plan, 1, 0) == []
    assert lost_states(tmp_path / "mutant", mutant, plan, 1, 0) != []


def test_states_do_not_pile_up(tmp_path: Path) -> None:
    store = NodeStore(tmp_path, 2, 10)
    for round_index in range(25):
        store.load("r", "ada", round_index)
        store.commit(state(round_index), round_index + 1)
    assert NumberedStates(tmp_path).numbers() == [0, 10, 20, 23, 24, 25]


# --- refusals --------------------------------------------------------------------------------------------------------


def test_a_round_too_long_ago_is_refused_with_advice(tmp_path: Path) -> None:
    store = NodeStore(tmp_path, 1, 0)
    for round_index in range(4):
        store.commit(state(round_index), round_index + 1)
    with pytest.raises(StateError, match=r"oldest state is for round 3, round 1 was asked for; checkpoint\.keep_last"):
        store.load("r", "ada", 1)


@pytest.mark.parametrize(("run", "node"), [("other", "ada"), ("r", "bob")])
def test_a_state_of_another_run_or_node_is_refused(run: str, node: str, tmp_path: Path) -> None:
    NodeStore(tmp_path, 1, 0).commit(state(3), 1)
    with pytest.raises(StateError, match=f"belongs to node 'ada' of run 'r', not to '{node}' of '{run}'"):
        NodeStore(tmp_path, 1, 0).load(run, node, 1)


@pytest.mark.parametrize("file", [STATE_FILE, OPTIMIZER_FILE, LINK_FILE])
def test_a_damaged_state_is_refused_by_name_not_replaced_by_an_older_one(file: str, tmp_path: Path) -> None:
    store = NodeStore(tmp_path, 3, 0)
    for round_index in range(3):
        store.commit(state(round_index), round_index + 1)
    path = tmp_path / "000003" / file
    path.write_bytes(path.read_bytes()[:-2])
    with pytest.raises(StateError, match=rf"000003/{file}"):
        store.load("r", "ada", 3)
    assert store.load("r", "ada", 2).position == 1


def test_fields_that_are_not_a_node_state_are_refused(tmp_path: Path) -> None:
    NodeStore(tmp_path, 1, 0).commit(state(3), 1)
    path = tmp_path / "000001" / STATE_FILE
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"fields": content["fields"] | {"surprise": 1}}))
    with pytest.raises(StateError, match="000001"):
        NodeStore(tmp_path, 1, 0).load("r", "ada", 1)


def test_set_aside_puts_later_states_out_of_reach(tmp_path: Path) -> None:
    store = NodeStore(tmp_path, 3, 0)
    for round_index in range(3):
        store.commit(state(round_index), round_index + 1)
    store.set_aside(2)
    assert store.load("r", "ada", 3).position == 1
