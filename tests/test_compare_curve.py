"""One run as numbers: where a loss was reached, against hand-computed values; statistics; computed bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from photon.compare_curve import Moment, Spread, bytes_of, is_finished, mean_moment, reached, read_run
from photon.events import Evaluated, Event
from photon.recipe import load_recipe
from photon.summary import summarise
from photon.track import JsonlSink

MakeEvents = Callable[..., list[Event]]


def curve(*losses: float) -> list[Moment]:
    """Evaluations 100 tokens, 10 steps, 1000 bytes up and 2000 down apart."""
    return [
        Moment(tokens=100 * i, sequential_steps=10 * i, bytes_up=1000 * i, bytes_down=2000 * i, loss=loss)
        for i, loss in enumerate(losses)
    ]


def numbers(moment: Moment | None) -> tuple[float, ...] | None:
    if moment is None:
        return None
    return (moment.tokens, moment.sequential_steps, moment.bytes_up, moment.bytes_down)


CASES = {
    # 5.0 lies a quarter of the way from 5.5 (at 100) to 3.5 (at 200)
    "between": (curve(8.0, 5.5, 3.5), 5.0, (125.0, 12.5, 1250.0, 2500.0)),
    "at an evaluation": (curve(8.0, 5.5, 3.5), 5.5, (100.0, 10.0, 1000.0, 2000.0)),
    "before training": (curve(8.0, 5.5), 9.0, (0.0, 0.0, 0.0, 0.0)),
    "the first of two crossings": (curve(8.0, 4.0, 6.0, 4.9), 5.0, (75.0, 7.5, 750.0, 1500.0)),
    "over a score that is no number": (curve(8.0, math.nan, 4.0), 6.0, (100.0, 10.0, 1000.0, 2000.0)),
    "never": (curve(8.0, 5.5, 5.01), 5.0, None),
    "diverged": (curve(8.0, math.nan, math.inf), 5.0, None),
}


@pytest.mark.parametrize("case", CASES)
def test_where_a_loss_was_reached(case: str) -> None:
    moments, target, expected = CASES[case]
    assert numbers(reached(moments, target)) == expected


def nearest(moments: Sequence[Moment], target: float) -> Moment | None:
    """A mutant: the evaluation whose loss is nearest, never extrapolated."""
    near = [m for m in moments if math.isfinite(m.loss)]
    found = min(near, key=lambda m: abs(m.loss - target))
    return found if any(m.loss <= target for m in near) else None


def test_the_nearest_evaluation_is_not_where_it_was_reached() -> None:
    wrong = {
        case for case, (moments, target, expected) in CASES.items() if numbers(nearest(moments, target)) != expected
    }
    assert {"between", "the first of two crossings", "over a score that is no number"} <= wrong


def test_the_spread_is_of_a_sample() -> None:
    spread = Spread.of([4.0, 5.0, 9.0])
    assert spread is not None
    assert spread.mean == 6.0
    assert spread.deviation == pytest.approx(math.sqrt((4 + 1 + 9) / 2))  # n - 1, where n would give sqrt(14 / 3)
    assert spread.values == [4.0, 5.0, 9.0]
    assert Spread.of([4.0]) == Spread(mean=4.0, deviation=None, values=[4.0])
    assert Spread.of([]) is None


def test_means_of_moments() -> None:
    first, second = curve(8.0, 4.0)
    assert numbers(mean_moment([first, second])) == (50.0, 5.0, 500.0, 1000.0)
    assert mean_moment([]) is None


def test_what_trains_in_one_place_is_charged_for_what_it_stands_for(make_events: MakeEvents) -> None:
    summary = summarise(make_events())
    measured = (7, 8)
    federated = load_recipe("demo")
    per_step = load_recipe("demo", ["federation.outer=none"])
    alone = load_recipe("demo", ["federation.outer=none", "federation.nodes_per_round=1"])
    assert bytes_of(federated, summary, 96, measured) == measured
    each_way = summary.payload_bytes * 96 * 4
    assert bytes_of(per_step, summary, 96, measured) == (each_way, each_way)
    assert bytes_of(alone, summary, 96, measured) == (0, 0)


def write(folder: Path, events: Sequence[Event]) -> None:
    folder.mkdir()
    sink = JsonlSink(folder / "metrics.jsonl")
    for event in events:
        sink.write(event)
    sink.close()


def test_a_run_is_read_from_its_record(tmp_path: Path, make_events: MakeEvents) -> None:
    events = make_events(rounds=6, every=2)
    write(tmp_path / "run", events)
    assert is_finished(tmp_path / "run")
    result = read_run(tmp_path / "run", load_recipe("demo"), 7, "runs/x")
    scores = [event for event in events if event.event == "evaluation"]
    assert [moment.loss for moment in result.curve] == [event.pooled.loss for event in scores]
    assert [moment.sequential_steps for moment in result.curve] == [0, 32, 64, 96]
    assert result.loss == scores[-1].pooled.loss
    assert (result.seed, result.folder, result.tokens) == (7, "runs/x", 6 * 3 * 1000 * 16)


@pytest.mark.parametrize("lost", ["all", "one"])
def test_the_score_of_another_model_or_of_fewer_owners_is_not_the_final_one(
    lost: str, tmp_path: Path, make_events: MakeEvents
) -> None:
    events = make_events(rounds=6, every=2)
    score = next(event for event in reversed(events) if isinstance(event, Evaluated))
    events.remove(score)
    fewer = score.model_copy(update={"silos": dict(list(score.silos.items())[1:])})
    write(tmp_path / "run", [fewer, *events] if lost == "one" else events)
    result = read_run(tmp_path / "run", load_recipe("demo"), 7, "runs/x")
    assert result.loss is None
    assert "remove" in result.failure


def test_an_unfinished_run_is_not_finished(tmp_path: Path, make_events: MakeEvents) -> None:
    write(tmp_path / "run", make_events(rounds=3, planned=6))
    assert not is_finished(tmp_path / "run")
    assert not is_finished(tmp_path / "nothing")
