"""The last reply of a node, on its own disk: asked for the same work again, it hands in the same update untrained.

An Aggregator that crashed, or a network that lost a reply, asks again with another nonce. What makes two tasks the same
work is the round, the base, the place in the schedule, the number of steps and of nodes, and the recipe: that may have
been changed since, because a round failed.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from photon.durable import Chunk, NumberedStates
from photon.errors import StateError
from photon.link.body import FileBody, whole_file
from photon.link.update import EvaluationReport, Task, TrainingReport

UPDATE_FILE = "update.safetensors"


@dataclass(frozen=True)
class StoredReply:
    """A finished piece of work: its reports, its update in a file, and the place in the data that it led to."""

    training: TrainingReport
    evaluation: EvaluationReport | None
    codec: str
    position_after: int
    body: FileBody
    body_sha256: str


class ReplyStore:
    """`nodes/<name>/replies`: the reply to the newest finished task, or of more rounds, up to `keep`.

    A node that may train on while a reply is still on its way keeps two. `recipe_sha256` stands for all that decides an
    update and is not in its task.
    """

    def __init__(self, folder: Path, recipe_sha256: str, keep: int = 1) -> None:
        self._states, self._recipe_sha256, self._keep = NumberedStates(folder), recipe_sha256, keep

    def commit(
        self,
        task: Task,
        training: TrainingReport,
        evaluation: EvaluationReport | None,
        codec: str,
        position_after: int,
        update: Iterable[Chunk],
    ) -> StoredReply:
        """Make a reply durable before the state that goes with it; those of rounds too far before it, or later, go."""
        fields = {
            "work": self._work(task),
            "training": training.model_dump(),
            "evaluation": evaluation.model_dump() if evaluation else None,
            "codec": codec,
            "position_after": position_after,
        }
        hashes = self._states.commit(task.round, {UPDATE_FILE: update}, fields)
        self._states.prune(range(task.round - self._keep + 1, task.round + 1))
        body = whole_file(self._states.folder(task.round) / UPDATE_FILE)
        return StoredReply(training, evaluation, codec, position_after, body, hashes[UPDATE_FILE])

    def find(self, task: Task, codec: str) -> StoredReply | None:
        """The reply to this very work in this codec; a damaged one counts as none, since it can be made again."""
        if task.round not in self._states.numbers():
            return None
        try:
            committed = self._states.load(task.round)
            fields = committed.fields
            if fields["work"] != self._work(task) or fields["codec"] != codec:
                return None
            evaluation = fields["evaluation"]
            return StoredReply(
                TrainingReport.model_validate(fields["training"]),
                EvaluationReport.model_validate(evaluation) if evaluation else None,
                fields["codec"],
                fields["position_after"],
                whole_file(committed.folder / UPDATE_FILE),
                committed.sha256[UPDATE_FILE],
            )
        except (StateError, ValueError, KeyError):
            return None

    def _work(self, task: Task) -> dict[str, object]:
        return {
            "run": task.run,
            "node": task.node,
            "base_sha256": task.base_sha256,
            "sequential_step": task.sequential_step,
            "tau": task.tau,
            "evaluate": task.evaluate,
            "nodes": task.nodes,
            "recipe_sha256": self._recipe_sha256,
        }
