"""What the Link's presets cost in held-out loss and save in bytes: whole runs of a recipe, seed by seed.

Beside them runs per-step data-parallel training of the same model at equal tokens and equal sequential steps (the
centralised baseline with the batch of all nodes), whose gradients would cross in float32 at every step. With it, bytes
are also compared at matched loss: those that per-step training has moved when it reaches what a federated run ends
with. Finished runs are kept under `--runs`: call it again to go on. Differences are taken within each seed.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.common import RESULTS, ROOT, Out, Report, Row
from photon.compare_plan import recipe_key
from photon.events import Evaluated
from photon.recipe import load_recipe
from photon.summary import Summary
from photon.track import METRICS_FILE, read_events

EXACT, PER_STEP = "exact", "per-step"
_SEEDS = (1337, 1, 2)


def main(
    recipe: Annotated[str, typer.Option(help="Recipe of the runs.")] = "demo",
    links: Annotated[list[str] | None, typer.Option("--link", help="Presets; repeatable; default all three.")] = None,
    options: Annotated[
        list[str] | None, typer.Option("--set", help="An option of all runs, as section.key=value.")
    ] = None,
    codec: Annotated[list[str] | None, typer.Option(help="A variant: NAME:link.up=[...];link.down=[...]")] = None,
    seeds: Annotated[int, typer.Option(min=1, max=len(_SEEDS))] = 3,
    runs: Annotated[Path, typer.Option(help="Folder of the runs; finished ones are not repeated.")] = ROOT
    / "runs"
    / "presets",
    out: Out = RESULTS,
) -> None:
    """Run what is missing, then write a row a run and the table."""
    report = Report("link_presets", out)
    variants = {name: [f"link={name}"] for name in links or [EXACT, "balanced", "tiny"]}
    for text in codec or []:
        name, _, settings = text.partition(":")
        variants[name] = settings.split(";")
    variants[PER_STEP] = ["federation.outer=none"]
    common = options or []
    losses: dict[str, list[float]] = {name: [] for name in variants}
    rows: dict[str, list[Row]] = {name: [] for name in variants}
    for seed in _SEEDS[:seeds]:
        for name, setting in variants.items():
            folder = runs / f"{name}-{seed}"
            summary = _run(folder, [recipe, f"seed={seed}", *common, *setting])
            row = _row(name, seed, summary)
            losses[name].append(_final(summary))
            rows[name].append(row)
    for name in variants:
        for row in rows[name]:
            report.add({**row, **_against(runs / f"{PER_STEP}-{row['seed']}", row)})
        if name not in (EXACT, PER_STEP) and EXACT in losses:
            shares = [100 * (ours / exact - 1) for ours, exact in zip(losses[name], losses[EXACT], strict=True)]
            report.say(f"{name}: {_spread(shares)} % more loss than {EXACT}, each seed {[f'{s:+.3f}' for s in shares]}")
    report.show("bytes and held-out loss, a row a run")


def _run(folder: Path, arguments: Sequence[str]) -> Summary:
    """The summary of a finished run, trained or gone on with if it is not. Raises BadParameter for another run."""
    path, there = folder / "summary.json", folder / "recipe.toml"
    if there.is_file() and recipe_key(load_recipe(there)) != recipe_key(load_recipe(arguments[0], arguments[1:])):
        raise typer.BadParameter(f"{folder} has a run of other options; give --runs another folder, or remove that one")
    if not (path.is_file() and Summary.model_validate_json(path.read_bytes()).status == "finished"):
        photon = [sys.executable, "-m", "photon", "train"]
        begun = (folder / "run.json").is_file()
        command = [*photon, "--resume", str(folder)] if begun else [*photon, *arguments, "--run", str(folder)]
        print(" ".join(command[2:]), flush=True)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=ROOT)
    return Summary.model_validate_json(path.read_bytes())


def _row(name: str, seed: int, summary: Summary) -> Row:
    up, down = summary.link.up, summary.link.down
    is_federated = name != PER_STEP
    return {
        "variant": name,
        "seed": seed,
        "loss": _final(summary),
        "tokens": summary.tokens,
        "sequential steps": summary.sequential_steps,
        "fewer up": up.raw / up.encoded if is_federated else None,
        "fewer down": down.raw / down.encoded if is_federated else None,
        "fewer both": (up.raw + down.raw) / (up.encoded + down.encoded) if is_federated else None,
        "MB up": up.encoded / 1e6 if is_federated else None,
        "MB down": down.encoded / 1e6 if is_federated else None,
        "bytes per step": 2 * summary.payload_bytes * summary.nodes_per_round if is_federated else None,
        "model_sha256": summary.model_sha256,
    }


def _against(folder: Path, row: Row) -> Row:
    """At matched loss: bytes that per-step training has moved when it first scores as well, over those of this run."""
    step_bytes = row["bytes per step"]
    moved = row["MB up"], row["MB down"]
    if not isinstance(step_bytes, int) or not all(isinstance(part, float) for part in moved):
        return {"matched loss": None}
    loss = row["loss"]
    assert isinstance(loss, float)
    scored = [event for event in read_events(folder / METRICS_FILE) if isinstance(event, Evaluated)]
    first = next((event for event in scored if event.pooled.loss <= loss), None)
    if first is None:
        return {"matched loss": None}
    ours = sum(part for part in moved if isinstance(part, float)) * 1e6
    return {"matched steps": first.sequential_step, "matched loss": step_bytes * first.sequential_step / ours}


def _final(summary: Summary) -> float:
    assert summary.after is not None
    return summary.after.loss


def _spread(values: Sequence[float]) -> str:
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):+.3f} +- {deviation:.3f}"


if __name__ == "__main__":
    typer.run(main)
