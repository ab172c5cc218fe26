"""A site's work as it is kept: the task that came, and how far it is."""

from __future__ import annotations

import time
from dataclasses import dataclass

from photon.errors import WireError
from photon.link.update import Sealed, Task, TrainingReport, decode_message, expect_reply, expect_task, seal


@dataclass(frozen=True)
class Standing:
    """How far the open task is, as the next answer says it."""

    phase: str = "idle"
    nonce: str = ""
    round: int = 0
    step: int = 0
    steps: int = 0
    loss: float | None = None
    note: str = ""
    head: bytes = b""  # of the finished reply
    body_bytes: int = 0
    tokens_per_second: float = 0.0


@dataclass(frozen=True)
class Job:
    """A task as it came, with the size of its base and when that was."""

    task: Task
    head: bytes
    base_bytes: int
    received: float

    @classmethod
    def of(cls, head: bytes, base_bytes: int, run: str) -> Job:
        """Raises WireError if it is no task for this run."""
        task = expect_task(decode_message(Sealed(head, b"")))
        if task.run != run:
            raise WireError(f"a task of run {task.run}, this node is prepared for {run}")
        return cls(task, head, base_bytes, time.monotonic())

    def is_same_as(self, other: Job | None) -> bool:
        """Whether doing one is doing the other."""
        return other is not None and self.task.is_same_work(other.task)


def finished(before: Standing, task: Task, reply: Sealed, nonce: str) -> tuple[Standing, TrainingReport | None]:
    """How it stands once the task is answered, under the nonce that is open for it now; and what was trained."""
    header = expect_reply(decode_message(Sealed(reply.head, b""))).model_copy(update={"nonce": nonce})
    report = header.training
    standing = Standing(
        phase="done",
        nonce=nonce,
        round=task.round,
        step=report.steps if report else 0,
        steps=task.tau,
        head=seal(header).head,
        body_bytes=len(reply.body),
        tokens_per_second=(report.tokens / max(report.seconds, 1e-9) if report else 0.0) or before.tokens_per_second,
    )
    return standing, report
