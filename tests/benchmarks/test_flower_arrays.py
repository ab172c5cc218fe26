"""Flower is that of the Python that runs, whatever environment a shell has activated."""

from __future__ import annotations

import subprocess
from pathlib import Path
from unittest import mock

import pytest

from benchmarks import flower_arrays


def test_the_superlink_is_started_from_this_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class StartedError(Exception):
        pass

    def start(command: list[str], **_: object) -> None:
        raise StartedError if Path(command[0]).is_file() else FileNotFoundError(command[0])

    monkeypatch.setenv("VIRTUAL_ENV", str(tmp_path / "another"))
    with mock.patch.object(subprocess, "Popen", start), pytest.raises(StartedError):
        flower_arrays.round_trip(tmp_path, 4)
