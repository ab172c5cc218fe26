"""Which places are kept: every form against its definition, and against senders who lie."""

import tracemalloc
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from photon.errors import WireError
from photon.link.codec.indices import (
    BITMAP,
    DELTA,
    GROUP,
    MAX_LENGTH,
    PACKED,
    Chunks,
    decode_chunk_indices,
    decode_indices,
    encode_chunk_indices,
    encode_indices,
    index_count,
    index_width,
    max_index_bytes,
)
from photon.link.codec.packing import packed_bytes

Indices = NDArray[np.int64]
Bytes = NDArray[np.uint8]


def places(*values: int) -> Indices:
    return np.array(values, dtype=np.int64)


def random_places(length: int, count: int, seed: int = 0) -> Indices:
    return np.sort(np.random.default_rng(seed).choice(length, count, replace=False)).astype(np.int64)


def form_sizes(indices: list[int], length: int) -> dict[int, int]:
    """Bytes of every form, computed from its definition a group at a time."""
    before = -1
    gaps = []
    for index in indices:
        gaps.append(index - before - 1)
        before = index
    delta = 5
    for start in range(0, len(gaps), GROUP):
        group = gaps[start : start + GROUP]
        delta += 1 + -(-len(group) * max(group).bit_length() // 8)
    packed = 5 - (-len(indices) * (max(length - 1, 0)).bit_length() // 8)
    return {BITMAP: 1 - (-length // 8), PACKED: packed, DELTA: delta}


# A third, at random: bitmap. Three of a million: packed. One in fifty: delta.
EXAMPLES = {
    BITMAP: (random_places(3001, 1000), 3001),
    PACKED: (places(70_000, 500_001, 999_999), 1_000_000),
    DELTA: (random_places(100_000, 2000), 100_000),
}


@given(st.integers(0, 3000), st.floats(0, 1), st.integers(0, 2**32 - 1), st.booleans())
@settings(deadline=None)
def test_any_places_come_back_from_the_smallest_form(length: int, share: float, seed: int, crowded: bool) -> None:
    count = int(share * length)
    indices = random_places(max(count, length // 7 if crowded else length), count, seed)
    data = encode_indices(indices, length)
    sizes = form_sizes(indices.tolist(), length)
    assert len(data) == min(sizes.values()) == sizes[int(data[0])]
    assert int(data[0]) == min(tag for tag, size in sizes.items() if size == len(data))
    assert len(data) <= max_index_bytes(length, count)
    assert index_count(data, length) == count
    back = decode_indices(data, length)
    assert back.dtype == np.int64
    assert back.tolist() == indices.tolist()


@pytest.mark.parametrize("tag", EXAMPLES)
def test_each_form_is_the_smallest_somewhere(tag: int) -> None:
    indices, length = EXAMPLES[tag]
    data = encode_indices(indices, length)
    assert data[0] == tag
    assert np.array_equal(decode_indices(data, length), indices)


def test_forms_hold_what_the_definition_says() -> None:
    assert encode_indices(places(0, 3, 8), 9).tolist() == [BITMAP, 0b1001, 1]
    assert encode_indices(places(), 100).tolist() == [PACKED, 0, 0, 0, 0]
    assert encode_indices(places(513), 1000).tolist() == [PACKED, 1, 0, 0, 0, 0x01, 0x02]
    run = np.arange(40, 40 + 200, dtype=np.int64)
    data = encode_indices(run, 10_000)  # one gap of 40, then none
    assert data.tolist() == [DELTA, 200, 0, 0, 0, 6, 0, 0, 0, 0, 0, 0, 40] + [0] * (4 * 6 - 1)


def test_many_blocks_of_groups_join_without_a_seam() -> None:
    rng = np.random.default_rng(3)
    scale = rng.integers(0, 16, 3000).repeat(GROUP)[:-5]  # widths from 0 to 16 bits, and a short last group
    indices = np.cumsum(rng.integers(0, 2**scale) + 1)
    length = int(indices[-1]) + 1
    data = encode_indices(indices, length)
    assert data[0] == DELTA
    assert np.array_equal(decode_indices(data, length), indices)
    with pytest.raises(WireError, match="exceeds"):
        decode_indices(data, length - 1)


def test_widths_of_indices() -> None:
    assert [index_width(n) for n in (0, 1, 2, 3, 4, 5, 4096, 4097, MAX_LENGTH)] == [0, 0, 1, 2, 2, 3, 12, 13, 32]
    top = places(0, 2**31, MAX_LENGTH - 1)
    assert np.array_equal(decode_indices(encode_indices(top, MAX_LENGTH), MAX_LENGTH), top)
    with pytest.raises(ValueError, match="too large"):
        encode_indices(top, MAX_LENGTH + 1)


def refused_or_well_formed(data: Bytes, length: int) -> bool:
    try:
        count = index_count(data, length)
        back = decode_indices(data, length)
    except WireError:
        return False
    assert len(back) == count <= length
    assert (np.diff(back) > 0).all()
    assert not len(back) or (back[0] >= 0 and back[-1] < length)
    return True


@pytest.mark.parametrize("tag", EXAMPLES)
def test_truncations_extra_bytes_and_flips(tag: int) -> None:
    indices, length = EXAMPLES[tag][0][:300], EXAMPLES[tag][1]
    data = encode_indices(indices, length) if tag != BITMAP else encode_indices(*EXAMPLES[BITMAP])
    assert data[0] == tag
    for cut in range(len(data)):
        assert not refused_or_well_formed(data[:cut], length)
    assert not refused_or_well_formed(np.append(data, np.uint8(0)), length)
    rng = np.random.default_rng(0)
    for _ in range(500):
        flipped = data.copy()
        flipped[rng.integers(len(data))] ^= 1 << rng.integers(8)
        refused_or_well_formed(flipped, length)


@given(st.binary(max_size=80), st.integers(0, 2), st.integers(0, 700))
@settings(deadline=None)
def test_any_bytes_are_refused_or_name_ascending_places(data: bytes, tag: int, length: int) -> None:
    refused_or_well_formed(np.frombuffer(bytes([tag]) + data, dtype=np.uint8), length)


def test_lies_are_refused() -> None:
    def wire(*data: int) -> Bytes:
        return np.array(data, dtype=np.uint8)

    for lie, data in {
        "tag": wire(3, 0, 0, 0, 0),
        "bits are set": wire(BITMAP, 0xFF, 0x02),
        "declared": wire(PACKED, 10, 0, 0, 0, 0, 0, 0, 0, 0),
        "do not ascend": wire(PACKED, 2, 0, 0, 0, 0x44),
        "exceed the 9": wire(PACKED, 1, 0, 0, 0, 0x09),
        "exceeds the 9": wire(DELTA, 1, 0, 0, 0, 4, 9),
        "behind the last": wire(DELTA, 1, 0, 0, 0, 3, 8),
        "exceeds 32": wire(DELTA, 1, 0, 0, 0, 33, 0, 0, 0, 0, 0),
        "lack their widths": wire(DELTA, 1, 0, 0, 0),
        "take 2 bytes": wire(DELTA, 1, 0, 0, 0, 3, 0, 0),
    }.items():
        with pytest.raises(WireError, match=lie):
            decode_indices(data, 9)


def test_a_claimed_count_allocates_nothing_before_its_bytes_are_there() -> None:
    length = 2**30
    claim = np.frombuffer(bytes([DELTA]) + length.to_bytes(4, "little") + bytes(1000), dtype=np.uint8)
    for tag in (PACKED, DELTA):
        data = claim.copy()
        data[0] = tag
        tracemalloc.start()
        with pytest.raises(WireError):
            decode_indices(data, length)
        assert tracemalloc.get_traced_memory()[1] < 2**20
        tracemalloc.stop()


@given(st.integers(1, 40), st.integers(0, 200), st.floats(0, 1), st.integers(0, 2**32 - 1))
@settings(deadline=None)
def test_places_in_chunks_come_back_in_bytes_known_beforehand(length: int, count: int, share: float, seed: int) -> None:
    rest = count % length
    chunks = Chunks(count, length, max(1, int(share * length)), max(min(1, rest), int(share * rest)))
    expected, offsets = [], []
    for start in range(0, count, length):
        size = min(length, count - start)
        chosen = random_places(size, chunks.kept if size == length else chunks.kept_last, seed + start)
        offsets += chosen.tolist()
        expected += [start + place for place in chosen.tolist()]
    data = encode_chunk_indices(np.array(offsets, dtype=np.uint32), chunks)
    width = (min(length, count) - 1).bit_length() if count else 0
    assert len(data) == chunks.side_bytes == min(-(-count // 8), packed_bytes(len(expected), width))
    assert decode_chunk_indices(data, chunks).tolist() == expected
    for wrong in (data[:-1], np.append(data, np.uint8(0))):
        if len(wrong) != len(data):
            with pytest.raises(WireError, match="take"):
                decode_chunk_indices(wrong, chunks)


@pytest.mark.parametrize(("kept", "kept_last"), [(2, 1), (9, 4)])
def test_damaged_places_in_chunks(kept: int, kept_last: int) -> None:
    chunks = Chunks(20 * 4 + 7, 20, kept, kept_last)
    assert chunks.is_bitmap == (kept == 9)
    rows = [random_places(20, kept, seed) for seed in range(4)] + [random_places(7, kept_last)]
    data = encode_chunk_indices(np.concatenate(rows).astype(np.uint32), chunks)
    accepted = 0
    for one in range(len(data) * 8):
        for other in range(one, len(data) * 8):
            flipped = data.copy()
            flipped[one // 8] ^= 1 << (one % 8)
            flipped[other // 8] ^= (1 << (other % 8)) * (other != one)
            try:
                back = decode_chunk_indices(flipped, chunks)
            except WireError:
                continue
            accepted += 1
            assert (np.diff(back) > 0).all()
            assert np.bincount(back // 20, minlength=5).tolist() == [kept] * 4 + [kept_last]
            assert back[-1] < chunks.count
    assert accepted


def test_a_bitmap_that_moves_a_place_to_the_next_chunk_is_refused() -> None:
    for count, kept_last in ((16, 0), (12, 2)):
        chunks = Chunks(count, 8, 4, kept_last)
        mask = np.zeros(count, dtype=np.bool_)
        mask[[0, 1, 2, *range(8, 8 + chunks.kept_total - 3)]] = True
        with pytest.raises(WireError, match="does not have"):
            decode_chunk_indices(np.packbits(mask, bitorder="little"), chunks)
        mask[:8], mask[8:] = [1, 1, 1, 1, 1, 0, 0, 0], False
        mask[8 : 8 + chunks.kept_total - 5] = True
        with pytest.raises(WireError, match="does not have"):
            decode_chunk_indices(np.packbits(mask, bitorder="little"), chunks)


def assert_keeps_the_places(encode: Callable[[Indices, int], Bytes]) -> None:
    for first in (0, 1, 40):
        indices = np.concatenate([places(0), random_places(5000, 100) + 1]) + first
        data = encode(indices, 6000)
        assert data[0] == DELTA
        assert decode_indices(data, 6000).tolist() == indices.tolist()


def without_the_first_gap(indices: Indices, length: int) -> Bytes:
    return encode_indices(indices - indices[0], length)


def gaps_one_too_long(indices: Indices, length: int) -> Bytes:
    """Writes differences where the reader expects what lies between."""
    return encode_indices(indices + np.arange(1, len(indices) + 1), length)


def test_wrong_gaps_are_noticed() -> None:
    assert_keeps_the_places(encode_indices)
    for mutant in (without_the_first_gap, gaps_one_too_long):
        with pytest.raises(AssertionError):
            assert_keeps_the_places(mutant)
