"""Packed integers against a slow reader that treats the bytes as one long number."""

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from photon.errors import WireError
from photon.link.codec.packing import pack, packed_bytes, unpack

Values = NDArray[np.uint32]
Pack = Callable[[Values, int], NDArray[np.uint8]]


def random_values(count: int, width: int, seed: int = 0) -> Values:
    return np.random.default_rng(seed).integers(0, 2**width, count, dtype=np.uint32)


def reference(values: Values, width: int) -> bytes:
    """The definition, in one arbitrarily long integer."""
    number = sum(int(value) << (index * width) for index, value in enumerate(values))
    return number.to_bytes((len(values) * width + 7) // 8, "little")


def assert_packs_like_the_reference(packer: Pack) -> None:
    for width in range(1, 33):
        for count in (0, 1, 2, 7, 8, 9, 31):
            values = random_values(count, width, seed=width)
            assert packer(values, width).tobytes() == reference(values, width), (width, count)


@given(st.integers(0, 32), st.integers(0, 200), st.integers(0, 2**32 - 1))
@settings(deadline=None)
def test_every_width_and_count_comes_back_in_as_many_bytes_as_the_formula_says(
    width: int, count: int, seed: int
) -> None:
    values = random_values(count, width, seed)
    packed = pack(values, width)
    assert packed.nbytes == packed_bytes(count, width) == -(-count * width // 8)
    assert packed.tobytes() == reference(values, width)
    back = unpack(packed, count, width)
    assert back.dtype == np.uint32
    assert back.tolist() == values.tolist()


def test_the_bits_lie_as_the_definition_says() -> None:
    assert_packs_like_the_reference(pack)
    assert pack(np.array([0xABC, 0x123], dtype=np.uint32), 12).tobytes() == bytes([0xBC, 0x3A, 0x12])


@pytest.mark.parametrize("width", [1, 5, 12, 16, 27, 32])
def test_blocks_join_without_a_seam(width: int) -> None:
    values = random_values(2**17 + 3, width)
    packed = pack(values, width)
    assert np.array_equal(unpack(packed, len(values), width), values)
    # Eight values end at a byte: any such piece alone gives the same bytes.
    cut = 2**16 - 8
    assert packed[cut * width // 8 : (cut + 800) * width // 8].tobytes() == reference(values[cut : cut + 800], width)


def test_extremes_and_views() -> None:
    for width in range(1, 33):
        highest = np.full(11, 2**width - 1, dtype=np.uint32)
        assert unpack(pack(highest, width), 11, width).tolist() == highest.tolist()
        strided = random_values(40, width)[::3]
        assert pack(strided, width).tobytes() == reference(strided, width)


def test_values_that_do_not_fit_are_refused() -> None:
    for width in (0, 1, 7, 12, 31):
        with pytest.raises(ValueError, match="does not fit"):
            pack(np.array([0, 2**width], dtype=np.uint32), width)
    for width in (-1, 33):
        with pytest.raises(ValueError, match="0 to 32 bits"):
            packed_bytes(1, width)


def test_more_or_fewer_bytes_and_set_padding_are_refused() -> None:
    for width in (1, 3, 12, 13, 32):
        data = pack(random_values(5, width), width)
        for wrong in [data[:cut] for cut in range(len(data))] + [np.append(data, np.uint8(0))]:
            with pytest.raises(WireError, match="take"):
                unpack(wrong, 5, width)
        for bit in range(5 * width, len(data) * 8):
            flipped = data.copy()
            flipped[bit // 8] ^= 1 << (bit % 8)
            with pytest.raises(WireError, match="behind the last"):
                unpack(flipped, 5, width)


@given(st.binary(max_size=60), st.integers(0, 32), st.integers(0, 100))
@settings(deadline=None)
def test_any_bytes_are_refused_or_are_exactly_what_packing_gives(data: bytes, width: int, count: int) -> None:
    raw = np.frombuffer(data, dtype=np.uint8)
    try:
        values = unpack(raw, count, width)
    except WireError:
        return
    assert pack(values, width).tobytes() == data


def high_bit_first(values: Values, width: int) -> NDArray[np.uint8]:
    bits = "".join(f"{int(value):0{width}b}" for value in values) if width else ""
    bits += "0" * (-len(bits) % 8)
    return np.array([int(bits[at : at + 8], 2) for at in range(0, len(bits), 8)], dtype=np.uint8)


def without_the_carry(values: Values, width: int) -> NDArray[np.uint8]:
    """Forgets the bits of a value that reach over into the next byte but one."""
    out = np.zeros(packed_bytes(len(values), width) + 2, dtype=np.uint8)
    for index, value in enumerate(values):
        shifted = int(value) << (index * width % 8)
        out[index * width // 8] |= shifted & 0xFF
        out[index * width // 8 + 1] |= shifted >> 8 & 0xFF
    return out[: packed_bytes(len(values), width)]


@pytest.mark.parametrize("mutant", [high_bit_first, without_the_carry])
def test_wrong_packers_are_noticed(mutant: Pack) -> None:
    with pytest.raises(AssertionError):
        assert_packs_like_the_reference(mutant)
