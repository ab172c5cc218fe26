"""A model told as what it differs by from one that the receiver already holds: in some tensors, or in all.

With a lossy codec a message holds differences, without one the new tensors themselves; what it lacks has not changed.
Sender and receiver compute the new model with the same function from the same bytes, so both hold identical bits
however much the codec lost; what was lost stays in the next difference, because that is taken to what the receivers
hold. (`photon.aggregator.downlink` sends, `photon.node.base` receives.)
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from photon.errors import WireError
from photon.link.body import Body
from photon.link.codec.pipeline import Decoded, Pipeline
from photon.link.tensors import iterate_tensors, writing_order


def changed(
    base: Body, wire: Mapping[str, Tensor], codec: Pipeline, stage_bytes: dict[str, int]
) -> Iterator[tuple[str, Tensor]]:
    """Tensors of `base` with the decoded difference, one at a time, in the order of its bytes and in its dtypes.

    What was left after each stage of the codec is added to `stage_bytes`. Raises WireError if the difference has a name
    that the base has not, or a tensor of it cannot be decoded.
    """
    seen = 0
    for name, old in iterate_tensors(base):
        if name not in wire:
            yield name, old
            continue
        seen += 1
        own = codec.of(name)
        decoded = own.decode(wire[name], tuple(old.shape), old.dtype if codec.is_lossless else torch.float32)
        count_stages(stage_bytes, own, decoded)
        if codec.is_lossless:
            yield name, decoded.tensor
        else:
            yield name, (old.to(torch.promote_types(old.dtype, torch.float32)) + decoded.tensor).to(old.dtype)
    if seen != len(wire):
        raise WireError(f"the difference has {len(wire) - seen} tensors that the base has not")


def rebuilt(
    like: Mapping[str, Tensor], wire: Mapping[str, Tensor], codec: Pipeline, stage_bytes: dict[str, int]
) -> Iterator[tuple[str, Tensor]]:
    """The tensors themselves as decoded, one at a time, with the names, shapes and dtypes of `like`, in writing order.

    `stage_bytes` as in `changed`. Raises WireError if there are other names, or a tensor cannot be decoded.
    """
    if wire.keys() != like.keys():
        strange = sorted(wire.keys() ^ like.keys())
        raise WireError(f"the message and the model differ in {len(strange)} tensors, first {strange[0]!r}")
    for name in writing_order({name: tensor.dtype for name, tensor in like.items()}):
        own = codec.of(name)
        decoded = own.decode(wire[name], tuple(like[name].shape), like[name].dtype)
        count_stages(stage_bytes, own, decoded)
        yield name, decoded.tensor


def count_stages(stage_bytes: dict[str, int], codec: Pipeline, decoded: Decoded) -> None:
    """Add to `stage_bytes`, by stage, what each left of one tensor."""
    for label, left in zip(codec.labels, decoded.stage_bytes, strict=False):
        stage_bytes[label] = stage_bytes.get(label, 0) + left
