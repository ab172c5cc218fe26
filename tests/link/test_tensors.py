"""The reader of tensors against the safetensors library, and against everything a sender could do to it."""

import json
import re
import tracemalloc
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load, save
from torch import Tensor

from photon.errors import WireError
from photon.link.body import FileBody, whole_file
from photon.link.tensors import decode_tensors, encode_tensors, iterate_tensors, read_specs

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int8, torch.uint8]


@st.composite
def named_tensors(draw: st.DrawFn) -> dict[str, Tensor]:
    names = draw(
        st.lists(st.text(min_size=1, max_size=12).filter(lambda n: n != "__metadata__"), unique=True, max_size=5)
    )
    out = {}
    for index, name in enumerate(names):
        shape = draw(st.lists(st.integers(0, 5), max_size=3))
        dtype = draw(st.sampled_from(DTYPES))
        generator = torch.Generator().manual_seed(index)
        out[name] = (torch.randn(shape, generator=generator) * 50).to(dtype)
    return out


@given(named_tensors())
def test_round_trip_equals_the_library(tensors: dict[str, Tensor]) -> None:
    data = encode_tensors(tensors)
    ours, theirs = decode_tensors(data), load(data)
    assert ours.keys() == theirs.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert ours[name].dtype == tensor.dtype
        assert ours[name].shape == tensor.shape
        assert torch.equal(ours[name], theirs[name])
        assert torch.equal(ours[name], tensor)


@given(named_tensors())
def test_the_bytes_are_the_librarys(tensors: dict[str, Tensor]) -> None:
    assert encode_tensors(tensors) == save(tensors)


def test_bytes_depend_on_nothing_but_names_and_values() -> None:
    a, b = torch.randn(3, 4), torch.randn(5)
    assert encode_tensors({"a": a, "b": b}) == encode_tensors({"b": b.clone(), "a": a.t().contiguous().t()})


@given(st.integers(0, 63))
def test_an_unaligned_buffer_is_read_right(offset: int) -> None:
    tensors = {"w": torch.arange(7, dtype=torch.float64), "v": torch.arange(3, dtype=torch.float32)}
    data = bytes(offset) + encode_tensors(tensors)
    decoded = decode_tensors(memoryview(data)[offset:])
    assert all(torch.equal(decoded[name], tensor) for name, tensor in tensors.items())


def test_values_no_arithmetic_preserves_survive() -> None:
    bits = torch.tensor([0x7FC00001, 0x7F800001, 0xFF800000 - 2**32, 0x80000000 - 2**32, 1], dtype=torch.int32)
    decoded = decode_tensors(encode_tensors({"w": bits.view(torch.float32)}))["w"]
    assert torch.equal(decoded.view(torch.int32), bits)


@given(named_tensors(), st.data())
def test_truncated_or_flipped_bytes_are_refused_or_read_within_bounds(
    tensors: dict[str, Tensor], data: st.DataObject
) -> None:
    good = encode_tensors(tensors)
    cut = data.draw(st.integers(0, len(good) - 1))
    with pytest.raises(WireError):
        list(iterate_tensors(good[:cut]))
    flipped = bytearray(good)
    flipped[data.draw(st.integers(0, len(good) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    try:
        decoded = decode_tensors(flipped)
    except WireError:
        return
    assert sum(t.numel() * t.element_size() for t in decoded.values()) <= len(good)


def _with_header(header: object, body: bytes) -> bytes:
    text = json.dumps(header).encode() if not isinstance(header, bytes) else header
    return len(text).to_bytes(8, "little") + text + body


def in_file(path: Path, data: bytes) -> FileBody:
    path.write_bytes(data)
    return whole_file(path)


ATTACKS = {
    "overlap": (
        {
            "a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
            "b": {"dtype": "F32", "shape": [2], "data_offsets": [4, 12]},
        },
        bytes(12),
    ),
    "gap": ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, bytes(8)),
    "trailing bytes": ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, bytes(5)),
    "beyond the end": ({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}, bytes(4)),
    "size and shape differ": ({"a": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}, bytes(8)),
    "negative": ({"a": {"dtype": "F32", "shape": [-2, -1], "data_offsets": [0, 8]}}, bytes(8)),
    "huge shape": ({"a": {"dtype": "F32", "shape": [2**61, 8], "data_offsets": [0, 0]}}, b""),
    "huge strides of nothing": ({"a": {"dtype": "F32", "shape": [2**40, 2**40, 0], "data_offsets": [0, 0]}}, b""),
    "nothing, hugely often": ({"a": {"dtype": "F32", "shape": [0, 2**61, 2**61], "data_offsets": [0, 0]}}, b""),
    "boolean shape": ({"a": {"dtype": "F32", "shape": [True], "data_offsets": [0, 4]}}, bytes(4)),
    "unknown dtype": ({"a": {"dtype": "PICKLE", "shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
    "dtype of another type": ({"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}, bytes(4)),
    "extra field": ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], "x": 1}}, bytes(4)),
    "not an object": ([], b""),
    "same name twice": (
        b'{"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},"a":{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}',
        b"",
    ),
    "not JSON": (b"\xff\xfe", b""),
    "deep nesting": (b'{"a":' * 100_000, b""),
    "deep nesting that ends": (b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}", b""),
    "numbers beyond any buffer": (b'{"a":{"dtype":"U8","shape":[1' + b"0" * 5000 + b'],"data_offsets":[0,1]}}', b"\0"),
    "not a number": (b'{"a":{"dtype":"U8","shape":[NaN],"data_offsets":[0,1]}}', b"\0"),
    "shape of text": ({"a": {"dtype": "U8", "shape": "1", "data_offsets": [0, 1]}}, b"\0"),
    "end before begin": ({"a": {"dtype": "U8", "shape": [0], "data_offsets": [1, 0]}}, b"\0"),
    "a thousand dimensions": ({"a": {"dtype": "U8", "shape": [1] * 1000, "data_offsets": [0, 1]}}, b"\0"),
    "a header of nothing": (b"", b""),
    "two headers": (b"{}{}", b""),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_attacks_are_refused(name: str, tmp_path: Path) -> None:
    """Whether the body is in memory or in the file that it arrived in."""
    data = _with_header(*ATTACKS[name])
    for body in (data, in_file(tmp_path / "body", data)):
        with pytest.raises(WireError):
            list(iterate_tensors(body))


def test_a_header_length_cannot_make_us_allocate(tmp_path: Path) -> None:
    for data in ((2**62).to_bytes(8, "little") + b"{}", b"\xff" * 64, (2**31).to_bytes(8, "little")):
        for body in (memoryview(data), in_file(tmp_path / "body", data)):
            with pytest.raises(WireError, match="declares"):
                read_specs(body)


def test_a_header_longer_than_it_can_be_is_not_even_parsed(tmp_path: Path) -> None:
    """Lists take 24 times their bytes when parsed; the reader of an update knows how long its header can be."""
    data = _with_header(b'{"a":[' + b"[]," * 200_000 + b"[]]}", b"")
    tracemalloc.start()
    try:
        with pytest.raises(WireError, match="a header 10000 at most"):
            list(iterate_tensors(in_file(tmp_path / "body", data), 10_000))
        assert tracemalloc.get_traced_memory()[1] < 200_000
    finally:
        tracemalloc.stop()


@given(named_tensors(), st.data())
def test_a_body_in_a_file_is_read_or_refused_like_one_in_memory(
    tmp_path_factory: pytest.TempPathFactory, tensors: dict[str, Tensor], data: st.DataObject
) -> None:
    """Any byte changed, any number of bytes cut off or added, and the file may hold other things before and behind."""
    hostile = bytearray(encode_tensors(tensors))
    for _ in range(data.draw(st.integers(0, 3))):
        hostile[data.draw(st.integers(0, len(hostile) - 1))] = data.draw(st.integers(0, 255))
    hostile = hostile[: data.draw(st.integers(0, len(hostile)))] + data.draw(st.binary(max_size=8))
    offset = data.draw(st.integers(0, 20))
    path = tmp_path_factory.getbasetemp() / "hostile"
    path.write_bytes(bytes(offset) + hostile + bytes(5))
    body = FileBody(path, offset, len(hostile))
    try:
        expected = decode_tensors(bytes(hostile))
    except WireError as error:
        with pytest.raises(WireError, match=re.escape(str(error))):
            decode_tensors(body)
        return
    found = decode_tensors(body)
    assert encode_tensors(found) == encode_tensors(expected)
