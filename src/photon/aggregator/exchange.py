"""One exchange: tasks go out, replies come in, and quorum, grace and deadline decide when it is over (law 3)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction

from photon.aggregator.validate import verify_identity
from photon.errors import ReplyRefusedError, WireError
from photon.events import NodeProgress
from photon.fabric.base import Arrival, Fabric, Lost
from photon.link.ledger import Ledger
from photon.link.update import Message, Task, decode_message, expect_reply, seal

_POLL_S = 1.0  # upper bound of one wait: Ctrl-C and the deadline are noticed within it


@dataclass(frozen=True)
class Patience:
    """How long an exchange waits, and for how many."""

    quorum: float
    grace_s: float
    deadline_s: float


class Exchange:
    """Sends one task per node and yields the replies that answer them, as they arrive, each once.

    The quorum is a share of those asked to train (of all, if none is). `missing` says afterwards who did not count and
    why. Whoever finds a yielded reply unusable calls `refuse`.
    """

    def __init__(
        self,
        fabric: Fabric,
        ledger: Ledger,
        patience: Patience,
        on_progress: Callable[[NodeProgress], None],
    ) -> None:
        self._fabric, self._ledger, self._patience = fabric, ledger, patience
        self._on_progress = on_progress
        self._waiting: dict[str, Task] = {}
        self._asked: set[str] = set()
        self._counted: set[str] = set()
        self.missing: dict[str, str] = {}

    def send(self, tasks: Mapping[str, Task], body: bytes) -> None:
        """Hand every task to the fabric with `body`, the base they start from."""
        for node, task in tasks.items():
            message = seal(task, body)
            self._ledger.down(node, len(message))
            self._fabric.send(node, message)
            self._waiting[node] = task
        self._asked = set(tasks)
        self._counted = {node for node, task in tasks.items() if task.tau > 0} or self._asked

    def replies(self) -> Iterator[tuple[Task, Message]]:
        """Yield (task, reply) until all have answered, or quorum and grace are over, or the deadline is."""
        # Virtual nodes queue for a device: each wave of them gets the time that one node gets.
        waves = math.ceil(len(self._asked) / max(1, self._fabric.slots))
        grace_s = self._patience.grace_s * waves
        end = time.monotonic() + self._patience.deadline_s * waves + self._patience.grace_s
        grace_is_running = False
        while self._waiting and not self._is_hopeless:
            if self.quorum_is_met and not grace_is_running:
                grace_is_running = True
                end = min(end, time.monotonic() + grace_s)
            remaining_s = end - time.monotonic()
            if remaining_s <= 0:
                break
            match self._fabric.receive(min(remaining_s, _POLL_S)):
                case NodeProgress() as progress:
                    self._on_progress(progress)
                case Lost(node, reason) if node in self._waiting:
                    self._give_up(node, reason)
                case Arrival(node, data):
                    accepted = self._accept(node, data)
                    if accepted is not None:
                        yield accepted
                    del data, accepted  # one reply in memory, not this one until the next has arrived
        reason = "given up: no quorum was in reach" if self._is_hopeless else "no answer before the deadline"
        for node in list(self._waiting):
            self._fabric.abandon(node)
            self._give_up(node, reason)

    @property
    def quorum_is_met(self) -> bool:
        """Whether enough nodes have answered with something usable."""
        usable = self._counted - self._waiting.keys() - self.missing.keys()
        return len(usable) >= self.quorum

    @property
    def quorum(self) -> int:
        """Nodes that must answer with something usable: the share as it is written, 0.28 of 25 is 7."""
        return max(1, math.ceil(Fraction(str(self._patience.quorum)) * len(self._counted)))

    @property
    def _is_hopeless(self) -> bool:
        """Whether too many have failed already: waiting for the others would only cost time."""
        return len(self._counted - self.missing.keys()) < self.quorum

    def refuse(self, node: str, reason: str) -> None:
        """A yielded reply cannot be used: it no longer counts towards the quorum."""
        self._give_up(node, f"refused: {reason}")

    def _accept(self, node: str, data: bytes) -> tuple[Task, Message] | None:
        self._ledger.up(node, len(data))
        task = self._waiting.get(node)
        if task is None:
            return None  # a reply to a task that was given up; its bytes are on the ledger
        try:
            message = decode_message(data)
            reply = expect_reply(message)
            if reply.node == node and reply.nonce != task.nonce:
                return None  # the late answer to an earlier task; the one asked for may still come
            verify_identity(node, reply, task)
        except (WireError, ReplyRefusedError) as error:
            self._give_up(node, f"refused: {error}")
            return None
        del self._waiting[node]
        self._on_progress(NodeProgress(node=node, round=task.round, state="done", step=task.tau, steps=task.tau))
        return task, message

    def _give_up(self, node: str, reason: str) -> None:
        task = self._waiting.pop(node, None)
        self.missing[node] = reason
        self._on_progress(NodeProgress(node=node, round=task.round if task else 0, state="failed", note=reason))
