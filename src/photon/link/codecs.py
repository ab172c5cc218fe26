"""Codecs: what an update becomes on the wire.

A codec is a pair of pure functions over one named tensor. `decode` trusts nothing: the tensor it is given came over
the network, so dtype and shape are checked against what the base says they must be.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from photon.errors import ReplyRefusedError


@dataclass(frozen=True)
class Codec:
    """How one tensor of an update is written; `wire_dtype` maps the dtype it has to the dtype that travels."""

    name: str
    wire_dtype: Callable[[torch.dtype], torch.dtype]

    def encode(self, tensor: Tensor) -> Tensor:
        """The tensor as it travels; same shape."""
        return tensor.to(self.wire_dtype(tensor.dtype))

    def decode(self, name: str, tensor: Tensor, like: Tensor) -> Tensor:
        """The received tensor as `like`'s dtype. Raises ReplyRefusedError if it is not what `like` encodes to."""
        if tensor.shape != like.shape:
            raise ReplyRefusedError(f"tensor {name!r} has shape {tuple(tensor.shape)}, expected {tuple(like.shape)}")
        if tensor.dtype != self.wire_dtype(like.dtype):
            raise ReplyRefusedError(
                f"tensor {name!r} is {tensor.dtype}, codec {self.name} sends {self.wire_dtype(like.dtype)}"
            )
        return tensor.to(like.dtype)


CODECS: dict[str, Codec] = {
    codec.name: codec
    for codec in (
        Codec("exact", lambda dtype: dtype),
        Codec("bfloat16", lambda dtype: torch.bfloat16),
    )
}
