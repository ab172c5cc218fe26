"""Peak memory of the Aggregator's round loop, phase by phase, against the tensors that it cannot do without.

One fresh process does what `photon aggregator`'s round loop does, over a fabric in the process that answers each task
from one file, as updates arrive over a network: three rounds with the final score, then another such process resumes
from what the first committed. Peaks are the kernel's (`VmHWM`), set back before each phase. They hold pages of library
files too, torch's above all, which the kernel shares between processes and drops when memory is short: their least
(`RssFile`) is told apart.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from photon.config import Recipe
    from photon.fabric.base import Arrival, NodeInfo
    from photon.link.update import Sealed

WIDTH, VOCABULARY, LENGTH = 1024, 512, 64
MEGABYTES_PER_LAYER = 12 * WIDTH**2 * 4 / 1e6
ROUNDS = 3
TOKENS_PER_STEP = 64


def main(
    megabytes: Annotated[int, typer.Option(help="Size of the model in float32, in steps of 50 MB.", min=50)] = 200,
    nodes: Annotated[int, typer.Option(help="K.", min=1)] = 2,
    outer: Annotated[str, typer.Option(help="federation.outer.")] = "nesterov",
    vocabulary: Annotated[int, typer.Option(help="Rows of 1,024 numbers of the largest tensor.")] = VOCABULARY,
    out: Annotated[Path | None, typer.Option(help="Folder of the JSON lines; default benchmarks/results.")] = None,
    child: Annotated[Path | None, typer.Option(hidden=True, help="Be one process of the run in this folder.")] = None,
) -> None:
    """Merge state by part, peak by phase, and the peak beyond the state; under 300 MB is the aim."""
    if child is not None:
        be_the_round_loop(child, recipe_of(megabytes, nodes, outer, vocabulary))
        return
    from benchmarks.common import RESULTS, Report, command

    report = Report("aggregator_memory", out or RESULTS)
    command_line = [sys.executable, *sys.orig_argv[1:]]
    with tempfile.TemporaryDirectory(prefix="photon-benchmark-", dir=Path.cwd()) as folder:
        write_update(recipe_of(megabytes, nodes, outer, vocabulary), Path(folder) / "update")
        for what in ("a run", "its resume"):
            done = subprocess.run([*command_line, "--child", folder], check=True, stdout=subprocess.PIPE, text=True)
            found = json.loads(done.stdout.splitlines()[-1])
            peak = max(found["phases"].values())
            row = {"what": what, "model MB": found["model"], "outer": outer, "nodes": nodes, **found["state"]}
            state = sum(found["state"].values())
            beyond = {"beyond MB": peak - state, "of it files": found["files"]}
            report.add({**row, "state MB": state, "peak MB": peak, **beyond, **found["phases"]})
    report.show("MB; the phases' peaks are of the whole process")
    report.say(f"again: {command()}")


class FromFile:
    """A fabric whose nodes answer at once, each with the same update, in a file."""

    foretells = False

    def __init__(self, names: list[str], update: Path, sha256: str) -> None:
        self.slots = len(names)
        self._names, self._update, self._sha256 = names, update, sha256
        self._open: deque[tuple[str, Sealed]] = deque()

    def nodes(self) -> list[NodeInfo]:
        from photon.fabric.base import NodeInfo

        return [NodeInfo(name, TOKENS_PER_STEP) for name in self._names]

    def send(self, node: str, message: Sealed) -> None:
        self._open.append((node, message))

    def foretell(self, node: str, message: Sealed) -> None:
        """Its nodes never wait."""

    def receive(self, timeout_s: float) -> Arrival | None:
        from photon.fabric.base import Arrival

        return Arrival(*self._answer(*self._open.popleft())) if self._open else None

    def carried(self) -> None:
        """It counts no bytes."""

    def abandon(self, node: str) -> None:
        pass

    def close(self) -> None:
        pass

    def _answer(self, node: str, message: Sealed) -> tuple[str, Sealed]:
        from photon.link.body import whole_file
        from photon.link.update import EvaluationReport, Reply, TrainingReport, decode_message, expect_task, seal

        task = expect_task(decode_message(message))
        header: dict[str, Any] = task.model_dump(include={"run", "round", "node", "nonce", "base_sha256"})
        if task.evaluate:
            header["evaluation"] = EvaluationReport(nats=2.0, tokens=1, text_bytes=1.0, unigram_nats=2.0)
        if not task.tau:
            return node, seal(Reply(status="ok", **header))
        header["training"] = TrainingReport(
            tokens=task.tau * TOKENS_PER_STEP, steps=task.tau, loss_first=1.0, loss_last=1.0, loss_mean=1.0,
            gradient_norm_mean=1.0, clipped_steps=0, learning_rate=0.1, seconds=1.0, epoch=0.0,
        )  # fmt: skip
        return node, seal(Reply(status="ok", body_sha256=self._sha256, **header), whole_file(self._update))


class Peaks:
    """Peak resident memory of this process by phase, in MB."""

    def __init__(self) -> None:
        self.phases: dict[str, int] = {}
        self.files: int | None = None  # pages of files, the least after any phase

    def end(self, phase: str) -> None:
        """What was needed since the last call belongs to `phase`; of several of that name the highest counts."""
        status = Path("/proc/self/status").read_text(encoding="ascii")
        peak = int(status.partition("VmHWM:")[2].split()[0]) * 1024
        self.phases[f"{phase}:"] = max(self.phases.get(f"{phase}:", 0), round(peak / 1e6))
        files = round(int(status.partition("RssFile:")[2].split()[0]) * 1024 / 1e6)
        self.files = files if self.files is None else min(self.files, files)
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # VmHWM begins anew at what is resident now

    def watch(self, owner: object, method: str, phase: str) -> None:
        """Count calls of `owner.method` as `phase`, and what comes before each as `between`."""
        call: Callable[..., object] = getattr(owner, method)

        def watched(*arguments: object, **options: object) -> object:
            self.end("between")
            try:
                return call(*arguments, **options)
            finally:
                self.end(phase)

        setattr(owner, method, watched)


def recipe_of(megabytes: int, nodes: int, outer: str, vocabulary: int) -> Recipe:
    """The demo with another model, and nodes that need no text."""
    from photon.recipe import load_recipe

    silos = ", ".join(f'{{name="node-{index}", text=["builtin:tools"]}}' for index in range(nodes))
    return load_recipe("demo", [
        f"model.layers={round(megabytes / MEGABYTES_PER_LAYER)}", f"model.width={WIDTH}", "model.heads=8",
        f"data.vocab_size={vocabulary}", f"data.sequence_length={LENGTH}", f"silo=[{silos}]",
        f"federation.outer={outer}", f"federation.rounds={ROUNDS}", "federation.parts=[]",
    ])  # fmt: skip


def be_the_round_loop(folder: Path, recipe: Recipe) -> None:
    """Begin or resume the run in `folder`, one round less than all at first, and print what it took as JSON."""
    peaks = Peaks()
    import photon.sites_far  # noqa: F401  # all that the real process imports, Flower too
    from photon.aggregator.server import Aggregator
    from photon.aggregator.state import GlobalState, Progress, RoundStore
    from photon.link.body import whole_file
    from photon.link.tensors import encode_tensors, sha256_hex
    from photon.model.build import build_model, named_weights
    from photon.track import JsonlSink, Tracker

    peaks.end("imports")
    store = RoundStore(folder / "rounds", keep_last=2, keep_every=0)
    begun = bool(store.rounds())
    if not begun:
        federation = recipe.federation.model_copy(update={"rounds": ROUNDS - 1})
        recipe = recipe.model_copy(update={"federation": federation})
    update = folder / "update"
    fabric = FromFile([silo.name for silo in recipe.silo], update, sha256_hex(whole_file(update)))
    # As `photon.run` does: the model is there until the Aggregator has its weights.
    model = build_model(recipe.model, recipe.data.vocab_size, LENGTH, recipe.seed)
    state = store.load("r") if begun else GlobalState(Progress("r"), encode_tensors(named_weights(model)), {})
    with Tracker([], [], JsonlSink(folder / "metrics.jsonl")) as tracker:
        aggregator = Aggregator(recipe, fabric, store, tracker, state)
        del model, state
        peaks.end("start")
        for owner, method, phase in (
            (aggregator, "_gather", "nodes"),
            (aggregator.outer, "step", "outer"),
            (aggregator, "_final_evaluation", "final score"),
            (aggregator, "_commit", "commit"),
        ):
            peaks.watch(owner, method, phase)
        began = time.monotonic()
        final = aggregator.run()
        peaks.end("between")
    weights = sum(tensor.numel() * tensor.element_size() for tensor in aggregator.outer.weights().values())
    outer = sum(tensor.numel() * tensor.element_size() for tensor in final.outer.values())
    parts = {"sums": 2 * weights, "weights": weights, "outer state": outer}
    found = {
        "model": round(weights / 1e6),
        "state": {name: round(size / 1e6) for name, size in parts.items()},
        "phases": peaks.phases,
        "files": peaks.files,
        "seconds": time.monotonic() - began,
    }
    print(f"{final.model_sha256} after round {final.progress.round}, {found['seconds']:.1f} s", file=sys.stderr)
    print(json.dumps(found), flush=True)
    os._exit(0)


def write_update(recipe: Recipe, path: Path) -> None:
    """An update of small numbers with the names and shapes of the model, at `path`."""
    import torch

    from photon.link.tensors import tensor_chunks
    from photon.model.build import build_model, named_weights

    with torch.device("meta"):
        model = build_model(recipe.model, recipe.data.vocab_size, LENGTH, recipe.seed)
        shapes = {name: tensor.shape for name, tensor in named_weights(model).items()}
    generator = torch.Generator().manual_seed(0)
    update = {name: torch.randn(shape, generator=generator).mul_(1e-3) for name, shape in shapes.items()}
    with path.open("wb") as file:
        for chunk in tensor_chunks(update):
            file.write(chunk)


if __name__ == "__main__":
    typer.run(main)
