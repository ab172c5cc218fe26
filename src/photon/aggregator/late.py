"""Tasks that go on over the end of their round: their nodes get no other, and the reply counts in the round it meets.

Who is late stands in memory alone. After a crash of the Aggregator these tasks are nobody's: a reply to one answers
nothing that is open, is dropped like any other, and is charged to nobody; its node is asked anew.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field

from photon.fabric.base import Arrival, Lost
from photon.link.update import Task

UNIFORM_WEIGHT = 2**20  # of an update on time where all weigh the same: weights are whole, and age makes less of it


@dataclass
class Late:
    """`tasks`, by node, are of rounds that are over; `limits` the tokens for a local step that their nodes may claim.

    At the end of round `round` a task goes on if its reply would be at most `rounds` old in the next one; 0: none does.
    """

    round: int = 0
    rounds: int = 0
    tasks: dict[str, Task] = field(default_factory=dict)
    limits: dict[str, int] = field(default_factory=dict)
    events: deque[Arrival | Lost] = field(default_factory=deque)

    def begin(self, round_index: int, rounds: int) -> None:
        """A round begins."""
        self.round, self.rounds = round_index, rounds

    def age(self, task: Task) -> int:
        """Rounds that have ended since the task was given."""
        return self.round - task.round

    def goes_on(self, task: Task) -> bool:
        """Whether it may go on when this round ends. Scores alone are of a model that nobody asks for then."""
        return self.rounds > 0 and task.tau > 0 and self.age(task) < self.rounds

    def limits_with(self, limits: Mapping[str, int]) -> dict[str, int]:
        """Those of the nodes that are asked now, beside those of late ones; they hold when these are late in turn."""
        self.limits = {name: self.limits[name] for name in self.tasks} | dict(limits)
        return self.limits

    def keep(self, event: Arrival | Lost) -> bool:
        """Keep what a late node sends between two rounds for the one that begins; says whether it was one's.

        Of each node that is at most what one task can bring, in its file where it has crossed a network.
        """
        if event.node not in self.tasks:
            return False
        self.events.append(event)
        return True

    def kept(self) -> Arrival | Lost | None:
        """The first event that was kept, once. That a task was lost which is open no more is no news."""
        while self.events:
            event = self.events.popleft()
            if isinstance(event, Arrival) or event.node in self.tasks:
                return event
        return None
