"""What holds for every quantiser: sizes, shapes, zeros, hostile bytes."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from photon.errors import WireError
from photon.link.codec.base import Quantiser
from photon.link.codec.blocks import block_count, pack, pieces, rounded_up, unpack, work_values
from photon.link.codec.blockwise import Int2, Int4, Int8
from photon.link.codec.cast import Bfloat16, Float16
from photon.link.codec.sign import Sign

# Each with its bytes by count, written apart from the code.
SIZES = [
    (Bfloat16(), lambda n: 2 * n),
    (Float16(), lambda n: 2 * n + 4 * math.ceil(n / 65536)),
    (Float16(block=16), lambda n: 2 * n + 4 * math.ceil(n / 16)),
    (Int8(), lambda n: n + 2 * math.ceil(n / 128)),
    (Int8(block=8, rounding="stochastic"), lambda n: n + 2 * math.ceil(n / 8)),
    (Int4(), lambda n: math.ceil(n / 2) + 2 * math.ceil(n / 64)),
    (Int4(block=24, rounding="stochastic"), lambda n: math.ceil(n / 2) + 2 * math.ceil(n / 24)),
    (Int2(), lambda n: math.ceil(n / 4) + 4 * math.ceil(n / 128)),
    (Int2(block=40, rounding="stochastic"), lambda n: math.ceil(n / 4) + 4 * math.ceil(n / 40)),
    (Sign(), lambda n: math.ceil(n / 8) + 2 * math.ceil(n / 1024)),
    (Sign(block=16), lambda n: math.ceil(n / 8) + 2 * math.ceil(n / 16)),
]
STAGES = [stage for stage, _ in SIZES]
LARGEST = torch.finfo(torch.float32).max
each = pytest.mark.parametrize("stage", STAGES, ids=str)


def spike(count: int, value: float) -> Tensor:
    out = torch.zeros(count)
    out[count // 2] = value
    return out


def normal(count: int, scale: float = 1.0) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(count)) * scale


ADVERSARIAL = {
    "empty": torch.empty(0),
    "one": torch.tensor([0.3]),
    "one zero": torch.zeros(1),
    "odd": normal(131),
    "prime": normal(1031),
    "denormal": torch.full((77,), 1e-45),
    "denormals": normal(300, 1e-41),
    "small": normal(300, 1e-30),
    "huge": normal(300, 1e37),
    "largest": torch.full((200,), LARGEST),
    "smallest": torch.full((200,), -LARGEST),
    "both ends": torch.tensor([LARGEST, -LARGEST] * 70),
    "spike": spike(300, 1.0),
    "huge spike": spike(300, -LARGEST),
    "spike among small": normal(300, 1e-20) + spike(300, 1e20),
    "alternating": torch.tensor([1.0, -1.0] * 100),
    "minus zero": torch.full((9,), -0.0),
}


@pytest.mark.parametrize("name", ADVERSARIAL)
@each
def test_any_finite_tensor_comes_back_finite_and_no_larger(stage: Quantiser, name: str) -> None:
    values = ADVERSARIAL[name]
    before = values.clone()
    data = stage.encode(values, 5)
    assert torch.equal(values, before)
    assert torch.equal(data, stage.encode(values.clone(), 5)), "deterministic"
    assert data.shape == (stage.encoded_bytes(len(values)),)
    out = stage.decode(data, len(values))
    assert out.dtype == torch.float32
    assert out.shape == values.shape
    assert out.isfinite().all()
    if len(values):
        assert out.abs().max() <= values.abs().max() * 1.08 + 2.0**-125


@pytest.mark.parametrize(("stage", "size"), SIZES, ids=[str(stage) for stage in STAGES])
def test_sizes_follow_the_formula(stage: Quantiser, size) -> None:  # type: ignore[no-untyped-def]  # a lambda
    for count in [*range(300), 1023, 1024, 1025, 65535, 65536, 65537, 2**18 + 3]:
        assert stage.encoded_bytes(count) == size(count)
    for count in (0, 1, 7, 8, 9, 127, 128, 129, 2**18 + 3):
        assert len(stage.encode(normal(count), 1)) == size(count)


@each
def test_it_is_a_quantiser(stage: Quantiser) -> None:
    assert isinstance(stage, Quantiser)
    assert stage.item_bytes == (2 if isinstance(stage, Bfloat16 | Float16) else 1)


@each
def test_zeros_stay_zeros(stage: Quantiser) -> None:
    for count in (1, 8, 127, 128, 5000):
        assert torch.count_nonzero(stage.decode(stage.encode(torch.zeros(count), 3), count)) == 0


@pytest.mark.parametrize("stage", [stage for stage in STAGES if "stochastic" not in str(stage)], ids=str)
def test_pieces_do_not_show(stage: Quantiser) -> None:
    """A tensor of several pieces is what its blocks are one by one."""
    block = getattr(stage, "block", 128)
    count = 2 * 2**18 + 1000
    values = normal(count)
    whole = stage.decode(stage.encode(values, 0), count)
    for begin in (0, 2**18 // block * block, count // block * block):
        part = values[begin : begin + block]
        assert torch.equal(whole[begin : begin + block], stage.decode(stage.encode(part, 0), len(part)))


@each
def test_views_and_unaligned_bytes_are_read_right(stage: Quantiser) -> None:
    wide = normal(600)
    assert torch.equal(stage.encode(wide[::2], 1), stage.encode(wide[::2].contiguous(), 1))
    assert torch.equal(stage.encode(wide[1:], 1), stage.encode(wide[1:].clone(), 1))
    data = stage.encode(wide, 1)
    expected = stage.decode(data, 600)
    for offset in range(1, 9):
        buffer = torch.cat([torch.zeros(offset, dtype=torch.uint8), data])
        assert torch.equal(stage.decode(buffer[offset:], 600), expected)
    assert torch.equal(stage.decode(torch.stack([data, data], 1)[:, 0], 600), expected)


@each
def test_every_truncation_and_every_lie_is_refused(stage: Quantiser) -> None:
    data = stage.encode(normal(150), 1)
    for size in range(len(data)):
        with pytest.raises(WireError, match="expected"):
            stage.decode(data[:size], 150)
    with pytest.raises(WireError):
        stage.decode(torch.cat([data, data[:1]]), 150)
    for count in (-(2**60), -1, 0, 134, 167, 2**40, 2**62):
        with pytest.raises(WireError):
            stage.decode(data, count)
    for wrong in (data.view(1, -1), data.view(torch.int8), data.float(), torch.tensor(3, dtype=torch.uint8)):
        with pytest.raises(WireError):
            stage.decode(wrong, 150)


@each
@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 2**32), count=st.integers(0, 400))
def test_any_bytes_become_a_tensor_of_that_shape(stage: Quantiser, seed: int, count: int) -> None:
    random = torch.Generator().manual_seed(seed)
    data = torch.randint(0, 256, (stage.encoded_bytes(count),), dtype=torch.uint8, generator=random)
    out = stage.decode(data, count)
    assert out.dtype == torch.float32
    assert out.shape == (count,)


@each
def test_flipped_bits_become_a_tensor_of_that_shape(stage: Quantiser) -> None:
    data = stage.encode(normal(150), 1)
    for index in range(len(data)):
        flipped = data.clone()
        flipped[index] ^= 1 << (index % 8)
        assert stage.decode(flipped, 150).shape == (150,)


@each
def test_only_float32_is_quantised(stage: Quantiser) -> None:
    with pytest.raises(ValueError, match="float64"):
        stage.encode(torch.zeros(3, dtype=torch.float64), 0)


@each
def test_the_default_dtype_does_not_matter(stage: Quantiser) -> None:
    values = normal(300)
    expected = stage.decode(stage.encode(values, 1), 300)
    torch.set_default_dtype(torch.float64)
    try:
        out = stage.decode(stage.encode(values, 1), 300)
    finally:
        torch.set_default_dtype(torch.float32)
    assert out.dtype == torch.float32
    assert torch.equal(out, expected)


@pytest.mark.parametrize("kind", [Float16, Int8, Int4, Int2, Sign])
@pytest.mark.parametrize("block", [-8, 0, 1, 12, 2**20 + 8])
def test_a_block_that_cannot_be_is_refused(kind: type[Int8], block: int) -> None:
    with pytest.raises(ValueError, match=rf"block is {block}: it must be a multiple of 8"):
        kind(block=block)


@given(st.integers(0, 2**20), st.integers(1, 4096).map(lambda n: 8 * n))
def test_pieces_tile_the_vector(count: int, block: int) -> None:
    found = list(pieces(count, block))
    values, blocks = 0, 0
    for piece in found:
        assert (piece.begin, piece.first) == (values, blocks)
        assert 0 <= piece.values - (piece.end - piece.begin) < 8
        assert piece.width <= block
        assert piece.values <= work_values(count, block) <= max(block, 2**18)
        values, blocks = piece.end, piece.last
    assert (values, blocks) == (count, block_count(count, block))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_packing_is_by_the_book(bits: int) -> None:
    codes = torch.randint(0, 1 << bits, (4096,), dtype=torch.uint8, generator=torch.Generator().manual_seed(bits))
    per_byte = 8 // bits
    expected = [
        sum(code << (bits * place) for place, code in enumerate(codes[begin : begin + per_byte].tolist()))
        for begin in range(0, 4096, per_byte)
    ]
    packed = pack(codes, bits)
    assert packed.tolist() == expected
    assert torch.equal(unpack(packed, bits), codes)


def test_rounding_up_gives_the_next_bfloat16() -> None:
    values = torch.cat([normal(2000).abs(), normal(500, 1e-40).abs(), torch.tensor([0.0, 1.0, 1e-45, 2.0**-126])])
    up = rounded_up(values)
    assert torch.equal(up.bfloat16().float(), up)
    assert (up >= values).all()
    below = (up.bfloat16().view(torch.int16) - 1).view(torch.bfloat16).float()
    assert (below[values > 0] < values[values > 0]).all()
