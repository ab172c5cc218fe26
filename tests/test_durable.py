"""Whole or not at all: a state is as it was written, or refused by name; a crash leaves what was there before."""

from __future__ import annotations

import json
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from photon import durable
from photon.durable import STATE_FILE, NumberedStates, kept_numbers, write_atomic
from photon.errors import StateError

FILES: dict[str, list[bytes]] = {"model.safetensors": [bytes(range(256))] * 5, "empty": []}
FIELDS = {"run": "r", "round": 3, "seconds": 1.5}


class Crash(BaseException):
    """The process ends here."""


@contextmanager
def crash_at(step: int) -> Iterator[list[int]]:
    """Raise Crash at the `step`-th write (half done) or rename; gives the list of those that were begun."""
    done: list[int] = []
    write, rename, replace = durable._write_synced, Path.rename, Path.replace

    def counted(original: Callable[[Path, Any], object], half: bool) -> Callable[[Path, Any], object]:
        def call(path: Path, argument: Any) -> object:
            done.append(len(done))
            if done[-1] == step:
                if half:
                    data = b"".join(argument)
                    path.write_bytes(data[: len(data) // 2])
                raise Crash
            return original(path, argument)

        return call

    with (
        mock.patch.object(durable, "_write_synced", counted(write, half=True)),
        mock.patch.object(Path, "rename", counted(rename, half=False)),
        mock.patch.object(Path, "replace", counted(replace, half=False)),
    ):
        yield done


def test_what_was_committed_is_read(tmp_path: Path) -> None:
    states = NumberedStates(tmp_path / "states")
    assert states.numbers() == []
    states.commit(3, FILES, FIELDS)
    states.commit(12, {}, {})
    assert states.numbers() == [3, 12]
    states.commit(1_000_000, {}, {})  # more digits than are written of others
    assert states.numbers() == [3, 12, 1_000_000]
    state = states.load(3)
    assert (state.number, state.fields) == (3, FIELDS)
    assert {name: state.read(name) for name in FILES} == {name: b"".join(chunks) for name, chunks in FILES.items()}
    assert sorted(path.name for path in states.root.iterdir()) == ["000003", "000012", "1000000"]


def test_everything_is_flushed_before_it_is_renamed(tmp_path: Path) -> None:
    """Else a power cut could leave the new name over pages that were never written."""
    order: list[str] = []
    rename = Path.rename

    def renaming(path: Path, target: Path) -> Path:
        order.append("rename")
        return rename(path, target)

    with (
        mock.patch.object(os, "fsync", lambda handle: order.append("flush")),
        mock.patch.object(Path, "rename", renaming),
    ):
        NumberedStates(tmp_path / "states").commit(1, FILES, FIELDS)
    # Two files, the manifest, the folder that names them; then the rename, and the folder that names it.
    assert order == ["flush"] * 4 + ["rename", "flush"]


@pytest.mark.parametrize("replaces", [False, True])
def test_a_crash_in_a_commit_leaves_no_half_state(replaces: bool, tmp_path: Path) -> None:
    """A new state is there whole or not at all. One that is written again may be gone for an instant, never damaged."""
    outcomes = set()
    for step in range(20):
        states = NumberedStates(tmp_path / str(step))
        states.commit(1, FILES, {"version": "before"})
        if replaces:
            states.commit(2, FILES, {"version": "old"})
        with crash_at(step) as done:
            try:
                states.commit(2, {**FILES, "more": [b"x"]}, {"version": "new"})
            except Crash:
                pass
            else:
                break
        assert states.load(1).fields == {"version": "before"}
        outcomes.add(states.load(2).fields["version"] if 2 in states.numbers() else "none")
        states.prune([1, 2])
        assert not list(states.root.glob(".*"))
        states.commit(2, FILES, {"version": "again"})
        assert states.load(2).fields == {"version": "again"}
    assert len(done) == (6 if replaces else 5)  # the step of the last pass, in which nothing crashed
    assert outcomes == ({"old", "none"} if replaces else {"none"})


def test_a_draft_becomes_a_file_of_the_state_that_takes_it_over(tmp_path: Path) -> None:
    states = NumberedStates(tmp_path / "states")
    states.commit(1, FILES, FIELDS)
    draft = states.draft(FILES["model.safetensors"])
    data = b"".join(FILES["model.safetensors"])
    assert (draft.path.read_bytes(), draft.sha256) == (data, sha256(data).hexdigest())
    assert states.numbers() == [1]  # no state before it is committed
    hashes = states.commit(2, {"model.safetensors": draft, "more": [b"x"]}, FIELDS)
    assert hashes == {"model.safetensors": draft.sha256, "more": sha256(b"x").hexdigest()}
    assert {name: states.load(2).read(name) for name in hashes} == {"model.safetensors": data, "more": b"x"}
    assert not draft.path.exists()
    states.draft([b"nobody's"])
    states.prune([1, 2])
    assert sorted(path.name for path in states.root.iterdir()) == ["000001", "000002"]


def test_a_crash_while_a_draft_is_taken_over_leaves_no_half_state(tmp_path: Path) -> None:
    for step in range(20):
        states = NumberedStates(tmp_path / str(step))
        states.commit(1, FILES, {"version": "before"})
        with crash_at(step) as done:
            try:
                draft = states.draft(FILES["model.safetensors"])
                states.commit(2, {"model.safetensors": draft, "more": [b"x"]}, {"version": "new"})
            except Crash:
                pass
            else:
                break
        assert states.load(1).fields == {"version": "before"}
        assert states.numbers() == [1]
        states.prune([1, 2])
        assert not list(states.root.glob(".*"))
    assert len(done) == 5  # the draft, its move, the other file, the manifest, the state's name


@pytest.mark.parametrize("what", ["commit", "draft"])
def test_a_full_disk_is_told_and_nothing_is_left_on_it(what: str, tmp_path: Path) -> None:
    """Attempt after attempt would else leave half a state, until there is no room for a whole one."""
    states = NumberedStates(tmp_path)
    states.commit(1, FILES, FIELDS)
    write = durable._write_synced

    def full(path: Path, chunks: Any) -> object:
        write(path, [b"half"])
        raise OSError(28, "No space left on device")

    with (
        mock.patch.object(durable, "_write_synced", full),
        pytest.raises(StateError, match=r"cannot be written there \(No space left on device\)\. Make room"),
    ):
        states.commit(2, FILES, FIELDS) if what == "commit" else states.draft([b"model"])
    assert [entry.name for entry in tmp_path.iterdir()] == ["000001"]
    states.commit(2, FILES, FIELDS)
    assert states.numbers() == [1, 2]


def test_a_crash_in_write_atomic_leaves_the_old_content(tmp_path: Path) -> None:
    path = tmp_path / "run.json"
    write_atomic(path, "old")
    for step in range(2):
        with crash_at(step), pytest.raises(Crash):
            write_atomic(path, "new")
        assert path.read_text() == "old"
        assert [entry.name for entry in tmp_path.iterdir()] == ["run.json"]
    write_atomic(path, b"new")
    assert path.read_bytes() == b"new"


DAMAGE: dict[str, Callable[[Path], object]] = {
    "shorter": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "empty": lambda path: path.write_bytes(b""),
    "missing": lambda path: path.unlink(),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_refused_by_name(damage: str, tmp_path: Path) -> None:
    states = NumberedStates(tmp_path)
    states.commit(3, FILES, FIELDS)
    DAMAGE[damage](tmp_path / "000003" / "model.safetensors")
    with pytest.raises(StateError, match=r"000003/model\.safetensors"):
        states.load(3)


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 1280 * 8 - 1))
def test_any_flipped_bit_of_a_file_is_found(tmp_path_factory: pytest.TempPathFactory, bit: int) -> None:
    with mock.patch.object(os, "fsync"):
        states = NumberedStates(tmp_path_factory.mktemp("flip"))
        states.commit(3, FILES, FIELDS)
    path = states.folder(3) / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)
    with pytest.raises(StateError, match="damaged: its sha256"):
        states.load(3)


MANIFESTS = {
    "not JSON": "{",
    "not UTF-8": b"\xff\xfe{}",
    "empty": "",
    "a list": "[]",
    "null": "null",
    "no fields": '{"number": 3, "files": {}}',
    "no files": '{"number": 3, "fields": {}}',
    "files are no object": '{"number": 3, "fields": {}, "files": 7}',
}


@pytest.mark.parametrize("content", MANIFESTS)
def test_a_damaged_manifest_is_refused_by_name(content: str, tmp_path: Path) -> None:
    states = NumberedStates(tmp_path)
    states.commit(3, FILES, FIELDS)
    text = MANIFESTS[content]
    (tmp_path / "000003" / STATE_FILE).write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(StateError, match=r"000003/state\.json"):
        states.load(3)


def test_a_manifest_without_a_hash_is_refused(tmp_path: Path) -> None:
    states = NumberedStates(tmp_path)
    states.commit(3, FILES, FIELDS)
    path = tmp_path / "000003" / STATE_FILE
    for broken in ({}, {"bytes": 1280}, None, 7):
        content = json.loads(path.read_text())
        path.write_text(json.dumps(content | {"files": {"model.safetensors": broken}}))
        with pytest.raises(StateError, match="000003"):
            states.load(3)


def test_any_change_of_the_fields_is_found(tmp_path: Path) -> None:
    states = NumberedStates(tmp_path)
    states.commit(3, FILES, FIELDS)
    path = tmp_path / "000003" / STATE_FILE
    path.write_text(path.read_text().replace('"round": 3', '"round": 2'))
    with pytest.raises(StateError, match="000003"):
        states.load(3)


def test_a_state_that_is_not_there_or_not_itself_is_refused(tmp_path: Path) -> None:
    states = NumberedStates(tmp_path)
    with pytest.raises(StateError, match=r"000004 holds no state\.json: there is no state 4"):
        states.load(4)
    states.commit(3, FILES, FIELDS)
    shutil.copytree(tmp_path / "000003", tmp_path / "000004")
    with pytest.raises(StateError, match="says it is state 3: the folder was renamed or copied"):
        states.load(4)


def test_pruning_removes_the_rest_and_what_crashes_left(tmp_path: Path) -> None:
    states = NumberedStates(tmp_path)
    for number in range(6):
        states.commit(number, FILES, {"number": number})
    (tmp_path / ".pending-000009-abc").mkdir()
    (tmp_path / ".pending-000009-abc" / "half").write_bytes(b"")
    (tmp_path / "set-aside-000007-abc").mkdir()  # put away on purpose: not pruned
    states.prune([1, 5, 8])
    assert states.numbers() == [1, 5]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["000001", "000005", "set-aside-000007-abc"]


def test_set_aside_keeps_the_content_out_of_the_way(tmp_path: Path) -> None:
    states = NumberedStates(tmp_path)
    for number in range(4):
        states.commit(number, FILES, {"number": number})
    states.set_aside(1)
    assert states.numbers() == [0, 1]
    aside = sorted(path for path in tmp_path.iterdir() if path.name.startswith("set-aside-"))
    assert [json.loads((path / STATE_FILE).read_text())["number"] for path in aside] == [2, 3]
    states.commit(2, FILES, {"number": 2})
    states.set_aside(1)  # twice: no clash of names
    assert len([path for path in tmp_path.iterdir() if path.name.startswith("set-aside-")]) == 3


@given(st.sets(st.integers(0, 60)), st.integers(1, 5), st.integers(0, 12))
def test_the_retention_rule(numbers: set[int], keep_last: int, keep_every: int) -> None:
    """A number stays if fewer than `keep_last` are newer, or if it is a multiple of `keep_every`."""
    expected = {
        number
        for number in numbers
        if sum(other > number for other in numbers) < keep_last or (keep_every > 0 and number % keep_every == 0)
    }
    assert kept_numbers(numbers, keep_last, keep_every) == expected


def test_what_one_may_not_see_is_not_taken_for_absent(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert stat.S_ISREG(durable.mode_of(tmp_path / "file"))
    assert stat.S_ISDIR(durable.mode_of(tmp_path))
    assert durable.mode_of(tmp_path / "nothing") == durable.mode_of(tmp_path / "file" / "below") == 0
    with mock.patch.object(Path, "stat", side_effect=PermissionError(13, "denied")), pytest.raises(PermissionError):
        durable.mode_of(tmp_path / "file")
