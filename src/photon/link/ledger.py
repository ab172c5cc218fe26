"""The byte ledger: what really crossed, in both directions, measured on serialised messages (law 6)."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Traffic:
    """Bytes of messages sent down to a node and received up from it."""

    bytes_down: int = 0
    bytes_up: int = 0


@dataclass
class Ledger:
    """Totals of the run and, since `begin_round`, of the round per node.

    A refused, late or failed reply is counted too: its bytes crossed.
    """

    total: Traffic = field(default_factory=Traffic)
    nodes: dict[str, Traffic] = field(default_factory=dict)

    def begin_round(self) -> None:
        """Forget the per-node figures of the round before."""
        self.nodes = {}

    def down(self, node: str, message_bytes: int) -> None:
        """Count a message sent to `node`."""
        self.total.bytes_down += message_bytes
        self.of(node).bytes_down += message_bytes

    def up(self, node: str, message_bytes: int) -> None:
        """Count a message received from `node`."""
        self.total.bytes_up += message_bytes
        self.of(node).bytes_up += message_bytes

    def of(self, node: str) -> Traffic:
        """This round's traffic of one node."""
        return self.nodes.setdefault(node, Traffic())

    @property
    def round(self) -> Traffic:
        """This round's traffic of all nodes."""
        return Traffic(
            sum(traffic.bytes_down for traffic in self.nodes.values()),
            sum(traffic.bytes_up for traffic in self.nodes.values()),
        )
