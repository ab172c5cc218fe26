"""Bytes of a round and of a run: the bodies of messages, whatever the codecs, and whatever the rounds exchange."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import TYPE_CHECKING, Protocol

from photon.estimate import Shared, expected_nodes

if TYPE_CHECKING:  # torch takes seconds to import, and no formula needs it
    import torch

    from photon.config import Recipe

Shape = tuple[int, ...]
FLOAT32_BYTES = 4
ENVELOPE_BYTES = 1024  # at most, of a message without its body


class BodyBytes(Protocol):
    """The size of a message's body: exact, or the most it can be."""

    @property
    def body_bytes(self) -> int: ...  # noqa: D102 - the class says it
    @property
    def stage_bytes(self) -> Mapping[str, int]: ...  # noqa: D102 - of the tensors, after each stage of the codec
    @property
    def is_exact(self) -> bool: ...  # noqa: D102


class SizedCodec(Protocol):
    """A codec as far as a plan needs it."""

    def body_size(self, shapes: Mapping[str, Shape], dtypes: Mapping[str, torch.dtype]) -> BodyBytes:
        """What a body with tensors of these shapes and dtypes comes to, the safetensors header included."""


@dataclass(frozen=True)
class LinkCodecs:
    """What crosses in each direction, and what a node gets that has nothing to build on: the whole model, exact."""

    up: SizedCodec
    down: SizedCodec
    whole: SizedCodec
    sends_differences: bool  # down: what changed since the base that the node holds
    down_is_lossy: bool = False
    holds_back: bool = False  # the first of several rounds leaves the base as it is


@dataclass(frozen=True)
class Turn:
    """Bodies of a round that exchanges certain tensors: updates up, and down what tells a node how they were merged.

    `raw_bytes` are the exchanged tensors as float32. `last_down_bytes`: down after the run's last round, where
    merges are held back for a round: it tells those of the round before as well.
    """

    down_bytes: float
    up_bytes: float
    raw_bytes: int = 0
    last_down_bytes: float = 0.0


@dataclass(frozen=True)
class RoundBytes:
    """Bodies of one node's round; not exact: the most they can be. `whole_bytes` is all that is shared, exact.

    Where parts have rounds exchange other tensors in turn, `turns` are those of a period, and `down_bytes`, `up_bytes`
    the mean over them, or what `over` makes of them. `shared` None: the weights, and all of them in every round.
    """

    down_bytes: float
    up_bytes: float
    whole_bytes: int
    down_is_exact: bool = True
    up_is_exact: bool = True
    sends_differences: bool = False
    down_is_lossy: bool = False
    holds_back: bool = False
    turns: tuple[Turn, ...] = ()
    shared: Shared | None = None

    @property
    def is_exact(self) -> bool:
        """Whether both are."""
        return self.down_is_exact and self.up_is_exact

    @property
    def largest(self) -> Turn:
        """The most that is sent each way in a round, be it in the same one or not."""
        turns = self.turns or (self.turn(0),)
        return Turn(max(turn.down_bytes for turn in turns), max(turn.up_bytes for turn in turns))

    def turn(self, round_index: int) -> Turn:
        """What that round exchanges."""
        if not self.turns:
            return Turn(self.down_bytes, self.up_bytes)
        return self.turns[round_index % len(self.turns)]

    def told(self, index: int, rounds: int) -> float:
        """Bytes that tell a node the base of round `index` of so many, from 1 on; that after the last is the end."""
        if not self.holds_back or not self.sends_differences:
            return self.turn(index - 1).down_bytes
        if index == rounds:
            return self.turn(index - 1).last_down_bytes if self.turns and index > 1 else self.turn(index - 1).down_bytes
        return self.turn(index - 2).down_bytes if index > 1 else 0.0

    def over(self, rounds: int) -> RoundBytes:
        """With the mean over the first so many rounds."""
        turns = [self.turn(index) for index in range(rounds)]
        return replace(
            self,
            down_bytes=_mean([turn.down_bytes for turn in turns]),
            up_bytes=_mean([turn.up_bytes for turn in turns]),
        )


def round_bytes(shapes: Mapping[str, Shape], codecs: LinkCodecs, turns: Sequence[Collection[str]] = ()) -> RoundBytes:
    """Bodies of one node's round with these float32 tensors; of each of `turns`, if rounds exchange only some."""
    import torch

    exchanged = [{name: shapes[name] for name in names} for names in turns or [tuple(shapes)]]
    ups = [codecs.up.body_size(tensors, dict.fromkeys(tensors, torch.float32)) for tensors in exchanged]
    told = exchanged if codecs.sends_differences else [dict(shapes)] * len(exchanged)
    downs = [codecs.down.body_size(tensors, dict.fromkeys(tensors, torch.float32)) for tensors in told]
    both = [
        {name: shapes[name] for name in shapes if name in now or name in exchanged[i - 1]} for i, now in enumerate(told)
    ]
    lasts = [codecs.down.body_size(tensors, dict.fromkeys(tensors, torch.float32)).body_bytes for tensors in both]
    sizes = [
        Turn(down.body_bytes, up.body_bytes, FLOAT32_BYTES * sum(map(prod, tensors.values())), last)
        for down, up, tensors, last in zip(downs, ups, exchanged, lasts, strict=True)
    ]
    return RoundBytes(
        down_bytes=_mean([turn.down_bytes for turn in sizes]),
        up_bytes=_mean([turn.up_bytes for turn in sizes]),
        whole_bytes=codecs.whole.body_size(shapes, dict.fromkeys(shapes, torch.float32)).body_bytes,
        down_is_exact=all(down.is_exact for down in downs),
        up_is_exact=all(up.is_exact for up in ups),
        sends_differences=codecs.sends_differences,
        down_is_lossy=codecs.down_is_lossy,
        holds_back=codecs.holds_back,
        turns=tuple(sizes) if len(sizes) > 1 else (),
    )


def run_down_bytes(recipe: Recipe, node_bytes: RoundBytes, rounds: int | None = None) -> float:
    """Bodies down in the whole run, where every node answers every task; `rounds`, if not those of the recipe.

    A round sends to its K nodes, one that scores to every owner, and after the last the finished model is scored. Who
    drops out gets nothing. The untrained model travels whole and exact, or, where differences travel, not at all:
    everybody makes it from the seed. A difference needs the base before; a node that had no task in the round before
    gets the whole model. Where merges are held back for a round, the first moves nothing that could be told. With K of
    P nodes sampled, or with drop-outs, that is a matter of chance, and this the mean over the draws.
    """
    rounds = rounds or recipe.federation.rounds
    nodes, owners = expected_nodes(recipe), len(recipe.silo)
    dropped = recipe.nodes_per_round - nodes
    total, share_that_holds = 0.0, 1.0
    for index in range(rounds + 1):
        is_scored = index % recipe.evaluation.every == 0
        tasks = owners if index == rounds else owners - dropped if is_scored else nodes
        if index == 0:
            size = 0.0 if node_bytes.sends_differences else float(node_bytes.whole_bytes)
        else:
            size = node_bytes.told(index, rounds)
            if node_bytes.sends_differences:
                size = share_that_holds * size + (1 - share_that_holds) * node_bytes.whole_bytes
        total += tasks * size
        share_that_holds = tasks / owners
    return total


def run_up_bytes(recipe: Recipe, node_bytes: RoundBytes, rounds: int | None = None) -> float:
    """Bodies up in the whole run; with nodes that drop out, the mean over the draws."""
    rounds = rounds or recipe.federation.rounds
    return expected_nodes(recipe) * math.fsum(node_bytes.turn(index).up_bytes for index in range(rounds))


def run_tasks(recipe: Recipe, rounds: int | None = None) -> int:
    """Tasks of the whole run; each is answered by one reply. As if nobody dropped out."""
    rounds = rounds or recipe.federation.rounds
    nodes, owners = recipe.nodes_per_round, len(recipe.silo)
    return rounds * nodes + math.ceil(rounds / recipe.evaluation.every) * (owners - nodes) + owners


def _mean(sizes: Sequence[float]) -> float:
    """Of whole numbers a whole one where it can be: most plans have rounds that are all alike."""
    total = sum(sizes)
    return total // len(sizes) if total % len(sizes) == 0 else total / len(sizes)
