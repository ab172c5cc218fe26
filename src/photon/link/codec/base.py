"""The three kinds of stages, and what passes between them.

    tensor --Transform*--> fewer float32 values, and side information in bytes
           --Quantiser?--> bytes (without one: the values' own)
           --Lossless?---> fewer bytes

`photon.link.codec.pipeline` chains them. Stages are immutable and know nothing of names, rounds or nodes; what one
keeps of a tensor from one round to the next goes out in `Reduced.memory` and comes back in `Context.memory`.

Decoders trust nothing. Whatever bytes they are given, they return a tensor of the shape that was asked for or raise
WireError, and allocate no more than a small multiple of the declared sizes, which follow from that shape. What they
compute is the same to the last bit on every machine, so that both ends of a lossy downlink hold the same base:
integers, casts and elementwise IEEE arithmetic, and no matrix product in float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Context:
    """What a stage may know of a tensor beside its values.

    `seed` feeds every random choice; it differs by run, node, round and tensor. `survey` is what `Transform.survey`
    found in all tensors together. `memory` is what this stage kept of this tensor the last time; empty at first.
    """

    seed: int
    survey: float | None = None
    memory: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Reduced:
    """What a transform makes of a tensor: `values` float32 [n] and `side` uint8 [m], both contiguous, on the CPU."""

    values: Tensor
    side: Tensor
    memory: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class ReducedSize:
    """How much a transform leaves of a tensor of some shape: the most, and always just that if `is_exact`."""

    values: int
    side_bytes: int
    is_exact: bool


@runtime_checkable
class Transform(Protocol):
    """Fewer numbers: top-k, low rank."""

    def survey(self, tensors: Iterable[Tensor]) -> float | None:
        """What must be known of all tensors before the first is encoded; None where every tensor stands alone."""

    def encode(self, tensor: Tensor, context: Context) -> Reduced:
        """Reduce a contiguous, finite float32 CPU tensor of any shape, empty and 0-d included; does not change it."""

    def size(self, shape: Shape) -> ReducedSize:
        """How much is left of a tensor of that shape."""

    def value_count(self, side: Tensor, shape: Shape) -> int:
        """How many values go with this side information (uint8 [m]). Raises WireError if it is malformed."""

    def decode(self, values: Tensor, side: Tensor, shape: Shape) -> Tensor:
        """The float32 tensor of that shape. Raises WireError if values and side do not fit it, or each other."""


@runtime_checkable
class Quantiser(Protocol):
    """Fewer bits a number: casts, blockwise integers, signs."""

    item_bytes: int  # bytes of one item of the encoding, for a byte shuffle: 2 for bfloat16, 1 for packed integers

    def encode(self, values: Tensor, seed: int) -> Tensor:
        """uint8 [encoded_bytes(n)] of contiguous, finite float32 [n]; does not change them."""

    def encoded_bytes(self, count: int) -> int:
        """Bytes of so many values; exact."""

    def decode(self, data: Tensor, count: int) -> Tensor:
        """float32 [count] of uint8 [encoded_bytes(count)]. Raises WireError if there are more or fewer bytes."""


@runtime_checkable
class Lossless(Protocol):
    """Fewer bytes, every bit kept."""

    def encode(self, data: Tensor, item_bytes: int) -> Tensor:
        """uint8 [at most max_bytes(n)] of uint8 [n], which consists of items of `item_bytes` (and maybe a rest)."""

    def max_bytes(self, size: int) -> int:
        """The most that `size` bytes can become."""

    def decode(self, data: Tensor, most: int, item_bytes: int) -> Tensor:
        """The original bytes. Raises WireError if they would be more than `most`, before anything is allocated."""


Stage = Transform | Quantiser | Lossless
