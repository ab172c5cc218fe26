"""A file that arrives in pieces is whole and right under its name, or is not there; a kill costs a few MiB."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.link.pieces import fill, sha256, some_bytes

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
