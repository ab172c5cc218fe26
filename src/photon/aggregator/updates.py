"""Reading an update: from what travelled to pseudo-gradients, one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from photon.config import LinkConfig
from photon.errors import ReplyRefusedError, WireError
from photon.link.body import Body
from photon.link.codec.notation import parse_pipeline
from photon.link.codec.pipeline import Pipeline
from photon.link.difference import count_stages
from photon.link.tensors import TensorSpec, iterate_tensors, read_specs
from photon.link.update import Message, expect_reply

# A header of safetensors holds for each tensor its name, at most six characters of JSON for a byte of it, and numbers.
_HEADER_BYTES, _HEADER_BYTES_PER_TENSOR, _HEADER_BYTES_PER_DIMENSION = 4096, 256, 24


@dataclass(frozen=True)
class UpdateReader:
    """Decodes updates as the recipe has them written; `of_weights`: they carry local weights, not differences."""

    codec: Pipeline
    of_weights: bool

    @classmethod
    def of(cls, link: LinkConfig) -> UpdateReader:
        """As the recipe says. Raises ConfigError for a codec that there is not."""
        return cls(parse_pipeline(link.up, "link.up", link.exact_tensors), link.of == "weights")

    def read(
        self, message: Message, base: Mapping[str, Tensor], stage_bytes: dict[str, int] | None = None
    ) -> Iterator[tuple[str, Tensor]]:
        """Every tensor's pseudo-gradient, in the base's dtype; adds the bytes left after each stage to `stage_bytes`.

        Raises ReplyRefusedError or WireError at the first tensor that is not what `base` encodes to, or if one is
        missing at the end.
        """
        reply = expect_reply(message)
        if reply.codec != self.codec.name:
            raise ReplyRefusedError(
                f"its update is written with codec {reply.codec[:64]!r}, the recipe says {self.codec.name!r}"
            )
        seen: set[str] = set()
        for name, wire in iterate_tensors(message.body, header_bytes_of(base), lambda spec: self._check(spec, base)):
            seen.add(name)
            like, own = base[name], self.codec.of(name)
            try:
                decoded = own.decode(wire, tuple(like.shape), self._dtype(like))
            except WireError as error:
                raise ReplyRefusedError(f"tensor {name!r} {error}") from error
            if stage_bytes is not None:
                count_stages(stage_bytes, own, decoded)
            tensor = decoded.tensor.to(like.dtype)
            yield name, torch.sub(like, tensor) if self.of_weights else tensor
        if missing := sorted(set(base) - seen):
            raise ReplyRefusedError(f"lacks {len(missing)} tensors, first {missing[0]!r}")

    def _dtype(self, like: Tensor) -> torch.dtype:
        """What an update of `like` is written in: its own dtype, or float32 in front of lossy stages."""
        return like.dtype if self.codec.is_lossless else torch.float32

    def _check(self, spec: TensorSpec, base: Mapping[str, Tensor]) -> None:
        """Before a byte of a tensor is read: is it one of ours, and no longer than it can be?"""
        like = base.get(spec.name)
        if like is None:
            raise ReplyRefusedError(f"unknown tensor {spec.name!r}")
        most = self.codec.of(spec.name).most_bytes(tuple(like.shape), self._dtype(like))
        if spec.end - spec.begin > most:
            raise ReplyRefusedError(
                f"tensor {spec.name!r} takes {spec.end - spec.begin} bytes; {self.codec.name} makes {most} at most"
            )


def largest_update(link: LinkConfig, base: Body) -> int:
    """The most bytes that the body of an update of these tensors can take. Some codecs make it longer than they are."""
    codec, specs = UpdateReader.of(link).codec, read_specs(base)[1]
    dtypes = {spec.name: spec.dtype if codec.is_lossless else torch.float32 for spec in specs}
    return codec.body_size({spec.name: spec.shape for spec in specs}, dtypes).body_bytes


def header_bytes_of(base: Mapping[str, Tensor]) -> int:
    """The longest header that an update of these tensors can have."""
    return _HEADER_BYTES + sum(
        6 * len(name.encode()) + _HEADER_BYTES_PER_TENSOR + _HEADER_BYTES_PER_DIMENSION * tensor.dim()
        for name, tensor in base.items()
    )
