"""Named tensors as safetensors bytes, read one tensor at a time.

The format is the safetensors library's, byte for byte; the code is ours for one reason, memory. The library copies
every tensor to write it and decodes a whole buffer at once, where a model-sized copy is what one can least afford, and
law 4 wants each tensor folded and freed. The reader trusts nothing: names, dtypes, shapes and offsets are checked
against the buffer before a byte is looked at.
"""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor

from photon.errors import WireError
from photon.link.body import Body, pieces, read_body

MAX_HEADER_BYTES = 32 * 2**20
MAX_TENSORS = 1_000_000
_HEADER_LENGTH_BYTES = 8
_END = 2**62  # of sizes, offsets and strides: torch counts in 64 bits, with a sign
# In the library's order of writing: a later dtype comes first.
_DTYPES: dict[str, torch.dtype] = {
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_RANKS = {dtype: rank for rank, dtype in enumerate(_DTYPES.values())}


@dataclass(frozen=True)
class TensorSpec:
    """What a sender says a tensor is; `begin` and `end` are byte offsets behind the header."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def encode_tensors(tensors: Mapping[str, Tensor]) -> bytes:
    """Safetensors bytes of tensors. The same names and values always give the same bytes."""
    return b"".join(tensor_chunks(tensors))


def tensor_chunks(tensors: Mapping[str, Tensor]) -> Iterator[bytes | memoryview]:
    """The same bytes in pieces, the tensors' own memory among them: nothing is copied, nothing may change meanwhile."""
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    dtypes = {name: tensor.dtype for name, tensor in tensors.items()}
    yield tensors_header(shapes, dtypes)
    for name in writing_order(dtypes):
        yield from _memory(tensors[name])


def streamed_chunks(like: Mapping[str, Tensor], tensors: Iterable[tuple[str, Tensor]]) -> Iterator[bytes | memoryview]:
    """The same bytes of tensors that come one at a time, in writing order, with the names, shapes and dtypes of `like`.

    A tensor is let go before the next one is asked for. Raises WireError at the first that is not the expected one.
    """
    yield tensors_header({n: tuple(t.shape) for n, t in like.items()}, {n: t.dtype for n, t in like.items()})
    expected = iter(writing_order({name: tensor.dtype for name, tensor in like.items()}))
    for name, tensor in tensors:
        if name != next(expected, None) or tensor.shape != like[name].shape or tensor.dtype != like[name].dtype:
            raise WireError(f"tensor {name!r} is not the one that the model has in this place")
        yield from _memory(tensor)
        del tensor
    if (missing := next(expected, None)) is not None:
        raise WireError(f"tensor {missing!r} is missing")


def _memory(tensor: Tensor) -> Iterator[memoryview]:
    """The tensor's bytes as they lie, if it has any."""
    flat = tensor.detach().cpu().contiguous().view(-1)
    if flat.numel():
        yield flat.view(torch.uint8).numpy().data


def writing_order(dtypes: Mapping[str, torch.dtype]) -> list[str]:
    """The library's order: widest dtype first, so that every tensor is aligned; then by name."""
    return sorted(dtypes, key=lambda name: (-_RANKS[dtypes[name]], name))


def tensors_header(shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, torch.dtype]) -> bytes:
    """What stands before the data of tensors of these shapes and dtypes, its own length included."""
    header: dict[str, object] = {}
    end = 0
    for name in writing_order(dtypes):
        begin, end = end, end + prod(shapes[name]) * dtypes[name].itemsize
        header[name] = {"dtype": _NAMES[dtypes[name]], "shape": list(shapes[name]), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _HEADER_LENGTH_BYTES)
    return len(text).to_bytes(_HEADER_LENGTH_BYTES, "little") + text


def read_specs(data: Body, max_header_bytes: int = MAX_HEADER_BYTES) -> tuple[int, list[TensorSpec]]:
    """Header of a safetensors buffer: (where the data begins, specs in the order of their bytes).

    Raises WireError unless the tensors tile the rest of the buffer exactly, without gap or overlap. A hostile header
    takes up to 30 times its bytes of memory when it is parsed: who knows how long it can be says so.
    """
    if len(data) < _HEADER_LENGTH_BYTES:
        raise WireError(f"tensor payload of {len(data)} bytes is too short for a safetensors header")
    header_bytes = int.from_bytes(read_body(data, 0, _HEADER_LENGTH_BYTES), "little")
    start = _HEADER_LENGTH_BYTES + header_bytes
    if header_bytes > max_header_bytes or start > len(data):
        raise WireError(
            f"safetensors header declares {header_bytes} bytes; the payload has {len(data)}, "
            f"and a header {max_header_bytes} at most"
        )
    try:
        header = json.loads(bytes(read_body(data, _HEADER_LENGTH_BYTES, start)), object_pairs_hook=_no_twins)
    except (ValueError, RecursionError) as error:
        raise WireError(f"safetensors header is not JSON: {error}") from error
    if not isinstance(header, dict) or len(header) > MAX_TENSORS:
        raise WireError("safetensors header is not an object of named tensors")
    specs = sorted(
        (_spec(name, entry) for name, entry in header.items() if name != "__metadata__"),
        key=lambda spec: (spec.begin, spec.end),
    )
    position = 0
    for spec in specs:
        if spec.begin != position:
            raise WireError(f"tensor {spec.name!r} begins at byte {spec.begin}, expected {position}")
        position = spec.end
    if start + position != len(data):
        raise WireError(f"tensors cover {position} bytes, the payload holds {len(data) - start}")
    return start, specs


def iterate_tensors(
    data: Body,
    max_header_bytes: int = MAX_HEADER_BYTES,
    check: Callable[[TensorSpec], None] = lambda spec: None,
) -> Iterator[tuple[str, Tensor]]:
    """Yield (name, CPU tensor) in the order of the bytes; a tensor is a read-only view where alignment allows.

    Of a body in a file one tensor is in memory at a time. Callers must not write into the tensors. Raises WireError on
    a malformed buffer, before the first yield. `check` is shown every tensor's spec before its bytes are read.
    """
    start, specs = read_specs(data, max_header_bytes)
    for spec in specs:
        check(spec)
        yield spec.name, _view(read_body(data, start + spec.begin, start + spec.end), spec)


def decode_tensors(data: Body) -> dict[str, Tensor]:
    """All tensors of a buffer as a dict; see `iterate_tensors`."""
    return dict(iterate_tensors(data))


def sha256_hex(data: Body) -> str:
    """The identity of a payload: sha256 of its bytes, in hexadecimal."""
    return sha256_of_chunks(pieces(data))


def sha256_of_chunks(chunks: Iterable[bytes | memoryview]) -> str:
    """The same of a payload that comes in pieces, of which one is held at a time."""
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


def _no_twins(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    out = dict(pairs)
    if len(out) != len(pairs):
        raise ValueError("a name occurs twice")
    return out


def _spec(name: str, entry: object) -> TensorSpec:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise WireError(f"tensor {name!r}: expected dtype, shape and data_offsets")
    dtype = _DTYPES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
    if dtype is None:
        raise WireError(f"tensor {name!r}: dtype {entry['dtype']!r} is not one of {', '.join(_DTYPES)}")
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise WireError(f"tensor {name!r}: shape and data_offsets must be natural numbers")
    # A size of 0 hides what the others come to, and torch multiplies them all the same: strides are their products.
    if prod(max(1, size) for size in shape) * dtype.itemsize >= _END:
        raise WireError(f"tensor {name!r}: shape {shape} is more than can be addressed")
    begin, end = offsets
    if prod(shape) * dtype.itemsize != end - begin:
        raise WireError(f"tensor {name!r}: shape {shape} of {entry['dtype']} does not fill {end - begin} bytes")
    return TensorSpec(name, dtype, tuple(shape), begin, end)


def _naturals(values: object) -> bool:
    return isinstance(values, list) and len(values) <= 64 and all(type(v) is int and 0 <= v < _END for v in values)


def _view(data: memoryview, spec: TensorSpec) -> Tensor:
    if spec.begin == spec.end:
        return torch.empty(spec.shape, dtype=spec.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "buffer is not writable": our callers only read
        raw = torch.frombuffer(data, dtype=torch.uint8)
    if raw.data_ptr() % spec.dtype.itemsize:
        raw = raw.clone()  # a hostile or foreign sender's padding: an unaligned view would be undefined behaviour
    return raw.view(spec.dtype).view(spec.shape)
