"""A chain of stages as one codec of named tensors: `photon.link.codec.base` says what the stages are.

On the wire a tensor is one uint8 tensor: for each transform the length of its side information (8 bytes, little endian)
and that information, then the values. A lossless stage packs each of these streams on its own. Without any stage a
tensor travels as it is, in its own dtype and shape.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod

import torch
from torch import Tensor

from photon.errors import WireError
from photon.link.codec.base import Context, Lossless, Quantiser, Shape, Stage, Transform
from photon.link.tensors import tensors_header

_LENGTH_BYTES = 8
_FLOAT32_BYTES = 4


@dataclass(frozen=True)
class Encoded:
    """A tensor as it travels, and what each stage keeps of it for the next time (`memory`, by `stage/key`)."""

    wire: Tensor
    memory: dict[str, Tensor]


@dataclass(frozen=True)
class Decoded:
    """A received tensor, and the bytes that were left of it after each stage."""

    tensor: Tensor
    stage_bytes: tuple[int, ...]


@dataclass(frozen=True)
class Size:
    """Bytes after each stage, the last being those that travel; the most they can be, or just that if `is_exact`."""

    stage_bytes: tuple[int, ...]
    is_exact: bool


@dataclass(frozen=True)
class BodySize:
    """Bytes of a message's body: all of it, and the tensors' own after each stage, by the stage as it is written."""

    body_bytes: int
    stage_bytes: dict[str, int]
    is_exact: bool


@dataclass(frozen=True)
class Pipeline:
    """Transforms, then at most one quantiser, then at most one lossless stage; `labels` are the stages as written.

    Tensors whose names match one of the patterns `exact_tensors` are left to the lossless stage alone: ask `of`.
    """

    labels: tuple[str, ...] = ()
    transforms: tuple[Transform, ...] = ()
    quantiser: Quantiser | None = None
    lossless: Lossless | None = None
    exact_tensors: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """What a message calls this codec: both ends must have the same."""
        return " | ".join(self.labels) or "exact"

    @property
    def is_lossless(self) -> bool:
        """Whether what is decoded is what was encoded, to the last bit."""
        return not self.transforms and self.quantiser is None

    def of(self, name: str) -> Pipeline:
        """The stages that are for the tensor of that name."""
        if not any(fnmatchcase(name, pattern) for pattern in self.exact_tensors):
            return self
        return EXACT if self.lossless is None else Pipeline(self.labels[-1:], lossless=self.lossless)

    def survey(self, tensors: Callable[[], Iterable[tuple[str, Tensor]]]) -> float | None:
        """What the first transform must know of all tensors together, by name; behind another one no stage may ask."""
        if not self.transforms:
            return None
        return self.transforms[0].survey(tensor for name, tensor in tensors() if self.of(name) is self)

    def encode(self, tensor: Tensor, seed: int, survey: float | None, memory: Mapping[str, Tensor]) -> Encoded:
        """The tensor as it travels. Raises WireError if it is not finite and a stage would lose that."""
        if not self.labels:
            return Encoded(tensor, {})
        if self.is_lossless:
            return Encoded(self._pack(_bytes_of(tensor), tensor.element_size()), {})
        values = tensor.detach().to(device="cpu", dtype=torch.float32).contiguous()
        if values.numel() and not all(bool(end.isfinite()) for end in torch.aminmax(values)):
            raise WireError("the tensor holds NaN or infinity: a lossy codec has no place for them")
        sides: list[Tensor] = []
        kept: dict[str, Tensor] = {}
        for index, transform in enumerate(self.transforms):
            own = {key.removeprefix(f"{index}/"): value for key, value in memory.items() if key.startswith(f"{index}/")}
            reduced = transform.encode(values, Context(seed, survey if index == 0 else None, own))
            values = reduced.values
            sides.append(self._pack(reduced.side, 1))
            kept |= {f"{index}/{key}": value for key, value in reduced.memory.items()}
        coded = _bytes_of(values) if self.quantiser is None else self.quantiser.encode(values.view(-1), seed)
        return Encoded(_join(sides, self._pack(coded, self._item_bytes)), kept)

    def decode(self, wire: Tensor, shape: Shape, dtype: torch.dtype) -> Decoded:
        """A tensor of that shape and dtype from what was received. Raises WireError if it cannot be one."""
        if not self.labels:
            if wire.shape != shape or wire.dtype != dtype:
                raise WireError(f"is {wire.dtype} {tuple(wire.shape)}, expected {dtype} {shape}")
            return Decoded(wire, ())
        if wire.dtype != torch.uint8 or wire.dim() != 1:
            raise WireError(f"is {wire.dtype} {tuple(wire.shape)}, codec {self.name} sends bytes in one dimension")
        if self.is_lossless:
            size = prod(shape) * dtype.itemsize
            data = self._unpack(wire, size, dtype.itemsize)
            _expect(data.numel(), size, "bytes of values")
            return Decoded(_from_bytes(data, dtype).view(shape), (wire.numel(),))
        return self._decode_lossy(wire, shape, dtype)

    def _decode_lossy(self, wire: Tensor, shape: Shape, dtype: torch.dtype) -> Decoded:
        packed_sides, packed_values = _split(wire, len(self.transforms))
        shapes, sides, stage_bytes = [shape], [], []
        side_bytes = 0
        for transform, packed in zip(self.transforms, packed_sides, strict=True):
            most = transform.size(shapes[-1])
            side = self._unpack(packed, most.side_bytes, 1)
            count = transform.value_count(side, shapes[-1])
            if side.numel() > most.side_bytes or not 0 <= count <= most.values:
                raise WireError(f"declares {count} values with {side.numel()} bytes beside them: more than can be")
            shapes.append((count,))
            sides.append(side)
            side_bytes += _LENGTH_BYTES + side.numel()
            stage_bytes.append(side_bytes + _FLOAT32_BYTES * count)
        count = prod(shapes[-1])
        size = _FLOAT32_BYTES * count if self.quantiser is None else self.quantiser.encoded_bytes(count)
        data = self._unpack(packed_values, size, self._item_bytes)
        _expect(data.numel(), size, "bytes of values")
        if self.quantiser is None:
            values = _from_bytes(data, torch.float32)
        else:
            values = self.quantiser.decode(data, count)
            stage_bytes.append(side_bytes + size)
        if self.lossless is not None:
            stage_bytes.append(wire.numel())
        for transform, side, before in zip(
            reversed(self.transforms), reversed(sides), reversed(shapes[:-1]), strict=True
        ):
            values = transform.decode(values.view(-1), side, before)
        return Decoded(values.view(shape).to(dtype), tuple(stage_bytes))

    def size(self, shape: Shape, dtype: torch.dtype) -> Size:
        """What becomes of a tensor of that shape."""
        if self.is_lossless:
            raw = prod(shape) * dtype.itemsize
            return Size((), True) if self.lossless is None else Size((self.lossless.max_bytes(raw),), False)
        stages: list[int] = []
        is_exact, sides, packed_sides = True, 0, 0
        for transform in self.transforms:
            left = transform.size(shape)
            is_exact &= left.is_exact
            sides += _LENGTH_BYTES + left.side_bytes
            packed_sides += _LENGTH_BYTES + self._max_bytes(left.side_bytes)
            stages.append(sides + _FLOAT32_BYTES * left.values)
            shape = (left.values,)
        values = _FLOAT32_BYTES * prod(shape)
        if self.quantiser is not None:
            values = self.quantiser.encoded_bytes(prod(shape))
            stages.append(sides + values)
        if self.lossless is not None:
            stages.append(packed_sides + self._max_bytes(values))
        return Size(tuple(stages), is_exact and self.lossless is None)

    def most_bytes(self, shape: Shape, dtype: torch.dtype) -> int:
        """The most that a tensor of that shape takes on the wire."""
        stages = self.size(shape, dtype).stage_bytes
        return stages[-1] if stages else prod(shape) * dtype.itemsize

    def body_size(self, shapes: Mapping[str, Shape], dtypes: Mapping[str, torch.dtype]) -> BodySize:
        """What a message's body with all these tensors comes to, safetensors header included."""
        if not self.labels:
            data = sum(prod(shape) * dtypes[name].itemsize for name, shape in shapes.items())
            return BodySize(len(tensors_header(shapes, dtypes)) + data, {}, True)
        wire_shapes, wire_dtypes = dict[str, Shape](), dict[str, torch.dtype]()
        stages, is_exact = dict.fromkeys(self.labels, 0), True
        for name, shape in shapes.items():
            own, dtype = self.of(name), dtypes[name]
            size = own.size(shape, dtype)
            wire_shapes[name] = (own.most_bytes(shape, dtype),) if own.labels else shape
            wire_dtypes[name] = torch.uint8 if own.labels else dtype
            is_exact &= size.is_exact
            for label, left in zip(own.labels, size.stage_bytes, strict=True):
                stages[label] += left
        data = sum(prod(shape) * wire_dtypes[name].itemsize for name, shape in wire_shapes.items())
        return BodySize(len(tensors_header(wire_shapes, wire_dtypes)) + data, stages, is_exact)

    @property
    def _item_bytes(self) -> int:
        return _FLOAT32_BYTES if self.quantiser is None else self.quantiser.item_bytes

    def _pack(self, data: Tensor, item_bytes: int) -> Tensor:
        return data if self.lossless is None else self.lossless.encode(data, item_bytes)

    def _unpack(self, data: Tensor, most: int, item_bytes: int) -> Tensor:
        if self.lossless is None:
            return data
        if data.numel() > self.lossless.max_bytes(most):
            raise WireError(f"a stream of {data.numel()} bytes cannot stand for {most} bytes at most")
        return self.lossless.decode(data, most, item_bytes)

    def _max_bytes(self, size: int) -> int:
        return size if self.lossless is None else self.lossless.max_bytes(size)


def pipeline(stages: Iterable[tuple[str, Stage]], exact_tensors: Iterable[str] = ()) -> Pipeline:
    """The chain of (label, stage). Raises ValueError where the order of kinds is not that of `Pipeline`.

    Or where two stages are written alike: their bytes are counted by what they are called.
    """
    labels: list[str] = []
    transforms: list[Transform] = []
    quantiser: Quantiser | None = None
    lossless: Lossless | None = None
    for label, stage in stages:
        if lossless is not None:
            raise ValueError(f"{label} stands behind {labels[-1]}: a lossless stage comes last")
        if label in labels:
            raise ValueError(f"{label} is written twice: one stage can choose what both together leave")
        if isinstance(stage, Transform):
            if quantiser is not None:
                raise ValueError(
                    f"{label} stands behind {labels[-1]}: what chooses numbers comes before what rounds them"
                )
            if transforms and stage.survey([]) is not None:
                raise ValueError(f"{label} stands behind {labels[-1]}: what looks at all tensors together comes first")
            transforms.append(stage)
        elif isinstance(stage, Quantiser):
            if quantiser is not None:
                raise ValueError(f"{label} stands behind {labels[-1]}: numbers are rounded once")
            quantiser = stage
        else:
            lossless = stage
        labels.append(label)
    return Pipeline(tuple(labels), tuple(transforms), quantiser, lossless, tuple(exact_tensors))


EXACT = Pipeline()


def _bytes_of(tensor: Tensor) -> Tensor:
    flat = tensor.detach().cpu().contiguous().view(-1)
    return flat.view(torch.uint8) if flat.numel() else torch.empty(0, dtype=torch.uint8)


def _from_bytes(data: Tensor, dtype: torch.dtype) -> Tensor:
    if data.data_ptr() % dtype.itemsize or data.storage_offset() % dtype.itemsize:
        data = data.clone()  # a stretch of a received buffer: an unaligned view would be undefined behaviour
    return data.contiguous().view(dtype) if data.numel() else torch.empty(0, dtype=dtype)


def _join(sides: list[Tensor], values: Tensor) -> Tensor:
    if not sides:
        return values
    parts = [part for side in sides for part in (_length(side.numel()), side)]
    return torch.cat([*parts, values])


def _length(size: int) -> Tensor:
    return torch.tensor(list(size.to_bytes(_LENGTH_BYTES, "little")), dtype=torch.uint8)


def _split(wire: Tensor, sides: int) -> tuple[list[Tensor], Tensor]:
    """Views of the streams of side information and of the values."""
    found = []
    for _ in range(sides):
        if wire.numel() < _LENGTH_BYTES:
            raise WireError("ends within the length of a stream")
        size = int.from_bytes(bytes(wire[:_LENGTH_BYTES].tolist()), "little")
        wire = wire[_LENGTH_BYTES:]
        if size > wire.numel():
            raise WireError(f"declares a stream of {size} bytes, {wire.numel()} are left")
        found.append(wire[:size])
        wire = wire[size:]
    return found, wire


def _expect(found: int, expected: int, what: str) -> None:
    if found != expected:
        raise WireError(f"holds {found} {what}, expected {expected}")
