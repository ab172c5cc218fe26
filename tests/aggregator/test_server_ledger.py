"""What is recorded of the bytes, for every kind of codec: the sum of the messages that crossed, and the planner's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from tests.support import Federation, tiny_recipe, weights

from photon.aggregator import server
from photon.aggregator.server import Aggregator
from photon.events import Event
from photon.link.codec.notation import parse_pipeline
from photon.link.ledger import Flow
from photon.link.tensors import decode_tensors
from photon.link.update import decode_message
from photon.summary import summarise, write_summary

LINKS: dict[str, dict[str, Any]] = {
    "exact": {},
    "zstd": {"up": ["zstd"], "down": ["zstd"]},
    "bf16": {"up": ["bf16"], "down": ["bf16"]},
    "int4": {"up": ["int4(block=32)"], "down": ["int8", "zstd"]},
    "topk": {"up": ["topk(density=0.1, chunk=64)", "int2"], "down": ["topk(density=0.1, chunk=64)"]},
    "lowrank": {"up": ["lowrank(rank=1)", "int8"], "down": ["lowrank(rank=1)"]},
    "weights": {"up": ["svd(energy=0.6)"], "down": ["bf16"], "of": "weights"},
}


def without_stages(flow: Flow) -> Flow:
    return flow.model_copy(update={"stages": {}})


def flow_of(messages: list[bytes], model_bytes: int, always_raw: bool) -> Flow:
    """What the ledger should say of these messages, but for stages."""
    bodies = [len(decode_message(message).body) for message in messages]
    whole = sum(len(message) for message in messages)
    raw = model_bytes * (len(messages) if always_raw else sum(body > 0 for body in bodies))
    return Flow(raw=raw, body=sum(bodies), encoded=whole, sent=whole)


@pytest.mark.parametrize("name", LINKS)
def test_the_ledger_is_the_sum_of_the_messages_at_every_step_of_their_way(
    name: str, tmp_path: Path, make_events: Callable[..., list[Event]]
) -> None:
    recipe = tiny_recipe(link=LINKS[name], federation={"rounds": 3})
    federation = Federation(tmp_path, recipe)
    state = federation.run()
    tensors = weights(state)
    shapes, dtypes = {n: tuple(t.shape) for n, t in tensors.items()}, {n: t.dtype for n, t in tensors.items()}
    model_bytes = 4 * sum(tensor.numel() for tensor in tensors.values())

    def crossed(ours: list[tuple[str, bytes]], node: str, upto: int, since: int = 0) -> list[bytes]:
        rounds = range(since, upto)
        return [data for who, data in ours if who == node and decode_message(data).header.round in rounds]

    sent, received = federation.fabric.sent, federation.fabric.received
    for event in federation.rounds():
        assert len(event.round_link) == 3
        for node, traffic in event.round_link.items():
            down, up = (crossed(ours, node, event.round, event.round - 1) for ours in (sent, received))
            assert (len(down), len(up)) == (1, 1)
            assert without_stages(traffic.down) == flow_of(down, model_bytes, True)
            assert without_stages(traffic.up) == flow_of(up, model_bytes, False)
            assert (event.nodes[node].bytes_down, event.nodes[node].bytes_up) == (len(down[0]), len(up[0]))
    last = federation.evaluations()[-1]
    assert last.link == state.progress.link
    assert without_stages(last.link.down) == flow_of([data for _, data in sent], model_bytes, True)
    assert without_stages(last.link.up) == flow_of([data for _, data in received], model_bytes, False)
    assert (last.bytes_down, last.bytes_up) == (last.link.down.encoded, last.link.up.encoded)
    # What the planner says: one body up a node and round; one down a node in every round but the first, and at the end.
    for way, flow in (("up", last.link.up), ("down", last.link.down)):
        codec = parse_pipeline(LINKS[name].get(way, []))
        size = codec.body_size(shapes, dtypes)
        exact = len(federation.aggregator.payload)
        first = 0 if way == "up" or federation.aggregator.downlink.sends_differences else 3 * exact
        bodies, stages = first + 9 * size.body_bytes, {stage: 9 * left for stage, left in size.stage_bytes.items()}
        assert flow.stages.keys() == stages.keys()
        if size.is_exact:
            assert (flow.body, flow.stages) == (bodies, stages)
        elif size.stage_bytes:  # the last stage left what the messages hold, their own headers aside
            coded = [decode_message(data) for _, data in (received if way == "up" else sent)]
            wires = [
                decode_tensors(message.body) for message in coded if message.header.codec == codec.name if message.body
            ]
            assert flow.stages[codec.labels[-1]] == sum(wire.numel() for tensors in wires for wire in tensors.values())
            assert 0 < flow.body <= bodies
    summary = summarise([make_events()[0], *federation.events()])
    assert (summary.link.up, summary.link.down) == (last.link.up, last.link.down)
    assert summary.link.bytes_per_token == (last.link.up.sent + last.link.down.sent) / state.progress.tokens
    written = json.loads(write_summary(tmp_path, summary).read_text())["link"]
    assert written == last.link.model_dump() | {"bytes_per_token": summary.link.bytes_per_token}


@pytest.mark.parametrize("is_resumed", [False, True])
def test_what_a_network_carried_is_taken_from_its_own_counters(tmp_path: Path, is_resumed: bool) -> None:
    """What it carried before the first round is the run's; before a resume it is on the ledger already, or on none."""
    federation = Federation(tmp_path, tiny_recipe(federation={"rounds": 2}))
    counters = {"ada": (5_000_000, 7_000_000), "bob": (0, 0)}

    def carried() -> dict[str, tuple[int, int]]:
        calls = len(federation.fabric.received)
        return {node: (down + 1000 * calls, up + 10 * calls) for node, (down, up) in counters.items()}

    federation.fabric.carried = carried  # type: ignore[method-assign, assignment]  # a network of its own for one test
    if is_resumed:
        federation.store.commit(federation.aggregator.state())
    federation.aggregator = Aggregator(
        federation.recipe, federation.fabric, federation.store, federation.tracker, federation.aggregator.state()
    )
    with mock.patch.object(server, "_ACCOUNTS_S", 0.0):
        link = federation.run().progress.link
    before = (0, 0) if is_resumed else counters["ada"]
    assert (link.down.sent, link.up.sent) == (before[0] + 2 * 1000 * 9, before[1] + 2 * 10 * 9)
    assert link.down.encoded == sum(len(message) for _, message in federation.fabric.sent)
    first, second = federation.rounds()
    assert first.round_link["bob"].down.sent == 3000
    assert first.round_link["cyd"].down.sent == 0
    assert second.link.up.sent == before[1] + 2 * 10 * 6
