"""A file that arrives in pieces: who hashes them, the writers or one behind them, and that all come to the same."""

from __future__ import annotations

import os
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.link.pieces import fill, sha256, some_bytes

from photon.link import partial as module
from photon.link.partial import (
    HashMismatchError,
    PartialFile,
)

MIB = 2**20


@contextmanager
def small_steps() -> Iterator[None]:
    """The background hasher begins, and reads, after few bytes."""
    with mock.patch.multiple(module, _HASH_BURST_BYTES=24, _PIECE_BYTES=7):
        yield


class Disk:
    """Stands for `os.pwrite` on a disk that writes less than it was given, or fails in the middle."""

    def __init__(self, order: random.Random) -> None:
        self.order, self.real = order, os.pwrite

    def __call__(self, handle: int, data: memoryview, offset: int) -> int:
        if self.order.random() > 0.8:
            raise OSError(28, "No space left on device")
        return self.real(handle, data[: len(data) - self.order.randrange(len(data))], offset)


@given(
    st.integers(1, 300),
    st.lists(st.integers(1, 299), max_size=4),
    st.booleans(),
    st.randoms(use_true_random=False),
)
@settings(max_examples=150, deadline=None)
def test_the_verdict_is_right_whoever_hashed_what_and_in_which_order_it_came(
    size: int, cuts: list[int], is_wrong: bool, order: random.Random
) -> None:
    data = some_bytes(size)
    edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    bounds, sent = list(pairwise(edges)), bytearray(data)
    if is_wrong:
        sent[order.randrange(len(data))] ^= 1
    with tempfile.TemporaryDirectory() as folder, small_steps(), mock.patch("os.pwrite", Disk(order)):
        target = Path(folder) / "blob"
        file = PartialFile(target, sha256(data), len(data), bounds)
        while not file.complete:
            index = order.choice([i for i, (low, high) in enumerate(bounds) if file.done()[i] < high - low])
            low, high = bounds[index]
            begin = low + file.done()[index]
            buffer = sent[begin : high - order.randrange(high - begin)]
            with suppress(OSError):
                file.write(index, begin, buffer)
            buffer[:] = bytes(len(buffer))  # the caller's own again
            if order.random() > 0.8:
                before = file.done()
                file.close()
                file = PartialFile(target, sha256(data), len(data), bounds)
                assert file.done() == before
        if is_wrong:
            with pytest.raises(HashMismatchError):
                file.finish()
            assert list(Path(folder).iterdir()) == []
        else:
            file.finish()
            assert target.read_bytes() == data


class Watched(PartialFile):
    """Notes each piece that nobody would hash: its writer did not, and the hasher had gone when it was counted.

    It would be hashed in the end, but it and all that follows it would be read again.
    """

    left = 0

    def _count(self, part: int, written: int) -> None:
        self.left += written > 0 and not self._is_hashing and self._hashed == self.bounds[part][0] + self._done[part]
        super()._count(part, written)

    def _let_go(self) -> None:
        self.left += self._filled() > self._hashed
        super()._let_go()


def test_threads_that_write_at_once_and_one_that_hashes_behind_them_agree(tmp_path: Path) -> None:
    data = some_bytes(60_000, seed=15)
    bounds = [(begin, begin + 15_000) for begin in range(0, len(data), 15_000)]

    def write(file: PartialFile, index: int) -> None:
        order = random.Random(index)
        low, high = bounds[index]
        while low < high:
            end = min(high, low + order.randint(1, 90))
            file.write(index, low, data[low:end])
            low = end

    with small_steps():
        for number in range(5):
            file = Watched(tmp_path / str(number), sha256(data), len(data), bounds)
            with ThreadPoolExecutor(4) as threads:
                list(threads.map(write, [file] * 4, range(4)))
            file.finish()
            assert file.left == 0


def test_what_comes_in_order_is_hashed_from_memory(tmp_path: Path) -> None:
    data = some_bytes(20 * MIB, seed=16)
    bounds = [(0, 9 * MIB), (9 * MIB, len(data))]
    file = PartialFile(tmp_path / "blob", sha256(data), len(data), bounds)
    with mock.patch("os.preadv", side_effect=AssertionError("read again")):
        fill(file, data)
        file.finish()
    assert (tmp_path / "blob").read_bytes() == data


def test_once_the_hasher_has_caught_up_the_writer_hashes_again(tmp_path: Path) -> None:
    """A part that was there first is read once; what comes after it is not."""
    data = some_bytes(400, seed=17)
    file = PartialFile(tmp_path / "blob", sha256(data), len(data), [(0, 100), (100, 300), (300, 400)])
    read = 0
    real = os.preadv

    def counted(*arguments: Any) -> int:
        nonlocal read
        count = real(*arguments)
        read += count
        return count

    with small_steps(), mock.patch("os.preadv", counted):
        file.write(1, 100, data[100:300])
        file.write(0, 0, data[:100])
        until(lambda: read == 200 and not file._is_hashing)
        file.write(2, 300, data[300:])
        file.finish()
    assert read == 200


def test_a_writer_leaves_the_digest_to_who_holds_it(tmp_path: Path) -> None:
    """Also when the hasher has just caught up: else it could go on while a second one is begun."""
    data, begun, go_on = some_bytes(100, seed=21), threading.Event(), threading.Event()
    file = PartialFile(tmp_path / "blob", sha256(data), len(data), [(0, 24), (24, 48), (48, 100)])
    real = file._bytes_behind

    def slow() -> int:
        if file._hashed == 48 and not go_on.is_set():
            begun.set()
            assert go_on.wait(20)
        return real()

    with mock.patch.object(module, "_HASH_BURST_BYTES", 24), mock.patch.object(file, "_bytes_behind", slow):
        file.write(1, 24, data[24:48])
        file.write(0, 0, data[:24])
        assert begun.wait(20)
        file.write(2, 48, data[48:60])
        assert (file._hashed, file._is_hashing) == (48, True)
        go_on.set()
        until(lambda: file._hashed == 60 and not file._is_hashing)
        file.write(2, 60, data[60:])
        file.finish()
    assert (tmp_path / "blob").read_bytes() == data


class Lingering:
    """A lock after whose release something is done."""

    def __init__(self, lock: Any, then: Callable[[], None]) -> None:
        self.lock, self.then = lock, then

    def __enter__(self) -> None:
        self.lock.acquire()

    def __exit__(self, *_: object) -> None:
        self.lock.release()
        self.then()


def test_a_hasher_that_finds_nothing_left_lets_go_before_anything_can_come(tmp_path: Path) -> None:
    data, begun, go_on = some_bytes(100, seed=22), threading.Event(), threading.Event()
    file = PartialFile(tmp_path / "blob", sha256(data), len(data), [(0, 24), (24, 48), (48, 100)])

    def then() -> None:
        if threading.current_thread().name == "photon-hash" and file._hashed == 48:
            begun.set()
            assert go_on.wait(20)

    lock: Any = Lingering(file._lock, then)
    with mock.patch.object(module, "_HASH_BURST_BYTES", 24), mock.patch.object(file, "_lock", lock):
        file.write(1, 24, data[24:48])
        file.write(0, 0, data[:24])
        assert begun.wait(20)
        file.write(2, 48, data[48:])
        assert file._hashed == 100
        go_on.set()
        file.finish()
    assert (tmp_path / "blob").read_bytes() == data


def until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.parametrize("ending", ["finish", "close", "discard"])
def test_who_ends_waits_for_the_one_that_holds_the_digest(tmp_path: Path, ending: str) -> None:
    data, begun, go_on = some_bytes(400, seed=18), threading.Event(), threading.Event()
    file = PartialFile(tmp_path / "blob", sha256(data), len(data), [(0, 200), (200, 400)])
    real = os.preadv

    def slow(*arguments: Any) -> int:
        begun.set()
        assert go_on.wait(20)
        return real(*arguments)

    with small_steps(), mock.patch("os.preadv", slow), ThreadPoolExecutor(1) as pool:
        file.write(1, 200, data[200:])
        file.write(0, 0, data[:200])
        assert begun.wait(20)
        ended = pool.submit(getattr(file, ending))
        time.sleep(0.1)
        assert not ended.done()
        os.fstat(file._file)  # it is read from
        go_on.set()
        ended.result(20)
    names = {"finish": ["blob"], "close": ["blob.partial", "blob.progress"], "discard": []}[ending]
    assert sorted(path.name for path in tmp_path.iterdir()) == names
    if ending == "finish":
        assert (tmp_path / "blob").read_bytes() == data


def test_an_error_of_the_hasher_is_met_again_by_who_finishes(tmp_path: Path) -> None:
    data = some_bytes(400, seed=19)
    file = PartialFile(tmp_path / "blob", sha256(data), len(data), [(0, 200), (200, 400)])
    with small_steps():
        with mock.patch("os.preadv", side_effect=OSError(5, "Input/output error")):
            file.write(1, 200, data[200:])
            file.write(0, 0, data[:200])
            for _ in range(2):
                with pytest.raises(OSError, match="Input/output"):
                    file.finish()
        file.finish()
    assert (tmp_path / "blob").read_bytes() == data


def test_nothing_that_arrives_is_synced(tmp_path: Path) -> None:
    data = some_bytes(MIB, seed=20)
    with mock.patch.multiple(os, fsync=mock.DEFAULT, fdatasync=mock.DEFAULT) as calls:
        file = PartialFile(tmp_path / "blob", sha256(data), len(data))
        fill(file, data)
        file.finish()
    assert not any(call.called for call in calls.values())


def test_bytes_that_did_not_reach_the_file_are_not_in_its_digest(tmp_path: Path) -> None:
    data = some_bytes(100, seed=23)
    file = PartialFile(tmp_path / "blob", sha256(data), len(data))
    real = os.pwrite

    def full(handle: int, piece: memoryview, offset: int) -> int:
        if offset >= 10:
            raise OSError(28, "No space left on device")
        return real(handle, piece[:10], offset)

    with mock.patch("os.pwrite", full), pytest.raises(OSError, match="No space"):
        file.write(0, 0, data[:10] + bytes(50))
    assert file.done() == [10]
    fill(file, data)
    file.finish()
    assert (tmp_path / "blob").read_bytes() == data
