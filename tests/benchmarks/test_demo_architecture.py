"""Candidates are ranked and skipped only beside those that were scored on the same text."""

from __future__ import annotations

import json
from pathlib import Path
from unittest import mock

import pytest

from benchmarks import demo_architecture


@pytest.mark.parametrize(("sequences", "measured"), [(64, []), (8, ["demo"])])
def test_a_score_on_other_held_out_text_is_another_result(tmp_path: Path, sequences: int, measured: list[str]) -> None:
    row = {"candidate": "demo", "bits per byte": 2.0, "CPU budget s": 1.0, "seed": 1, "demo step CPU s": 0.1}
    (tmp_path / "demo_architecture.jsonl").write_text(json.dumps(row) + "\n")  # of before sequences were told: 64
    with (
        mock.patch.object(demo_architecture, "Trial") as trial,
        mock.patch.object(demo_architecture, "step_time", return_value=(0.1, 1.0)),
        mock.patch.object(demo_architecture, "pin"),
    ):
        trial.return_value.run.return_value = {"bits per byte": 2.1}
        demo_architecture.main(1.0, ["demo"], seed=1, sequences=sequences, data_dir="data", out=tmp_path)
    rows = [json.loads(line) for line in (tmp_path / "demo_architecture.jsonl").read_text().splitlines()]
    assert [one["candidate"] for one in rows[1:]] == measured
