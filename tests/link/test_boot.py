"""A name is believed since the machine was started, and not a moment longer."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path
from unittest import mock

import pytest

from photon.link import boot
from photon.link.boot import MARKER, this_boot, verify_after_boot

GOOD, BAD = b"what its name says", b"what a power cut left"
NAME = hashlib.sha256(GOOD).hexdigest()
OTHER = hashlib.sha256(b"another").hexdigest()


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file that tells which start of the machine this is."""
    path = tmp_path / "boot_id"
    path.write_text("first\n")
    monkeypatch.setattr(boot, "_BOOT_ID", path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "folder"
    path.mkdir()
    return path


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {MARKER}


def test_after_another_start_what_is_wrong_is_removed_and_what_is_right_stays(start: Path, folder: Path) -> None:
    verify_after_boot(folder, "*")
    (folder / NAME).write_bytes(GOOD)
    (folder / OTHER).write_bytes(BAD)
    verify_after_boot(folder, "*")
    assert names(folder) == {NAME, OTHER}  # they were checked when they came
    start.write_text("second\n")
    verify_after_boot(folder, "*")
    assert names(folder) == {NAME}
    assert (folder / NAME).read_bytes() == GOOD


def test_a_folder_without_a_marker_is_not_trusted(start: Path, folder: Path) -> None:
    (folder / OTHER).write_bytes(BAD)
    verify_after_boot(folder, "*")
    assert names(folder) == set()


@pytest.mark.parametrize("damage", [b"", b"firs", b"first\n\0", b"\xff\xfe", bytes(36)])
def test_a_damaged_marker_is_none(start: Path, folder: Path, damage: bytes) -> None:
    (folder / MARKER).write_bytes(damage)
    (folder / OTHER).write_bytes(BAD)
    verify_after_boot(folder, "*")
    assert names(folder) == set()
    assert (folder / MARKER).read_bytes() == b"first"


def test_files_are_hashed_once_after_a_start(start: Path, folder: Path) -> None:
    (folder / NAME).write_bytes(GOOD)
    with mock.patch.object(boot, "_is_whole", return_value=True) as hashed:
        for _ in range(3):
            verify_after_boot(folder, "*")
        assert hashed.call_count == 1
        start.write_text("second\n")
        for _ in range(3):
            verify_after_boot(folder, "*")
        assert hashed.call_count == 2


def test_a_check_that_was_interrupted_is_made_again(start: Path, folder: Path) -> None:
    (folder / OTHER).write_bytes(BAD)
    with mock.patch.object(boot, "_is_whole", side_effect=KeyboardInterrupt), pytest.raises(KeyboardInterrupt):
        verify_after_boot(folder, "*")
    verify_after_boot(folder, "*")
    assert names(folder) == set()


def test_only_finished_files_in_the_places_that_were_named_are_looked_at(start: Path, folder: Path) -> None:
    for place in ("up/ada", "up/ada/deeper", "tickets"):
        (folder / place).mkdir(parents=True)
    stay = [
        folder / OTHER,
        folder / "tickets" / OTHER,
        folder / "up" / "ada" / "deeper" / OTHER,
        folder / "up" / "ada" / f"{OTHER}.partial",
        folder / "up" / "ada" / f"{OTHER}.progress",
        folder / "up" / "ada" / OTHER.upper(),
    ]
    for path in (*stay, folder / "up" / "ada" / OTHER):
        path.write_bytes(BAD)
    (folder / "up" / "ada" / NAME).mkdir()
    verify_after_boot(folder, "up/*/*", "taken/*/*")
    assert all(path.exists() for path in stay)
    assert not (folder / "up" / "ada" / OTHER).exists()
    assert (folder / "up" / "ada" / NAME).is_dir()


def test_what_cannot_be_read_is_removed_and_said(start: Path, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (folder / NAME).write_bytes(GOOD)
    failing = mock.patch.object(boot.hashlib, "file_digest", side_effect=OSError(5, "Input/output error"))
    with failing, caplog.at_level(logging.WARNING):
        verify_after_boot(folder, "*")
    assert names(folder) == set()
    assert [f"{folder / NAME} is not what its name says" in text for text in caplog.messages] == [True]


def test_what_somebody_else_takes_away_meanwhile_is_no_error(start: Path, folder: Path) -> None:
    (folder / NAME).write_bytes(GOOD)
    with mock.patch.object(boot.hashlib, "file_digest", side_effect=FileNotFoundError):
        verify_after_boot(folder, "*")
    assert names(folder) == {NAME}


def test_this_machine_tells_one_start_from_another() -> None:
    assert this_boot()
    assert this_boot() == this_boot()


def test_elsewhere_the_time_of_the_start_tells_and_without_it_nothing_is_trusted(start: Path, folder: Path) -> None:
    start.unlink()
    with mock.patch("psutil.boot_time", side_effect=[1000.2, 999.8, 2000.0]):
        assert this_boot() == this_boot() != this_boot()
    with mock.patch("psutil.boot_time", side_effect=RuntimeError("no btime")):
        assert this_boot() == ""
        for _ in range(2):
            (folder / OTHER).write_bytes(BAD)
            verify_after_boot(folder, "*")
            assert names(folder) == set()
