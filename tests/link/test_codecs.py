"""What a codec writes is read back; what it would not have written is refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from photon.errors import ReplyRefusedError
from photon.link.codecs import CODECS

LIKE = torch.zeros(2, 3)
values = st.lists(st.floats(-1024, 1024, width=32), min_size=1, max_size=20)


@given(values)
def test_exact_is_exact(values: list[float]) -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        tensor = torch.tensor(values, dtype=dtype)
        wire = CODECS["exact"].encode(tensor)
        assert wire.dtype == dtype
        assert torch.equal(CODECS["exact"].decode("w", wire, tensor), tensor)


@given(values)
def test_bfloat16_rounds_to_the_nearest_and_only_once(values: list[float]) -> None:
    """Within half a unit of its eight significant bits; encoding again changes nothing."""
    tensor = torch.tensor(values)
    codec = CODECS["bfloat16"]
    wire = codec.encode(tensor)
    decoded = codec.decode("w", wire, tensor)
    assert (wire.dtype, decoded.dtype) == (torch.bfloat16, torch.float32)
    normal = tensor.abs() >= 2.0**-126
    assert torch.all((decoded - tensor).abs()[normal] <= tensor.abs()[normal] * 2.0**-8)
    assert torch.equal(codec.encode(decoded), wire)


def test_bfloat16_does_not_cut_off() -> None:
    """The mutant: dropping the lower half of the bits is biased towards zero, and half as exact."""
    tensor = torch.rand(4096, generator=torch.Generator().manual_seed(0)) + 1.0
    decoded = CODECS["bfloat16"].decode("w", CODECS["bfloat16"].encode(tensor), tensor)
    cut = (tensor.view(torch.int32) & -65536).view(torch.float32)
    assert abs(float((decoded - tensor).mean())) < 1e-4
    assert float((cut - tensor).mean()) < -1e-3


def test_the_dtype_of_the_base_comes_back() -> None:
    for dtype in (torch.float32, torch.float64, torch.bfloat16):
        like = torch.ones(3, dtype=dtype)
        for codec in CODECS.values():
            assert codec.decode("w", codec.encode(like), like).dtype == dtype


@pytest.mark.parametrize("name", CODECS)
def test_another_shape_is_refused_also_where_it_would_broadcast(name: str) -> None:
    codec = CODECS[name]
    for shape in [(3, 2), (6,), (1, 3), (), (2, 3, 1), (2, 0)]:
        wire = codec.encode(torch.zeros(shape))
        with pytest.raises(ReplyRefusedError, match="tensor 'w' has shape"):
            codec.decode("w", wire, LIKE)


@pytest.mark.parametrize("name", CODECS)
def test_another_dtype_is_refused_also_where_it_would_convert(name: str) -> None:
    codec = CODECS[name]
    for dtype in (torch.float64, torch.float16, torch.int8, torch.float32, torch.bfloat16):
        if dtype != codec.wire_dtype(LIKE.dtype):
            with pytest.raises(ReplyRefusedError, match=f"tensor 'w' is {dtype}, codec {name} sends"):
                codec.decode("w", LIKE.to(dtype), LIKE)


def test_codecs_are_known_by_their_own_names() -> None:
    assert all(codec.name == name for name, codec in CODECS.items())
