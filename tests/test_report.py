from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from photon.errors import StateError
from photon.events import Evaluated, Event, RoundDone
from photon.report import asset, render_report, write_report
from photon.report_charts import Axis, Chart, Series, heat_map, line_chart, nice_ticks, sparkline, tick_label
from photon.report_content import Run, heat_maps, lede, node_rows, phase_rows, round_rows, silo_rows
from photon.track import JsonlSink

MakeEvents = Callable[..., list[Event]]
RECIPE = 'name = "demo"\n'
HOSTILE = "</pre></title></script>'\"><script>alert(1)</script><img src=x onerror=alert(2)>&amp;\x1b[2J"
VOID = {"meta", "input", "br"}


class Page(HTMLParser):
    """Reads a page strictly: tags balance, and everything that could act is collected."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.texts: dict[str, list[str]] = {}
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data)

    def all(self, tag: str) -> list[dict[str, str]]:
        return [attrs for name, attrs in self.tags if name == tag]

    @property
    def text(self) -> str:
        return " ".join(" ".join(part for parts in self.texts.values() for part in parts).split())


def hostile_run(make_events: MakeEvents) -> list[Event]:
    events = make_events(names=[HOSTILE, "bob"], missing={2: {"bob": HOSTILE}})
    facts = {"run": HOSTILE, "recipe": HOSTILE, "device": HOSTILE}
    events[0] = events[0].model_copy(update=facts)
    return [e.model_copy(update={"prompt": HOSTILE, "text": HOSTILE}) if e.event == "sample" else e for e in events]


def assert_harmless(html: str) -> None:
    page = Page(html)
    assert page.texts["script"] == [asset("report.js")]  # our script, and no other
    assert {tag for tag, _ in page.tags}.isdisjoint({"img", "iframe", "object", "embed", "link", "base", "form", "a"})
    for _, attrs in page.tags:
        assert not any(name.startswith("on") or name in ("src", "href", "srcdoc", "action") for name in attrs)


def test_nothing_of_the_run_becomes_markup(make_events: MakeEvents) -> None:
    html = render_report(hostile_run(make_events), HOSTILE)
    assert_harmless(html)
    assert html.count("alert(1)") > 20  # it is all there, as text
    assert "\x1b" not in html
    for mutant in (html.replace("&lt;script&gt;", "<script>", 1), html.replace("&lt;img src", "<img src", 1)):
        with pytest.raises(AssertionError):
            assert_harmless(mutant)


@settings(max_examples=15, deadline=None)
@given(text=st.text(st.characters(codec=None, exclude_categories=()), max_size=30))
def test_a_sample_of_any_text_is_shown_as_text(make_events: MakeEvents, text: str) -> None:
    events = make_events(rounds=1)
    events[1] = events[1].model_copy(update={"text": text + "<b>"})
    html = render_report(events, RECIPE)
    html.encode()
    assert_harmless(html)


def test_the_page_asks_the_network_for_nothing(make_events: MakeEvents) -> None:
    html = render_report(make_events(), RECIPE)
    assert not re.search(r"(src|href|action)=|url\(|@import|https?:(?!//www\.w3\.org/2000/svg)", html)
    policy = next(a["content"] for a in Page(html).all("meta") if a.get("http-equiv") == "Content-Security-Policy")
    digest = base64.b64encode(hashlib.sha256(asset("report.js").encode()).digest()).decode()
    assert policy.startswith("default-src 'none';")
    assert f"script-src 'sha256-{digest}'" in policy


def test_the_script_writes_text_only() -> None:
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|fetch\(|import\(", asset("report.js")
    )


def test_the_page_can_be_read_without_seeing_it(make_events: MakeEvents) -> None:
    page = Page(render_report(make_events(), RECIPE))
    for attrs in page.all("svg"):
        assert attrs.get("aria-label") or attrs.get("aria-hidden") == "true"
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert len(page.all("h1")) == 1
    assert page.all("html")[0]["lang"] == "en"
    assert len(page.all("input")) == 4  # steps, tokens, bytes, time
    assert all(attrs["type"] == "radio" for attrs in page.all("input"))
    label = next(a["aria-label"] for a in page.all("svg") if a.get("aria-label", "").startswith("Loss, by sequential"))
    assert "held-out loss: from 8.30 to 4.86" in label


def test_headlines_come_first_and_say_their_units(make_events: MakeEvents) -> None:
    text = Page(render_report(make_events(rounds=6, tau=16), RECIPE)).text
    html = render_report(make_events(rounds=6, tau=16), RECIPE)
    for fact in ("4024 →", "129", "2.99 →", "1.75", "288k", "in 96 sequential steps", "16.0", "1:00"):
        assert fact in html
    assert "2 x payload_bytes x sequential_steps x nodes_per_round = 2 × 4.00 MB × 96 × 3 = 2.30 GB" in text
    assert html.index("headlines") < html.index("Is it learning?")
    assert "Unfinished" not in html


@pytest.mark.parametrize(
    ("nodes", "rounds", "planned"), [(1, 3, 3), (1, 1, 4), (2, 5, 9), (9, 2, 2), (64, 12, 20)], ids=str
)
def test_runs_of_every_size_are_drawn(make_events: MakeEvents, nodes: int, rounds: int, planned: int) -> None:
    names = [f"owner-{i:02}" for i in range(nodes)]
    html = render_report(make_events(names=names, rounds=rounds, planned=planned), RECIPE)
    assert_harmless(html)
    page = Page(html)
    assert (f"Unfinished: {rounds} of {planned} rounds" in page.text) == (rounds < planned)
    assert ("Agreement of updates" in html) == (nodes > 1)
    assert ("times fewer bytes" in html) == (nodes > 1)
    assert all(name in html for name in names)


def test_a_run_that_has_only_begun_has_a_report(make_events: MakeEvents) -> None:
    events = make_events(planned=9)
    for length in range(1, 6):
        assert_harmless(render_report(events[:length], RECIPE))


def test_a_diverged_run_has_a_report(make_events: MakeEvents) -> None:
    events: list[Event] = []
    for event in make_events(rounds=3):
        if isinstance(event, Evaluated) and event.round == 2:
            bad = event.pooled.model_copy(update={"loss": math.nan, "perplexity": math.inf, "bits_per_byte": math.nan})
            event = event.model_copy(update={"pooled": bad, "silos": dict.fromkeys(event.silos, bad)})  # noqa: PLW2901 - the point
        if isinstance(event, RoundDone) and event.round == 3:
            n = len(event.nodes)
            event = event.model_copy(update={"train_loss": math.inf, "cosine": [[math.nan] * n] * n})  # noqa: PLW2901 - the point
        events.append(event)
    html = render_report(events, RECIPE)
    for attrs in Page(html).all("svg"):
        drawn = json.dumps({k: v for k, v in attrs.items() if k != "data-chart" and k != "aria-label"})
        assert "nan" not in drawn.lower().replace("finance", "")
        assert "inf" not in drawn.lower()


def test_a_long_run_of_many_nodes_stays_a_page_one_can_mail(make_events: MakeEvents) -> None:
    names = [f"owner-{i:02}" for i in range(12)]
    events = make_events(names=names, rounds=1000)
    run = Run.of(events, RECIPE)
    drawn = [row.number for row in round_rows(run)]
    assert (drawn[0], drawn[-1]) == (0, 1000)
    assert 200 < len(drawn) <= 480
    html = render_report(events, RECIPE)
    assert len(html) < 3_000_000
    assert "evenly spaced, of 1000" in html


def test_the_report_follows_from_the_events_alone(make_events: MakeEvents) -> None:
    assert render_report(make_events(), RECIPE) == render_report(make_events(), RECIPE)


def test_write_report_reads_a_run_folder(make_events: MakeEvents, tmp_path: Path) -> None:
    with pytest.raises(StateError, match=r"recipe\.toml.*folder of a run"):
        write_report(tmp_path)
    (tmp_path / "recipe.toml").write_text(RECIPE)
    with pytest.raises(StateError, match=r"metrics\.jsonl"):
        write_report(tmp_path)
    sink = JsonlSink(tmp_path / "metrics.jsonl")
    with pytest.raises(StateError, match="run_started"):
        write_report(tmp_path)
    for event in make_events():
        sink.write(event)
    sink.close()
    path = write_report(tmp_path)
    assert path == tmp_path / "report.html"
    assert path.read_text("utf-8") == render_report(make_events(), RECIPE)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "recipe.toml", "report.html"]


def test_tables_add_up(make_events: MakeEvents) -> None:
    run = Run.of(make_events(rounds=5, tau=16, missing={2: {"bob": "late"}}), RECIPE)
    bob = next(row for row in node_rows(run) if row.name == "bob")
    assert (bob.rounds, bob.missed, bob.steps, bob.tokens) == (4, 1, 64, 64_000)
    assert bob.clipped == 0.25
    assert bob.bytes_up == 4 * 4_000_000
    phases = phase_rows(run)
    assert sum(row.seconds for row in phases) == pytest.approx(run.summary.seconds)
    assert sum(row.share for row in phases) == pytest.approx(1.0)
    rows = silo_rows(run)
    assert [row.name for row in rows] == ["alice", "bob", "carol", "pooled"]
    assert rows[-1].after.loss == pytest.approx(2.5 + 5.8 * math.exp(-0.75))


def test_the_page_says_where_before_and_after_are_not_of_the_same_owners(make_events: MakeEvents) -> None:
    remark = "are not of the same silos: bob"
    events = make_events()
    assert remark not in Page(render_report(events, RECIPE)).text
    at = max(n for n, event in enumerate(events) if event.event == "evaluation")
    final = events[at]
    assert isinstance(final, Evaluated)
    events[at] = final.model_copy(update={"silos": {n: s for n, s in final.silos.items() if n != "bob"}})
    assert remark in Page(render_report(events, RECIPE)).text


def test_the_lede_claims_only_what_is_so(make_events: MakeEvents) -> None:
    together = lede(Run.of(make_events(), RECIPE))
    assert together.startswith("3 nodes trained a language model of 1.00M parameters together, in 6 rounds of 16")
    assert "No text left its owner" in together
    alone = lede(Run.of(make_events(names=["pool"]), RECIPE))  # the pool may hold what many owners gave
    assert "No text left" not in alone


@pytest.mark.parametrize(
    ("ends", "told"),
    [((16, 32, 48), "16 local steps"), ((1, 2, 3), "1 local step"), ((4, 12, 28), "4 to 16 local steps")],
)
def test_local_steps_are_those_that_rounds_took(make_events: MakeEvents, ends: tuple[int, ...], told: str) -> None:
    """A part may set tau: the recipe's says nothing of any round then."""
    events: list[Event] = [
        event.model_copy(update={"sequential_step": ends[event.round - 1]}) if isinstance(event, RoundDone) else event
        for event in make_events(rounds=3, tau=16)
    ]
    assert f"in 3 rounds of {told}." in lede(Run.of(events, RECIPE))
    assert f"3 of 3, {told} each" in Page(render_report(events, RECIPE)).text


def test_bytes_are_told_where_one_node_trains_a_round(make_events: MakeEvents) -> None:
    """There is no per-step training of one node to compare with, but what the link's codecs saved is there to see."""
    events = make_events()
    page = Page(render_report([events[0].model_copy(update={"nodes_per_round": 1}), *events[1:]], RECIPE)).text
    assert "What crossed the network?" in page
    assert "This run: 72.0 MB up and 72.0 MB down" in page
    assert "From float32 to the wire" in page
    assert "Per-step" not in page
    assert "What crossed" not in render_report(make_events(names=["pooled"]), RECIPE)


AXIS = Axis("steps", "sequential steps", "steps", str, {n: 10.0 * n for n in range(50)})


def drawn_points(svg: str) -> list[tuple[float, float]]:
    path = re.search(r'class="line s1" d="M([^"]*)"', svg)
    assert path is not None
    return [(float(x), float(y)) for x, y in (pair.split() for pair in path.group(1).split("L"))]


@settings(deadline=None)
@given(values=st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=30), from_zero=st.booleans())
def test_lines_are_drawn_to_scale(values: list[float], from_zero: bool) -> None:
    """Equal steps lie equally far apart, and height is an affine, falling function of value inside the frame."""
    chart = Chart("t", "c", "u", list(range(len(values))), [Series("one", values, "s1")], from_zero)
    points = drawn_points(line_chart(chart, AXIS))
    xs, ys = [x for x, _ in points], [y for _, y in points]
    assert (xs[0], xs[-1]) == (58.0, 542.0)
    assert all(b - a == pytest.approx(484 / (len(xs) - 1), abs=0.11) for a, b in pairwise(xs))
    assert all(13.9 <= y <= 266.1 for y in ys)
    low, high = values.index(min(values)), values.index(max(values))
    if values[high] - values[low] > 1e-6:
        slope = (ys[high] - ys[low]) / (values[high] - values[low])
        assert slope < 0
        for value, y in zip(values, ys, strict=True):
            assert y == pytest.approx(ys[low] + slope * (value - values[low]), abs=0.25)


def test_gaps_leave_no_mark_and_hover_has_the_same_numbers() -> None:
    values = [3.0, None, math.nan, 1.23456]
    svg = line_chart(Chart("t", "c", "u", range(4), [Series("one", values, "s1")]), AXIS)
    assert len(drawn_points(svg)) == 2
    data = json.loads(Page(svg).all("svg")[0]["data-chart"])
    assert data["series"] == [{"name": "one", "style": "s1", "values": ["3.000", None, "nan", "1.235"]}]
    assert data["labels"][3] == "round 3, 30.0 steps"
    assert len(data["x"]) == 4


def test_heat_map_shows_each_pair_once_with_strength_and_sign() -> None:
    cosine = [[1.0, 0.5, -0.25], [0.5, 1.0, 0.0], [-0.25, 0.0, 1.0]]
    page = Page(heat_map(["a", "b", "c"], cosine, 0.5, "t"))
    cells = [(attrs["class"], attrs["fill-opacity"]) for attrs in page.all("rect")]
    assert cells == [("cell", "1.00"), ("cell against", "0.50"), ("cell", "0.00")]
    assert page.texts["title"] == ["b and a: 0.500", "c and a: -0.250", "c and b: 0.000"]


def test_heat_maps_are_of_the_first_middle_and_last_round_that_can_be_compared(make_events: MakeEvents) -> None:
    gone = {n: {"bob": "late", "carol": "late"} for n in (1, 9)}
    run = Run.of(make_events(rounds=9, missing=gone), RECIPE)
    assert [number for number, _ in heat_maps(run)] == [2, 5, 8]
    assert heat_maps(Run.of(make_events(names=["alone"]), RECIPE)) == []


@given(low=st.floats(-1e6, 1e6), span=st.floats(1e-3, 1e6))
def test_ticks_are_few_round_and_in_place(low: float, span: float) -> None:
    high = low + span
    inside, outside = nice_ticks(low, high), nice_ticks(low, high, outside=True)
    slack = span * 1e-6
    assert all(low - slack <= tick <= high + slack for tick in inside)
    assert outside[0] <= low + slack
    assert outside[-1] >= high - slack
    assert 2 <= len(inside) <= 6
    assert 2 <= len(outside) <= 8
    step = outside[1] - outside[0]
    mantissa = step / 10 ** math.floor(math.log10(step) + 1e-6)
    assert min(abs(mantissa - m) for m in (1, 2, 5)) < 1e-3


def test_tick_labels_tell_ticks_apart() -> None:
    for low, high in ((0, 1), (0.96, 1.01), (0, 7), (0, 12_345), (12_344, 12_346.5), (2.2, 2.3)):
        ticks = nice_ticks(low, high)
        assert len({tick_label(t, ticks) for t in ticks}) == len(ticks)


def test_a_sparkline_needs_two_points() -> None:
    assert "path" in sparkline([1.0, None, 2.0])
    assert "path" not in sparkline([1.0])
    assert "path" not in sparkline([])
