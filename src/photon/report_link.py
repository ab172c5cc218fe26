"""What the report says of the bytes: from float32 to what the network carried."""

from __future__ import annotations

from dataclasses import dataclass

from photon.link.ledger import Flow
from photon.summary import Summary


@dataclass(frozen=True)
class LinkRow:
    """Bytes of the whole run at one step of their way; None where there is no such step in that direction."""

    name: str
    up: int | None
    down: int | None


def link_rows(summary: Summary) -> list[LinkRow]:
    """From raw to sent, the stages of the codecs between them; empty if nothing crossed."""
    up, down = summary.link.up, summary.link.down
    if not up.encoded + down.encoded:
        return []
    stages = list(dict.fromkeys([*up.stages, *down.stages]))
    # A stage leaves less than the one before: their order is that of the bytes they leave.
    stages.sort(
        key=lambda stage: -max(up.stages.get(stage, 0) / max(up.raw, 1), down.stages.get(stage, 0) / max(down.raw, 1))
    )
    return [
        LinkRow("as float32", up.raw, down.raw),
        *(LinkRow(f"after {stage}", up.stages.get(stage), down.stages.get(stage)) for stage in stages),
        LinkRow("bodies of messages", up.body, down.body),
        LinkRow("whole messages", up.encoded, down.encoded),
        LinkRow("sent on the network", up.sent, down.sent),
    ]


def times_fewer(flow: Flow) -> float:
    """How many times less the messages took than float32 would have."""
    return flow.raw / flow.encoded if flow.encoded else 1.0
