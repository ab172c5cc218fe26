"""The runs of `method_overhead` take turns, and end when the measurement does."""

from __future__ import annotations

import threading
from typing import Any, cast
from unittest import mock

import pytest
from benchmarks.method_overhead import NoTurnError, Turn, Turns

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
