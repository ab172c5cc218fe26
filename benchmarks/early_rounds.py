"""What is gained in wall time where communication hides behind training: methods in pairs, over the same line.

Two nodes and the Aggregator as processes of their own on this machine, each node behind a line of a given rate, 20 ms
there and back. The two of a pair exchange the same bytes for the same local steps; nodes of the first wait for the next
base, those of the second train on. The methods take turns.
"""

from __future__ import annotations

import math
import tempfile
from pathlib import Path
from statistics import fmean, median
from typing import Annotated

import typer
from tests.faults.shaped import MBIT, Line, Recorded, federate
from tests.faults.sites import write_texts

from benchmarks.common import RESULTS, Out, Report

METHODS = {
    "DiLoCo": "",
    "DiLoCo, eager": 'parts = ["eager"]',
    "two fragments": 'parts = ["fragments(count=2)"]',
    "two fragments, delay 1": 'parts = ["fragments(count=2, delay=1)"]',
}
WAITS_IN = {"DiLoCo, eager": "DiLoCo", "two fragments, delay 1": "two fragments"}


def main(
    width: Annotated[int, typer.Option(help="Of the model; 192 is 3.8 MB as float32.")] = 192,
    tau: Annotated[int, typer.Option(help="Local steps of a round.")] = 96,
    rounds: Annotated[int, typer.Option(help="Of each federation; from the third on they are measured.", min=5)] = 8,
    mbit_per_s: Annotated[float, typer.Option(help="Of each node's line.")] = 10.0,
    turns: Annotated[int, typer.Option(help="How often each method is run.", min=1)] = 2,
    out: Out = RESULTS,
) -> None:
    """Seconds of a round, and the share of it in which nodes train."""
    report, line = Report("early_rounds", out), Line(mbit_per_s * MBIT, 0.02)
    with tempfile.TemporaryDirectory(prefix="photon-early-") as folder:
        texts = Path(folder) / "texts"
        write_texts(texts, ("ada", "bob"))
        recorded: dict[str, list[Recorded]] = {name: [] for name in METHODS}
        for turn in range(turns):
            for name, extra in METHODS.items():
                place = Path(folder) / f"{name}-{turn}"
                recorded[name].append(federate(place, texts, line, width=width, rounds=rounds, extra=extra, tau=tau))
    for name, runs in recorded.items():
        report.add(_row(name, runs, mbit_per_s, median(_round_s(recorded[WAITS_IN.get(name, name)]))))
    report.show("seconds of a round")


def _round_s(runs: list[Recorded]) -> list[float]:
    """Of all later rounds but the last, which hides behind nothing."""
    return [math.fsum(event.phases_s.values()) for run in runs for event in run.later[:-1]]


def _row(name: str, runs: list[Recorded], mbit_per_s: float, plain_s: float) -> dict[str, object]:
    walls = _round_s(runs)
    trains = [max(node.seconds for node in event.nodes.values()) for run in runs for event in run.later[:-1]]
    return {
        "method": name,
        "Mbit/s": mbit_per_s,
        "model MB": round(runs[0].parameters * 4 / 1e6, 2),
        "rounds": len(walls),
        "round s (median)": round(median(walls), 2),
        "over the one that waits": round(median(walls) / plain_s, 3),
        "nodes train s": round(fmean(trains), 2),
        "share in which nodes train": round(fmean(trains) / fmean(walls), 3),
        "bytes by all lines": runs[0].carried_bytes,
    }


if __name__ == "__main__":
    typer.run(main)
