"""One exchange: tasks go out, replies come in, and quorum, grace and deadline decide when it is over (law 3)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction

from photon.aggregator.downlink import Told
from photon.aggregator.late import Late
from photon.aggregator.validate import NodeFailedError, verify_identity
from photon.errors import ReplyRefusedError, WireError
from photon.events import NodeProgress
from photon.fabric.base import Arrival, Fabric, Lost
from photon.link.ledger import Flow, Ledger, Traffic
from photon.link.update import Message, Reply, Task, decode_message, expect_reply, seal

_POLL_S = 1.0  # upper bound of one wait: Ctrl-C and the deadline are noticed within it
_GOES_ON = "goes on training: its update may count in a later round"
_REASON_CHARACTERS = 2000  # a stranger may name a tensor as it likes; the record of the run repeats no megabytes


@dataclass(frozen=True)
class Patience:
    """How long an exchange waits, and for how many.

    `nodes` is K: so many usable replies make the round complete, and the quorum is a share of it. More may have been
    asked to train (`federation.oversample`). None: K is the number of those asked.
    """

    quorum: float
    grace_s: float
    deadline_s: float
    nodes: int | None = None


@dataclass(frozen=True)
class RawBytes:
    """What messages would hold as exact float32, for the ledger: a whole base, what changed in it in the round before,
    and an update. They differ where parts have a round exchange only some tensors."""

    whole: int
    difference: int
    update: int

    def of(self, told: Told) -> int:
        """Of a task. A base that its node holds already, because all make it from the seed, counts as a whole one."""
        return self.difference if told.form == "difference" else self.whole


def quorum_of(share: float, nodes: int) -> int:
    """Nodes that must answer with something usable: the share as it is written, 0.28 of 25 is 7."""
    return max(1, math.ceil(Fraction(str(share)) * nodes))


class Exchange:
    """Sends one task per node and yields the replies that answer them, as they arrive, each once.

    The quorum is a share of K, or of those asked to train (of all, if none is). `missing` says afterwards who did not
    count and why; `refused` those of them whose reply failed a check, which is charged to them. Whoever finds a yielded
    reply unusable calls `refuse`. A node that lacks what its task builds on is asked once more, with what `whole` makes
    of the task.

    `late` are tasks of earlier rounds, of nodes that are asked nothing now. Their replies are checked against the task
    that they answer and are yielded with it. They help the quorum, but make no round complete: K are fresh replies. As
    long as a fresh one may still come, the grace time begins with the first of them: a round whose updates are all old
    would take them at full weight. Nobody waits for a late node once the quorum is there.
    """

    def __init__(
        self,
        fabric: Fabric,
        ledger: Ledger,
        patience: Patience,
        on_progress: Callable[[NodeProgress], None],
        whole: Callable[[Task], tuple[Task, Told]],
        raw: RawBytes,
        late: Late | None = None,
    ) -> None:
        self._fabric, self._ledger, self._patience = fabric, ledger, patience
        self._on_progress, self._whole, self._raw = on_progress, whole, raw
        self._late = Late() if late is None else late
        self._answered_late: set[str] = set()
        self._waiting: dict[str, Task] = {}
        self._asked: set[str] = set()
        self._counted: set[str] = set()
        self._trains = False
        self.missing: dict[str, str] = {}
        self.refused: dict[str, str] = {}

    def send(self, tasks: Mapping[str, tuple[Task, Told]]) -> None:
        """Hand every task to the fabric, with what tells the base that it starts from."""
        for task, told in tasks.values():
            self._send(task, told)
        self._asked = set(tasks)
        train = {node for node, (task, _) in tasks.items() if task.tau > 0}
        self._trains = bool(train or self._late.tasks)
        self._counted = train if self._trains else self._asked

    def _send(self, task: Task, told: Told) -> None:
        message = seal(task, told.body)
        self._ledger.down(task.node, len(message), len(told.body), self._raw.of(told))
        self._ledger.add(task.node, Traffic(down=Flow(stages=dict(told.stage_bytes))))
        self._fabric.send(task.node, message)
        self._waiting[task.node] = task

    def replies(self) -> Iterator[tuple[Task, Message]]:
        """Yield (task, reply) until all have answered, or quorum and grace are over, or the deadline is.

        With K usable replies in, nodes that were asked to train beyond K are let go at once; those that were asked
        for scores alone still have the grace time. Who is let go is abandoned, or goes on as `late` says.
        """
        # Virtual nodes queue for a device: each wave of them gets the time that one node gets.
        waves = math.ceil(len(self._asked | self._late.tasks.keys()) / max(1, self._fabric.slots))
        grace_s = self._patience.grace_s * waves
        end = time.monotonic() + self._patience.deadline_s * waves + self._patience.grace_s
        grace_is_running = False
        while self._is_open and not self._is_hopeless:
            if self._is_complete and self._let_spares_go():
                continue
            if self._may_end and not grace_is_running:
                grace_is_running = True
                end = min(end, time.monotonic() + grace_s)
            remaining_s = end - time.monotonic()
            if remaining_s <= 0:
                break
            match self._late.kept() or self._fabric.receive(min(remaining_s, _POLL_S)):
                case NodeProgress() as progress:
                    self._on_progress(progress)
                case Lost(node, reason) if node in self._waiting or node in self._late.tasks:
                    self._give_up(node, reason)
                case Arrival() as arrival:
                    accepted = self._accept(arrival)
                    if accepted is not None:
                        yield accepted
                    del arrival, accepted  # one reply in memory, not this one until the next has arrived
        self._end()

    def _end(self) -> None:
        """Let go of whoever has not answered: abandoned, or late from now on."""
        reason = "given up: no quorum was in reach" if self._is_hopeless else "no answer before the deadline"
        has_quorum = self.quorum_is_met
        for node, task in list(self._late.tasks.items()):
            if not (has_quorum and self._late.goes_on(task)):
                self._fabric.abandon(node)
                self._give_up(node, f"too old: its task is of round {task.round}" if has_quorum else reason)
        for node, task in list(self._waiting.items()):
            if has_quorum and self._late.goes_on(task):
                self._let_go_on(node)
            else:
                self._fabric.abandon(node)
                self._give_up(node, reason)

    @property
    def quorum_is_met(self) -> bool:
        """Whether enough nodes have answered with something usable."""
        return self._usable + self._usable_late >= self.quorum

    @property
    def quorum(self) -> int:
        """Nodes that must answer with something usable."""
        return quorum_of(self._patience.quorum, self._patience.nodes or len(self._counted))

    @property
    def _usable(self) -> int:
        return len(self._counted - self._waiting.keys() - self.missing.keys())

    @property
    def _usable_late(self) -> int:
        return len(self._answered_late - self.missing.keys())

    @property
    def _is_open(self) -> bool:
        """Whether anybody is waited for."""
        return bool(self._waiting) or (bool(self._late.tasks) and not self.quorum_is_met)

    @property
    def _may_end(self) -> bool:
        """Whether the grace time begins: with the quorum, and a fresh reply in it if there may be one."""
        return self.quorum_is_met and (self._usable > 0 or self._counted <= self.missing.keys())

    @property
    def _is_complete(self) -> bool:
        return self._patience.nodes is not None and self._usable >= self._patience.nodes

    @property
    def _is_hopeless(self) -> bool:
        """Whether too many have failed already: waiting for the others would only cost time.

        Never where scores alone are asked for: each of them is good without the others.
        """
        late = len(self._late.tasks) + self._usable_late
        return self._trains and len(self._counted - self.missing.keys()) + late < self.quorum

    def complaint(self) -> str:
        """What is to be said if the quorum was not met."""
        reasons = "; ".join(f"{node}: {reason}" for node, reason in sorted(self.missing.items()))
        return (
            f"{self._usable + self._usable_late} of {len(self._counted | self._answered_late)} nodes counted, "
            f"federation.quorum asks for {self.quorum}. {reasons}."
        )

    def refuse(self, node: str, reason: str) -> None:
        """A yielded reply cannot be used: it no longer counts towards the quorum."""
        self.refused[node] = reason[:_REASON_CHARACTERS]
        self._give_up(node, f"refused: {reason}")

    def _accept(self, arrival: Arrival) -> tuple[Task, Message] | None:
        node = arrival.node
        self._ledger.up(node, len(arrival.message))
        task = self._waiting.get(node) or self._late.tasks.get(node)
        if task is None:
            return None  # a reply to a task that was given up; its bytes are on the ledger
        try:
            message = decode_message(arrival.message)
            reply = expect_reply(message)
            if body_bytes := len(message.body):
                self._ledger.add(node, Traffic(up=Flow(raw=self._raw.update, body=body_bytes)))
            if reply.node == node and reply.nonce != task.nonce:
                return None  # the late answer to an earlier task; the one asked for may still come
            verify_identity(node, reply, task)
            if reply.status == "lacks":
                self._tell_again(task, reply)
                return None
        except NodeFailedError as error:  # it says so itself: no lie, nothing to charge
            self._give_up(node, str(error))
            return None
        except (WireError, ReplyRefusedError) as error:
            self.refuse(node, str(error))
            return None
        if self._waiting.pop(node, None) is None:
            del self._late.tasks[node]
            self._answered_late.add(node)
        self._on_progress(NodeProgress(node=node, round=task.round, state="done", step=task.tau, steps=task.tau))
        return task, message

    def _tell_again(self, task: Task, reply: Reply) -> None:
        """Ask a node that lacks the base again, with all of it. Raises NodeFailedError if it had all of it, or is late:
        the base of its round is not kept."""
        if task.form == "whole" or task.node in self._late.tasks:
            raise NodeFailedError(f"the node lacks the base that it was sent: {reply.error or 'no reason given'}")
        self._on_progress(NodeProgress(node=task.node, round=task.round, state="waiting", note="gets the whole base"))
        self._send(*self._whole(task))

    def _let_spares_go(self) -> bool:
        """Let go of whoever still trains; says whether there was anybody. They did nothing wrong."""
        spares = sorted(self._counted & self._waiting.keys())
        reason = f"not needed: {self._usable} others had answered"
        for node in spares:
            if self._late.goes_on(self._waiting[node]):
                self._let_go_on(node)
                continue
            task = self._waiting.pop(node)
            self._fabric.abandon(node)
            self.missing[node] = reason
            self._on_progress(NodeProgress(node=node, round=task.round, state="waiting", note=reason))
        return bool(spares)

    def _let_go_on(self, node: str) -> None:
        self._late.tasks[node] = task = self._waiting.pop(node)
        self.missing[node] = _GOES_ON
        self._on_progress(NodeProgress(node=node, round=task.round, state="training", steps=task.tau, note="is late"))

    def _give_up(self, node: str, reason: str) -> None:
        task = self._waiting.pop(node, None) or self._late.tasks.pop(node, None)
        reason = reason[:_REASON_CHARACTERS]
        self.missing[node] = reason
        self._on_progress(NodeProgress(node=node, round=task.round if task else 0, state="failed", note=reason))
