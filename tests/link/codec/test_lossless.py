"""Byte planes and compressors: every bit comes back, and nothing a sender says is believed."""

import contextlib
import random
import tracemalloc
from collections.abc import Callable

import lz4.block
import numpy as np
import pytest
import torch
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from photon.errors import WireError
from photon.link.codec.lossless import Lz4, Zstd

PIECE_ITEMS = 2**18
STAGES = [Zstd(), Zstd(level=5), Zstd(shuffle=False), Lz4(), Lz4(shuffle=False)]
Stage = Zstd | Lz4
Expand = Callable[[bytes, int], bytes]


def as_tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def gaussian(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Bytes of Gaussian numbers, as a pseudo-gradient's are."""
    return torch.randn(count, generator=torch.Generator().manual_seed(0)).to(dtype).view(torch.uint8)


def round_trips(stage: Stage, data: Tensor, item_bytes: int) -> bool:
    encoded = stage.encode(data, item_bytes)
    assert encoded.dtype == torch.uint8
    assert encoded.numel() <= stage.max_bytes(data.numel()) == data.numel() + 1
    return torch.equal(stage.decode(encoded, data.numel(), item_bytes), data)


def slow_decode(encoded: bytes, item_bytes: int, expand: Expand, is_transposed: bool = False) -> bytes:
    """The format read byte by byte; `is_transposed` is the mutant that takes planes for items."""
    assert encoded[0] == 1
    size, position = int.from_bytes(encoded[1:9], "little"), 9
    out = bytearray(size)
    for start in range(0, size // item_bytes, PIECE_ITEMS):
        items = min(PIECE_ITEMS, size // item_bytes - start)
        for k in range(item_bytes):
            length = int.from_bytes(encoded[position : position + 4], "little")
            payload = encoded[position + 4 : position + 4 + length]
            position += 4 + length
            plane = payload if length == items else expand(payload, items)
            for i, byte in enumerate(plane):
                out[start * item_bytes + (k * items + i if is_transposed else i * item_bytes + k)] = byte
    rest = encoded[position:]
    assert len(rest) == size % item_bytes
    out[size - len(rest) :] = rest
    return bytes(out)


def expand_zstd(payload: bytes, size: int) -> bytes:
    return zstandard.decompress(payload)


def expand_lz4(payload: bytes, size: int) -> bytes:
    return bytes(lz4.block.decompress(payload, uncompressed_size=size))


@given(st.sampled_from(STAGES), st.binary(max_size=200), st.integers(1, 60), st.integers(1, 9))
@settings(deadline=None, max_examples=200)
def test_every_byte_string_round_trips(stage: Stage, data: bytes, repeats: int, item_bytes: int) -> None:
    assert round_trips(stage, as_tensor(data * repeats), item_bytes)


@pytest.mark.parametrize("stage", STAGES, ids=str)
def test_every_bit_pattern_round_trips(stage: Stage) -> None:
    sixteen_bits = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.uint8)  # all of bfloat16's NaNs
    assert round_trips(stage, sixteen_bits, 2)
    words = np.array([0x7F800001, 0xFFC12345, 0x80000000, 0x7F800000, 1, 0x80000001, 0xFFFFFFFF] * 50, np.uint32)
    assert round_trips(stage, torch.from_numpy(words.view(np.uint8)), 4)


@pytest.mark.parametrize("stage", STAGES, ids=str)
@pytest.mark.parametrize("extra", [-4, -1, 0, 1, 3, 4, 12345])
def test_several_pieces_round_trip(stage: Stage, extra: int) -> None:
    data = gaussian(PIECE_ITEMS + 2**14)[: 4 * PIECE_ITEMS + extra]
    assert round_trips(stage, data, 4)
    assert round_trips(stage, gaussian(3 * PIECE_ITEMS, torch.bfloat16)[: 4 * PIECE_ITEMS + extra], 2)


@pytest.mark.parametrize("stage", STAGES, ids=str)
def test_views_are_read_right_and_nothing_is_changed(stage: Stage) -> None:
    data = torch.arange(5000).to(torch.uint8)
    before, view = data.clone(), data[::2]
    assert round_trips(stage, view, 4)
    encoded = stage.encode(data, 4)
    strided = torch.stack([encoded, encoded], 1)[:, 0]
    assert torch.equal(stage.decode(strided, 5000, 4), before)
    assert torch.equal(data, before)


@pytest.mark.parametrize(("stage", "expand"), [(Zstd(), expand_zstd), (Lz4(), expand_lz4)], ids=["zstd", "lz4"])
@pytest.mark.parametrize("extra", [0, 1])
def test_the_format_is_as_written_and_mutants_of_the_stride_are_not(stage: Stage, expand: Expand, extra: int) -> None:
    data = gaussian(PIECE_ITEMS + 999, torch.bfloat16)[: 2 * PIECE_ITEMS + 1996 + extra]
    encoded = bytes(stage.encode(data, 2).tolist())

    def is_read_by(reader: Callable[[], bytes]) -> bool:
        return reader() == bytes(data.tolist())

    assert is_read_by(lambda: slow_decode(encoded, 2, expand))
    assert not is_read_by(lambda: slow_decode(encoded, 2, expand, is_transposed=True))
    with pytest.raises(WireError):
        stage.decode(as_tensor(encoded), data.numel(), 4)


@pytest.mark.parametrize("count", [5_000, 2**16, 300_000])
def test_planes_make_floats_smaller_and_small_tensors_too(count: int) -> None:
    data = gaussian(count, torch.bfloat16)
    for planes, plain in ((Zstd(), Zstd(shuffle=False)), (Lz4(), Lz4(shuffle=False))):
        assert planes.encode(data, 2).numel() < 0.95 * plain.encode(data, 2).numel()
    assert Zstd().encode(data, 2).numel() < 0.76 * data.numel()


@pytest.mark.parametrize("stage", STAGES, ids=str)
def test_what_does_not_compress_grows_by_one_byte(stage: Stage) -> None:
    for size in (0, 1, 7, 1000, 3 * 2**20 + 1):
        data = torch.from_numpy(np.random.default_rng(0).integers(0, 256, size, dtype=np.uint8))
        encoded = stage.encode(data, 4)
        assert encoded.numel() == size + 1
        assert encoded[0] == 0
        assert torch.equal(encoded[1:], data)
    out = stage.decode(encoded, size, 4)
    assert out.data_ptr() % 8 == 0  # readable as wider numbers


@pytest.mark.parametrize("stage", STAGES, ids=str)
def test_truncations_and_extra_bytes_are_refused(stage: Stage) -> None:
    data = (torch.arange(800, dtype=torch.int32) // 100).view(torch.uint8)
    encoded = stage.encode(data, 4)
    assert encoded[0] == 1
    for size in range(encoded.numel()):
        with pytest.raises(WireError):
            stage.decode(encoded[:size], data.numel(), 4)
    for extra in (1, 4, 100):
        with pytest.raises(WireError, match="follow the last plane, expected 0"):
            stage.decode(torch.cat([encoded, torch.zeros(extra, dtype=torch.uint8)]), data.numel(), 4)
    for most in (0, 1, data.numel() - 1):
        with pytest.raises(WireError, match="were expected"):
            stage.decode(encoded, most, 4)
        with pytest.raises(WireError, match="were expected"):
            stage.decode(torch.zeros(most + 2, dtype=torch.uint8), most, 4)


@pytest.mark.parametrize("stage", STAGES, ids=str)
def test_flipped_bits_are_refused_or_change_bytes_only(stage: Stage) -> None:
    data = torch.cat([torch.arange(300, dtype=torch.int32).view(torch.uint8), gaussian(100)])
    encoded, dice = stage.encode(data, 4), random.Random(0)
    tracemalloc.start()
    for trial in range(2000):
        broken = encoded.clone()
        for _ in range(1 + trial % 3):
            place = dice.randrange(min(40, encoded.numel()) if trial % 2 else encoded.numel())
            broken[place] ^= 1 << dice.randrange(8)
        with contextlib.suppress(WireError):
            assert stage.decode(broken, data.numel() + 50, 4).numel() <= data.numel() + 50
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 500_000


def piece(size: int, payload: bytes) -> Tensor:
    return as_tensor(b"\x01" + size.to_bytes(8, "little") + len(payload).to_bytes(4, "little") + payload)


def hostile_frames() -> dict[str, bytes]:
    zeros = zstandard.compress(bytes(50_000_000))
    good = zstandard.compress(bytes(4000))
    return {
        "bomb": zeros,
        "bomb that declares nothing": zstandard.ZstdCompressor(write_content_size=False).compress(bytes(50_000_000)),
        "declares nothing": zstandard.ZstdCompressor(write_content_size=False).compress(bytes(4000)),
        "declares less": zstandard.compress(bytes(3999)),
        "declares more": zstandard.compress(bytes(4001)),
        # single segment off, window of 2 GiB, content size 4000: behind it nothing
        "window": b"\x28\xb5\x2f\xfd" + b"\x40\xa8" + (4000 - 256).to_bytes(2, "little"),
        # content of 2^63 bytes
        "huge": b"\x28\xb5\x2f\xfd" + b"\xe0" + (2**63).to_bytes(8, "little") + good[6:],
        "two frames": good + good,
        "two half frames": zstandard.compress(bytes(2000)) * 2,
        "skippable": b"\x50\x2a\x4d\x18" + (4000).to_bytes(4, "little") + bytes(3000),
        "skippable behind": good + b"\x50\x2a\x4d\x18" + (4).to_bytes(4, "little") + bytes(4),
        "dictionary": b"\x28\xb5\x2f\xfd" + b"\x61\x07" + (4000 - 256).to_bytes(2, "little") + good[6:],
        "empty": b"",
        "checksum": zstandard.ZstdCompressor(write_checksum=True).compress(bytes(4000))[:-1] + b"\x00",
    }


@pytest.mark.parametrize("name", list(hostile_frames()))
def test_hostile_frames_are_refused_in_little_memory(name: str) -> None:
    frame = hostile_frames()[name]
    assert torch.equal(Zstd().decode(piece(4000, zstandard.compress(bytes(4000))), 4000, 1), torch.zeros(4000).byte())
    tracemalloc.start()
    with pytest.raises(WireError):
        Zstd().decode(piece(4000, frame), 4000, 1)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 100_000


def test_hostile_lz4_blocks_are_refused_in_little_memory() -> None:
    for block in (
        lz4.block.compress(bytes(50_000_000), store_size=False)[:3900],
        lz4.block.compress(bytes(3999), store_size=False),
        lz4.block.compress(bytes(4001), store_size=False),
        lz4.block.compress(bytes(4000), store_size=True),
        b"\xff" * 3000,
        b"",
    ):
        tracemalloc.start()
        with pytest.raises(WireError):
            Lz4().decode(piece(4000, block), 4000, 1)
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak_bytes < 100_000


@pytest.mark.parametrize("stage", STAGES, ids=str)
def test_a_few_bytes_do_not_make_us_allocate_much(stage: Stage) -> None:
    tracemalloc.start()
    for size in (10**9, 2**40, 2**63, 2**64 - 1):
        with pytest.raises(WireError):
            stage.decode(piece(size, bytes(100)), 2**62, 1)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 100_000


@given(st.sampled_from(STAGES), st.binary(max_size=60), st.integers(0, 500), st.integers(1, 8), st.booleans())
@settings(deadline=None, max_examples=300)
def test_arbitrary_bytes_are_refused_or_within_the_bound(
    stage: Stage, data: bytes, most: int, item_bytes: int, has_header: bool
) -> None:
    head = b"\x01" + most.to_bytes(8, "little") + max(len(data) - 1, 0).to_bytes(4, "little") if has_header else b""
    with contextlib.suppress(WireError):
        assert stage.decode(as_tensor(head + data[:-1]), most, item_bytes).numel() <= most


def test_parameters_are_checked() -> None:
    for level in (0, 23, -1):
        with pytest.raises(ValueError, match=f"level must be between 1 and 22, got {level}"):
            Zstd(level=level)
