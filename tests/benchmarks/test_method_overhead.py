"""The runs of `method_overhead` take turns, and end when the measurement does."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, cast
from unittest import mock

import pytest
from benchmarks.method_overhead import NoTurnError, Turn, Turns, _state_bytes, row

from benchmarks import method_overhead
from photon.events import Event, RoundDone
from photon.track import Tracker


@pytest.mark.timeout(20)
def test_when_one_run_fails_those_that_wait_for_their_turn_end() -> None:
    waiting, ended = threading.Event(), threading.Event()

    def run(recipe: str, turns: Turns, index: int) -> list[Turn]:
        if recipe == "fails":
            assert waiting.wait(5)
            raise RuntimeError("it failed")
        waiting.set()
        with pytest.raises(NoTurnError):
            turns.wait(index)
        ended.set()
        return []

    with mock.patch.object(method_overhead, "_run", run), pytest.raises(RuntimeError, match="it failed"):
        method_overhead.measure(cast(Any, ["fails", "waits"]))
    assert ended.is_set()


def test_the_turn_is_of_whoever_has_made_the_fewest_steps() -> None:
    turns = Turns(2)
    assert turns.end(0, 8.0)
    turns.wait(1)
    assert not turns.end(1, 4.0)
    assert turns.end(1, 12.0)
    turns.wait(0)
    turns.stop()
    assert turns.end(0, 9.0), "once it is over nobody goes on"
    with pytest.raises(NoTurnError):
        turns.wait(0)


def test_a_display_that_raises_it_is_not_taken_for_a_closed_terminal() -> None:
    def wait(_: Event) -> None:
        turns.wait(0)

    turns, display = Turns(2), mock.Mock(write=wait)
    turns.stop()
    with Tracker([], [display]) as tracker, pytest.raises(NoTurnError):
        tracker.write(mock.Mock(spec=RoundDone))


def test_more_state_is_allowed_for_and_fewer_bytes_over_the_link_are_not_set_against_it() -> None:
    fedavg = [Turn(cpu_s=10.0, moving_s=2.0, steps=10, link_bytes=100, state_bytes=300)] * 2
    ours = [Turn(cpu_s=12.0, moving_s=3.0, steps=10, link_bytes=50, state_bytes=500)] * 2
    found = row("streaming", fedavg, ours)
    assert found["allowed for bytes"] == pytest.approx(200 / 400 * 0.2)  # netted it would be 150 / 400
    assert found["beyond that"] == pytest.approx(0.2 - 0.1)
    assert row("fedavg", fedavg, fedavg)["allowed for bytes"] == 0


def test_the_newest_state_is_counted(tmp_path: Path) -> None:
    for number, size in (("000003", 7), ("000012", 5), ("set-aside-000099", 1)):
        (tmp_path / "state" / number).mkdir(parents=True)
        (tmp_path / "state" / number / "optimizer").write_bytes(b"x" * size)
    assert _state_bytes(tmp_path) == 5
