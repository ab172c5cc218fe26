"""Error feedback: what a lossy codec left out of one message is added to the next.

`input = update + decay * residual`, `residual = input - decoded` (Seide et al. 2014; Karimireddy et al. 2019; a decay
below 1 as in SparseLoCo, arXiv 2508.15706). With decay 1 nothing is ever lost: the sum of all that was decoded and the
last residual is the sum of all updates, to rounding.

The other way to lose nothing is `rescale`, for codecs that leave much out. What is decoded is shorter along the update
than the update, by the energy left out; so each tensor is scaled up beforehand until it is not (the scale of EDEN,
Vargaftik et al. 2022, arXiv 2108.08842, without its rotation). What is wrong across the update differs from node to
node and is averaged by the merge, as the noise in updates itself is, and none of it comes back in later rounds.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import Tensor

from photon.errors import WireError
from photon.link.codec.pipeline import Encoded, Pipeline

_RESIDUAL = "residual/"
_MEMORY = "memory/"
_MOST_TRIES = 8
_PIECE_VALUES = 2**18
_MOST_RESCALED = 4.0  # of a tensor of which next to nothing is sent the rest is not made up for


@dataclass(frozen=True)
class Sent:
    """Tensors as they travel, and the state that goes with them: residuals and what stages remember, by name."""

    wire: dict[str, Tensor]
    state: dict[str, Tensor]


def encode_update(
    codec: Pipeline,
    update: dict[str, Tensor],
    state: Mapping[str, Tensor],
    decay: float,
    seed: str,
    max_norm: float | None = None,
    rescale: bool = False,
) -> Sent:
    """Encode all tensors of an update, the residual of the last time added, the norm of what will be decoded bounded.

    With `rescale`, which goes with a decay of 0, <update, decoded> is |update|^2 for each tensor: to the rounding of
    scales, and unless that took more than four times the update. A codec that surveys all tensors together is refused
    beside it when the recipe is read: longer tensors would change what it keeps of the others.

    `update` is emptied on the way: of each tensor only one copy is left. Of tensors that are not in it the state stays
    as it is. `seed` is any text that differs by run, node and round. Raises WireError if a tensor is not finite and the
    codec is lossy.
    """
    if codec.is_lossless:
        limit_norm(update, max_norm)
        return Sent({name: codec.of(name).encode(update.pop(name), 0, None, {}).wire for name in list(update)}, {})
    others = {key: tensor for key, tensor in state.items() if tensor_of(key) not in update}
    inputs = {}
    for name in list(update):
        inputs[name] = update.pop(name).detach().to(device="cpu", dtype=torch.float32, copy=True).contiguous()
        if decay and (residual := state.get(_RESIDUAL + name)) is not None:
            inputs[name].add_(residual, alpha=decay)
    if rescale:
        _rescale(codec, inputs, state, seed)
    limit_norm(inputs, max_norm)
    sent, norm = _encode(codec, inputs, state, bool(decay), seed)
    tries = 0
    while max_norm is not None and norm > max_norm:
        # Rounding made it longer. A codec commutes with a factor up to the rounding of its scales, so a factor that is
        # a little too small soon suffices.
        if (tries := tries + 1) > _MOST_TRIES:
            raise WireError(f"codec {codec.name} makes an update of norm {max_norm:g} longer each time")
        for tensor in inputs.values():
            tensor.mul_(0.98 * max_norm / norm)
        sent, norm = _encode(codec, inputs, state, bool(decay), seed)
    return Sent(sent.wire, others | sent.state)


def tensor_of(key: str) -> str:
    """The tensor that a piece of state belongs to: its residual, or under `tensor/stage/key` what a stage remembers."""
    return key.removeprefix(_RESIDUAL) if key.startswith(_RESIDUAL) else key.removeprefix(_MEMORY).rsplit("/", 2)[0]


def stage_memory(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """What the stages remember of tensor `name`, as `Pipeline.encode` takes it."""
    prefix = _MEMORY + name + "/"
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}


def named_memory(memory: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
    """The same under the names in which it is kept."""
    return {f"{_MEMORY}{name}/{key}": value for key, value in memory.items()}


def tensor_seed(seed: str, name: str) -> int:
    """A number for the random choices of one tensor in one message."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:8], "little") >> 1


def _encode(
    codec: Pipeline, inputs: Mapping[str, Tensor], state: Mapping[str, Tensor], keeps_residual: bool, seed: str
) -> tuple[Sent, float]:
    """All tensors encoded, and the norm of what they decode to."""
    wire: dict[str, Tensor] = {}
    kept: dict[str, Tensor] = {}
    squares = 0.0
    for name, encoded, decoded in _encoded(codec, inputs, state, seed):
        wire[name] = encoded.wire
        kept |= named_memory(encoded.memory, name)
        squares += float(torch.linalg.vector_norm(decoded, dtype=torch.float64)) ** 2
        if keeps_residual and not codec.of(name).is_lossless:
            kept[_RESIDUAL + name] = inputs[name] - decoded
    return Sent(wire, kept), math.sqrt(squares)


def _rescale(codec: Pipeline, inputs: Mapping[str, Tensor], state: Mapping[str, Tensor], seed: str) -> None:
    """Scale each tensor that loses something, in place, by |tensor|^2 / <tensor, decoded>, but never down."""
    lossy = {name: tensor for name, tensor in inputs.items() if not codec.of(name).is_lossless}
    for name, _, decoded in _encoded(codec, lossy, state, seed):
        along = _dot(lossy[name], decoded)
        if along > 0:
            lossy[name].mul_(min(max(1.0, _dot(lossy[name], lossy[name]) / along), _MOST_RESCALED))


def _dot(one: Tensor, other: Tensor) -> float:
    """In float64, piece by piece: neither large values overflow nor is a tensor copied whole."""
    one, other = one.view(-1), other.reshape(-1)
    pieces = (slice(begin, begin + _PIECE_VALUES) for begin in range(0, one.numel(), _PIECE_VALUES))
    return math.fsum(float(torch.dot(one[piece].double(), other[piece].double())) for piece in pieces)


def _encoded(
    codec: Pipeline, inputs: Mapping[str, Tensor], state: Mapping[str, Tensor], seed: str
) -> Iterator[tuple[str, Encoded, Tensor]]:
    """Each tensor's name, encoding, and what that decodes to; side by side on as many threads as torch has (stages let
    go of Python's lock)."""
    survey = codec.survey(lambda: iter(inputs.items()))

    def encode(name: str) -> tuple[Encoded, Tensor]:
        own = codec.of(name)
        encoded = own.encode(inputs[name], tensor_seed(seed, name), survey, stage_memory(state, name))
        return encoded, own.decode(encoded.wire, tuple(inputs[name].shape), torch.float32).tensor

    with ThreadPoolExecutor(torch.get_num_threads()) as threads:
        for name, (encoded, decoded) in zip(inputs, threads.map(encode, inputs), strict=True):
            yield name, encoded, decoded


def limit_norm(tensors: Mapping[str, Tensor], max_norm: float | None) -> None:
    """Scale all tensors, in place, to a norm of at most `max_norm` together."""
    if max_norm is None:
        return
    norm = math.sqrt(sum(float(torch.linalg.vector_norm(t, dtype=torch.float64)) ** 2 for t in tensors.values()))
    if norm > max_norm:
        for tensor in tensors.values():
            tensor.mul_(max_norm / norm)
