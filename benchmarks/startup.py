"""From the command to the first training step, once the data is built: where a user's first seconds go.

Starts fresh processes, as a user does. Wall time, so run it on a machine that has nothing else to do; the CPU time of
the starting process beside it says how much of the wall time was work.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.common import DATA_DIR, RESULTS, DataDir, Out, Quiet, Report, Spread, builtin_text
from photon.errors import StoppedError
from photon.events import Event, NodeProgress, RunStarted

COMMANDS = (["--help"], ["train", "--help"], ["presets"])


def main(
    repeats: Annotated[int, typer.Option(help="Starts of each kind.", min=1)] = 5,
    data_dir: DataDir = DATA_DIR,
    out: Out = RESULTS,
    child: Annotated[Path | None, typer.Option(hidden=True, help="Be one start, in this new run folder.")] = None,
    began: Annotated[float, typer.Option(hidden=True, help="When that start was asked for, Unix time.")] = 0.0,
) -> None:
    """Seconds from starting `photon train demo` to each stage on the way to the first step."""
    if child is not None:
        start_once(child, data_dir, began)
        return
    report = Report("startup", out)
    builtin_text(data_dir)
    for arguments in COMMANDS:
        seconds = Spread([time_command(arguments) for _ in range(repeats)])
        report.add({"until": f"photon {' '.join(arguments)} is over", "wall s": str(seconds), "starts": repeats})
    starts = [one_start(data_dir) for _ in range(repeats)]
    for stage in starts[0]:
        wall = Spread([start[stage][0] for start in starts])
        cpu = Spread([start[stage][1] for start in starts])
        report.add({"until": f"train: {stage}", "wall s": str(wall), "own CPU s": str(cpu), "starts": repeats})
    report.show("seconds since the start of the process: median [quartiles]")


def time_command(arguments: list[str]) -> float:
    """Wall seconds of a `photon` command."""
    program = "import sys; from photon.cli import main; sys.argv[0] = 'photon'; main()"
    began = time.perf_counter()
    subprocess.run([sys.executable, "-c", program, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - began


def one_start(data_dir: str) -> dict[str, tuple[float, float]]:
    """Stages of one start in a process of its own: name -> (wall seconds, its CPU seconds)."""
    with tempfile.TemporaryDirectory(prefix="photon-benchmark-") as folder:
        command = [sys.executable, "-m", "benchmarks.startup", "--child", folder, "--data-dir", data_dir]
        command += ["--began", str(time.time())]  # the kernel's time of a process's start is up to a second off
        done = subprocess.run(command, check=True, capture_output=True, text=True)
    stages: dict[str, tuple[float, float]] = {k: tuple(v) for k, v in json.loads(done.stdout.splitlines()[-1]).items()}
    return stages


class Stopwatch(Quiet):
    """Notes when the run gets how far, and stops it after the first step."""

    def __init__(self, began: float) -> None:
        super().__init__()
        self._began = began
        self.stages: dict[str, tuple[float, float]] = {}

    def reach(self, stage: str) -> None:
        """Note the first time a stage is reached."""
        self.stages.setdefault(stage, (time.time() - self._began, time.process_time()))

    def data_progress(self, silo: str, phase: str, done_bytes: int, total_bytes: int | None, note: str) -> None:
        self.reach("data found")

    def write(self, event: Event) -> None:
        if isinstance(event, RunStarted):
            self.reach("run started")

    def progress(self, progress: NodeProgress) -> None:
        if progress.state == "evaluating":
            self.reach("a worker begins the first score")
        if progress.state == "training":
            self.reach("first training step done")
            raise KeyboardInterrupt


def start_once(folder: Path, data_dir: str, began: float) -> None:
    """`photon train demo`, with a stopwatch in the place of the screen."""
    watch = Stopwatch(began)
    watch.reach("benchmark's own imports done")  # more than the command needs: torch among them
    from photon.recipe import load_recipe
    from photon.run import train
    from photon.runfolder import RunFolder

    recipe = load_recipe("demo", [f"data.dir={json.dumps(data_dir)}"])
    watch.reach("recipe read, all modules imported")
    try:
        train(recipe, RunFolder(folder), watch)
    except StoppedError:
        print(json.dumps(watch.stages))


if __name__ == "__main__":
    typer.run(main)
