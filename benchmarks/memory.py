"""Peak memory of a whole run against the tensors it cannot do without, where tensors dominate.

The floor: the model, one gradient, the optimizer state of each of the K nodes, and the merge's sums, each once. A run
of two rounds is watched from outside: the sum over the Aggregator and its workers of resident memory, ten
milliseconds apart. From it goes what the same processes take with a model of next to nothing (interpreter, torch,
tokenizer), measured the same way just before.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import psutil  # type: ignore[import-untyped]  # it ships no types
import typer

from benchmarks.common import DATA_DIR, RESULTS, DataDir, Out, Report, Row, builtin_text
from photon.model.build import count_parameters
from photon.recipe import load_recipe

MIB = 2**20
SAMPLE_EVERY_S = 0.01
STOP_WITHIN_S = 60.0
# Bytes per parameter: float32 weights and gradient, AdamW's two moments in float32, the merge's int64 sums.
MODEL_BYTES, GRADIENT_BYTES, OPTIMIZER_BYTES, MERGE_BYTES = 4, 4, 8, 8
OPTIONS = [
    "data.sequence_length=64",
    "data.max_bytes_per_silo=1000000",
    "node.batch_size=1",
    "node.optimizer=adamw",
    "node.workers=1",
    "node.threads=1",
    "node.device=cpu",
    "node.total_steps=1000",
    "federation.rounds=2",
    "federation.tau=2",
    "evaluation.sequences=2",
    "evaluation.sample_tokens=0",
]


def main(
    layers: Annotated[int, typer.Option(help="Blocks; 12 of width 512 with 4096 tokens are 40 million numbers.")] = 12,
    width: Annotated[int, typer.Option(help="Model width, a multiple of 8.")] = 512,
    nodes: Annotated[
        list[int] | None, typer.Option(help="K; repeatable, to see what grows with it; default 4.")
    ] = None,
    option: Annotated[list[str] | None, typer.Option(help="Change the run: section.key=value; repeatable.")] = None,
    data_dir: DataDir = DATA_DIR,
    out: Out = RESULTS,
) -> None:
    """Peak resident memory over model + gradient + K x optimizer state + merge; 1.3 is the aim."""
    report = Report("memory", out)
    processes: list[Row] = []
    for count in nodes or [4]:
        owners = ", ".join(f'{{name="node-{index}", text=["builtin:tools"]}}' for index in range(count))
        options = [f"data.dir={json.dumps(data_dir)}", *OPTIONS, f"silo=[{owners}]", *(option or [])]
        prepared = builtin_text(data_dir, *options)
        empty = watch([*options, "model.layers=1", "model.width=32", "model.heads=1"])
        options += [f"model.layers={layers}", f"model.width={width}", "model.heads=8"]
        recipe = load_recipe("demo", options)
        vocabulary, length = prepared.tokenizer.vocab_size, recipe.data.sequence_length
        parameters = count_parameters(recipe.model, vocabulary, length).total
        full = watch(options)
        floor = parameters * (MODEL_BYTES + GRADIENT_BYTES + count * OPTIMIZER_BYTES + MERGE_BYTES)
        row: dict[str, object] = {"parameters": parameters, "nodes": count, "workers": len(full.workers)}
        row |= {"floor MiB": round(floor / MIB), "baseline MiB": round(empty.peak / MIB)}
        row |= {
            "peak MiB": round(full.peak / MIB),
            "(peak - baseline) / floor": round((full.peak - empty.peak) / floor, 3),
        }
        report.add(row)
        roles = [("aggregator", full.aggregator, empty.aggregator)]
        roles += [("worker", *peaks) for peaks in zip(full.workers.values(), empty.workers.values(), strict=False)]
        for role, peak, base in roles:
            copies = round((peak - base) / (parameters * MODEL_BYTES), 2)
            processes.append({"process": role, "nodes": count, "peak MiB": round(peak / MIB), "copies": copies})
    report.show("the whole run: resident memory of all processes together")
    report.show("each process at its own peak; copies: (peak - baseline) / float32 weights", processes)
    for process in processes:
        report.add(process)


@dataclass
class Peaks:
    """Most bytes resident: all processes at one moment, and each process at its own worst."""

    peak: int = 0
    aggregator: int = 0
    workers: dict[int, int] = field(default_factory=dict)


def watch(options: list[str]) -> Peaks:
    """Run the demo with `options` in a temporary folder and watch its memory. Raises RuntimeError if it fails."""
    with tempfile.TemporaryDirectory(prefix="photon-benchmark-") as folder:
        log = Path(folder) / "log"
        command = [sys.executable, "-c", "from photon.cli import main; main()", "train", "demo", *options]
        with log.open("wb") as output:
            run = subprocess.Popen([*command, "--run", f"{folder}/run"], stdout=output, stderr=output)
            peaks = Peaks()
            try:
                while run.poll() is None:
                    sample(psutil.Process(run.pid), peaks)
                    time.sleep(SAMPLE_EVERY_S)
            finally:
                run.terminate()  # as Ctrl-C does, and before its folder goes; nothing to one that is over
                run.wait(STOP_WITHIN_S)
        if run.returncode:
            raise RuntimeError(f"the run failed:\n{log.read_text(errors='replace')[-2000:]}")
    return peaks


def sample(run: psutil.Process, peaks: Peaks) -> None:
    """Take one look at the run and its workers."""
    try:
        own = run.memory_info().rss
        workers = {child.pid: child.memory_info().rss for child in run.children()}
    except psutil.NoSuchProcess:
        return  # one ended while we looked
    peaks.peak = max(peaks.peak, own + sum(workers.values()))
    peaks.aggregator = max(peaks.aggregator, own)
    for pid, resident in workers.items():
        peaks.workers[pid] = max(peaks.workers.get(pid, 0), resident)


if __name__ == "__main__":
    typer.run(main)
