"""The fabric protocol: how tasks reach nodes and replies come back.

Only bytes cross it, so a node in this process can do nothing that a node on another continent could not. The
identity of a sender is the fabric's word (a pipe, a certificate), never the message's.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from photon.events import NodeProgress
from photon.link.update import Sealed, Serialised


@dataclass(frozen=True)
class NodeInfo:
    """What the Aggregator knows of a node: a name and the most it can count, never a corpus or a path (law 1).

    `tokens_per_step` bounds the tokens a node may claim for a local step, `evaluation_tokens` those of a score. Without
    the second, one owner could outweigh all others in the pooled score.
    """

    name: str
    tokens_per_step: int
    trains: bool = True
    evaluates: bool = True
    evaluation_tokens: int = 2**40


@dataclass(frozen=True)
class Arrival:
    """Serialised reply of the node that the fabric knows to have sent it."""

    node: str
    message: Serialised


@dataclass(frozen=True)
class Lost:
    """The node will not answer what it was last sent."""

    node: str
    reason: str


FabricEvent = Arrival | Lost | NodeProgress


class Fabric(Protocol):
    """Carries messages. One task is in flight per node at most; every wait is the caller's, with a deadline."""

    @property
    def slots(self) -> int:
        """How many nodes work at the same time (virtual nodes share devices)."""

    def nodes(self) -> list[NodeInfo]:
        """The nodes that can be reached now."""

    def send(self, node: str, message: Sealed) -> None:
        """Hand a task over for delivery. Raises FabricError if the fabric is closed or the node unknown."""

    @property
    def foretells(self) -> bool:
        """Whether anything is gained by telling nodes what comes next: they are far away, and would wait for it."""

    def foretell(self, node: str, message: Sealed) -> None:
        """Tell a node the task that most likely follows its open one. It may begin that when it is done, and hands
        nothing in before the same work is sent. Nothing happens if no task of the node is open."""

    def receive(self, timeout_s: float) -> FabricEvent | None:
        """The next event, or None after `timeout_s` seconds."""

    def abandon(self, node: str) -> None:
        """Stop waiting for the node's task; whatever it still sends for it is dropped."""

    def carried(self) -> Mapping[str, tuple[int, int]] | None:
        """Bytes that the network has carried, (down, up) per node since any moment; None where there is no network."""

    def close(self) -> None:
        """Stop everything the fabric started; safe to call twice."""
