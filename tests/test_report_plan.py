"""Predicted beside measured: the prediction knows nothing of what it is compared with, and phases add up to rounds."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import pytest

from photon.devices import (
    DECODE_BYTES_PER_S,
    DISK_BYTES_PER_S,
    ENCODE_BYTES_PER_S,
    MERGE_BYTES_PER_S,
    OUTER_BYTES_PER_S,
)
from photon.events import Event, RoundDone, RunStarted
from photon.link.ledger import Flow, Traffic
from photon.report import render_report
from photon.report_plan import Comparison, phases_of, predicted_and_measured

MakeEvents = Callable[..., list[Event]]
NAMES = ("alice", "bob", "carol")
COMMIT = "commit of the round before"
TRANSFER = "messages, transfer, waiting"
RECIPE = """
[data]
sequence_length = 100
[node]
batch_size = 2
optimizer = "sgd"
[evaluation]
sequences = 6
every = 2
[federation]
rounds = 6
tau = 16
outer = "nesterov"
{more}
[link]
fabric = "{fabric}"
{link}
[[silo]]
name = "alice"
text = "x"
[[silo]]
name = "bob"
text = "x"
[[silo]]
name = "carol"
text = "x"
"""


def recipe(fabric: str = "flower", more: str = "", link: str = "") -> str:
    return RECIPE.format(fabric=fabric, more=more, link=link)


def timed(event: RoundDone, slower: float = 1.0, **nodes: float) -> RoundDone:
    """What a round with these phases records; bob is the slowest. `slower`: everything takes so many times as long."""
    scored = 3.0 if event.round % 2 == 1 else 0.0
    parts = {"receive_s": 0.5, "evaluation_seconds": scored, "seconds": 4.0, "encode_s": 0.25, "save_s": 0.125} | nodes
    changed = {
        name: node.model_copy(update={key: s * slower * (1.0 if name == "bob" else 0.5) for key, s in parts.items()})
        for name, node in event.nodes.items()
    }
    phases = {"assembly": 1.0, "nodes": 8.0 + scored, "merge": 0.75, "outer": 0.5, COMMIT: 0.25}
    body = Traffic(up=Flow(body=2_000_000), down=Flow(body=1_000_000))
    return event.model_copy(
        update={
            "nodes": changed,
            "phases_s": {phase: s * slower for phase, s in phases.items()},
            "round_link": dict.fromkeys(NAMES, body),
        }
    )


def recorded(make_events: MakeEvents, slower: dict[int, float] | None = None, **nodes: float) -> list[Event]:
    factors = slower or {}
    return [
        timed(event, factors.get(event.round, 1.0), **nodes) if isinstance(event, RoundDone) else event
        for event in make_events(names=NAMES, rounds=6)
    ]


def compared(events: list[Event], text: str) -> Comparison | None:
    start = next(event for event in events if isinstance(event, RunStarted))
    rounds = {event.round: event for event in events if isinstance(event, RoundDone)}
    return predicted_and_measured(start, rounds, text)


def rows(events: list[Event], text: str) -> dict[str, tuple[float, float]]:
    found = compared(events, text)
    assert found is not None
    assert not found.why_not
    out = {}
    for row in found.rows:
        assert row.predicted_s is not None, row
        assert row.measured_s is not None, row
        out[row.phase] = row.predicted_s, row.measured_s
    return out


def test_phases_of_a_round_add_up_to_its_wall_time(make_events: MakeEvents) -> None:
    for event in recorded(make_events):
        if isinstance(event, RoundDone):
            assert math.fsum(phases_of(event).values()) == pytest.approx(math.fsum(event.phases_s.values()))
            assert phases_of(event)["train"] == 4.0  # the slowest node's
            assert phases_of(event, at_once=1)["train"] == 8.0  # one after the other
            assert phases_of(event, at_once=2)["train"] == pytest.approx(2 * 8.0 / 3)  # two waves of a mean node


def test_the_table_by_hand(make_events: MakeEvents) -> None:
    found = rows(recorded(make_events), recipe())
    size = 4_000_000  # bytes of the model
    own = 0.5 + 4.0 + 0.25 + 0.125
    assert found[TRANSFER] == pytest.approx((9.0 - own, 9.0 - own))
    assert found["node: train"] == pytest.approx((4.0, 4.0))
    # In rounds 3 and 5 of 3, 4, 5, 6; 600 tokens, of which it trains 800 a second.
    assert found["node: score held-out text"] == pytest.approx((600 / (3 * 800) / 2, 1.5))
    assert found["node: decode, load"] == pytest.approx((size / DECODE_BYTES_PER_S, 0.5))
    assert found["Aggregator: verify, merge"] == pytest.approx((3 * size / MERGE_BYTES_PER_S, 0.75))
    assert found["Aggregator: commit"] == pytest.approx((size / DISK_BYTES_PER_S, 0.25))
    total = found.pop("a round")
    assert total == pytest.approx(tuple(math.fsum(pair[side] for pair in found.values()) for side in (0, 1)))


def test_the_prediction_knows_nothing_of_the_rounds_that_it_is_compared_with(make_events: MakeEvents) -> None:
    calm = rows(recorded(make_events), recipe())
    slow = rows(recorded(make_events, dict.fromkeys(range(3, 7), 3.0)), recipe())
    for phase, (predicted, measured) in slow.items():
        assert predicted == calm[phase][0]
        assert measured == pytest.approx(3 * calm[phase][1])
    # It can fail: from the second round it does take something.
    assert rows(recorded(make_events, {2: 3.0}), recipe())["node: train"] == pytest.approx((12.0, 4.0))
    assert rows(recorded(make_events, {1: 3.0}), recipe())["node: train"] == calm["node: train"]


def test_scoring_is_that_of_the_second_round_and_not_of_the_first_that_starts_everything_up(
    make_events: MakeEvents,
) -> None:
    def scored(seconds: dict[int, float], text: str) -> float:
        events = [
            event.model_copy(
                update={
                    "nodes": {
                        name: node.model_copy(update={"evaluation_seconds": seconds.get(event.round, 0.0)})
                        for name, node in event.nodes.items()
                    }
                }
            )
            if isinstance(event, RoundDone)
            else event
            for event in recorded(make_events)
        ]
        return rows(events, text)["node: score held-out text"][0]

    often = recipe().replace("every = 2", "every = 1")
    assert scored(dict.fromkeys(range(1, 7), 0.5), often) == pytest.approx(0.5)
    assert scored({1: 9.0, 2: 0.5}, often) == pytest.approx(0.5)
    assert scored({1: 9.0, 3: 0.5}, recipe()) == pytest.approx(0.25 / 2)
    assert scored({1: 0.125, 3: 0.5}, recipe()) == pytest.approx(0.125 / 2)  # faster than is assumed, even so


def test_nodes_that_queue_for_two_workers(make_events: MakeEvents) -> None:
    found = rows(recorded(make_events), recipe("local"))
    assert found["node: train"] == pytest.approx((2 * 8.0 / 3, 2 * 8.0 / 3))
    assert found["node: decode, load"][0] == pytest.approx(2 * 4_000_000 / DECODE_BYTES_PER_S)


def test_what_lossy_codecs_keep_is_written_too(make_events: MakeEvents) -> None:
    exact = rows(recorded(make_events), recipe())
    lossy = rows(recorded(make_events), recipe(link='up = "int8"\ndown = "int8"'))
    assert lossy["node: update and state to disk"][0] == pytest.approx(6_000_000 / DISK_BYTES_PER_S)
    assert exact["node: update and state to disk"][0] == pytest.approx(2_000_000 / DISK_BYTES_PER_S)
    assert lossy["Aggregator: commit"][0] == pytest.approx((2 * 4_000_000 + 1_000_000) / DISK_BYTES_PER_S)


def changed(events: list[Event], change: Callable[[RoundDone], dict[str, Any]]) -> list[Event]:
    return [event.model_copy(update=change(event)) if isinstance(event, RoundDone) else event for event in events]


def with_taus(events: list[Event], taus: Sequence[int]) -> list[Event]:
    """Rounds of these local steps, each of which takes the slowest node a quarter of a second."""
    steps = list(accumulate(taus))

    def change(event: RoundDone) -> dict[str, Any]:
        tau = taus[event.round - 1]
        nodes = {
            name: node.model_copy(update={"steps": tau, "seconds": 0.25 * tau * (1.0 if name == "bob" else 0.5)})
            for name, node in event.nodes.items()
        }
        return {"nodes": nodes, "sequential_step": steps[event.round - 1]}

    return changed(events, change)


@pytest.mark.parametrize("part", ["tau_ramp(first=2)", "tau_by_agreement(low=0.2, high=0.6)"])
def test_steps_are_those_that_the_rounds_took(part: str, make_events: MakeEvents) -> None:
    """Speed is that of the second round's own steps, and later rounds take as many as they took."""
    text = recipe(more=f'parts = ["{part}"]')
    found = rows(with_taus(recorded(make_events), [4, 9, 14, 18, 23, 28]), text)
    assert found["node: train"] == pytest.approx((0.25 * (14 + 18 + 23 + 28) / 4,) * 2)


def exchanging(events: list[Event], up: Sequence[int], down: int) -> list[Event]:
    """Updates of so many bytes of float32 in each round, and a base of `down`; carol sends hers twice."""

    def change(event: RoundDone) -> dict[str, Any]:
        link = {
            name: Traffic(
                up=Flow(raw=up[event.round - 1] * (2 if name == "carol" else 1), body=2_000_000),
                down=Flow(raw=down, body=1_000_000),
            )
            for name in NAMES
        }
        return {"round_link": link}

    return changed(events, change)


SHARE, SGD, ADAMW = 'parts = ["share"]', 'optimizer = "sgd"', 'optimizer = "adamw"'


def test_shared_optimizer_state_is_moved_too(make_events: MakeEvents) -> None:
    """Weights and both moments, three times the model, are decoded, encoded, merged and written."""
    text = recipe(more=SHARE).replace(SGD, ADAMW)
    found = rows(exchanging(recorded(make_events), [12_000_000] * 6, 12_000_000), text)
    state = 8_000_000  # both moments in the node's own state
    assert found["node: decode, load"][0] == pytest.approx((12_000_000 + state) / DECODE_BYTES_PER_S)
    assert found["node: encode the update"][0] == pytest.approx(12_000_000 / ENCODE_BYTES_PER_S)
    assert found["node: update and state to disk"][0] == pytest.approx((state + 2_000_000) / DISK_BYTES_PER_S)
    assert found["Aggregator: verify, merge"][0] == pytest.approx(3 * 12_000_000 / MERGE_BYTES_PER_S)
    outer = 12_000_000 / OUTER_BYTES_PER_S + 12_000_000 / DISK_BYTES_PER_S
    assert found["Aggregator: outer step, new base"][0] == pytest.approx(outer)


def test_the_state_of_a_parts_own_optimizer_is_read_and_written(make_events: MakeEvents) -> None:
    """Three numbers for each of the model's, where the recipe's AdamW would keep two."""
    own = ADAMW + "\nweight_decay = 0.0\nclip_norm = 0.0"
    text = recipe(more='parts = ["fedlalr"]\nweighting = "uniform"\nouter_lr = 1.0').replace(SGD, own)
    text = text.replace('"nesterov"', '"fedavg"')
    found = rows(exchanging(recorded(make_events), [12_000_000] * 6, 12_000_000), text)
    assert found["node: decode, load"][0] == pytest.approx((12_000_000 + 12_000_000) / DECODE_BYTES_PER_S)


def test_a_fragment_is_what_is_encoded_and_merged(make_events: MakeEvents) -> None:
    text = recipe(more='parts = ["fragments(count=2)"]')
    found = rows(exchanging(recorded(make_events), [2_000_000] * 6, 4_000_000), text)
    assert found["node: encode the update"][0] == pytest.approx(2_000_000 / ENCODE_BYTES_PER_S)
    assert found["node: decode, load"][0] == pytest.approx((4_000_000 + 4_000_000) / DECODE_BYTES_PER_S)


def test_no_table_where_rounds_exchange_different_tensors_in_turn(make_events: MakeEvents) -> None:
    text = recipe(more='parts = ["share(first=3, second=6)"]').replace(SGD, ADAMW)
    once, twice, thrice = 4_000_000, 8_000_000, 12_000_000
    found = compared(exchanging(recorded(make_events), [once, once, twice, once, once, thrice], thrice), text)
    assert found is not None
    assert not found.rows
    assert "different tensors in turn" in found.why_not


def test_no_table_without_three_rounds_or_for_runs_that_did_not_record_it(make_events: MakeEvents) -> None:
    events = recorded(make_events)
    assert compared([event for event in events if getattr(event, "round", 0) < 3], recipe()) is None
    assert compared(make_events(names=NAMES), recipe()) is None
    assert compared(events, recipe().replace('"nesterov"', '"none"')) is None
    unreadable = compared(events, "nonsense = 1")
    assert unreadable is not None
    assert "cannot read the recipe" in unreadable.why_not


@pytest.mark.parametrize(
    ("text", "shown"),
    [(recipe(), ("rounds 3 to 6", "a round", "node: train")), ("nonsense = 1", ("cannot read the recipe",))],
)
def test_the_report_shows_it(make_events: MakeEvents, text: str, shown: tuple[Any, ...]) -> None:
    html = render_report(recorded(make_events), text)
    for words in ("Predicted beside measured", *shown):
        assert words in html
    assert "Predicted beside measured" not in render_report(make_events(names=NAMES), text)
