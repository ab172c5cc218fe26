"""How long an exchange takes, by topology: the paper's formulas, corrected as `photon.planner` says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Topology = Literal["ps", "allreduce", "ring"]

_INITIAL_WINDOW_BYTES = 14_600  # ten segments of 1460 bytes (RFC 6928)
_BITS = 8


@dataclass(frozen=True)
class LinkSpeed:
    """The network. `aggregator_bits_per_s` holds each way and is shared by the nodes of a round.

    `handshakes` are the round trips before the first byte of a body: TCP one, TLS 1.3 one, the request itself one.
    `control_round_trips` are those of the messages around them.
    """

    node_up_bits_per_s: float
    node_down_bits_per_s: float
    aggregator_bits_per_s: float
    round_trip_s: float = 0.0
    handshakes: float = 3.0
    control_round_trips: float = 10.0  # two messages a round, four to five calls each (docs/benchmarks.md)

    def scaled(self, factor: float) -> LinkSpeed:
        """The same network with all bandwidths times `factor`."""
        return LinkSpeed(
            self.node_up_bits_per_s * factor,
            self.node_down_bits_per_s * factor,
            self.aggregator_bits_per_s * factor,
            self.round_trip_s,
            self.handshakes,
            self.control_round_trips,
        )

    @property
    def node_bits_per_s(self) -> float:
        """Between two nodes: the slower of the one's up and the other's down."""
        return min(self.node_up_bits_per_s, self.node_down_bits_per_s)


def transfer_s(payload_bytes: float, bits_per_s: float, round_trip_s: float, handshakes: float) -> float:
    """Seconds until a payload has crossed on a new connection.

    handshakes x RTT + slow start + S / B. In slow start a sender waits a round trip for each window, the first of ten
    segments and each twice the one before (RFC 6928, RFC 5681), until a window fills the link.
    """
    bytes_per_s = bits_per_s / _BITS
    seconds, left, window = handshakes * round_trip_s, payload_bytes, float(_INITIAL_WINDOW_BYTES)
    while window < bytes_per_s * round_trip_s and window < left:
        seconds, left, window = seconds + round_trip_s, left - window, 2 * window
    return seconds + left / bytes_per_s


def star_bits_per_s(node_bits_per_s: float, aggregator_bits_per_s: float, nodes: float) -> float:
    """What one of `nodes` gets when all exchange with the Aggregator at once.

    S over it is max(K S / B_aggregator, S / B_node): the notebook's K S / B where both links are alike.
    """
    return min(node_bits_per_s, aggregator_bits_per_s / nodes)


def collective_s(
    topology: Topology, payload_bytes: float, nodes: float, bits_per_s: float, round_trip_s: float
) -> float:
    """One all-reduce of S bytes among K nodes: (K - 1) S / B, as a ring 2 S (K - 1) / (K B); alone, nothing.

    All at once takes one message's way (half a round trip), a ring 2 (K - 1) of them one after the other.
    """
    if nodes <= 1:
        return 0.0
    bytes_per_s = bits_per_s / _BITS
    if topology == "allreduce":
        return (nodes - 1) * payload_bytes / bytes_per_s + round_trip_s / 2
    return 2 * payload_bytes * (nodes - 1) / (nodes * bytes_per_s) + (nodes - 1) * round_trip_s


def step_exchange_s(topology: Topology, gradient_bytes: float, nodes: int, link: LinkSpeed) -> float:
    """What per-step data-parallel training exchanges in each step, on connections that stay open.

    With a server gradients go up and their mean comes down: S / B each way by `star_bits_per_s`, and one round trip.
    """
    if nodes < 2:
        return 0.0
    if topology != "ps":
        return collective_s(topology, gradient_bytes, nodes, link.node_bits_per_s, link.round_trip_s)
    up = star_bits_per_s(link.node_up_bits_per_s, link.aggregator_bits_per_s, nodes)
    down = star_bits_per_s(link.node_down_bits_per_s, link.aggregator_bits_per_s, nodes)
    return gradient_bytes * _BITS * (1 / up + 1 / down) + link.round_trip_s


def merge_s(topology: Topology, model_bytes: float, nodes: float, merge_bytes_per_s: float) -> float:
    """K S / zeta at the Aggregator; in an all-reduce a node adds K - 1 payloads, in a ring that many K-ths of one."""
    parts: dict[Topology, float] = {"ps": nodes, "allreduce": nodes - 1, "ring": (nodes - 1) / nodes}
    return parts[topology] * model_bytes / merge_bytes_per_s
