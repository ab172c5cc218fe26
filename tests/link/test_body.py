"""A body reads the same whether it lies in memory or in a stretch of a file, a piece at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from photon.errors import WireError
from photon.link.body import Body, FileBody, pieces, read_body, whole_file

HEAD, TAIL = b"head of the file", b"and what stands behind"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bodies")


def in_file(folder: Path, data: bytes) -> FileBody:
    """`data` as a stretch of a file, with other bytes before and behind."""
    path = folder / "body"
    path.write_bytes(HEAD + data + TAIL)
    return FileBody(path, len(HEAD), len(data))


def forms(folder: Path, data: bytes) -> list[Body]:
    return [data, bytearray(data), memoryview(data), in_file(folder, data)]


@settings(deadline=None)
@given(st.binary(max_size=300), st.integers(1, 400))
def test_pieces_are_the_body_and_none_is_longer_than_asked(folder: Path, data: bytes, size: int) -> None:
    for body in forms(folder, data):
        parts = [bytes(piece) for piece in pieces(body, size)]
        assert b"".join(parts) == data
        assert [len(part) for part in parts] == [min(size, len(data) - at) for at in range(0, len(data), size)]


@settings(deadline=None)
@given(st.binary(max_size=300), st.data())
def test_any_range_is_that_of_the_bytes(folder: Path, data: bytes, draw: st.DataObject) -> None:
    begin = draw.draw(st.integers(0, len(data)))
    end = draw.draw(st.integers(begin, len(data)))
    for body in forms(folder, data):
        assert len(body) == len(data)
        assert read_body(body, begin, end) == data[begin:end]


def test_a_body_that_forgets_where_it_begins_is_another(folder: Path) -> None:
    body = in_file(folder, b"12345")
    assert body.read(1, 3) == b"23"
    assert FileBody(body.path, 0, 5).read(1, 3) == HEAD[1:3]  # mutant: the beginning of the file


def test_a_body_of_numbers_is_counted_in_bytes() -> None:
    numbers = np.arange(5, dtype=np.float32)
    assert b"".join(pieces(memoryview(numbers), 3)) == numbers.tobytes()
    assert read_body(memoryview(numbers), 4, 8) == numbers[1:2].tobytes()


@pytest.mark.parametrize(("begin", "end"), [(-1, 2), (3, 2), (0, 6), (6, 6)])
def test_a_range_outside_the_body_is_refused_though_the_file_goes_on(folder: Path, begin: int, end: int) -> None:
    with pytest.raises(WireError, match=f"bytes {begin} to {end} were asked of a body of 5"):
        in_file(folder, b"12345").read(begin, end)


def test_a_file_that_is_too_short_is_named(folder: Path) -> None:
    body = in_file(folder, b"12345")
    body.path.write_bytes(HEAD + b"123")
    for read in (lambda: body.read(0, 5), lambda: list(body.chunks()), lambda: list(pieces(body, 2))):
        with pytest.raises(WireError, match=rf"body ends before byte {len(HEAD) + 5}"):
            read()
    assert body.read(0, 3) == b"123"


def test_pieces_of_a_file_share_one_buffer_and_what_is_read_is_the_callers(folder: Path) -> None:
    """Whoever keeps a piece must copy it; that is what makes a large body cost one piece of memory."""
    body = in_file(folder, b"aabbc")
    kept = list(body.chunks(2))
    assert [bytes(piece) for piece in kept] != [b"aa", b"bb", b"c"]
    first, second = body.read(0, 2), body.read(2, 4)
    assert (first, second) == (b"aa", b"bb")


def test_a_whole_file_is_one_that_is_there(folder: Path) -> None:
    path = folder / "whole"
    path.write_bytes(b"12345")
    assert whole_file(path) == FileBody(path, 0, 5)
    assert [bytes(piece) for piece in whole_file(path).chunks(2)] == [b"12", b"34", b"5"]
    with pytest.raises(FileNotFoundError):
        whole_file(folder / "nowhere")
