"""`make bench`: every benchmark has its turn whatever the others do, and Ctrl-C leaves nothing behind."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from unittest import mock

import benchmarks.all as quick
import pytest
import typer

# Ctrl-C reaches the whole group of the terminal: here this process and itself.
INTERRUPTED = """
import os, pathlib, signal, sys, time
def stop(number, frame):
    time.sleep(0.5)  # ending runs and removing folders takes longer than `subprocess.run` waits
    pathlib.Path(sys.argv[1]).write_text("tidy")
    sys.exit(1)
signal.signal(signal.SIGINT, stop)
os.kill(os.getppid(), signal.SIGINT)
os.kill(os.getpid(), signal.SIGINT)
time.sleep(60)
"""


def test_one_that_fails_keeps_no_other_from_running(tmp_path: Path) -> None:
    asked: list[str] = []

    def fail(command: list[str]) -> int:
        asked.append(command[2])
        return 1

    with mock.patch.object(quick, "run", fail), pytest.raises(typer.Exit) as ended:
        quick.main(["startup", "memory"], out=tmp_path)
    assert ended.value.exit_code == 1
    assert asked == ["benchmarks.startup", "benchmarks.memory"]


def test_an_unknown_name_is_refused_before_anything_runs() -> None:
    with mock.patch.object(quick, "run") as run, pytest.raises(typer.BadParameter, match="startup"):
        quick.main(["startup", "strtup"])
    run.assert_not_called()


def test_ctrl_c_gives_the_benchmark_time_to_end(tmp_path: Path) -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            quick.run([sys.executable, "-c", INTERRUPTED, str(tmp_path / "end")])
    finally:
        signal.signal(signal.SIGINT, before)
    assert (tmp_path / "end").read_text() == "tidy"
