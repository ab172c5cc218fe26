"""The byte ledger: what really crossed, in both directions, measured on serialised messages (law 6).

Of every message it keeps four numbers that must not be mistaken for each other: what an exact float32 message would
have held, the tensors as the codec wrote them, the whole message, and what the network carried for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pydantic import BaseModel, ConfigDict, Field


class Flow(BaseModel):
    """Bytes in one direction."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    raw: int = Field(
        0, description="The same tensors as exact float32; a base that its node holds already counts as a whole one."
    )
    body: int = Field(0, description="Their tensors as the codec wrote them.")
    encoded: int = Field(0, description="Whole messages: bodies and headers, also of those that carry no tensors.")
    sent: int = Field(
        0,
        description="On the network (not to a bucket): messages, framing, encryption, control, what was sent again.",
    )
    stages: dict[str, int] = Field(
        default_factory=dict, description="Of the bodies, what each stage of the codec left."
    )

    def __add__(self, other: Flow) -> Flow:
        stages = self.stages.keys() | other.stages.keys()
        return Flow(
            raw=self.raw + other.raw,
            body=self.body + other.body,
            encoded=self.encoded + other.encoded,
            sent=self.sent + other.sent,
            stages={stage: self.stages.get(stage, 0) + other.stages.get(stage, 0) for stage in sorted(stages)},
        )


class Traffic(BaseModel):
    """Down to a node, or to all of them, and up again."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    down: Flow = Flow()
    up: Flow = Flow()

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(down=self.down + other.down, up=self.up + other.up)


@dataclass
class Ledger:
    """Totals of the run and, since `begin_round`, of the round per node.

    A refused, late or failed reply is counted too: its bytes crossed. Without a network (`counts_sent` false) what is
    sent is what was encoded.
    """

    total: Traffic = field(default_factory=Traffic)
    nodes: dict[str, Traffic] = field(default_factory=dict)
    counts_sent: bool = False
    _read: dict[str, tuple[int, int]] = field(default_factory=dict)  # of the network's counters, per node

    def begin_round(self) -> None:
        """Forget the per-node figures of the round before."""
        self.nodes = {}

    def down(self, node: str, message_bytes: int, body_bytes: int = 0, raw_bytes: int = 0) -> None:
        """Count a message to `node` that stands for `raw_bytes` of float32."""
        self.add(node, Traffic(down=self._flow(message_bytes, body_bytes, raw_bytes)))

    def up(self, node: str, message_bytes: int) -> None:
        """Count a message from `node`; what is in it is known later, and told to `add`."""
        self.add(node, Traffic(up=self._flow(message_bytes, 0, 0)))

    def add(self, node: str, traffic: Traffic) -> None:
        """Count any traffic of one node."""
        self.total += traffic
        self.nodes[node] = self.of(node) + traffic

    def sent(self, counters: Mapping[str, tuple[int, int]]) -> None:
        """Take over the network's counters: bytes (down, up) per node since any moment; only what was added counts."""
        for node, (down, up) in counters.items():
            before = self._read.get(node, (0, 0))
            added = [now - then if now >= then else now for now, then in zip((down, up), before, strict=True)]
            self._read[node] = (down, up)
            if any(added):
                self.add(node, Traffic(down=Flow(sent=added[0]), up=Flow(sent=added[1])))

    def skip(self, counters: Mapping[str, tuple[int, int]]) -> None:
        """What the network's counters stand at is known already, or was not ours."""
        self._read = dict(counters)

    def of(self, node: str) -> Traffic:
        """This round's traffic of one node."""
        return self.nodes.get(node, Traffic())

    @property
    def round(self) -> Traffic:
        """This round's traffic of all nodes."""
        return sum(self.nodes.values(), Traffic())

    def _flow(self, message_bytes: int, body_bytes: int, raw_bytes: int) -> Flow:
        sent = 0 if self.counts_sent else message_bytes
        return Flow(raw=raw_bytes, body=body_bytes, encoded=message_bytes, sent=sent)
