"""A file that arrives in pieces is whole and right under its name, or is not there; a kill costs a few MiB."""

from __future__ import annotations

import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from photon.link import partial as module
from photon.link.partial import (
    MAX_PARTS,
    SAVE_EVERY_BYTES,
    BeyondPartError,
    HashMismatchError,
    IncompleteError,
    OffsetError,
    PartialBusyError,
    PartialError,
    PartialFile,
    part_bounds,
    partial_names,
)

MIB = 2**20


def some_bytes(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def fill(file: PartialFile, data: bytes, piece_bytes: int = 100_000) -> None:
    """Write everything that is missing, part after part."""
    for index, ((low, high), done) in enumerate(zip(file.bounds, file.done(), strict=True)):
        for begin in range(low + done, high, piece_bytes):
            file.write(index, begin, data[begin : min(high, begin + piece_bytes)])


@given(st.integers(0, 2**45))
def test_parts_tile_the_file_and_are_few(size: int) -> None:
    bounds = part_bounds(size)
    assert len(bounds) <= MAX_PARTS
    edges = [0, *(high for _, high in bounds)]
    assert edges[-1] == size
    assert bounds == list(pairwise(edges))
    assert all(low < high for low, high in bounds)


@given(st.binary(max_size=200), st.lists(st.integers(1, 199), max_size=4), st.randoms(use_true_random=False))
@settings(max_examples=60, deadline=None)
def test_pieces_in_any_order_of_parts_and_any_number_of_restarts_give_the_file(
    data: bytes, cuts: list[int], order: random.Random
) -> None:
    edges = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    bounds = list(pairwise(edges))
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "blob"
        file = PartialFile(target, sha256(data), len(data), bounds)
        while not file.complete:
            assert not target.exists()
            index = order.choice([i for i, (low, high) in enumerate(bounds) if file.done()[i] < high - low])
            low, high = bounds[index]
            begin = low + file.done()[index]
            file.write(index, begin, data[begin : order.randint(begin + 1, high)])
            if order.random() < 0.3:
                before = file.done()
                file.close()
                file = PartialFile(target, sha256(data), len(data), bounds)
                assert file.done() == before
        file.finish()
        file.finish()
        assert target.read_bytes() == data
        assert [path.name for path in Path(folder).iterdir()] == ["blob"]


def test_parts_arrive_in_parallel_while_the_beginning_is_hashed(tmp_path: Path) -> None:
    data = some_bytes(40 * MIB)
    bounds = [(begin, begin + 10 * MIB) for begin in range(0, len(data), 10 * MIB)]
    file = PartialFile(tmp_path / "blob", sha256(data), len(data), bounds)

    def write(index: int) -> None:
        low, high = bounds[index]
        for begin in range(low, high, MIB // 2):
            file.write(index, begin, data[begin : begin + MIB // 2])

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(write, range(4)))
    file.finish()
    assert sha256((tmp_path / "blob").read_bytes()) == file.sha256


WRITER = """
import os, random, signal, sys
from pathlib import Path
from photon.link import partial
from photon.link.partial import PartialFile
partial.SAVE_EVERY_S = 0.0
size, part, stop = (int(word) for word in sys.argv[3:])
data = random.Random(0).randbytes(size)
bounds = [(begin, min(size, begin + part)) for begin in range(0, size, part)]
file = PartialFile(Path(sys.argv[1]), sys.argv[2], size, bounds)
step, written = 300_000, 0
while True:
    for index, (low, high) in enumerate(bounds):
        begin = low + file.done()[index]
        file.write(index, begin, data[begin : min(high, begin + step)])
        written += min(high, begin + step) - begin
    if written >= stop:
        os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_receiver_that_was_killed_goes_on_and_has_lost_a_few_mib(tmp_path: Path) -> None:
    size, part, stop = 30 * MIB, 10 * MIB, 21 * MIB
    data = some_bytes(size)
    bounds = [(begin, begin + part) for begin in range(0, size, part)]
    words = [str(tmp_path / "blob"), sha256(data), str(size), str(part), str(stop)]
    killed = subprocess.run([sys.executable, "-c", WRITER, *words], timeout=60, check=False)
    assert killed.returncode == -9
    # The plausible wrong way to resume, by the size of the file, would take the holes between parts for bytes.
    assert partial_names(tmp_path / "blob")[0].stat().st_size > stop
    file = PartialFile(tmp_path / "blob", sha256(data), size, bounds)
    assert stop - SAVE_EVERY_BYTES <= sum(file.done()) < size
    fill(file, data)
    file.finish()
    assert (tmp_path / "blob").read_bytes() == data


def test_wrong_bytes_are_refused_and_removed(tmp_path: Path) -> None:
    data = bytearray(some_bytes(9 * MIB))
    file = PartialFile(tmp_path / "blob", sha256(data), len(data))
    data[-1] ^= 1
    fill(file, bytes(data))
    with pytest.raises(HashMismatchError, match="expected"):
        file.finish()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(PartialError, match="no longer"):
        file.write(0, 0, b"x")


def test_what_is_not_whole_cannot_be_finished(tmp_path: Path) -> None:
    file = PartialFile(tmp_path / "blob", sha256(b"abc"), 3)
    file.write(0, 0, b"ab")
    with pytest.raises(IncompleteError, match="1 of 3"):
        file.finish()
    file.write(0, 2, b"c")
    file.finish()


def test_a_piece_belongs_where_its_part_ends(tmp_path: Path) -> None:
    file = PartialFile(tmp_path / "blob", "0" * 64, 20, [(0, 10), (10, 20)])
    file.write(1, 10, b"1234")
    for begin in (10, 13, 15):
        with pytest.raises(OffsetError) as caught:
            file.write(1, begin, b"x")
        assert caught.value.done == 4
    for part, begin, length in ((0, 0, 11), (1, 14, 7), (1, 14, 10_000)):
        with pytest.raises(BeyondPartError):
            file.write(part, begin, b"x" * length)
    assert file.done() == [0, 4]
    assert partial_names(file.target)[0].stat().st_size == 14  # nothing of the refused pieces is on the disk


def test_a_declared_terabyte_costs_nothing_until_it_comes(tmp_path: Path) -> None:
    file = PartialFile(tmp_path / "blob", "0" * 64, 2**40)
    file.write(0, 0, b"x")
    assert partial_names(file.target)[0].stat().st_blocks * 512 < MIB
    file.discard()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", ["cut short", "other sha256", "other size", "garbage", "negative", "none"])
def test_progress_is_believed_only_if_it_is_of_this_file_and_its_bytes_are_there(tmp_path: Path, damage: str) -> None:
    target, data = tmp_path / "blob", some_bytes(1000)
    file = PartialFile(target, sha256(data), 1000)
    file.write(0, 0, data[:600])
    file.close()
    partial, sidecar = partial_names(target)
    text = sidecar.read_text()
    if damage == "cut short":
        partial.write_bytes(data[:599])
    elif damage == "other sha256":
        sidecar.write_text(text.replace(sha256(data), "0" * 64))
    elif damage == "other size":
        sidecar.write_text(text.replace('"bytes": 1000', '"bytes": 1001'))
    elif damage == "garbage":
        sidecar.write_text(text[:-5])
    elif damage == "negative":
        sidecar.write_text(text.replace("600]", "-600]"))
    again = PartialFile(target, sha256(data), 1000)
    assert again.done() == [600 if damage == "none" else 0]
    fill(again, data)
    again.finish()
    assert target.read_bytes() == data


def test_progress_ahead_of_the_bytes_as_after_a_power_cut_is_found_by_the_hash(tmp_path: Path) -> None:
    target, data = tmp_path / "blob", some_bytes(1000)
    file = PartialFile(target, sha256(data), 1000)
    file.write(0, 0, data[:600])
    file.close()
    partial_names(target)[0].write_bytes(bytes(600))
    again = PartialFile(target, sha256(data), 1000)
    fill(again, data)
    with pytest.raises(HashMismatchError):
        again.finish()
    assert PartialFile(target, sha256(data), 1000).done() == [0]


def test_only_one_receives_a_file_at_a_time(tmp_path: Path) -> None:
    first = PartialFile(tmp_path / "blob", sha256(b"abc"), 3)
    with pytest.raises(PartialBusyError):
        PartialFile(tmp_path / "blob", sha256(b"abc"), 3)
    first.close()
    PartialFile(tmp_path / "blob", sha256(b"abc"), 3).close()


def test_who_waited_for_the_lock_does_not_take_the_finished_file_for_a_partial_one(tmp_path: Path) -> None:
    """Between our open and our lock the other receiver may have finished: then what we hold is the good file."""
    target = tmp_path / "blob"
    first = PartialFile(target, sha256(b"abc"), 3)
    first.write(0, 0, b"abc")
    lock = module.fcntl.flock

    def finish_then_lock(handle: int, how: int) -> None:
        first.finish()
        lock(handle, how)

    with mock.patch.object(module.fcntl, "flock", finish_then_lock), pytest.raises(PartialBusyError):
        PartialFile(target, sha256(b"abc"), 3)
    assert target.read_bytes() == b"abc"


def test_a_crash_after_the_rename_leaves_a_good_file_and_a_sidecar_nobody_believes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SAVE_EVERY_S", 0.0)
    target, data = tmp_path / "blob", some_bytes(5 * MIB)
    file = PartialFile(target, sha256(data), len(data))
    fill(file, data)
    with mock.patch.object(file, "_close", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        file.finish()
    assert target.read_bytes() == data
    assert partial_names(target)[1].exists()
    assert PartialFile(target, sha256(data), len(data)).done() == [0]


def test_a_file_that_was_removed_under_us_is_not_alive(tmp_path: Path) -> None:
    file = PartialFile(tmp_path / "blob", sha256(b"abc"), 3)
    assert file.alive
    partial_names(file.target)[0].unlink()
    assert not file.alive
    file.close()


def test_two_who_send_the_same_piece_at_once_write_it_once(tmp_path: Path) -> None:
    data = some_bytes(4 * MIB, seed=12)
    file = PartialFile(tmp_path / "blob", sha256(data), len(data), [(0, len(data))])
    for begin in range(0, len(data), 64_000):
        piece = data[begin : begin + 64_000]
        with ThreadPoolExecutor(4) as pool:
            errors = [one.exception() for one in [pool.submit(file.write, 0, begin, piece) for _ in range(4)]]
        assert [type(error) for error in errors if error is not None] == [OffsetError] * 3
    file.finish()
    assert (tmp_path / "blob").read_bytes() == data


def test_closing_waits_for_the_piece_that_is_being_written(tmp_path: Path) -> None:
    data, begun, go_on = some_bytes(MIB, seed=13), threading.Event(), threading.Event()
    file = PartialFile(tmp_path / "blob", sha256(data), len(data), [(0, len(data))])
    real = os.pwrite

    def slow(*arguments: Any) -> int:
        begun.set()
        assert go_on.wait(20)
        return real(*arguments)

    with mock.patch("os.pwrite", slow), ThreadPoolExecutor(2) as pool:
        writing = pool.submit(file.write, 0, 0, data[:1000])
        assert begun.wait(20)
        assert file.done() == [0]  # who asks does not wait
        closing = pool.submit(file.close)
        time.sleep(0.1)
        assert not closing.done()
        go_on.set()
        writing.result(20)
        closing.result(20)
    assert PartialFile(tmp_path / "blob", sha256(data), len(data), [(0, len(data))]).done() == [1000]


def test_a_fast_line_does_not_write_its_progress_down_more_often_than_it_is_worth(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 1000.0
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now))
    monkeypatch.setattr(module, "SAVE_EVERY_BYTES", 100)
    file = PartialFile(tmp_path / "blob", "0" * 64, 10_000)
    sidecar = partial_names(file.target)[1]

    def saved(size: int, seconds: float) -> int:
        """Bytes that are in the sidecar after `size` more, that took so long."""
        nonlocal now
        now += seconds
        file.write(0, file.done()[0], bytes(size))
        return int(json.loads(sidecar.read_text())["parts"][0][2]) if sidecar.exists() else 0

    tick = module.SAVE_EVERY_S
    assert saved(500, 0.0) == 0  # enough, too soon
    assert saved(0, tick) == 500
    assert saved(99, 10 * tick) == 500  # late, and not enough
    assert saved(1, 0.0) == 600
    assert [saved(500, tick / 4) for _ in range(8)] == [600] * 3 + [2600] * 4 + [4600]
    file.close()
    assert PartialFile(file.target, "0" * 64, 10_000).done() == [4600]


# Who hashes what


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
