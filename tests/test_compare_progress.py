"""What a person sees while runs go on."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

from rich.console import Console

from photon.compare_plan import Job
from photon.compare_progress import Progress, latest
from photon.events import Event
from photon.recipe import load_recipe

MakeEvents = Callable[..., list[Event]]


def write(folder: Path, events: list[Event], torn: str = "") -> Path:
    folder.mkdir()
    text = "".join(f"{event.model_dump_json()}\n" for event in events)
    (folder / "metrics.jsonl").write_text(text + torn)
    return folder


def test_the_newest_round_and_score_of_a_run_that_is_being_written(tmp_path: Path, make_events: MakeEvents) -> None:
    events = make_events(rounds=4, planned=9, every=2)
    folder = write(tmp_path / "run", events, torn='{"event": "round", "round": 5')
    scores = [event.pooled.loss for event in events if event.event == "evaluation"]
    assert latest(folder / "metrics.jsonl") == (4, scores[-1])
    assert latest(tmp_path / "nothing") == (0, None)


def test_a_line_for_each_run_that_begins_and_ends(tmp_path: Path, make_events: MakeEvents) -> None:
    recipe = load_recipe("demo")
    jobs = [
        Job("fedavg", 7, "", recipe, "a"),
        Job("diloco", 7, "node.lr = 0.1", recipe, "b"),
        Job("x", 7, "", recipe, "c"),
    ]
    screen = io.StringIO()
    with Progress(Console(file=screen, width=200), "run", jobs, {"b", "c"}) as progress:
        progress.began(jobs[1])
        progress.show({"b": tmp_path / "none"})
        progress.ended(jobs[1], write(tmp_path / "run", make_events()), None)
        progress.began(jobs[2])
        progress.ended(jobs[2], tmp_path / "none", "no [bold]memory")
    lines = screen.getvalue().splitlines()
    assert lines[0] == "run: 1 of 3 runs are finished already"
    assert lines[1] == "run 2/3 diloco seed 7 (node.lr = 0.1) begins"
    assert lines[2].startswith("run 2/3 diloco seed 7 (node.lr = 0.1) held-out loss ")
    assert lines[2].endswith(" left")
    assert lines[4] == "run 3/3 x seed 7 failed: no [bold]memory"
