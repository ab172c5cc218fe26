from __future__ import annotations

import io
import math
import re
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from photon.display import Display, PlainDisplay, RunView, final_table, open_display
from photon.display_live import LiveDisplay, sparkline
from photon.events import Evaluated, Event, NodeProgress, RoundDone, RunStarted, Sampled
from photon.summary import summarise

MakeEvents = Callable[..., list[Event]]


class Stream(io.StringIO):
    """A text stream that counts flushes and may claim to be a terminal."""

    def __init__(self, tty: bool = False, encoding: str = "utf-8") -> None:
        super().__init__()
        self.flushes = 0
        self._tty, self._encoding = tty, encoding

    @property
    def encoding(self) -> str:  # type: ignore[override] # StringIO has none
        return self._encoding

    def isatty(self) -> bool:
        return self._tty

    def write(self, text: str) -> int:
        text.encode(self._encoding)  # as a real stream would
        return super().write(text)

    def flush(self) -> None:
        self.flushes += 1


def shown(display: LiveDisplay, width: int = 110, height: int = 40) -> str:
    console = Console(file=io.StringIO(), width=width, height=height, color_system=None)
    console.print(display.render())
    output = console.file
    assert isinstance(output, io.StringIO)
    return output.getvalue()


def live(height: int = 40) -> LiveDisplay:
    return LiveDisplay(Console(file=io.StringIO(), width=110, height=height, force_terminal=True))


def tell(display: Display, events: list[Event]) -> None:
    for event in events:
        display.write(event)


def test_one_flushed_line_a_round(make_events: MakeEvents) -> None:
    stream = Stream()
    with PlainDisplay(stream) as display:
        tell(display, make_events(rounds=6))
    lines = stream.getvalue().splitlines()
    assert [line.split()[0] for line in lines] == ["run", "before", *["round"] * 6, "after", "finished"]
    assert stream.flushes >= len(lines)
    assert stream.getvalue().isascii()


def test_a_round_line_says_what_matters(make_events: MakeEvents) -> None:
    stream = Stream()
    tell(
        PlainDisplay(stream),
        make_events(rounds=4, planned=24, tau=16, missing={4: {"bob": "no reply\n\x1b[2Jin 60 s"}}),
    )
    last = stream.getvalue().splitlines()[-1]
    assert last == (
        "round 4/24  step 64  192k tokens  4.80k tok/s  loss 5.05 train 6.20 held-out (of round 3)  2.24 bpb  "
        "up 48.0 MB down 48.0 MB  3:20 left  without bob (no reply \ufffd[2Jin 60 s)"
    )


def test_a_score_is_told_once_and_never_as_that_of_a_later_round(make_events: MakeEvents) -> None:
    stream = Stream()
    tell(PlainDisplay(stream), make_events(rounds=6, planned=9, every=3))
    lines = stream.getvalue().splitlines()
    assert [("held-out" in line) for line in lines] == [False, True, False, False, False, True, False, False]
    assert "(of round 3)" in lines[5]


def test_rounds_to_come_are_told_by_steps_where_a_method_changes_tau(make_events: MakeEvents) -> None:
    start, done = (next(e for e in make_events() if isinstance(e, kind)) for kind in (RunStarted, RoundDone))
    assert isinstance(start, RunStarted)
    assert isinstance(done, RoundDone)
    view = RunView()
    view.fold(start.model_copy(update={"rounds": 10, "tau": 16}))  # 160 steps
    told = []
    for number, step in enumerate((16, 24, 28, 60, 160), start=1):
        view.fold(done.model_copy(update={"round": number, "sequential_step": step}))
        told.append(view.rounds_planned)
    assert told == ["10", "~19", "~36", "~8", "5"]  # with tau as in the latest round: 136 / 8, 132 / 4, 100 / 32 to go
    resumed = RunView()
    resumed.fold(start.model_copy(update={"rounds": 10, "tau": 16, "first_round": 3, "first_step": 28}))
    assert (resumed.steps_done, resumed.rounds_planned) == (28, "~12")  # 132 / 16 more


@given(
    durations=st.lists(st.floats(0.1, 1e5), min_size=1, max_size=20),
    to_go=st.integers(0, 50),
    first=st.integers(0, 5),
)
def test_time_left_is_the_mean_of_the_latest_rounds(
    make_events: MakeEvents, durations: list[float], to_go: int, first: int
) -> None:
    """Seconds before this session (a resume) and rounds long ago do not count."""
    start, done = (next(e for e in make_events() if isinstance(e, kind)) for kind in (RunStarted, RoundDone))
    assert isinstance(start, RunStarted)
    assert isinstance(done, RoundDone)
    planned = first + len(durations) + to_go
    view, clock_s = RunView(), 5000.0
    so_far = {"first_round": first, "first_step": first * start.tau, "seconds": clock_s}
    view.fold(start.model_copy(update={"rounds": planned, **so_far}))
    assert view.seconds_left is None
    for index, duration in enumerate(durations, start=1):
        clock_s += duration
        number = first + index
        step = number * start.tau
        view.fold(done.model_copy(update={"round": number, "sequential_step": step, "seconds": clock_s}))
    latest = durations[-8:]
    assert view.seconds_left == pytest.approx(to_go * sum(latest) / len(latest), abs=1e-6)


def test_time_left_is_of_steps_where_rounds_differ_in_theirs(make_events: MakeEvents) -> None:
    """Rounds of 4, 4 and 6 steps at 3 s a step, of 10 rounds x 4 steps: 26 steps are left, not 7 rounds."""
    start, done = (next(e for e in make_events() if isinstance(e, kind)) for kind in (RunStarted, RoundDone))
    assert isinstance(start, RunStarted)
    view = RunView()
    view.fold(start.model_copy(update={"rounds": 10, "tau": 4, "seconds": 0.0}))
    for number, step in enumerate((4, 8, 14), start=1):
        view.fold(done.model_copy(update={"round": number, "sequential_step": step, "seconds": 3.0 * step}))
    assert view.seconds_left == pytest.approx(26 * 3.0)


def test_time_left_after_a_resume_forgets_the_time_before(make_events: MakeEvents) -> None:
    events = make_events(rounds=4, planned=9)
    start = events[0]
    assert isinstance(start, RunStarted)
    view = RunView()
    resumed = {"first_round": 3, "first_step": 3 * start.tau, "seconds": 25.0}
    for event in [start.model_copy(update=resumed), events[-1]]:
        view.fold(event)  # round 4 ends at 40 s
    assert view.seconds_left == 5 * 15.0
    assert view.seconds_left != 5 * 40.0 / 4  # the mutant: all time over all rounds


@pytest.mark.parametrize(("first_round", "first_step", "steps"), [(0, 0, 4), (3, 40, 10)])
def test_time_left_after_the_first_round_goes_by_the_steps_it_took(
    make_events: MakeEvents, first_round: int, first_step: int, steps: int
) -> None:
    """A part may give the first round, of a run or after a resume, another tau than the recipe's 16."""
    start, done = (next(e for e in make_events() if isinstance(e, kind)) for kind in (RunStarted, RoundDone))
    view = RunView()
    began = {"rounds": 10, "tau": 16, "seconds": 0.0, "first_round": first_round, "first_step": first_step}
    view.fold(start.model_copy(update=began))
    ended = {"round": first_round + 1, "sequential_step": first_step + steps, "seconds": 3.0 * steps}
    view.fold(done.model_copy(update=ended))
    assert view.seconds_left == pytest.approx(3.0 * (160 - first_step - steps))
    assert view.rounds_planned == f"~{first_round + 1 + math.ceil((160 - first_step - steps) / steps)}"


@given(gaps=st.lists(st.floats(0.0, 5.0), max_size=60))
def test_data_lines_keep_two_seconds_apart(gaps: list[float]) -> None:
    now_s, told_at = 0.0, []
    stream = Stream()
    display = PlainDisplay(stream, clock=lambda: now_s)
    for gap in gaps:
        now_s += gap
        before = stream.tell()
        display.data_progress("alice", "tokenise", 12_000_000, 40_000_000, "shard 3")
        if stream.tell() > before:
            told_at.append(now_s)
    assert all(later - earlier >= 2.0 for earlier, later in pairwise(told_at))
    assert not gaps or len(told_at) >= 1
    assert not gaps or stream.getvalue().splitlines()[0] == "data alice: tokenise 12.0 MB of 40.0 MB (30 %)  shard 3"


def test_data_of_unknown_length_is_told_without_a_share() -> None:
    stream = Stream()
    PlainDisplay(stream).data_progress("alice", "read", 512, None, "")
    assert stream.getvalue() == "data alice: read 512 B\n"


def test_a_stream_without_the_letters_shows_question_marks() -> None:
    stream = Stream(encoding="ascii")
    PlainDisplay(stream).note("Grüße")
    assert stream.getvalue() == "note: Gr??e\n"


def test_a_reader_that_leaves_does_not_end_the_run(make_events: MakeEvents) -> None:
    class Closed(Stream):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    with PlainDisplay(Closed()) as display:
        tell(display, make_events())
        display.data_progress("alice", "read", 1, None, "")


def test_only_failures_of_nodes_are_worth_a_line() -> None:
    stream = Stream()
    display = PlainDisplay(stream)
    display.progress(NodeProgress(node="bob", round=3, state="training", step=1, steps=4))
    assert stream.getvalue() == ""
    display.progress(NodeProgress(node="bob", round=3, state="failed", note="out of memory"))
    assert stream.getvalue() == "note: node bob failed in round 3: out of memory\n"


@pytest.mark.parametrize(
    ("tty", "encoding", "term", "kind"),
    [
        (True, "utf-8", "xterm-256color", LiveDisplay),
        (True, "UTF8", "xterm", LiveDisplay),
        (False, "utf-8", "xterm", PlainDisplay),
        (True, "utf-8", "dumb", PlainDisplay),
        (True, "ascii", "xterm", PlainDisplay),
    ],
)
def test_the_live_display_is_for_terminals_that_can_show_it(
    monkeypatch: pytest.MonkeyPatch, tty: bool, encoding: str, term: str, kind: type
) -> None:
    monkeypatch.setenv("TERM", term)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    assert type(open_display(Stream(tty, encoding))) is kind


def test_the_live_screen_answers_the_questions(make_events: MakeEvents) -> None:
    display = live()
    assert "preparing" in shown(display)
    display.data_progress("alice", "tokenise", 5_000_000, 10_000_000, "")
    assert "alice" in shown(display)
    assert "5.00 MB of 10.0 MB" in shown(display)
    tell(display, make_events(rounds=4, planned=24))
    display.progress(NodeProgress(node="bob", round=4, state="training", step=7, steps=16, loss=5.119))
    screen = shown(display)
    for fact in ("round 4/24", "3:20 left", "8.30 → 6.20", "192k", "4.80k tok/s", "up 48.0 MB", "7/16  loss 5.12"):
        assert fact in screen
    assert "tokenise" not in screen
    tell(display, make_events(rounds=4)[-4:])
    assert "finished" in shown(display)


def test_the_live_screen_of_a_resumed_run_says_where_it_is(make_events: MakeEvents) -> None:
    display = live()
    start = make_events(rounds=1, planned=24)[0]
    display.write(start.model_copy(update={"first_round": 7, "first_step": 112}))
    assert "sequential step   112" in shown(display)


def test_a_crowd_of_nodes_fits_the_screen_and_none_is_forgotten(make_events: MakeEvents) -> None:
    names = [f"node-{i:02}" for i in range(64)]
    display = live(height=30)
    tell(display, make_events(names=names, rounds=1, planned=3))
    display.progress(NodeProgress(node="node-63", round=1, state="failed", note="gone"))
    screen = shown(display, height=30)
    assert len(screen.splitlines()) <= 30
    assert "node-63" in screen  # what needs a person comes first
    rows = sum("node-" in line for line in screen.splitlines())
    assert f"{64 - rows} more" in screen
    assert f"{64 - rows} waiting" in screen


def test_text_from_elsewhere_is_shown_as_it_is_and_steers_nothing(make_events: MakeEvents) -> None:
    display = live()
    tell(display, make_events())
    display.progress(NodeProgress(node="[red]bob", round=1, state="failed", note="[/]\x1b[2J[bold]"))
    screen = shown(display)
    assert "[red]bob" in screen
    assert "[/]\ufffd[2J[bold]" in screen
    assert "\x1b" not in screen


def test_notes_stay_above_the_live_screen() -> None:
    console = Console(file=io.StringIO(), width=80, height=20, force_terminal=True)
    with LiveDisplay(console) as display:
        display.note("W&B [failed] and is switched off")
    assert isinstance(console.file, io.StringIO)
    assert "W&B [failed] and is switched off" in console.file.getvalue()


def test_sparkline_runs_from_high_to_low() -> None:
    assert sparkline([8.0, 7.0, 6.0, 5.0, 4.0, 3.0, 2.0, 1.0], 8) == "█▇▆▅▄▃▂▁"
    assert sparkline([1.0, float("nan"), 2.0], 8) == "▁ █"
    assert sparkline([], 8) == sparkline([float("inf")], 8).strip() == ""
    long = sparkline([float(-i) for i in range(1000)], 24)
    assert (len(long), long[0], long[-1]) == (24, "█", "▁")


def closing(events: list[Event], width: int = 100, paths: tuple[Path | None, Path | None] = (None, None)) -> str:
    console = Console(file=io.StringIO(), width=width, color_system=None)
    samples = [e for e in events if isinstance(e, Sampled)]
    before, after = (samples[0], samples[-1]) if len(samples) > 1 else (None, None)
    final_table(summarise(events), before, after, *paths, console)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_the_closing_table_tells_quality_cost_samples_and_paths(make_events: MakeEvents) -> None:
    report, model = Path("/runs/a-rather-long-folder-name/demo/report.html"), Path("/runs/demo/model")
    text = closing(make_events(rounds=6, tau=16), paths=(report, model))
    rows = {line.split("│")[1].strip(): line.split("│")[2:6] for line in text.splitlines() if line.count("│") == 6}
    assert set(rows) == {"alice", "bob", "carol", "pooled"}
    assert [float(cell) for cell in rows["pooled"]] == pytest.approx([4024, 129, 2.994, 1.752], rel=2e-3)
    assert "288k tokens in 1:00" in text
    assert "144 MB moved (up 72.0 MB, down 72.0 MB), 16.0 times fewer than the 2.30 GB" in text
    assert "  def main(argv):" in text
    assert str(report) in closing(make_events(), width=40, paths=(report, model))  # whole, to be copied


def test_the_closing_table_says_where_before_and_after_are_not_of_the_same_owners(make_events: MakeEvents) -> None:
    assert "of the same" not in closing(make_events())
    *events, last = make_events()
    at = max(n for n, event in enumerate(events) if event.event == "evaluation")
    final = events[at]
    assert isinstance(final, Evaluated)
    events[at] = final.model_copy(update={"silos": {n: s for n, s in final.silos.items() if n != "bob"}})
    text = closing([*events, last])
    assert re.search(r"│ bob +│ +\S*\d │ +- │ +\S*\d │ +- │", text)
    assert "the pooled scores before and after are not of the same silos: bob" in text


def test_the_closing_table_of_a_run_that_only_began(make_events: MakeEvents) -> None:
    text = closing(make_events()[:1])
    assert "no bytes moved" in text
    assert "│" not in text


def test_the_closing_table_tells_the_bytes_of_a_run_with_one_node_a_round(make_events: MakeEvents) -> None:
    """Per-step training of one node would exchange nothing, but these rounds did."""
    events = make_events(rounds=6, tau=16)
    start = events[0].model_copy(update={"nodes_per_round": 1})
    text = closing([start, *events[1:]])
    assert "144 MB moved (up 72.0 MB, down 72.0 MB)" in text
    assert "times fewer" not in text
    alone = start.model_copy(update={"nodes": ["pooled"]})  # the baseline's bytes are those of its own process
    assert "no bytes moved between sites" in closing([alone, *events[1:]])


def test_markup_in_names_and_samples_is_literal(make_events: MakeEvents) -> None:
    events = make_events(names=["[red]x[/red]"])
    events[-2] = events[-2].model_copy(update={"text": "[bold]\x1b]0;title\x07"})
    text = closing(events)
    assert "[red]x[/red]" in text
    assert "[bold]\ufffd]0;title\ufffd" in text
