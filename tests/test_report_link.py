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


RECIPE = '[link]\nup = {up}\ndown = {down}\n[[silo]]\nname = "a"\ntext = "x"\n'


def recipe(up: list[str], down: list[str]) -> str:
    return RECIPE.format(up=up, down=down)


def of(events: list[Event], **flows: Flow) -> Summary:
    summary = summarise(events)
    return summary.model_copy(update={"link": summary.link.model_copy(update=flows)})


def test_rows_go_from_float32_to_the_network(make_events: MakeEvents) -> None:
    down = Flow(raw=4000, body=900, encoded=950, sent=990, stages={"zstd": 800, "int4(block=32)": 1000})
    up = Flow(raw=2000, body=60, encoded=70, sent=71, stages={"int8": 50, "topk": 210})
    text = recipe(["topk", "int8"], ["int4(block=32)", "zstd"])
    rows = [(row.name, row.up, row.down) for row in link_rows(of(make_events(), down=down, up=up), text)]
    assert rows == [
        ("as float32", 2000, 4000),
        ("after topk", 210, None),
        ("after int8", 50, None),
        ("after int4(block=32)", None, 1000),
        ("after zstd", None, 800),
        ("bodies of messages", 60, 900),
        ("whole messages", 70, 950),
        ("sent on the network", 71, 990),
    ]


def test_a_stage_of_both_ways_has_one_row(make_events: MakeEvents) -> None:
    flow = Flow(raw=4000, body=900, encoded=950, sent=990, stages={"int8": 1000, "zstd": 800})
    rows = link_rows(of(make_events(), down=flow, up=flow), recipe(["int8", "zstd"], ["int8", "zstd"]))
    assert [row.name for row in rows[1:3]] == ["after int8", "after zstd"]
    assert all(row.up == row.down is not None for row in rows)


def order(events: list[Event], text: str, up: dict[str, int], down: dict[str, int]) -> list[str]:
    flows = {
        way: Flow(raw=1000, encoded=1000, stages=dict(sorted(s.items()))) for way, s in {"up": up, "down": down}.items()
    }
    return [row.name.removeprefix("after ") for row in link_rows(of(events, **flows), text)[1:-3]]


def test_stages_stand_as_in_the_recipe_whatever_they_leave(make_events: MakeEvents) -> None:
    """zstd is given what `link.exact_tensors` names beside what signs leave, and int4 leaves more than topk does."""
    top = "topk(density=0.075, chunk=65536)"
    up, down = {top: 106, "sign": 34, "zstd": 50}, {"int4": 129, "zstd": 120}
    text = recipe(["topk(chunk=65536,  density=0.0750)", "sign", "zstd"], ["int4", "zstd"])
    assert order(make_events(), text, up, down) == [top, "sign", "int4", "zstd"]
    other = recipe([top, "sign", "lz4"], ["zstd"])
    assert order(make_events(), other, {top: 106, "sign": 34, "lz4": 16}, {"zstd": 900}) == [top, "sign", "lz4", "zstd"]


def test_a_stage_of_both_ways_stands_behind_what_comes_before_it_in_either(make_events: MakeEvents) -> None:
    text = recipe(["topk", "int4"], ["lowrank", "int4", "zstd"])
    up, down = {"topk": 100, "int4": 50}, {"lowrank": 40, "int4": 20, "zstd": 19}
    assert order(make_events(), text, up, down) == ["topk", "lowrank", "int4", "zstd"]


def test_without_a_recipe_the_bytes_say_what_they_can(make_events: MakeEvents) -> None:
    """Each way in the order of what is left; and so for stages of a codec that the recipe no longer has."""
    up, down = {"topk": 106, "sign": 34}, {"int4": 129, "zstd": 120}
    assert order(make_events(), "nonsense = 1", up, down) == ["topk", "sign", "int4", "zstd"]
    assert order(make_events(), recipe(["sign"], ["zstd"]), up, down) == ["topk", "int4", "sign", "zstd"]


def test_a_run_that_moved_nothing_has_no_table(make_events: MakeEvents) -> None:
    assert link_rows(of(make_events(), down=Flow(), up=Flow()), "") == []
    assert "From float32 to the wire" not in render_report(make_events()[:1], "")


def test_times_fewer_is_float32_over_messages() -> None:
    assert times_fewer(Flow(raw=1000, encoded=250)) == 4.0
    assert times_fewer(Flow()) == 1.0


@pytest.mark.parametrize("words", ["From float32 to the wire", "after topk", "after int8", "sent on the network"])
def test_the_page_shows_it(words: str, make_events: MakeEvents) -> None:
    assert words in render_report(make_events(), "")
