"""What every benchmark shares: how it is timed, what it says of the machine, and where its results go.

Ratios are what counts, so they are made to survive a busy machine: variants take turns in blocks of a few steps, the
ratio is taken within each turn, and the median over the turns is reported with its quartiles. On a CPU the clock is
the process's own CPU time and one thread computes: two threads beside another busy process can fall ten-fold.
"""

from __future__ import annotations

import functools
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Self

import psutil  # type: ignore[import-untyped]  # it ships no types
import torch
import typer
from rich.console import Console
from rich.table import Table

from photon.data.build import Prepared, Progress, prepare
from photon.data.shards import ShardReader
from photon.data.stream import Stream
from photon.display import RunView
from photon.events import Event, NodeProgress
from photon.node.device import WorkerPlan, available_cores, configure_process
from photon.options import hint
from photon.recipe import load_recipe

ROOT = Path(__file__).resolve().parent.parent
_RESULTS = "benchmarks/results"
RESULTS = ROOT / _RESULTS

Row = Mapping[str, object]
Out = Annotated[Path, typer.Option(help="Folder of the JSON lines; a run appends to its benchmark's file.")]
DataDir = Annotated[str, typer.Option(help="Folder for the built-in text's tokenizer and shards; reused.")]
DATA_DIR = str(ROOT / "data")


class Report:
    """Rows of one benchmark: appended to `<out>/<name>.jsonl`, each with the machine and the moment, and tabulated."""

    def __init__(self, name: str, out: Path) -> None:
        self.name, self.path = name, out / f"{name}.jsonl"
        self.conditions = machine() | revision() | {"command": command()}
        self.rows: list[Row] = []
        self._console = Console(width=None if sys.stdout.isatty() else 160)
        self._console.print(f"[bold]{name}[/bold]: {json.dumps(self.conditions)}", soft_wrap=True)

    def add(self, row: Row) -> None:
        """Write a row at once, so that an interrupted benchmark keeps what it has measured."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"benchmark": self.name, **row, "conditions": self.conditions}) + "\n")
        self.rows.append(row)

    def show(self, title: str, rows: Sequence[Row] | None = None) -> None:
        """Print `rows` (all that were added, unless given) as a table; columns in the order of their appearance."""
        rows = self.rows if rows is None else rows
        columns = list(dict.fromkeys(key for row in rows for key in row))
        table = Table(title=title, title_justify="left", title_style="bold")
        for column in columns:
            table.add_column(column, justify="left" if isinstance(rows[0].get(column), str) else "right")
        for row in rows:
            table.add_row(*(_cell(row.get(column)) for column in columns))
        self._console.print(table)

    def say(self, text: str) -> None:
        """A line of conclusion."""
        self._console.print(text, soft_wrap=True)


def stored(name: str, out: Path) -> list[dict[str, object]]:
    """The rows that earlier runs of benchmark `name` left in `out`."""
    path = out / f"{name}.jsonl"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def machine() -> dict[str, object]:
    """The computer, as far as it decides the numbers."""
    found: dict[str, object] = {
        "cpu": _cpu_name(),
        "cores": available_cores(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "load_average": round(os.getloadavg()[0], 2),  # what else ran when the benchmark began
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
    if torch.cuda.is_available():
        found["gpu"] = torch.cuda.get_device_name()
    return found


def revision() -> dict[str, object]:
    """The commit, whether what is measured or what measures differs from it, and the date (UTC)."""
    commit = _git("rev-parse", "--short=12", "HEAD")
    changed = [part for part in ("src", "benchmarks") if _git("status", "--porcelain", "--", part, f":!{_RESULTS}")]
    return {
        "commit": (commit or "unknown") + (f" with changes in {' and '.join(changed)}" if changed else ""),
        "date": time.strftime("%Y-%m-%dT%H:%MZ", time.gmtime()),
    }


def command() -> str:
    """How to run this again."""
    module = Path(sys.argv[0]).stem
    return shlex.join(["python", "-m", f"benchmarks.{module}", *sys.argv[1:]]).replace(f"{ROOT}/", "")


def refuse_unknown(option: str, names: Sequence[str] | None, known: Collection[str]) -> None:
    """Before anything is measured. Raises BadParameter for a name that is not known."""
    for name in names or []:
        if name not in known:
            raise typer.BadParameter(f"{option} {name}: {hint(name, known)}")


def pin(threads: int = 1, device: str = "cpu") -> None:
    """Threads and allocator of this process, exactly as Photon sets up its workers. Call before the first tensor."""
    configure_process(WorkerPlan(device, threads))


def cpu_seconds() -> float:
    """CPU time of this process so far, user and system, all threads."""
    return time.process_time()


def take_turns(
    variants: Mapping[str, Callable[[], None]], turns: int, clock: Callable[[], float] = cpu_seconds
) -> dict[str, list[float]]:
    """Seconds of each variant in each turn; every turn runs all variants, in an order that rotates.

    One turn beforehand is not counted: it pays for lazy initialisation.
    """
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    names = list(variants)
    for turn in range(-1, turns):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            began = clock()
            variants[name]()
            if turn >= 0:
                seconds[name].append(clock() - began)
    return seconds


class Spread:
    """Median and quartiles of repeated measurements."""

    def __init__(self, values: Sequence[float]) -> None:
        self.median = statistics.median(values)
        quartiles = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else [self.median] * 3
        self.low, self.high = quartiles[0], quartiles[2]

    @classmethod
    def of_ratio(cls, above: Sequence[float], below: Sequence[float]) -> Self:
        """Of `above / below`, turn by turn: what slows one turn down slows both."""
        return cls([a / b for a, b in zip(above, below, strict=True)])

    def __str__(self) -> str:
        return f"{self.median:.3f} [{self.low:.3f}, {self.high:.3f}]"


class Quiet:
    """A display that shows only how far the data is; a benchmark may override what it wants to see."""

    def __init__(self) -> None:
        self.view = RunView()

    def write(self, event: Event) -> None:
        self.view.fold(event)

    def progress(self, progress: NodeProgress) -> None:
        pass

    def note(self, text: str) -> None:
        print(text, file=sys.stderr)

    def data_progress(self, silo: str, phase: str, done_bytes: int, total_bytes: int | None, note: str) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


def builtin_text(data_dir: str, *options: str) -> Prepared:
    """The demo's four silos of built-in text, built on first use (a minute) and then reused."""
    told: set[str] = set()

    def tell(progress: Progress) -> None:
        key = f"{progress.silo} {progress.phase}".strip()
        if progress.phase != "reuse" and key not in told:
            told.add(key)
            print(f"data: {key}", file=sys.stderr)

    return prepare(load_recipe("demo", [f"data.dir={json.dumps(data_dir)}", *options]), progress=tell)


def pooled_stream(prepared: Prepared, sequence_length: int, seed: int) -> Stream:
    """One stream of every silo's training text, mixed by size."""
    readers = [ShardReader(source) for silo in prepared.silos.values() for source in silo.sources]
    return Stream(readers, None, sequence_length, seed, "benchmark")


def _cell(value: object) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return f"{value:,}" if isinstance(value, int) else str("" if value is None else value)


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=False)
    return done.stdout.strip()


@functools.cache
def _cpu_name() -> str:
    information = Path("/proc/cpuinfo")
    lines = information.read_text().splitlines() if information.is_file() else []
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    parts = {key.strip(): value.strip() for key, value in fields.items()}
    model = f" (model {parts['model']})" if "model" in parts else ""  # virtual machines often hide the name
    return parts.get("model name", platform.processor() or platform.machine()) + model
