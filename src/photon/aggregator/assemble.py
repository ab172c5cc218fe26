"""The start of a round, or of the final score: wait for the nodes that belong to the run, for so long (law 3)."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Self

from photon.aggregator.late import Late
from photon.config import Recipe
from photon.errors import RoundFailedError
from photon.events import NodeProgress
from photon.fabric.base import Arrival, Fabric, Lost, NodeInfo
from photon.link.ledger import Ledger
from photon.track import Tracker

POOLED = "pooled"  # the baseline's only trainer: photon.sites.POOLED, which stands above this package
_POLL_S = 1.0  # upper bound of one wait: who connects is noticed within it


@dataclass(frozen=True)
class RollCall:
    """Who is waited for: all of `expected` at most `assemble_s`, then any `quorum` at most `deadline_s` more.

    `absent` were waited for in vain before: as long as the quorum is there, nobody waits for them again. A quorum of 0
    is that of the final score, which is good without the others.
    """

    round: int
    expected: frozenset[str]
    absent: frozenset[str]
    suspended: dict[str, str]
    quorum: int
    assemble_s: float
    deadline_s: float

    @classmethod
    def of(
        cls,
        recipe: Recipe,
        round_index: int,
        suspended: dict[str, str],
        quorum: int,
        absent: frozenset[str] = frozenset(),
    ) -> Self:
        """All trainers of a recipe but those that are suspended (name to reason)."""
        federation = recipe.federation
        names = {POOLED} if federation.outer == "none" else {silo.name for silo in recipe.silo}
        return cls(
            round=round_index,
            expected=frozenset(names - suspended.keys()),
            absent=absent,
            suspended=suspended,
            quorum=quorum,
            assemble_s=federation.assemble_s,
            deadline_s=federation.deadline_s,
        )

    @property
    def occasion(self) -> str:
        """What is waited for, in words."""
        return f"round {self.round}" if self.quorum else "the final score"

    def patience_s(self, trainers: set[str]) -> float:
        """How long a round may wait in all while these trainers are connected; 0 = it need not, or waiting is vain."""
        if self.expected <= trainers or len(self.expected | trainers) < self.quorum:
            return 0.0
        if len(trainers) >= self.quorum:
            return 0.0 if self.expected - self.absent <= trainers else self.assemble_s
        return self.assemble_s + self.deadline_s

    def missing(self, trainers: set[str]) -> list[str]:
        """Expected trainers that are not connected."""
        return sorted(self.expected - trainers)


def assemble(
    fabric: Fabric, ledger: Ledger, tracker: Tracker, call: RollCall, late: Late | None = None
) -> list[NodeInfo]:
    """The nodes that can be reached now and are not suspended, once the round may begin.

    What nodes still send for tasks of the past is ignored, but its bytes are counted; what `late` ones send is kept for
    the round. Raises RoundFailedError, which says who is missing, if the trainers among the nodes cannot make the
    quorum.
    """
    began = time.monotonic()
    told = False
    while True:
        nodes = [info for info in fabric.nodes() if info.name not in call.suspended]
        trainers = {info.name for info in nodes if info.trains}
        remaining_s = call.patience_s(trainers) - (time.monotonic() - began)
        if remaining_s <= 0:
            break
        if not told:
            told = True
            tracker.note(f"{call.occasion}: waiting for {', '.join(call.missing(trainers))} to connect")
        match fabric.receive(min(remaining_s, _POLL_S)):
            case NodeProgress() as progress:
                tracker.progress(progress)
            case Lost() as lost if late is not None:
                late.keep(lost)
            case Arrival() as arrival:
                if late is None or not late.keep(arrival):
                    ledger.up(arrival.node, len(arrival.message))
                del arrival  # an update is large, and this loop may be long
    if len(trainers) < call.quorum:
        raise RoundFailedError(_complaint(call, trainers))
    if told and (missing := call.missing(trainers)):
        tracker.note(f"{call.occasion}: goes on without {', '.join(missing)}")
    return nodes


def _complaint(call: RollCall, trainers: set[str]) -> str:
    connected = f"only {', '.join(sorted(trainers))} connected" if trainers else "no node is connected"
    parts = [f"round {call.round}: {connected}; federation.quorum asks for {call.quorum} that train."]
    if missing := call.missing(trainers):
        parts.append(f"Missing: {', '.join(missing)}.")
    if call.suspended:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in sorted(call.suspended.items()))
        parts.append(f"Suspended: {reasons}.")
    what = "Start the missing nodes" + (" or readmit the suspended ones" if call.suspended else "")
    parts.append(f"Nothing was lost. {what}, then resume.")
    return " ".join(parts)
