"""The floor is of the model that runs, whatever options change of it; Ctrl-C leaves no run behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest

from benchmarks import memory
from photon.config import ModelConfig
from photon.model.build import count_parameters


def test_the_floor_counts_the_model_that_was_run(tmp_path: Path) -> None:
    prepared = SimpleNamespace(tokenizer=SimpleNamespace(vocab_size=1000))
    peaks = memory.Peaks(peak=10, aggregator=5, workers={1: 5})
    with (
        mock.patch.object(memory, "builtin_text", return_value=prepared),
        mock.patch.object(memory, "watch", return_value=peaks),
    ):
        memory.main(
            layers=2,
            width=64,
            nodes=[1],
            option=["data.vocab_size=1000", "model.positions=learned", "data.sequence_length=128"],
            data_dir="data",
            out=tmp_path,
        )
    row = json.loads((tmp_path / "memory.jsonl").read_text().splitlines()[0])
    model = ModelConfig(layers=2, width=64, heads=8, positions="learned")
    assert row["parameters"] == count_parameters(model, 1000, 128).total


def test_ctrl_c_ends_the_run_before_its_folder_goes() -> None:
    runs: list[subprocess.Popen[bytes]] = []
    popen = subprocess.Popen

    def start(*_: object, **__: object) -> subprocess.Popen[bytes]:
        runs.append(popen([sys.executable, "-c", "import time; time.sleep(60)"]))
        return runs[0]

    try:
        with (
            mock.patch.object(subprocess, "Popen", start),
            mock.patch.object(memory, "sample", side_effect=KeyboardInterrupt),
            pytest.raises(KeyboardInterrupt),
        ):
            memory.watch([])
        assert runs[0].returncode is not None
    finally:
        runs[0].kill()
        runs[0].wait()
