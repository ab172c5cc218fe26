"""A whole federated run on this machine against the same K training loops without any federation.

`photon` is a real run: Aggregator, worker processes, updates as bytes, states on disk, evaluation only at the ends.
`bare` is K hand-written loops over the same model, optimizer and batches, on as many processes with as many threads.
The two take turns round by round: the bare loops run while the Aggregator is held between two rounds, so what else
the machine does hits both. In the first round every loop must give the very losses its node reports: equal work.
"""

from __future__ import annotations

import contextlib
import cProfile
import json
import math
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated

import psutil  # type: ignore[import-untyped]  # it ships no types
import torch
import typer

from benchmarks.bare import train_bare
from benchmarks.common import DATA_DIR, RESULTS, DataDir, Out, Quiet, Report, Row, Spread, builtin_text, pin
from photon.config import Recipe
from photon.events import Event, RoundDone, RunStarted
from photon.fabric.site import SITE_FILE, SiteFile, open_site
from photon.link.tensors import encode_tensors, sha256_hex
from photon.link.update import Task, encode_message
from photon.model.build import build_model, named_weights
from photon.node.base import Bases
from photon.node.node import Node
from photon.node.optimizers import build_optimizer
from photon.node.schedule import learning_rate_scale
from photon.node.trainer import Trainer
from photon.recipe import load_recipe
from photon.run import train
from photon.runfolder import RunFolder

# Where the CPU time of a node's round and of the Aggregator's goes: function in src/photon -> what it is.
NODE_PARTS = {
    "node/trainer.py:train": "tau local steps",
    "link/tensors.py:sha256_hex": "hash of the base",
    "model/build.py:load_weights": "swap: weights in",
    "node/state.py:load": "swap: own state from disk",
    "node/optimizers.py:import_state": "swap: optimizer in",
    "node/optimizers.py:state_views": "swap: optimizer out",
    "node/node.py:_update": "pseudo-gradient",
    "node/state.py:commit": "commit own state",
}
AGGREGATOR_PARTS = {
    "aggregator/validate.py:verify_training": "verify replies",
    "aggregator/merge.py:fold": "fold into the merge",
    "aggregator/drift.py:sample_update": "sample for cosines",
    "aggregator/merge.py:_means": "finish the merge (while the outer step reads it)",
    "aggregator/drift.py:pairwise_cosine": "cosines of updates",
    "aggregator/norms.py:squares_of": "norms",
    "aggregator/outer.py:step": "outer step",
    "link/tensors.py:encode_tensors": "serialise the model (and outer state)",
    "link/tensors.py:sha256_hex": "hash the model",
    "fabric/local.py:send": "hand tasks to workers",
    "fabric/local.py:receive": "wait for and read replies",
    "aggregator/state.py:commit": "commit the round",
}


def main(
    rounds: Annotated[int, typer.Option(help="Measured rounds; one more warms up.", min=1)] = 4,
    tau: Annotated[int, typer.Option(help="Local steps per round; 16 makes about 10 s on two cores.", min=1)] = 16,
    option: Annotated[list[str] | None, typer.Option(help="Change the demo: section.key=value; repeatable.")] = None,
    data_dir: DataDir = DATA_DIR,
    out: Out = RESULTS,
) -> None:
    """Tokens per second of the local fabric over bare training loops, at the demo's size."""
    pin()
    report = Report("fabric_overhead", out)
    changes = [
        f"data.dir={json.dumps(data_dir)}",
        f"federation.rounds={rounds + 1}",
        f"federation.tau={tau}",
        "node.total_steps=100000",  # the learning rate plays no part
        "evaluation.every=1000000",
        "evaluation.sample_tokens=0",
        *(option or []),
    ]
    recipe = load_recipe("demo", changes)
    builtin_text(data_dir)
    with tempfile.TemporaryDirectory(prefix="photon-benchmark-") as temporary:
        folder = RunFolder(Path(temporary))
        duel = Duel(recipe, folder)
        profile = cProfile.Profile(time.process_time)
        with duel:
            duel.profile = profile
            profile.enable()
            train(recipe, folder, duel)
            profile.disable()
        report.add(duel.row())
        report.show("rounds: wall seconds, and CPU seconds of all processes; ratios of speed, median [quartiles]")
        aggregator = parts(profile, AGGREGATOR_PARTS, rounds + 1, "aggregator/server.py:_round")
        node = node_parts(recipe, folder)
    report.show("one node's round, CPU seconds", node)
    report.show("the Aggregator's round, CPU seconds", aggregator)
    for where, found in (("node", node), ("aggregator", aggregator)):
        report.add({"parts of": where, **{str(row["part"]): row["CPU s"] for row in found}})


@dataclass
class Turn:
    """One round of the run and the same steps of the bare loops."""

    photon_s: float
    photon_cpu_s: float
    bare_s: float
    bare_cpu_s: float
    tokens: int
    phases_s: dict[str, float]
    local_s: float  # the longest of the workers' training times, had they been dealt out evenly


class Duel(Quiet):
    """A display that holds the Aggregator after each round and lets the bare loops do the same steps."""

    def __init__(self, recipe: Recipe, folder: RunFolder) -> None:
        super().__init__()
        self.recipe, self.folder = recipe, folder
        self.turns: list[Turn] = []
        self.profile: cProfile.Profile | None = None
        self.loops: list[BareProcess] = []
        self._resumed = 0.0
        self._resumed_cpu = 0.0
        self.workers = 0

    def __exit__(self, *_: object) -> None:
        for loop in self.loops:
            loop.close()

    def write(self, event: Event) -> None:
        now, cpu = time.perf_counter(), self._cpu_s()
        with self._unprofiled():
            if isinstance(event, RunStarted):
                self._start_loops(event)
            elif isinstance(event, RoundDone):
                self._take_turn(event, now - self._resumed, cpu - self._resumed_cpu)
        self._resumed, self._resumed_cpu = time.perf_counter(), self._cpu_s()

    def _start_loops(self, event: RunStarted) -> None:
        self.workers = event.workers
        names = [silo.name for silo in self.recipe.silo]
        for index in range(event.workers):
            self.loops.append(BareProcess(self.folder.path, names[index :: event.workers], event.threads))

    def _take_turn(self, event: RoundDone, photon_s: float, photon_cpu_s: float) -> None:
        began = time.perf_counter()
        for loop in self.loops:
            loop.begin({name: node.steps for name, node in event.nodes.items()})
        answers = [loop.end() for loop in self.loops]
        bare_s = time.perf_counter() - began
        if event.round == 1:  # warm-up, in which everyone starts from the same weights
            self._check_same_work(event, {name: losses for answer in answers for name, losses in answer.losses.items()})
            return
        nodes = event.nodes.values()
        self.turns.append(
            Turn(
                photon_s=photon_s,
                photon_cpu_s=photon_cpu_s,
                bare_s=bare_s,
                bare_cpu_s=sum(answer.cpu_s for answer in answers),
                tokens=event.round_tokens,
                phases_s=event.phases_s,
                local_s=sum(node.seconds for node in nodes) / self.workers,
            )
        )

    def _check_same_work(self, event: RoundDone, losses: dict[str, list[float]]) -> None:
        for name, node in event.nodes.items():
            ours, theirs = (node.loss_first, node.loss_last), (losses[name][0], losses[name][-1])
            if not all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(ours, theirs, strict=True)):
                raise AssertionError(f"node {name} had losses {ours}, its bare loop {theirs}: the work differs")

    def _cpu_s(self) -> float:
        """Of this process and the run's workers (dead or replaced ones would be missed; none may die here)."""
        own = psutil.Process()
        workers = [child for child in own.children() if "photon.fabric.worker" in child.cmdline()]
        return float(sum(sum(process.cpu_times()[:2]) for process in [own, *workers]))

    @contextlib.contextmanager
    def _unprofiled(self) -> Iterator[None]:
        if self.profile is not None:
            self.profile.disable()
        yield
        if self.profile is not None:
            self.profile.enable()

    def row(self) -> Row:
        turns = self.turns
        wall = Spread.of_ratio([t.bare_s for t in turns], [t.photon_s for t in turns])
        cpu = Spread.of_ratio([t.bare_cpu_s for t in turns], [t.photon_cpu_s for t in turns])
        return {
            "rounds": len(turns),
            "tau": self.recipe.federation.tau,
            "nodes": len(self.recipe.silo),
            "workers": self.workers,
            "photon tokens/s": Spread([t.tokens / t.photon_s for t in turns]).median,
            "bare tokens/s": Spread([t.tokens / t.bare_s for t in turns]).median,
            "round s": Spread([t.photon_s for t in turns]).median,
            "photon / bare, wall": str(wall),
            "photon / bare, CPU": str(cpu),
            "local training s": Spread([t.local_s for t in turns]).median,
            "outer step s": Spread([t.phases_s["outer"] for t in turns]).median,
            "commit s": Spread([t.phases_s["commit of the round before"] for t in turns]).median,
        }


@dataclass
class BareAnswer:
    """What one process's loops did in a turn."""

    cpu_s: float
    losses: dict[str, list[float]]


class BareProcess:
    """A process that trains some of the nodes' streams, one loop after the other, on request."""

    def __init__(self, run: Path, names: list[str], threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=serve_bare, args=(theirs, run, names, threads), daemon=True)
        self._process.start()
        theirs.close()  # with it open here, the end of that process would not be the end of the pipe
        self._pipe.recv()  # ready: building models is not part of a turn

    def begin(self, steps: Mapping[str, int]) -> None:
        """Let it do so many steps of each of its loops; one that is not named rests."""
        self._pipe.send(steps)

    def end(self) -> BareAnswer:
        """Wait for them."""
        answer: BareAnswer = self._pipe.recv()
        return answer

    def close(self) -> None:
        """End it."""
        self._pipe.close()
        self._process.join(10)


def serve_bare(pipe: Connection, run: Path, names: list[str], threads: int) -> None:
    """Runs in a `BareProcess`: a model, an optimizer and a stream per node, and nothing else."""
    pin(threads)
    folder = RunFolder(run)
    recipe = load_recipe(folder.recipe)
    loops = {name: bare_loop(recipe, folder, name) for name in names}
    pipe.send(None)
    with contextlib.suppress(EOFError):
        while steps := pipe.recv():
            began = time.process_time()
            losses = {name: loop(steps[name]) for name, loop in loops.items() if name in steps}
            pipe.send(BareAnswer(time.process_time() - began, losses))


def bare_loop(recipe: Recipe, folder: RunFolder, name: str) -> Callable[[int], list[float]]:
    """The hand-written loop of one node: goes on for so many steps, returns their losses."""
    length, size = recipe.data.sequence_length, recipe.node.batch_size
    model = build_model(recipe.model, folder.identity().vocab_size, length, recipe.seed)
    optimizer = build_optimizer(model, recipe.node, torch.device("cpu"))
    file = SiteFile.model_validate_json((folder.node(name) / SITE_FILE).read_bytes())
    stream = open_site(file, folder.node(name), recipe).stream
    taken = 0

    def draw() -> tuple[torch.Tensor, torch.Tensor]:
        nonlocal taken
        batch = torch.from_numpy(stream.batch(taken * size, size))
        taken += 1
        return batch[:, :-1].contiguous(), batch[:, 1:].contiguous()

    def run(steps: int) -> list[float]:
        rates = [learning_rate_scale(taken + step, recipe.node, recipe.total_steps) for step in range(steps)]
        return [loss.item() for loss in train_bare(model.loss, optimizer, model.parameters(), draw, rates)]

    return run


def node_parts(recipe: Recipe, folder: RunFolder) -> list[Row]:
    """CPU seconds of each part of one node's round, done in this process on a node of the finished run."""
    name = recipe.silo[0].name
    identity = folder.identity()
    model = build_model(recipe.model, identity.vocab_size, recipe.data.sequence_length, recipe.seed)
    body = encode_tensors(named_weights(model))
    file = SiteFile.model_validate_json((folder.node(name) / SITE_FILE).read_bytes())
    site = open_site(file, folder.node(name), recipe)
    trainer = Trainer(model, recipe.node, torch.device("cpu"), recipe.total_steps)
    bases = Bases.of_run(folder.bases, recipe.link, named_weights(model))
    node = Node(identity.run, site, trainer, recipe, bases)
    profile = cProfile.Profile(time.process_time)
    repeats = 2
    for number in range(repeats + 1):
        task = Task(
            run=identity.run,
            round=recipe.federation.rounds + number,
            node=name,
            nonce="benchmark",
            base_sha256=sha256_hex(body),
            body_sha256=sha256_hex(body),
            evaluate=False,
            sequential_step=0,
            tau=recipe.federation.tau,
            nodes=1,
            deadline_s=3600.0,
        )
        message = encode_message(task, body)
        if number:  # the first answer builds what later ones reuse
            profile.enable()
        node.handle(message, lambda progress: None)
        profile.disable()
    return parts(profile, NODE_PARTS, repeats, "node/node.py:handle")


def parts(profile: cProfile.Profile, functions: dict[str, str], rounds: int, whole: str) -> list[Row]:
    """CPU seconds a round of each of `functions`, callees included, and its share of the function `whole`."""
    profile.create_stats()
    found: dict[str, float] = {}
    for (file, _, name), (_, _, _, cumulative_s, _) in profile.stats.items():
        function = f"{file.rpartition('/photon/')[2]}:{name}"
        found[function] = found.get(function, 0.0) + cumulative_s / rounds
    return [
        {"part": label, "CPU s": round(found[function], 4), "share": f"{found[function] / found[whole]:.2%}"}
        for function, label in {**functions, whole: "whole"}.items()
        if function in found
    ]


if __name__ == "__main__":
    typer.run(main)
