"""The table of bytes: every step of their way, in its order, and nothing where there is none."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from photon.events import Event
from photon.link.ledger import Flow
from photon.report import render_report
from photon.report_link import link_rows, times_fewer
from photon.summary import Summary, summarise

MakeEvents = Callable[..., list[Event]]


def of(events: list[Event], **flows: Flow) -> Summary:
    summary = summarise(events)
    return summary.model_copy(update={"link": summary.link.model_copy(update=flows)})


def test_rows_go_from_float32_to_the_network(make_events: MakeEvents) -> None:
    down = Flow(raw=4000, body=900, encoded=950, sent=990, stages={"zstd": 800, "int4(block=32)": 1000})
    up = Flow(raw=2000, body=60, encoded=70, sent=71, stages={"int8": 50, "topk": 210})
    rows = [(row.name, row.up, row.down) for row in link_rows(of(make_events(), down=down, up=up))]
    assert rows == [
        ("as float32", 2000, 4000),
        ("after int4(block=32)", None, 1000),
        ("after zstd", None, 800),
        ("after topk", 210, None),
        ("after int8", 50, None),
        ("bodies of messages", 60, 900),
        ("whole messages", 70, 950),
        ("sent on the network", 71, 990),
    ]


def test_a_stage_of_both_ways_has_one_row(make_events: MakeEvents) -> None:
    flow = Flow(raw=4000, body=900, encoded=950, sent=990, stages={"int8": 1000, "zstd": 800})
    rows = link_rows(of(make_events(), down=flow, up=flow))
    assert [row.name for row in rows[1:3]] == ["after int8", "after zstd"]
    assert all(row.up == row.down is not None for row in rows)


def test_a_run_that_moved_nothing_has_no_table(make_events: MakeEvents) -> None:
    assert link_rows(of(make_events(), down=Flow(), up=Flow())) == []
    assert "From float32 to the wire" not in render_report(make_events()[:1], "")


def test_times_fewer_is_float32_over_messages() -> None:
    assert times_fewer(Flow(raw=1000, encoded=250)) == 4.0
    assert times_fewer(Flow()) == 1.0


@pytest.mark.parametrize("words", ["From float32 to the wire", "after topk", "after int8", "sent on the network"])
def test_the_page_shows_it(words: str, make_events: MakeEvents) -> None:
    assert words in render_report(make_events(), "")
