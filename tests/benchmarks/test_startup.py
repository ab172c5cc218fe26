"""A start is timed from when it was asked for."""

from __future__ import annotations

import json
import subprocess
import time
from typing import Any
from unittest import mock

from benchmarks import startup


def test_stages_are_seconds_since_the_process_was_asked_for() -> None:
    def start(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        """What the started process does, an hour later by its clock."""
        with mock.patch("time.time", return_value=time.time() + 3600):
            watch = startup.Stopwatch(float(command[command.index("--began") + 1]))
            watch.reach("data found")
        return subprocess.CompletedProcess(command, 0, json.dumps(watch.stages), "")

    with mock.patch("subprocess.run", start):
        wall_s, _ = startup.one_start("data")["data found"]
    assert 3600 <= wall_s < 3601
