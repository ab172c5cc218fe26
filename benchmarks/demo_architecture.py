"""Which small model learns most in a given CPU time: the choice behind the demo's preset.

Every candidate differs from the demo in a few options and trains on all four silos' text, in one process with one
thread, for the number of steps that fits its budget. That number follows from the candidate's measured step time
relative to the demo's, taken in turns, so a busy machine changes neither; the training itself is then deterministic.
The score is held-out bits per byte, which compares across vocabularies. Finished candidates are kept in
`demo_architecture.jsonl`: run it again to go on, add a candidate to the list to try another idea.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
import typer

from benchmarks.common import (
    DATA_DIR,
    RESULTS,
    DataDir,
    Out,
    Report,
    Spread,
    builtin_text,
    cpu_seconds,
    pin,
    pooled_stream,
    refuse_unknown,
    stored,
    take_turns,
)
from photon.config import Recipe
from photon.data.build import Prepared
from photon.data.shards import ShardReader
from photon.model.build import build_model, count_parameters
from photon.node.heldout import HeldOut, held_out, score
from photon.node.trainer import Trainer
from photon.recipe import load_recipe

BASELINE = "demo"
STEPS_PER_TURN = 3
_ROPE = ("model.positions=rope",)
_LLAMA = (*_ROPE, "model.norm=rmsnorm", "model.activation=swiglu")
_ADAMW = ("node.optimizer=adamw", "node.lr=4e-3")
CANDIDATES: dict[str, tuple[str, ...]] = {
    BASELINE: (),
    "rope": _ROPE,
    "rope, qk_norm": (*_ROPE, "model.qk_norm=true"),
    "learned": ("model.positions=learned",),
    "llama": _LLAMA,
    "llama, qk_norm": (*_LLAMA, "model.qk_norm=true"),
    "adamw": _ADAMW,
    "adamw lr 8e-3": ("node.optimizer=adamw", "node.lr=8e-3"),
    "adamw llama": (*_ADAMW, *_LLAMA),
    "width 96": ("model.width=96", "model.heads=3"),
    "width 160": ("model.width=160", "model.heads=5"),
    "width 160, 3 layers": ("model.width=160", "model.heads=5", "model.layers=3"),
    "3 layers": ("model.layers=3",),
    "6 layers": ("model.layers=6",),
    "batch 2": ("node.batch_size=2",),
    "batch 8": ("node.batch_size=8",),
    "batch 16": ("node.batch_size=16",),
    "vocabulary 2048": ("data.vocab_size=2048",),
    "sequence 128, batch 8": ("data.sequence_length=128", "node.batch_size=8"),
    "muon_lr 0.01": ("node.muon_lr=0.01",),
    "muon_lr 0.03": ("node.muon_lr=0.03",),
    "lr 5e-3": ("node.lr=5e-3",),
}


def main(
    cpu_budget_s: Annotated[float, typer.Option("--cpu-seconds", help="Training CPU seconds per candidate.")] = 60.0,
    only: Annotated[list[str] | None, typer.Option(help="Candidates by name; repeatable; default all.")] = None,
    seed: Annotated[int, typer.Option(help="Of weights and order of the text.")] = 1337,
    turns: Annotated[int, typer.Option(help="Turns to measure step times in.", min=1)] = 11,
    sequences: Annotated[int, typer.Option(help="Held-out sequences per silo.", min=1)] = 64,
    data_dir: DataDir = DATA_DIR,
    out: Out = RESULTS,
) -> None:
    """Held-out bits per byte of candidate demo models after equal CPU time."""
    refuse_unknown("--only", only, CANDIDATES)
    pin()
    report = Report("demo_architecture", out)
    budget = {"CPU budget s": cpu_budget_s, "seed": seed, "held-out sequences": sequences}
    done = [row for row in stored(report.name, out) if budget.items() <= ({"held-out sequences": 64} | row).items()]
    finished = {str(row["candidate"]) for row in done}
    wanted = [name for name in only or CANDIDATES if name not in finished]
    for name in wanted:
        trial = Trial(name, data_dir, seed)
        reference = float(str(done[0]["demo step CPU s"])) if done else None
        step_s, relative = step_time(trial, Trial(BASELINE, data_dir, seed), turns, reference)
        row = {"candidate": name, **trial.run(max(8, round(cpu_budget_s / (step_s * relative))), sequences)}
        done.append(row | {"step time / demo's": round(relative, 3), "demo step CPU s": step_s, **budget})
        report.add(done[-1])
    hidden = {"benchmark", "conditions", "demo step CPU s", *budget}
    ranking = sorted(done, key=lambda row: float(str(row["bits per byte"])))
    shown = [{key: value for key, value in row.items() if key not in hidden} for row in ranking]
    report.show(f"after {cpu_budget_s:g} CPU seconds of training, best first (seed {seed})", shown)


@dataclass
class Trial:
    """One candidate: its recipe and its text."""

    name: str
    data_dir: str
    seed: int

    def __post_init__(self) -> None:
        options = [f"data.dir={json.dumps(self.data_dir)}", *CANDIDATES[self.name]]
        self.recipe: Recipe = load_recipe("demo", options)
        self.prepared: Prepared = builtin_text(self.data_dir, *options)
        self.length = self.recipe.data.sequence_length
        self.stream = pooled_stream(self.prepared, self.length, self.seed)

    def trainer(self, total_steps: int) -> Trainer:
        """The untrained model with its optimizer and a schedule of so many steps, warm-up a twentieth of them."""
        node = self.recipe.node.model_copy(update={"warmup_steps": total_steps // 20, "device": "cpu"})
        model = build_model(self.recipe.model, self.prepared.tokenizer.vocab_size, self.length, self.seed)
        return Trainer(model, node, torch.device("cpu"), total_steps)

    def steps(self, trainer: Trainer, position: int, steps: int, first_step: int = 0) -> None:
        """Train on."""
        size = self.recipe.node.batch_size
        trainer.train(self.stream, position * size, size, steps, first_step, lambda step, loss: True)

    def run(self, steps: int, sequences: int) -> dict[str, object]:
        """Train for `steps` and score."""
        trainer = self.trainer(steps)
        began = cpu_seconds()
        self.steps(trainer, 0, steps)
        trained_s = cpu_seconds() - began
        found = score(trainer, self.held_out(sequences), batch_size=8)
        parameters = count_parameters(self.recipe.model, self.prepared.tokenizer.vocab_size, self.length)
        tokens = steps * self.recipe.node.batch_size * self.length
        return {
            "bits per byte": round(found.nats / found.text_bytes / math.log(2), 4),
            "nats per token": round(found.nats / found.tokens, 4),
            "steps": steps,
            "tokens": tokens,
            "parameters": parameters.total,
            "CPU s": round(trained_s, 1),
        }

    def held_out(self, sequences: int) -> list[HeldOut]:
        """Evenly spaced windows of every silo's held-out text."""
        readers = [ShardReader(source) for silo in self.prepared.silos.values() for source in silo.sources]
        return [held_out(reader, self.length, sequences) for reader in readers]


def step_time(trial: Trial, baseline: Trial, turns: int, reference_s: float | None) -> tuple[float, float]:
    """(CPU seconds of the demo's step, this candidate's step relative to it), taken in turns.

    `reference_s` is the demo's step time of earlier candidates: one number for all, so that all get the same budget.
    """

    def stepper(one: Trial) -> Callable[[], None]:
        trainer = one.trainer(10**6)
        return lambda: one.steps(trainer, 0, STEPS_PER_TURN)

    seconds = take_turns({"baseline": stepper(baseline), "trial": stepper(trial)}, turns)
    relative = 1.0 if trial.name == baseline.name else Spread.of_ratio(seconds["trial"], seconds["baseline"]).median
    return reference_s or Spread(seconds["baseline"]).median / STEPS_PER_TURN, relative


if __name__ == "__main__":
    typer.run(main)
