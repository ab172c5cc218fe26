"""What a federation will cost, from formulas: bytes and seconds of a round, and the same for per-step training.

The formulas are those of the paper's notebook ("Photon: Federated LLM Pre-Training", arXiv 2411.02908, its wall-time
model), with S the payload's bytes, K the nodes of a round, B a link's bytes per second, nu local steps per second and
zeta the bytes per second of the merge:

    round = tau / nu + exchange + merge        merge = K S / zeta
    exchange: parameter server 2 K S / B, all-reduce (K - 1) S / B, ring all-reduce 2 S (K - 1) / (K B)

Three slips of the notebook are not copied:

1. Beyond 100 nodes it divides by the square root of B, which is no time at all (bytes over the root of bytes per
   second). Here the Aggregator's link is shared by K nodes and every node has a link of its own, so each way takes
   max(K S / B_aggregator, S / B_node), for any K.
2. Its zeta is commented as 5 TFLOP/s, set to 5e9, and divides megabytes. Here it is bytes of float32 model per second.
3. Its S is 2 bytes per parameter. Here S is what the link's codecs really write, and may differ up and down.

Links are full duplex: what a node sends does not slow down what it receives. A node does not train while it receives or
sends; it sends its update while it saves its own state, and nothing else overlaps. All nodes are alike, so they finish
together and share the Aggregator's link evenly; where they differ in steps, the one with most work is waited for.

Where nodes are told early what comes next (`photon.aggregator.early`) a round is not the sum of its phases. With n what
a node does itself, u the way up with the merge and all that the Aggregator does until the next round is given, and d
the outer step once more (ahead) and the way down, round r of a node begins when its round r - 1 is done and the base
is there, which is known when round r - 2 is merged; and no update is sent before the merge of the one before:

    trained_r = max(trained_(r-1), merged_(r-2) + d) + n        merged_r = max(trained_r, merged_(r-1)) + u

In the long run that is a round every max(n, u, (n + u + d) / 2) seconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from photon.estimate import evaluation_tokens, expected_nodes, knows_next, node_state_bytes, outer_state_bytes
from photon.plan_bytes import FLOAT32_BYTES, LinkCodecs, RoundBytes, Shape, round_bytes
from photon.plan_exchange import LinkSpeed, Topology, collective_s, merge_s, star_bits_per_s, transfer_s

if TYPE_CHECKING:
    from photon.config import Recipe

# In the order in which they happen; a round takes their sum.
PHASES = (
    "control",
    "download",
    "decode",
    "evaluate",
    "train",
    "encode",
    "save",
    "upload",
    "merge",
    "outer",
    "commit",
)
# What a node does itself; the rest is the network's and the Aggregator's.
NODE_PHASES = ("decode", "evaluate", "train", "encode", "save")
# What a run measures is coarser: these phases of it hold so many of ours.
MEASURED_GROUPS: Mapping[str, tuple[str, ...]] = {
    "nodes": ("control", "download", "decode", "evaluate", "train", "encode", "save", "upload"),
    "messages and transfer": ("control", "download", "upload"),
    "commit of the round before": ("commit",),
}


@dataclass(frozen=True)
class MachineSpeed:
    """One node's training and what goes on beside it; rates in bytes are of the float32 model. Infinite: takes no time.

    `at_once`: nodes that work at the same time; None: every node has its own machine.
    """

    tokens_per_s: float
    evaluation_tokens_per_s: float
    decode_bytes_per_s: float  # hash, decode and load what was received
    encode_bytes_per_s: float  # difference, encode and hash what is sent
    merge_bytes_per_s: float  # verify, decode and fold one reply
    outer_bytes_per_s: float  # outer step, and the new model as it travels
    disk_bytes_per_s: float
    control_s: float
    at_once: int | None = None


@dataclass(frozen=True)
class RoundPrediction:
    """A typical round: seconds by phase (see PHASES; scoring spread over the rounds between) and bytes of one node."""

    phases_s: dict[str, float]
    node_bytes: RoundBytes
    overlaps: bool = False  # nodes train on while a round's updates travel and are merged

    @property
    def round_s(self) -> float:
        """From the end of one round to the end of the next."""
        return max(self._bounds_s) if self.overlaps else math.fsum(self.phases_s.values())

    @property
    def hidden_s(self) -> float:
        """Of the phases what happens beside others."""
        return math.fsum(self.phases_s.values()) - self.round_s

    @property
    def utilisation(self) -> float:
        """Share of the round in which nodes train."""
        return self.phases_s["train"] / self.round_s

    @property
    def _bounds_s(self) -> tuple[float, float, float]:
        """What a round cannot be shorter than, by the formula at the top of this module."""
        own = math.fsum(self.phases_s[phase] for phase in NODE_PHASES)
        up = math.fsum(self.phases_s[phase] for phase in ("control", "upload", "merge", "outer", "commit"))
        return own, up, (own + up + self.phases_s["outer"] + self.phases_s["download"]) / 2

    def run_s(self, rounds: int, trained_rounds: float) -> float:
        """R x round, where all are full; the last one may be shorter, so that less is trained than R rounds do.

        What is hidden behind a next round is not, once, behind the last.
        """
        short_s = (rounds - trained_rounds) * self.phases_s["train"]
        return rounds * self.round_s + self.hidden_s - short_s

    def tau_for(self, wanted: float, step_s: float) -> int:
        """The least tau at which nodes train for the `wanted` share of a round; a local step takes `step_s`."""
        if not self.overlaps:
            return tau_for_utilisation(wanted, step_s, self.round_s - self.phases_s["train"])
        train_s = self.phases_s["train"]
        own, up, both = self._bounds_s
        # Each bound alone: tau step / (tau step + rest), / up, and 2 tau step / (tau step + rest) reach what is wanted.
        from_both = wanted / (2 - wanted) * (2 * both - train_s) / step_s
        return max(
            tau_for_utilisation(wanted, step_s, own - train_s),
            math.ceil(wanted * up / step_s - 1e-9),
            math.ceil(from_both - 1e-9),
        )


@dataclass(frozen=True)
class BreakEven:
    """Bandwidth of a node's upward link (all links scaled alike) up to which the federation is the faster one.

    `from_bits_per_s`: from which on it is, where it trains less. None: there is no such bandwidth; if both are None,
    `always` says whether it is at every bandwidth or at none.
    """

    bits_per_s: float | None
    always: bool
    from_bits_per_s: float | None = None


@dataclass(frozen=True)
class PhaseComparison:
    """Predicted beside measured seconds of one phase; None where one side has no such phase."""

    phase: str
    predicted_s: float | None
    measured_s: float | None

    @property
    def ratio(self) -> float | None:
        """Measured / predicted."""
        if self.predicted_s is None or self.measured_s is None or self.predicted_s <= 0:
            return None
        return self.measured_s / self.predicted_s


def predict(
    recipe: Recipe,
    parameters: int,
    shapes: Mapping[str, Shape],
    codecs: LinkCodecs,
    machine: MachineSpeed,
    link: LinkSpeed,
) -> RoundPrediction:
    """A typical round of `recipe` through the Aggregator, as Photon runs it, but the first; see `predict_round`."""
    return predict_round(recipe, parameters, round_bytes(shapes, codecs), machine, link)


def predict_round(
    recipe: Recipe,
    parameters: int,
    node_bytes: RoundBytes,
    machine: MachineSpeed,
    link: LinkSpeed,
    topology: Topology = "ps",
    tau: float | None = None,
) -> RoundPrediction:
    """Seconds of every phase, by the formulas at the top of this module; `tau`, if the mean is not the recipe's.

    What is hashed, decoded and written as a base is all that is shared; what is encoded and merged, the mean of what
    the rounds exchange.
    """
    nodes, shared_bytes, raw_bytes = expected_nodes(recipe), *_float32_bytes(parameters, node_bytes)
    # Virtual nodes queue for a device, those on other machines do not.
    waves = math.ceil(recipe.nodes_per_round / machine.at_once) if machine.at_once else 1
    state_bytes = node_state_bytes(recipe, parameters, node_bytes.shared)
    node_steps = [(silo.tau or tau or recipe.federation.tau) * recipe.batch_size_of(silo) for silo in recipe.silo]
    evaluated = evaluation_tokens(recipe) / recipe.evaluation.every
    phases = dict.fromkeys(PHASES, 0.0)
    phases["control"] = machine.control_s + link.control_round_trips * link.round_trip_s
    if topology == "ps":
        down = star_bits_per_s(link.node_down_bits_per_s, link.aggregator_bits_per_s, nodes)
        up = star_bits_per_s(link.node_up_bits_per_s, link.aggregator_bits_per_s, nodes)
        phases["download"] = transfer_s(
            _slowest_down_bytes(recipe, node_bytes), down, link.round_trip_s, link.handshakes
        )
        upload_s = transfer_s(node_bytes.up_bytes, up, link.round_trip_s, link.handshakes)
        # An update is on its way while the node saves its own state; what is left of it is waited for.
        phases["upload"] = max(0.0, upload_s - waves * state_bytes / machine.disk_bytes_per_s)
    else:
        phases["upload"] = collective_s(topology, node_bytes.up_bytes, nodes, link.node_bits_per_s, link.round_trip_s)
    phases["decode"] = waves * (shared_bytes + state_bytes) / machine.decode_bytes_per_s
    phases["evaluate"] = waves * evaluated / machine.evaluation_tokens_per_s
    phases["train"] = waves * max(node_steps) * recipe.data.sequence_length / machine.tokens_per_s
    phases["encode"] = waves * raw_bytes / machine.encode_bytes_per_s
    phases["save"] = waves * (state_bytes + node_bytes.up_bytes) / machine.disk_bytes_per_s
    phases["merge"] = merge_s(topology, raw_bytes, nodes, machine.merge_bytes_per_s)
    # The new base is written as it is made; what is left for the commit is the outer optimizer's state and, where nodes
    # rebuild another base than the exact model, that model and what they rebuild theirs from.
    phases["outer"] = shared_bytes / machine.outer_bytes_per_s + shared_bytes / machine.disk_bytes_per_s
    keeps_exact = node_bytes.down_is_lossy and bool(recipe.link.down_feedback)
    apart = shared_bytes * keeps_exact + node_bytes.down_bytes if node_bytes.sends_differences else 0
    phases["commit"] = (outer_state_bytes(recipe, parameters, node_bytes.shared) + apart) / machine.disk_bytes_per_s
    overlaps = topology == "ps" and machine.at_once is None and knows_next(recipe)
    return RoundPrediction(phases, node_bytes, overlaps)


def compare(prediction: RoundPrediction, measured_s: Mapping[str, float]) -> list[PhaseComparison]:
    """Predicted beside measured seconds of a round, in the order of `measured_s`, then what was not measured.

    A measured phase may be one of PHASES or a group of MEASURED_GROUPS.
    """
    rows, told = [], set()
    for phase, seconds in measured_s.items():
        parts = MEASURED_GROUPS.get(phase, (phase,))
        known = [part for part in parts if part in prediction.phases_s and part not in measured_s.keys() - {phase}]
        predicted = math.fsum(prediction.phases_s[part] for part in known) if known else None
        told |= set(known)
        rows.append(PhaseComparison(phase, predicted, seconds))
    rows += [PhaseComparison(phase, s, None) for phase, s in prediction.phases_s.items() if phase not in told]
    return rows


def tau_for_utilisation(wanted: float, step_s: float, rest_s: float) -> int:
    """The least tau at which nodes train for the `wanted` share of a round: tau step / (tau step + rest) >= wanted.

    `rest_s` is everything in a round but training; it does not depend on tau. Raises ValueError outside [0, 1).
    """
    if not 0 <= wanted < 1:
        raise ValueError(f"a utilisation is at least 0 and below 1, not {wanted:g}")
    return max(1, math.ceil(wanted / (1 - wanted) * rest_s / step_s - 1e-9))


def baseline_s(steps: float, step_s: float, exchange_s: float, overlapped: bool) -> float:
    """Per-step data-parallel training: steps x (1 / nu + exchange), or the larger of the two with perfect overlap."""
    return steps * (max(step_s, exchange_s) if overlapped else step_s + exchange_s)


def break_even(
    federated_s: Callable[[LinkSpeed], float], other_s: Callable[[LinkSpeed], float], link: LinkSpeed
) -> tuple[float, float]:
    """The factors on all bandwidths of `link` up to which, and from which on, federated training is the faster one.

    (0, infinity): it is nowhere; (infinity, 0): it is everywhere. More bandwidth helps whoever sends more, so there is
    one crossing; it is bracketed between a billionth and a billion times the link and halved down (bisection on the
    logarithm). Up to it the federation wins where it sends less, from it on where it sends more and trains less.
    """

    def wins(exponent: float) -> bool:
        scaled = link.scaled(10.0**exponent)
        return federated_s(scaled) < other_s(scaled)

    low, high = -9.0, 9.0
    wins_low = wins(low)
    if wins_low == wins(high):
        return (math.inf, 0.0) if wins_low else (0.0, math.inf)
    for _ in range(50):
        middle = (low + high) / 2
        low, high = (middle, high) if wins(middle) == wins_low else (low, middle)
    return (float(10.0**low), math.inf) if wins_low else (0.0, float(10.0**high))


def _float32_bytes(parameters: int, node_bytes: RoundBytes) -> tuple[float, float]:
    """All that is shared, and what a mean round exchanges, as float32."""
    shared = FLOAT32_BYTES * (node_bytes.shared.values if node_bytes.shared else parameters)
    return shared, fmean(turn.raw_bytes for turn in node_bytes.turns) if node_bytes.turns else shared


def _slowest_down_bytes(recipe: Recipe, node_bytes: RoundBytes) -> float:
    """The round waits for whoever gets most: where nodes miss rounds, one that gets the model whole."""
    federation = recipe.federation
    misses = federation.dropout > 0 or (recipe.nodes_per_round < len(recipe.silo) and recipe.evaluation.every > 1)
    return node_bytes.whole_bytes if node_bytes.sends_differences and misses else node_bytes.down_bytes
