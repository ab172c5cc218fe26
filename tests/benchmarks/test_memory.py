"""The floor is of the model that runs, whatever options change of it."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

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
