"""Where the wall time of a piece of work goes, by name."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import TypeVar

Item = TypeVar("Item")


class Stopwatch:
    """Seconds from one mark to the next, added up by the name given at the end of each stretch."""

    def __init__(self) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self._began = time.monotonic()

    def end(self, phase: str) -> float:
        """What has passed since the last mark belongs to `phase`; all of that phase so far."""
        now = time.monotonic()
        self.seconds[phase] += now - self._began
        self._began = now
        return self.seconds[phase]

    def split(self, items: Iterable[Item], waiting: str, working: str) -> Iterator[Item]:
        """The items; the time until each is there is `waiting`, what the caller does with it `working`."""
        for item in items:
            self.end(waiting)
            yield item
            del item  # one item in memory, not this one until the next is there
            self.end(working)
        self.end(waiting)
