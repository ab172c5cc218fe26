"""Stretches of time add up by name, and nothing handed through is kept."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from photon import stopwatch
from photon.stopwatch import Stopwatch


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(stopwatch, "time", SimpleNamespace(monotonic=lambda: self.now))


class Thing:
    pass


def test_stretches_add_up_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    watch = Stopwatch()
    for phase, seconds in (("a", 1.0), ("b", 2.0), ("a", 4.0)):
        clock.now += seconds
        watch.end(phase)
    assert watch.seconds == {"a": 5.0, "b": 2.0}
    clock.now += 8.0
    assert watch.end("b") == 10.0


def test_waiting_is_told_from_working_also_where_the_loop_goes_on_early(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)
    watch, seen = Stopwatch(), []

    def slowly() -> Iterator[int]:
        for number in range(3):
            clock.now += 10.0
            yield number
        clock.now += 100.0

    for number in watch.split(slowly(), "wait", "work"):
        seen.append(number)
        clock.now += 1.0
        if number == 1:
            continue
        clock.now += 1.0
    assert seen == [0, 1, 2]
    assert watch.seconds == {"wait": 130.0, "work": 5.0}


def test_an_item_is_let_go_before_the_next_is_asked_for() -> None:
    alive: list[weakref.ref[Thing]] = []

    def things() -> Iterator[Thing]:
        for _ in range(2):
            gc.collect()
            assert [ref() for ref in alive] == [None] * len(alive)
            thing = Thing()
            alive.append(weakref.ref(thing))
            yield thing
            del thing

    for thing in Stopwatch().split(things(), "wait", "work"):
        del thing
    assert len(alive) == 2
