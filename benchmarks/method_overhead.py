"""What a method costs the local fabric beyond FedAvg at equal work: CPU time of a local step, all told.

The method is laid over the same recipe with the same inner optimizer, so that training is the same work for both. Each
method runs beside a FedAvg of its own, round by round in turn: while one makes its round the other waits, so that
whatever slows this machine down slows both. The first turn warms up and is not counted. A step's CPU time is that of
the Aggregator and its workers, divided by the local steps of that turn; the ratio is taken turn by turn.

What more state must move is allowed for: what FedAvg's step costs outside of training (the Aggregator's CPU time,
and the nodes' to receive, encode and save) for each byte that it moves, times the bytes that the method moves more of:
over the Link both ways, and of a node's own state to its disk and back. Fewer of one are not set against more of the
other. A method that begins a round with an inner optimizer of its own, or corrects gradients, pays for that here too.
The row of `fedavg` beside itself tells how far two equal runs are apart; the second of a pair has measured up to 3 %
less.
"""

from __future__ import annotations

import json
import math
import tempfile
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Annotated, Literal

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
_TURN_S = 600.0  # far more than any takes: a run that died would otherwise be waited for without end


def main(
    methods: Annotated[list[str] | None, typer.Option("--method", help="Repeatable; default all.")] = None,
    turns: Annotated[int, typer.Option(help="Measured turns of each.", min=1)] = 10,
    option: Annotated[list[str] | None, typer.Option(help="Change the demo: section.key=value; repeatable.")] = None,
    equal_rounds: Annotated[
        bool, typer.Option("--equal-rounds", help="FedAvg exchanges as often as the method, not as often as the demo.")
    ] = False,
    data_dir: DataDir = DATA_DIR,
    out: Out = RESULTS,
) -> None:
    """CPU time of a step over FedAvg's, method by method; `--method fedavg` tells the noise."""
    pin()
    report = Report("method_overhead", out)
    builtin_text(data_dir)
    chosen = methods or [name for name in method_names() if name not in _OTHERS]
    overrides = [
        f"data.dir={json.dumps(data_dir)}",
        f"federation.rounds={turns + 1}",
        "node.optimizer=adamw",
        "node.total_steps=100000",  # the learning rate plays no part
        "evaluation.every=1000000",
        "evaluation.sample_tokens=0",
        *(option or []),
    ]
    for name in chosen:
        method = apply_method(load_method(name), "demo", overrides)
        federation = method.federation
        rounds = [f"federation.tau={federation.tau}", f"federation.rounds={federation.rounds}"] if equal_rounds else []
        fedavg = apply_method(load_method(FEDAVG), "demo", [*overrides, *rounds])
        report.add(row(name, *measure([fedavg, method])))
    report.show("CPU time of a local step over FedAvg's, median [quartiles] of the turns")


class NoTurnError(Exception):
    """A run has no turn any more. Not an OSError, as TimeoutError is: of a display that means a closed terminal."""


class Turns:
    """Lets the run go on that has made the fewest steps, and no other."""

    def __init__(self, runs: int) -> None:
        self._changed = threading.Condition()
        self._steps = [0.0] * runs
        self._next = 0
        self._is_over = False

    def wait(self, run: int) -> None:
        """Until it is the turn of `run`. Raises NoTurnError, if it does not come or there are no more."""
        with self._changed:
            if not self._changed.wait_for(lambda: self._is_over or self._next == run, _TURN_S):
                raise NoTurnError(f"run {self._next} did not end its turn in {_TURN_S:.0f} s")
            if self._is_over:
                raise NoTurnError("the measurement was stopped")

    def end(self, run: int, steps: float) -> bool:
        """The run has made `steps` in all (infinity: it is over). Whether it has to wait for its next turn."""
        with self._changed:
            self._steps[run] = steps
            self._next = self._steps.index(min(self._steps))
            self._changed.notify_all()
            return self._is_over or self._next != run

    def stop(self) -> None:
        """No run has another turn."""
        with self._changed:
            self._is_over = True
            self._changed.notify_all()


@dataclass
class Turn:
    """What the rounds of a turn cost: CPU seconds, of these outside of training; local steps; bytes over the Link both
    ways, and of nodes' own state to their disks and back."""

    cpu_s: float = 0.0
    moving_s: float = 0.0
    steps: int = 0
    link_bytes: int = 0
    state_bytes: int = 0

    @property
    def cpu_s_per_step(self) -> float:
        return self.cpu_s / self.steps


class Watch(Quiet):
    """Ends the run's turn when a round has brought it to the front, and keeps what each turn has cost."""

    def __init__(self, turns: Turns, run: int, folder: RunFolder) -> None:
        super().__init__()
        self.done: list[Turn] = []
        self._turns, self._run, self._folder = turns, run, folder
        self._steps = 0
        self._begin()

    def write(self, event: Event) -> None:
        """At the end of a round all its work is done, but the commit, which the next one's time has."""
        super().write(event)
        if not isinstance(event, RoundDone):
            return
        nodes = event.nodes.values()
        self._turn.steps += sum(node.steps for node in nodes)
        self._turn.moving_s += sum(node.receive_s + node.encode_s + node.save_s for node in nodes)
        self._turn.link_bytes += event.round_bytes_up + event.round_bytes_down
        self._turn.state_bytes += 2 * sum(_state_bytes(self._folder.node(name)) for name in event.nodes)
        self._steps += sum(node.steps for node in nodes)
        ended_s, own_ended_s = _cpu_seconds(), time.process_time()
        if self._turns.end(self._run, self._steps):
            self._turn.cpu_s = ended_s - self._began_s
            self._turn.moving_s += own_ended_s - self._own_began_s
            self.done.append(self._turn)
            self._turns.wait(self._run)
            self._begin()

    def _begin(self) -> None:
        self._turn, self._began_s, self._own_began_s = Turn(), _cpu_seconds(), time.process_time()


def _state_bytes(node: Path) -> int:
    """Of the newest state that a node has committed."""
    newest = max(folder for folder in (node / "state").iterdir() if folder.name.isdecimal())
    return sum(file.stat().st_size for file in newest.iterdir())


def _cpu_seconds() -> float:
    """Of this process and all its workers: all that ran since an earlier reading was the run whose turn it is."""
    children = psutil.Process().children()
    return time.process_time() + float(sum(sum(child.cpu_times()[:2]) for child in children))


def measure(recipes: Sequence[Recipe]) -> list[list[Turn]]:
    """The turns of each, all in one process, after the first."""
    turns = Turns(len(recipes))
    with ThreadPoolExecutor(len(recipes)) as pool:
        try:
            return [turn[1:] for turn in pool.map(lambda run: _run(recipes[run], turns, run), range(len(recipes)))]
        finally:
            turns.stop()  # on Ctrl-C, or when one fails, the others end with the round at hand


def _run(recipe: Recipe, turns: Turns, run: int) -> list[Turn]:
    try:
        turns.wait(run)
        with tempfile.TemporaryDirectory(prefix="photon-benchmark-") as temporary:
            folder = RunFolder(Path(temporary))
            train(recipe, folder, watch := Watch(turns, run, folder))
        return watch.done
    finally:
        turns.end(run, math.inf)


def row(name: str, fedavg: list[Turn], ours: list[Turn]) -> Row:
    """A method beside the FedAvg that it took turns with."""
    both = min(len(fedavg), len(ours))
    ratio = Spread.of_ratio([t.cpu_s_per_step for t in ours[:both]], [t.cpu_s_per_step for t in fedavg[:both]])
    link, kept = _per_step(fedavg, "link_bytes"), _per_step(fedavg, "state_bytes")
    more = max(0.0, _per_step(ours, "link_bytes") - link) + max(0.0, _per_step(ours, "state_bytes") - kept)
    allowed = more / (link + kept) * median(turn.moving_s / turn.cpu_s for turn in fedavg)
    return {
        "method": name,
        "step / FedAvg's": str(ratio),
        "bytes of a step / FedAvg's": _per_step(ours, "link_bytes") / link,
        "of own state / FedAvg's": _per_step(ours, "state_bytes") / kept,
        "allowed for bytes": allowed,
        "beyond that": ratio.median - 1 - allowed,
        "ms a step": 1e3 * median(turn.cpu_s_per_step for turn in ours),
        "of these not training": 1e3 * median(turn.moving_s / turn.steps for turn in ours),
        "turns": both,
    }


def _per_step(turns: list[Turn], field: Literal["link_bytes", "state_bytes"]) -> float:
    return float(sum(getattr(turn, field) for turn in turns)) / sum(turn.steps for turn in turns)


if __name__ == "__main__":
    typer.run(main)
