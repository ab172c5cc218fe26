"""At which size the questions are asked, and the recipe of each run.

Eight texts make the pool of a size. However many owners there are, 1, 2, 4 or 8, all eight are shared out among them,
so all runs have the same training text and the same held-out text.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.paper.questions import Row
from photon.compare_plan import Job, recipe_key, run_tokens
from photon.config import Recipe
from photon.data.builtin import builtin_documents
from photon.data.split import content_hash
from photon.durable import write_atomic
from photon.errors import InputError
from photon.method import apply_method, load_method
from photon.recipe import load_recipe

FIRST_SEED = 1337
_AREAS = ("core", "net", "tools", "docs")
_HALVES = 2


@dataclass(frozen=True)
class Size:
    """`steps` are a run's sequential steps, `owners` K, and `texts` the eight texts, those of one kind side by side.

    `scored_sequences` are scored of all owners together, however many there are; None: as the recipe says.
    `tokens_per_s` (all nodes together) and `overhead_s` (a run's start, scores and end) are for estimates alone.
    """

    name: str
    source: str
    owners: int
    steps: int
    tau: int
    warmup: float  # share of the steps
    scores: int  # evaluations of a run, besides the first
    texts: tuple[str, ...]
    mixed_texts: tuple[str, ...]
    scored_sequences: int | None
    overrides: tuple[str, ...]
    tokens_per_s: float
    overhead_s: float
    needs_built_in_text: bool


_PARTS = tuple(f"text/{area}-{half + 1}.jsonl" for area in _AREAS for half in range(_HALVES))
SIZES = {
    "cpu": Size(
        name="cpu",
        source=str(Path(__file__).with_name("cpu.toml")),
        owners=4,
        steps=512,
        tau=32,
        warmup=1 / 16,
        scores=8,
        texts=_PARTS,
        mixed_texts=_PARTS,
        scored_sequences=None,
        overrides=(),
        tokens_per_s=25_000.0,
        overhead_s=22.0,
        needs_built_in_text=True,
    ),
    "125m": Size(
        name="125m",
        source="paper-125m",
        owners=8,
        steps=10_240,
        tau=128,
        warmup=800 / 40_960,
        scores=40,
        texts=tuple(f"text/site-{number}" for number in range(1, 9)),
        mixed_texts=tuple(
            f"text/{kind}-{half + 1}" for kind in ("pile-cc", "wikipedia", "arxiv", "pg19") for half in range(_HALVES)
        ),
        scored_sequences=8192,
        overrides=("data.partition=iid",),
        tokens_per_s=400_000.0,
        overhead_s=300.0,
        needs_built_in_text=False,
    ),
}


def job_of(row: Row, size: Size, seed: int, home: Path) -> Job:
    """The run of a row. `home` holds tokenizer and shards, and the texts that this benchmark writes.

    Raises InputError for steps that are no whole rounds, ConfigError for what no recipe can be.
    """
    method = load_method(row.method)
    recipe = apply_method(method, size.source, overrides_of(row, size, seed, home))
    return Job(row.method, seed, "", recipe, recipe_key(recipe))


def overrides_of(row: Row, size: Size, seed: int, home: Path) -> list[str]:
    """What lies over the size's recipe and its method. The row's own settings come last and win."""
    base = load_recipe(size.source)
    owners, tau = row.owners or size.owners, row.tau or size.tau
    steps = round(size.steps * row.steps)
    rounds, rest = divmod(steps, tau)
    if rest or not rounds:
        raise InputError(f"{row.label}: {steps} sequential steps are no whole rounds of tau = {tau}")
    batch = base.node.batch_size * (owners if row.central_batch else 1)
    # The option counts for each source of each node: dealt out, a node has one; by owner, all texts stay apart.
    sources = len(size.texts) if "data.partition=owner" in row.settings else owners
    scored = [] if size.scored_sequences is None else [f"evaluation.sequences={size.scored_sequences // sources}"]
    return [
        f"seed={seed}",
        *size.overrides,
        *scored,
        f"silo={_silos(size.mixed_texts if row.mixed else size.texts, owners, size, home)}",
        f"data.dir={json.dumps(str(home / 'data'))}",
        f"federation.rounds={rounds}",
        f"federation.tau={tau}",
        f"node.batch_size={batch}",
        f"node.lr={base.node.lr * row.lr:.9g}",
        f"node.warmup_steps={round(steps * size.warmup)}",
        f"evaluation.every={max(1, rounds // size.scores)}",
        *row.settings,
    ]


def expected_tokens(recipe: Recipe) -> float:
    """What the run trains on, on average over who drops out; at least one node of a round stays."""
    return run_tokens(recipe) * max(1 - recipe.federation.dropout, 1 / recipe.nodes_per_round)


def seconds_of(job: Job, size: Size) -> float:
    """A guess of the run's wall time."""
    return expected_tokens(job.recipe) / size.tokens_per_s + size.overhead_s


def write_texts(size: Size, home: Path) -> None:
    """The eight texts of built-in text, those that are missing: of each area two halves, by content hash.

    Written once: shards are named by their files' times of change too.
    """
    if not size.needs_built_in_text or all((home / part).is_file() for part in _PARTS):
        return
    (home / "text").mkdir(parents=True, exist_ok=True)
    for area in _AREAS:
        halves: list[list[str]] = [[] for _ in range(_HALVES)]
        for document in builtin_documents(area):
            halves[content_hash(document.text) % _HALVES].append(json.dumps({"text": document.text}))
        for index, lines in enumerate(halves):
            path = home / "text" / f"{area}-{index + 1}.jsonl"
            if not path.is_file():
                write_atomic(path, "\n".join(lines) + "\n")


def _silos(texts: Sequence[str], owners: int, size: Size, home: Path) -> str:
    """`owners` silos as a TOML value: texts side by side go to the same owner. Raises InputError if not evenly."""
    each, rest = divmod(len(texts), owners)
    if rest:
        raise InputError(f"{len(texts)} texts cannot be shared out evenly among {owners} owners")
    places = [str(home / text) if size.needs_built_in_text else text for text in texts]
    silos = [
        f'{{name = "owner-{index + 1}", text = {json.dumps(places[index * each : (index + 1) * each])}}}'
        for index in range(owners)
    ]
    return f"[{', '.join(silos)}]"
