"""Does a plan come true? Predicted beside measured seconds of a round, between real processes over shaped lines.

Two nodes and the Aggregator as processes of their own on this machine, each node behind a line of a given rate, 20 ms
there and back. What nodes and the Aggregator take is measured in a federation without such lines; with that, and the
line's rate, the planner predicts a round over it, before one is run.
"""

from __future__ import annotations

import math
import tempfile
from dataclasses import replace
from pathlib import Path
from statistics import fmean, stdev
from typing import Annotated

import typer
from tests.faults.shaped import MBIT, Line, Recorded, federate
from tests.faults.sites import write_texts

from benchmarks.common import RESULTS, Out, Report
from photon.devices import ideal_speed
from photon.plan_bytes import round_bytes
from photon.plan_sizes import link_codecs, model_facts
from photon.planner import RoundPrediction, predict_round
from photon.report_plan import phases_of

_NETWORK = "messages and transfer"
_COMMIT = "commit of the round before"
_MEASURED = {"decode", "evaluate", "train", "encode", "save", "merge", "outer"}


def main(
    width: Annotated[int, typer.Option(help="Of the model; 192 is 3.8 MB as float32.")] = 192,
    rounds: Annotated[int, typer.Option(help="Of each federation; from the third on they are measured.", min=4)] = 6,
    latency_ms: Annotated[float, typer.Option(help="There and back.")] = 20.0,
    codecs: Annotated[str, typer.Option(help="Options of [link], such as 'up = \"int8\"'.")] = "",
    out: Out = RESULTS,
) -> None:
    """Seconds of a round: predicted, measured (mean of the later rounds), and measured / predicted."""
    report = Report("plan_check", out)
    with tempfile.TemporaryDirectory(prefix="photon-plan-check-") as folder:
        texts = Path(folder) / "texts"
        write_texts(texts, ("ada", "bob"))
        open_ = federate(Path(folder) / "open", texts, None, width=width, rounds=rounds, codecs=codecs)
        for mbit_per_s in (10, 100, 1000):
            line = Line(mbit_per_s * MBIT, latency_ms / 1e3)
            predicted = predict_over(line, open_)
            name = f"line-{mbit_per_s}"
            measured = federate(Path(folder) / name, texts, line, width=width, rounds=rounds, codecs=codecs)
            report.add({"Mbit/s": mbit_per_s, "latency ms": latency_ms, **row(predicted, measured)})
    report.show("seconds of a round")


def predict_over(line: Line, open_: Recorded) -> RoundPrediction:
    """A round over `line` where nodes and Aggregator take what they took without one."""
    timed = mean_phases(open_)
    facts = model_facts(open_.recipe)
    sizes = round_bytes(facts.shapes, link_codecs(open_.recipe))
    # Without a line, what is no work of theirs is messages alone.
    machine = replace(ideal_speed(math.inf), control_s=timed[_NETWORK])
    plan = predict_round(open_.recipe, facts.parameters, sizes, machine, line.speed)
    own = {phase: timed[phase] for phase in _MEASURED} | {"commit": timed[_COMMIT]}
    return RoundPrediction(plan.phases_s | own, sizes)


def mean_phases(recorded: Recorded) -> dict[str, float]:
    """Of its later rounds."""
    phases = [phases_of(event) for event in recorded.later]
    return {phase: fmean(one[phase] for one in phases) for phase in phases[0]}


def row(predicted: RoundPrediction, measured: Recorded) -> dict[str, object]:
    """One line of the table."""
    walls = [math.fsum(event.phases_s.values()) for event in measured.later]
    network = predicted.phases_s["control"] + predicted.phases_s["download"] + predicted.phases_s["upload"]
    return {
        "rounds": len(walls),
        "body bytes down, up": f"{predicted.node_bytes.down_bytes:,}, {predicted.node_bytes.up_bytes:,}",
        "predicted s": round(predicted.round_s, 2),
        "measured s": round(fmean(walls), 2),
        "spread s": round(stdev(walls), 2),
        "ratio": round(fmean(walls) / predicted.round_s, 3),
        "messages, transfer: predicted s": round(network, 2),
        "measured  s": round(mean_phases(measured)[_NETWORK], 2),
    }


if __name__ == "__main__":
    typer.run(main)
