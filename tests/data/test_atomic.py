from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from photon.data.atomic import new_folder
from photon.errors import DataError


def test_a_finished_folder_appears_whole(tmp_path: Path) -> None:
    target = tmp_path / "a" / "b"
    with new_folder(target) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "file").write_text("x")
        assert not target.exists()
    assert (target / "sub" / "file").read_text() == "x"
    assert [path.name for path in target.parent.iterdir()] == ["b"]


def test_an_exception_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(KeyError), new_folder(tmp_path / "b") as temporary:
        (temporary / "file").write_text("x")
        raise KeyError
    assert list(tmp_path.iterdir()) == []


def test_the_first_to_finish_is_kept(tmp_path: Path) -> None:
    target = tmp_path / "b"
    with new_folder(target) as slower:
        (slower / "file").write_text("slower")
        with new_folder(target) as faster:
            (faster / "file").write_text("faster")
    assert (target / "file").read_text() == "faster"
    assert [path.name for path in tmp_path.iterdir()] == ["b"]


def test_what_a_killed_process_left_is_no_result_and_is_removed_later(tmp_path: Path) -> None:
    script = (
        "import sys, time; from pathlib import Path; from photon.data.atomic import new_folder\n"
        "with new_folder(Path(sys.argv[1])) as temporary:\n"
        "    (temporary / 'file').write_text('half'); print('writing', flush=True); time.sleep(60)\n"
    )
    target = tmp_path / "b"
    with subprocess.Popen([sys.executable, "-c", script, str(target)], stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stdout.readline() == b"writing\n"
        with new_folder(tmp_path / "other"):
            pass
        assert len(list(tmp_path.glob(".b.*.tmp"))) == 1, "a living build must not be touched"
        os.kill(child.pid, signal.SIGKILL)
    assert not target.exists()
    assert len(list(tmp_path.glob(".b.*.tmp"))) == 1
    with new_folder(target) as temporary:
        (temporary / "file").write_text("whole")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["b", "other"]
    assert (target / "file").read_text() == "whole"


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(DataError, match=r"file/b: cannot be created"), new_folder(tmp_path / "file" / "b"):
        pass
