"""What a round asks of its nodes: so many local steps from its base, and where they are due scores of it."""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from photon.aggregator.balance import local_steps
from photon.aggregator.state import Progress
from photon.config import Recipe
from photon.fabric.base import NodeInfo
from photon.link.update import Task


@dataclass(frozen=True)
class RoundTasks:
    """Makes the tasks of the round that `progress` stands before. `nodes` is K; `tau` that of the round."""

    recipe: Recipe
    progress: Progress
    base_sha256: str
    tau: int
    nodes: int

    def all(self, trainers: Sequence[NodeInfo], present: Sequence[NodeInfo]) -> dict[str, Task]:
        """A train task for each of `trainers`; where scores are due, also an evaluate task for every other owner."""
        taus = self._taus([info.name for info in trainers])
        due = self.progress.round % self.recipe.evaluation.every == 0
        tasks = {info.name: self.one(info.name, taus[info.name], due and info.evaluates) for info in trainers}
        others = [info.name for info in present if info.evaluates and info.name not in tasks] if due else []
        return tasks | {name: self.one(name, 0, evaluate=True) for name in others}

    def one(self, node: str, tau: int, evaluate: bool) -> Task:
        """A single task, with a nonce of its own."""
        return Task(
            run=self.progress.run,
            round=self.progress.round,
            node=node,
            nonce=secrets.token_hex(8),
            base_sha256=self.base_sha256,
            evaluate=evaluate,
            sequential_step=self.progress.sequential_step,
            tau=tau,
            nodes=self.nodes,
            deadline_s=self.recipe.federation.deadline_s,
        )

    def _taus(self, trainers: Sequence[str]) -> Mapping[str, int]:
        """Local steps of each: its silo's own tau, else by its speed if that is asked for, else tau."""
        own = {silo.name: silo.tau for silo in self.recipe.silo if silo.tau is not None}
        others = [name for name in trainers if name not in own]
        speeds = self.progress.seconds_per_step if self.recipe.federation.balance == "time" else {}
        return own | local_steps(others, self.tau, speeds)
