"""What a method costs the local fabric beyond FedAvg at equal work: CPU time of a local step, all told.

Every method is laid over the same recipe with the same inner optimizer, so that a local step is the same work for all.
Runs take turns; the first round of each warms up. A step's CPU time is that of the Aggregator and all its workers in
the rounds after it, divided by the local steps made there. What shared state must move is allowed for: the part of
FedAvg's step that is not training, times the bytes that the method moves more of.
"""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated

import psutil  # type: ignore[import-untyped]  # it ships no types
import typer

from benchmarks.common import DATA_DIR, RESULTS, DataDir, Out, Quiet, Report, Row, Spread, builtin_text, pin
from photon.config import Recipe
from photon.events import Event, RoundDone
from photon.method import apply_method, load_method, method_names
from photon.run import train
from photon.runfolder import RunFolder

FEDAVG = "fedavg"
# These train with one node, or with steps that are other work: nothing to compare.
_OTHERS = frozenset({"per-step", "central-small"})


def main(
    methods: Annotated[list[str] | None, typer.Option("--method", help="Repeatable; default all.")] = None,
    turns: Annotated[int, typer.Option(help="Runs of each.", min=1)] = 3,
    rounds: Annotated[int, typer.Option(help="Measured rounds of each run.", min=1)] = 4,
    option: Annotated[list[str] | None, typer.Option(help="Change the demo: section.key=value; repeatable.")] = None,
    data_dir: DataDir = DATA_DIR,
    out: Out = RESULTS,
) -> None:
    """CPU time of a step over FedAvg's, method by method."""
    pin()
    report = Report("method_overhead", out)
    builtin_text(data_dir)
    chosen = [name for name in methods or method_names() if name != FEDAVG and name not in _OTHERS]
    overrides = [
        f"data.dir={json.dumps(data_dir)}",
        f"federation.rounds={rounds + 1}",
        "node.optimizer=adamw",
        "node.total_steps=100000",  # the learning rate plays no part
        "evaluation.every=1000000",
        "evaluation.sample_tokens=0",
        *(option or []),
    ]
    recipes = {name: apply_method(load_method(name), "demo", overrides) for name in [FEDAVG, *chosen]}
    costs: dict[str, list[Cost]] = {name: [] for name in recipes}
    names = list(recipes)
    for turn in range(turns):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            costs[name].append(measure(recipes[name]))
    for name in chosen:
        report.add(row(name, costs[name], costs[FEDAVG]))
    report.show("CPU time of a local step over FedAvg's, median [quartiles] of the turns")


@dataclass(frozen=True)
class Cost:
    """A local step of the measured rounds: CPU seconds of all processes, seconds of training alone, bytes moved."""

    cpu_s: float
    training_s: float
    link_bytes: float


class Watch(Quiet):
    """Adds up what the rounds after the first cost."""

    def __init__(self) -> None:
        super().__init__()
        self.rounds: list[RoundDone] = []
        self.cpu_s: list[float] = []

    def write(self, event: Event) -> None:
        """At the end of a round all its work is done, but the commit, which the next one's time has."""
        super().write(event)
        if isinstance(event, RoundDone):
            self.rounds.append(event)
            self.cpu_s.append(self._cpu_s())

    def cost(self) -> Cost:
        """Of all but the first round."""
        later = self.rounds[1:]
        steps = sum(node.steps for event in later for node in event.nodes.values())
        link_bytes = sum(event.round_bytes_up + event.round_bytes_down for event in later)
        training_s = sum(node.seconds for event in later for node in event.nodes.values())
        return Cost((self.cpu_s[-1] - self.cpu_s[0]) / steps, training_s / steps, link_bytes / steps)

    def _cpu_s(self) -> float:
        own = psutil.Process()
        workers = [child for child in own.children() if "photon.fabric.worker" in child.cmdline()]
        return float(sum(sum(process.cpu_times()[:2]) for process in [own, *workers]))


def measure(recipe: Recipe) -> Cost:
    """One run."""
    with tempfile.TemporaryDirectory(prefix="photon-benchmark-") as temporary:
        watch = Watch()
        train(recipe, RunFolder(Path(temporary)), watch)
        return watch.cost()


def row(name: str, ours: list[Cost], fedavg: list[Cost]) -> Row:
    """A method beside FedAvg, run by run of the same turn."""
    ratio = Spread.of_ratio([cost.cpu_s for cost in ours], [cost.cpu_s for cost in fedavg])
    moved = median(a.link_bytes / b.link_bytes for a, b in zip(ours, fedavg, strict=True))
    share = median(1 - cost.training_s / cost.cpu_s for cost in fedavg)
    return {
        "method": name,
        "step / FedAvg's": str(ratio),
        "bytes of a step / FedAvg's": moved,
        "allowed for bytes": max(0.0, moved - 1) * share,
        "beyond that": ratio.median - 1 - max(0.0, moved - 1) * share,
        "ms a step": 1e3 * median(cost.cpu_s for cost in ours),
        "of these training": 1e3 * median(cost.training_s for cost in ours),
        "time": time.strftime("%H:%M"),
    }


if __name__ == "__main__":
    typer.run(main)
