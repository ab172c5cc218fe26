"""What a round over Flower costs when nothing is trained to speak of, and where the time goes.

A whole federation of processes on this machine (`photon train --fabric flower`), a very small model, few steps. What is
left of a round after training and scoring is overhead: questions and answers through Flower, blobs, commits.
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.common import DATA_DIR, RESULTS, DataDir, Out, Report, builtin_text

_OPTIONS = (
    "model.layers=2 model.width=32 model.heads=2 node.batch_size=1 node.micro_batch_size=1 federation.tau=1 "
    "node.warmup_steps=0 evaluation.every=1000 evaluation.sequences=4 evaluation.sample_tokens=0 "
    "data.sequence_length=64"
)


def main(
    rounds: Annotated[int, typer.Option(help="Rounds to measure.", min=1)] = 20,
    data_dir: DataDir = DATA_DIR,
    out: Out = RESULTS,
) -> None:
    """Median seconds of a round of the demo's four owners beyond training, on the local and on the flower fabric."""
    report = Report("site_rounds", out)
    builtin_text(data_dir, *_OPTIONS.split())  # else the first command's seconds would have it
    for fabric in ("local", "flower"):
        folder = Path(tempfile.mkdtemp(prefix="photon-rounds-"))
        try:
            began = time.monotonic()
            command = [sys.executable, "-m", "photon", "train", "demo", f"federation.rounds={rounds + 2}"]
            command += [f"data.dir={data_dir}", *_OPTIONS.split(), "--run", str(folder / "run"), "--fabric", fabric]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            report.add(_row(fabric, folder / "run", time.monotonic() - began))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    report.show("A round in which next to nothing is trained")


def _row(fabric: str, run: Path, whole_s: float) -> dict[str, object]:
    events = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    # The first round waits for everybody's trainer to start; the last has the final score behind it.
    measured = [event for event in events if event["event"] == "round"][1:-1]
    work = [max(node["seconds"] + node["evaluation_seconds"] for node in event["nodes"].values()) for event in measured]
    phases = {phase: [event["phases_s"][phase] for event in measured] for phase in measured[0]["phases_s"]}
    beyond = [sum(event["phases_s"].values()) - seconds for event, seconds in zip(measured, work, strict=True)]
    return {
        "fabric": fabric,
        "rounds": len(measured),
        "slowest node works s": round(statistics.median(work), 3),
        **{f"{phase} s": round(statistics.median(values), 3) for phase, values in phases.items()},
        "overhead of a round s": round(statistics.median(beyond), 2),
        "worst s": round(max(beyond), 2),
        "whole command s": round(whole_s, 1),
    }


if __name__ == "__main__":
    typer.run(main)
